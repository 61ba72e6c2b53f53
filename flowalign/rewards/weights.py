"""Loading of reward models from a folder or the hub. Incomplete or unreadable weights raise a RewardError."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from flowalign.hub import explain_hub_errors, is_hub_id
from flowalign.rewards.base import RewardError

P = ParamSpec("P")
T = TypeVar("T")


def fetch(pretrained: str, file: str, revision: str | None = None) -> Path:
    """Path of a file in a local folder, or in a hub repository via the local cache (HF_HOME, HF_HUB_OFFLINE)."""
    with _resolved(pretrained) as (where, local):
        if not local:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(where, file, revision=revision))
    if not (Path(where) / file).is_file():
        raise RewardError(f"the folder {pretrained} has no {file}.")
    return Path(where) / file


def load_json(pretrained: str, file: str, revision: str | None = None) -> dict[str, Any]:
    """Load a JSON file of a repository or folder."""
    return json.loads(fetch(pretrained, file, revision).read_text())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load tensors by name, on the CPU, from a .safetensors file or a pickle, of which only tensors are unpickled."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RewardError(f"{path} cannot be read as weights ({str(error).splitlines()[0]}).") from error
    if not isinstance(found, Mapping):
        raise RewardError(f"{path} cannot be read as weights (it holds a {type(found).__name__}).")
    for wrapper in ("state_dict", "model"):
        if isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    return dict(found)


def load_tokenizer(pretrained: str, revision: str | None = None) -> Any:
    """Load the tokenizer of a repository or folder."""
    with _resolved(pretrained) as (where, _):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(where, revision=revision)


def load_config(kind: str, pretrained: str, revision: str | None = None) -> Any:
    """Load the configuration of a repository or folder as the transformers class named `kind`."""
    with _resolved(pretrained) as (where, _):
        import transformers

        return getattr(transformers, kind).from_pretrained(where, revision=revision)


def load_processor(pretrained: str, revision: str | None = None) -> Any:
    """Load the processor for images and text of a repository or folder."""
    with _resolved(pretrained) as (where, _):
        import transformers

        return transformers.AutoProcessor.from_pretrained(where, revision=revision)


def cached(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """An lru_cache that computes each value once, even when rewards in several threads ask for it concurrently."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        compute, lock = lru_cache(maxsize=maxsize)(function), Lock()

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            with lock:
                return compute(*args, **kwargs)  # type: ignore[arg-type]

        return wrapper

    return decorate


def load_model(kind: str, pretrained: str, revision: str | None, dtype: torch.dtype) -> Any:
    """Load a model of the transformers class named `kind`, frozen. Raises RewardError if a weight is missing."""
    with _resolved(pretrained) as (where, _):
        import transformers

        network = getattr(transformers, kind)
        model, report = network.from_pretrained(where, revision=revision, dtype=dtype, output_loading_info=True)
    # transformers initialises missing weights at random and continues.
    if absent := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]):
        raise RewardError(f"{pretrained} is not a {kind}: it lacks {len(absent)} weights, such as {absent[0]}.")
    return freeze(model)


def build(make: Callable[[], nn.Module], state: Mapping[str, Tensor], dtype: torch.dtype, source: str) -> Any:
    """Build the module that `make` returns, without initialisation, and load exactly these weights; frozen."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = make()
    try:
        # assign=True makes the loaded tensors the parameters, so that a large model is in memory only once
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise RewardError(f"the weights of {source} do not fit: {' '.join(str(error).split())[:300]}") from error
    return freeze(model)


def build_mlp(state: Mapping[str, Tensor], source: str, between: type[nn.Module] = nn.Identity) -> nn.Sequential:
    """MLP of the linear layers N.weight and N.bias, in the order of N, with `between` after all but the last.

    The numbers may have gaps: published reward heads also number their dropouts, which do nothing at inference.
    """
    numbers = sorted({int(name.split(".")[0]) for name in state if name.split(".")[0].isdigit()})
    if not numbers or {f"{n}.{part}" for n in numbers for part in ("weight", "bias")} != set(state):
        raise RewardError(f"{source} holds no head of linear layers; its weights are {sorted(state)[:6]}.")
    layers: list[nn.Module] = []
    for number in numbers:
        weight = state[f"{number}.weight"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": state[f"{number}.bias"].float()})
        layers += [layer, between()]
    return freeze(nn.Sequential(*layers[:-1]))


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose keys begin with `prefix`, with it removed."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def freeze(model: nn.Module) -> Any:
    """Set a model to evaluation mode, without gradients."""
    return model.eval().requires_grad_(False)


@contextmanager
def _resolved(pretrained: str) -> Iterator[tuple[str, bool]]:
    """Context with the folder or hub id, and whether it is a folder, for loading by transformers.

    Hides the library's progress bar and its table of unused weights, and turns its errors into RewardErrors.
    """
    from transformers.utils import logging as library

    folder = Path(pretrained).expanduser()
    local = folder.is_dir()
    if not local and not is_hub_id(pretrained):
        raise RewardError(f"{pretrained} is neither a folder nor a hub id like org/name.")
    shown, verbosity = library.is_progress_bar_enabled(), library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity_error()
    try:
        with explain_hub_errors(pretrained, RewardError, local, ValueError):
            yield (str(folder) if local else pretrained), local
    finally:
        library.set_verbosity(verbosity)
        if shown:
            library.enable_progress_bar()
