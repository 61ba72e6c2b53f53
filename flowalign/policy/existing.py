"""Adapters that were trained before, to go on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flowalign.hub import explain_hub_errors, is_hub_id

METADATA = "lora_adapter_metadata"  # the header that diffusers writes


def load_adapters(denoiser: nn.Module, start: str, name: str, rank: int, alpha: float) -> None:
    """Puts the adapters of a file, folder or hub id into those of the denoiser called `name`, in diffusers' layout.

    Raises ValueError, with the setting to change, if they are of another rank or alpha or sit elsewhere.
    """
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    file = _file(start, name)
    state = {key.removeprefix("transformer."): t for key, t in load_file(file).items()}
    _check(file, state, rank, alpha)
    own = {key for key, _ in denoiser.named_parameters() if ".lora_" in key}
    theirs = {key.replace(".weight", ".default.weight") for key in state if ".lora_" in key}
    if differing := sorted(own ^ theirs):
        where = "has none at" if differing[0] in own else "also has some at"
        module = differing[0].partition(".lora_")[0]
        raise ValueError(f"tune.start={start} {where} {module}: set tune.targets to the modules that it adapts.")
    set_peft_model_state_dict(denoiser, state, adapter_name="default")


def _file(start: str, name: str) -> Path:
    """The safetensors file; adapters of a further denoiser lie in a folder of its name."""
    place = Path(start).expanduser()
    if not place.exists():
        if not is_hub_id(start):
            raise ValueError(f"tune.start={start} is neither a file, nor a folder, nor a hub id like org/name.")
        place = _downloaded(start)
    if place.is_file():
        return place
    folder = place if name == "transformer" else place / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(f"tune.start={start}: {folder} holds {len(found)} safetensors files instead of one; name one.")
    return found[0]


def _downloaded(start: str) -> Path:
    from huggingface_hub import snapshot_download

    with explain_hub_errors(f"tune.start={start}", ValueError, False):
        return Path(snapshot_download(start, allow_patterns=["*.safetensors"]))


def _check(file: Path, state: dict[str, Tensor], rank: int, alpha: float) -> None:
    from safetensors import safe_open

    ranks = {t.shape[0] for key, t in state.items() if ".lora_A." in key}
    if not ranks:
        raise ValueError(f"{file} holds no adapters in diffusers' layout.")
    with safe_open(file, framework="pt") as held:
        said: dict[str, Any] = json.loads((held.metadata() or {}).get(METADATA, "{}"))
    # Without a header diffusers takes alpha to be the rank.
    alphas = {value for key, value in said.items() if key.endswith("lora_alpha")} or ranks
    if ranks != {rank} or alphas != {alpha}:
        raise ValueError(
            f"the adapters of {file} have rank {_said(ranks)} and alpha {_said(alphas)}: set tune.rank and tune.alpha "
            "to that."
        )


def _said(values: set[Any]) -> str:
    return " and ".join(f"{value:g}" for value in sorted(values))
