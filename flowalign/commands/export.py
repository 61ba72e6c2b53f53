"""`flowalign export`: write weights that plain diffusers loads, with a model card."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import nn

from flowalign.commands.saved import SavedRun, load_run
from flowalign.curves import curves
from flowalign.models.loading import resolve
from flowalign.reward_nodes import final_weights, held_out, objective


def export(ckpt: str, to: str, weights: str = "", merge: bool = False) -> None:
    """Writes weights for plain diffusers: a folder for `load_lora_weights`, or denoisers for `from_pretrained`.

    merge=true merges the adapters into the base's weights and writes whole denoisers, as for a run with tune=full.
    """
    if weights == "base":
        raise ValueError("weights=base are the pipeline's own: there is nothing to export.")
    saved = load_run(ckpt, weights, device="cpu")
    if merge and saved.model.quantised is not None:
        raise ValueError(
            f"merge=true: the base of ckpt={ckpt} is held in {saved.model.quantised}, to which nothing can be added: "
            "use merge=false, and fuse_lora() of diffusers on the whole base."
        )
    if saved.weights != "live":
        saved.policy.copy_into_live(saved.weights)
    lora = saved.config.tune["_target_"].endswith("Lora")
    folder = Path(to).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if lora and not merge:
        saved.model.save_lora(folder)
    else:
        for name, denoiser in saved.policy.denoisers.items():
            _write_whole(denoiser, folder / name, lora)
    config = OmegaConf.to_container(saved.config, resolve=True)
    about = {"base": saved.model.pretrained, "weights": saved.weights, "epoch": saved.epoch, "config": config}
    (folder / "flowalign.json").write_text(json.dumps(about, indent=2, default=str))
    (folder / "README.md").write_text(card(saved, lora and not merge))
    print(folder)


def _write_whole(denoiser: nn.Module, folder: Path, lora: bool) -> None:
    if lora:
        denoiser.fuse_lora()  # type: ignore[operator]
        denoiser.unload_lora()  # type: ignore[operator]
    denoiser.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]


def card(saved: SavedRun, lora: bool) -> str:
    """The model card; its code works from inside the folder."""
    model = saved.model
    where = resolve(model.pretrained)
    embedded, on_hub = where != model.pretrained, not Path(where).is_dir()
    base_model = f"base_model: {where}\n" if on_hub else ""  # the hub refuses a card whose base is not on it
    imports = "\nfrom flowalign.models.loading import resolve  # its base is a part of that package" if embedded else ""
    lines = "\n".join(_load_line(name, lora, model.loads_lora) for name in saved.policy.denoisers)
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(saved).items())
    return f"""---
{base_model}library_name: diffusers
tags: [flow-matching, reinforcement-learning, {"lora" if lora else "full"}]
---
# {"LoRA" if lora else "Denoiser"} aligned with flowalign

```python
from diffusers import {model.pipeline}{imports}

pipe = {model.pipeline}.from_pretrained({_base(saved)})
{lines}
```

| | |
|---|---|
{rows}

## Curve

{_curve(saved)}
"""


def _base(saved: SavedRun) -> str:
    """The arguments of `from_pretrained` that load the base, whatever the working directory."""
    name, config = saved.model.pretrained, saved.config.model
    where = Path(resolve(name))
    if resolve(name) != name:
        first = f'resolve("{name}")'
    else:
        first = json.dumps(str(where.absolute()) if where.is_dir() else name)
    given = [f'{key}="{config[key]}"' for key in ("revision", "variant") if config.get(key)]
    return ", ".join([first, *given, *(f"{part}=None" for part in saved.model.absent)])


def _load_line(denoiser: str, lora: bool, by_pipeline: bool) -> str:
    if not lora:
        return f'pipe.{denoiser} = type(pipe.{denoiser}).from_pretrained("./{denoiser}")'
    if not by_pipeline:
        return f'pipe.{denoiser}.load_lora_adapter(".", prefix=None, use_safetensors=True)'
    if denoiser == "transformer":
        return 'pipe.load_lora_weights(".")'
    return f'pipe.load_lora_weights("./{denoiser}", load_into_{denoiser}=True)'


def _facts(saved: SavedRun) -> dict[str, str]:
    config, judged = saved.config, saved.config.evaluation.sampling
    algorithm, dynamics = (config[part]["_target_"].rsplit(".", 1)[-1] for part in ("algo", "dynamics"))
    weights = final_weights(config.reward)
    rewards = {name: _reward_name(node) for name, node in objective(config.reward).items()}
    trained = [f"{weights[name]:g} × {reward}" if len(rewards) > 1 else reward for name, reward in rewards.items()]
    size = saved.size()
    return {
        "base": f"`{saved.model.pretrained}`" + (f", in {kind}" if (kind := saved.model.quantised) else ""),
        "recipe": f"{_experiment(saved)}{algorithm} with {dynamics}, {saved.epoch} epochs of {config.batch.prompts} "
        f"prompts × {config.batch.group_size}, seed {config.seed}; whole in flowalign.json",
        "weights": saved.weights,
        "reward": f"{', '.join(trained)}; watched beside it: {', '.join(held_out(config.reward)) or 'nothing'}",
        "judged with": f"{judged.num_steps} steps, guidance {judged.guidance}, {size.height}×{size.width}",
    }


def _experiment(saved: SavedRun) -> str:
    """The recipe that the run named, if its folder is at hand."""
    file = _run_folder(saved) / ".hydra" / "hydra.yaml"
    chosen = OmegaConf.load(file).hydra.runtime.choices.get("experiment") if file.is_file() else None
    return f"`experiment={chosen}`: " if chosen else ""


def _run_folder(saved: SavedRun) -> Path:
    return saved.path.parents[1] if len(saved.path.parents) > 1 else saved.path.parent


def _reward_name(node: DictConfig) -> str:
    """Its class, and in brackets that of the reward which it wraps: Frames(PickScore)."""
    name, inner = node["_target_"].rsplit(".", 1)[-1], node.get("reward")
    return f"{name}({_reward_name(inner)})" if isinstance(inner, DictConfig) and "_target_" in inner else name


def _curve(saved: SavedRun) -> str:
    """A table of validation metrics by epoch, or a sentence if the run's folder no longer has them."""
    folder = _run_folder(saved)
    if not (folder / ".hydra" / "config.yaml").is_file():
        return "The run's folder was not at hand."
    measures = ["reward", *held_out(saved.config.reward)]
    found = {name.removeprefix("val/"): points for name, points in curves(folder, "val/").items()}
    found = {name: found[name] for name in measures if not all(map(isnan, found.get(name, {}).values()))}
    if not found:
        return "The run's folder has no curve: no value in TensorBoard files or a metrics.csv."
    epochs = [epoch for epoch in next(iter(found.values())) if epoch <= saved.epoch]
    lines = [f"| epoch | {' | '.join(map(str, epochs))} |", "|---" * (len(epochs) + 1) + "|"]
    for name, points in found.items():
        values = " | ".join(f"{points[epoch]:.3f}" if epoch in points else "" for epoch in epochs)
        lines.append(f"| {name} | {values} |")
    return "\n".join(lines)
