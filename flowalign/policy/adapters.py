"""Loading of previously trained adapters as the start of a run (`tune.start`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flowalign.hub import explain_hub_errors, is_hub_id

METADATA = "lora_adapter_metadata"  # key in the header that diffusers writes


def load_adapters(denoiser: nn.Module, start: str, name: str, rank: int, alpha: float) -> None:
    """Load adapters in diffusers' layout, from a file, folder or hub id, into those of the denoiser called `name`.

    Raises ValueError, naming the setting to change, if their rank, alpha or target modules differ.
    """
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    file = _file(start, name)
    state = {key.removeprefix("transformer."): t for key, t in load_file(file).items()}
    _check_rank_and_alpha(file, state, rank, alpha)
    own = {key for key, _ in denoiser.named_parameters() if ".lora_" in key}
    theirs = {key.replace(".weight", ".default.weight") for key in state if ".lora_" in key}
    if differing := sorted(own ^ theirs):
        where = "has none at" if differing[0] in own else "also has some at"
        module = differing[0].partition(".lora_")[0]
        raise ValueError(f"tune.start={start} {where} {module}: set tune.targets to the modules that it adapts.")
    set_peft_model_state_dict(denoiser, state, adapter_name="default")


def _file(start: str, name: str) -> Path:
    """The safetensors file. The adapters of a second denoiser are in a subfolder with its name."""
    path = Path(start).expanduser()
    if not path.exists():
        if not is_hub_id(start):
            raise ValueError(f"tune.start={start} is neither a file, nor a folder, nor a hub id like org/name.")
        path = _downloaded(start)
    if path.is_file():
        return path
    folder = path if name == "transformer" else path / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(f"tune.start={start}: {folder} holds {len(found)} safetensors files instead of one; name one.")
    return found[0]


def _downloaded(start: str) -> Path:
    from huggingface_hub import snapshot_download

    with explain_hub_errors(f"tune.start={start}", ValueError, False):
        return Path(snapshot_download(start, allow_patterns=["*.safetensors"]))


def _check_rank_and_alpha(file: Path, state: dict[str, Tensor], rank: int, alpha: float) -> None:
    from safetensors import safe_open

    ranks = {t.shape[0] for key, t in state.items() if ".lora_A." in key}
    if not ranks:
        raise ValueError(f"{file} holds no adapters in diffusers' layout.")
    with safe_open(file, framework="pt") as opened:
        header: dict[str, Any] = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    # Without this header diffusers assumes that alpha is the rank.
    alphas = {value for key, value in header.items() if key.endswith("lora_alpha")} or ranks
    if ranks != {rank} or alphas != {alpha}:
        raise ValueError(
            f"the adapters of {file} have rank {_joined(ranks)} and alpha {_joined(alphas)}: set tune.rank and "
            "tune.alpha to that."
        )


def _joined(values: set[Any]) -> str:
    return " and ".join(f"{value:g}" for value in sorted(values))
