"""`flowalign sample` and `flowalign export`: what to do with a checkpoint, in key=value words."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from flowalign.run import instantiate, quieten

if TYPE_CHECKING:
    from flowalign.models.base import FlowModel
    from flowalign.policy import Policy

REQUIRED = object()


def load(path: str, weights: str) -> tuple[dict[str, Any], FlowModel, Policy]:
    """Config, model and policy of a checkpoint, with the live weights or those of a frozen copy put in."""
    from flowalign.policy import Policy

    if not Path(path).is_file():
        raise ValueError(f"ckpt={path} does not exist.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if "flowalign" not in state:
        raise ValueError(f"ckpt={path} was not written by flowalign.")
    config = state["flowalign"]["config"]
    held = {key.removeprefix("policy."): value for key, value in state["state_dict"].items()}
    copies = sorted({key.split(".")[1] for key in held if key.startswith("copies.")})
    if weights != "live" and weights not in copies:
        raise ValueError(f"weights={weights}: the checkpoint holds {', '.join(['live', *copies])}.")
    model = instantiate(OmegaConf.create(config["model"]))
    tune = instantiate(OmegaConf.create(config["tune"]))
    policy = Policy(model.denoisers(), tune, model.lora_targets, copies)
    if differing := sorted(policy.kept_keys() ^ set(held)):
        raise ValueError(f"ckpt={path} does not fit its own config ({len(differing)} entries, first {differing[0]}).")
    policy.load_state_dict(held, strict=False)
    if weights != "live":
        with torch.no_grad():
            policy.copy_into_live(weights)
    return config, model, policy


def sample(
    ckpt: str, prompt: str, to: str, seed: int, num: int, steps: int, guidance: float, size: int, weights: str
) -> None:
    """Writes pictures of a prompt by the ODE, as the evaluation would."""
    from PIL import Image

    from flowalign.dynamics import ODE
    from flowalign.sampler import Noise, deterministic, walk

    config, model, _ = load(ckpt, weights)
    evaluation, resolution = config["evaluation"]["sampling"], config["resolution"]["eval"]
    steps, guidance = steps or evaluation["num_steps"], guidance or evaluation["guidance"]
    height, width = (size, size) if size else (resolution["height"], resolution["width"])
    model.check_size(height, width)
    solver = instantiate(OmegaConf.create(evaluation["solver"]))
    cond = model.encode([prompt], [""]).repeat_interleave(num)
    noise = Noise(seed, 0, range(num), model.latent_shape(height, width))
    sigmas = model.sigmas(steps, height, width)
    with torch.no_grad():
        x0 = walk(
            lambda x, s, rows: model.velocity(x, s, cond.index(rows), guidance),
            sigmas,
            deterministic(steps),
            ODE(),
            solver,
            noise,
        ).x0
        images = (model.decode(x0).permute(0, 2, 3, 1) * 255).round().byte().numpy()
    target = Path(to)
    target.parent.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        path = target if num == 1 else target.with_stem(f"{target.stem}_{i}")
        Image.fromarray(image).save(path)
        print(path)


def export(ckpt: str, to: str, weights: str) -> None:
    """Writes what plain diffusers loads: a folder for `load_lora_weights`, or transformers for `from_pretrained`."""
    config, model, policy = load(ckpt, weights)
    folder = Path(to)
    folder.mkdir(parents=True, exist_ok=True)
    lora = config["tune"]["_target_"].endswith("Lora")
    if lora:
        model.save_lora(folder)
    else:
        for name, denoiser in policy.denoisers.items():
            denoiser.save_pretrained(folder / name, safe_serialization=True)  # type: ignore
    (folder / "flowalign.json").write_text(
        json.dumps({"base": model.pretrained, "weights": weights, "config": config}, indent=2, default=str)
    )
    (folder / "README.md").write_text(_card(model, lora, weights))
    print(folder)


def _card(model: FlowModel, lora: bool, weights: str) -> str:
    """A model card whose code works from inside the folder."""
    from flowalign.models.loading import resolve

    absent = "".join(
        f", {name}=None" for name, part in model.pipe.components.items() if part is None and "text" in name
    )
    base = model.pretrained if resolve(model.pretrained) == model.pretrained else f"flowalign/assets/{model.pretrained}"
    load_lines = "\n".join(_load_line(name, lora) for name in model.denoisers())
    return f"""# {"LoRA" if lora else "Transformer"} aligned with flowalign

Base `{model.pretrained}`, {weights} weights; the whole recipe is in flowalign.json.

```python
from diffusers import {model.pipeline}

pipe = {model.pipeline}.from_pretrained("{base}"{absent})
{load_lines}
```
"""


def _load_line(denoiser: str, lora: bool) -> str:
    if not lora:
        return f'pipe.{denoiser} = type(pipe.{denoiser}).from_pretrained("./{denoiser}")'
    if denoiser == "transformer":
        return 'pipe.load_lora_weights(".")'
    return f'pipe.load_lora_weights("./{denoiser}", load_into_{denoiser}=True)'


COMMANDS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "sample": (
        sample,
        {
            "ckpt": REQUIRED,
            "prompt": REQUIRED,
            "to": "sample.png",
            "seed": 0,
            "num": 1,
            "steps": 0,
            "guidance": 0.0,
            "size": 0,
            "weights": "live",
        },
    ),
    "export": (export, {"ckpt": REQUIRED, "to": REQUIRED, "weights": "live"}),
}


def parse(name: str, words: list[str]) -> dict[str, Any]:
    """key=value words to arguments, typed like the defaults; everything after the first = is the value."""
    defaults = COMMANDS[name][1]
    arguments = dict(defaults)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in defaults:
            close = difflib.get_close_matches(key, defaults, n=1)
            hint = f"; did you mean {close[0]}=…?" if close else ""
            raise ValueError(f"flowalign {name} takes {', '.join(f'{k}=…' for k in defaults)}, and not {word!r}{hint}")
        kind = str if defaults[key] is REQUIRED else type(defaults[key])
        try:
            arguments[key] = kind(value)
        except ValueError:
            raise ValueError(f"{key} takes a {kind.__name__}, and not {value!r}.") from None
    missing = [key for key, value in arguments.items() if value is REQUIRED]
    if missing:
        raise ValueError(f"flowalign {name} needs {', '.join(f'{key}=…' for key in missing)}.")
    return arguments


def main() -> None:
    """`flowalign COMMAND key=value …`; a mistake ends with one sentence and exit code 2."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        for command, (function, defaults) in COMMANDS.items():
            words = [f"{k}=…" if v is REQUIRED else f"[{k}={v}]" for k, v in defaults.items()]
            print(f"flowalign {command} {' '.join(words)}\n    {(function.__doc__ or '').strip()}")
        return
    quieten()
    try:
        if name not in COMMANDS:
            raise ValueError(f"there is no command {name!r}; there are {', '.join(COMMANDS)}.")
        COMMANDS[name][0](**parse(name, words))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
