"""Weights of reward models: from a folder or the hub, complete or refused, with the reason in a sentence."""

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


def fetched(pretrained: str, file: str, revision: str | None = None) -> Path:
    """A file of a local folder, or of a hub repository by way of the local cache (HF_HOME, HF_HUB_OFFLINE)."""
    with _explained(pretrained) as (where, local):
        if not local:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(where, file, revision=revision))
    if not (Path(where) / file).is_file():
        raise RewardError(f"the folder {pretrained} has no {file}.")
    return Path(where) / file


def settings_of(pretrained: str, file: str, revision: str | None = None) -> dict[str, Any]:
    """The contents of a JSON file there."""
    return json.loads(fetched(pretrained, file, revision).read_text())


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Names to tensors on the CPU, of a .safetensors file or a pickle, of which nothing but tensors is read."""
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


def tokenizer_of(pretrained: str, revision: str | None = None) -> Any:
    """The tokenizer of a repository or folder."""
    with _explained(pretrained) as (where, _):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(where, revision=revision)


def config_of(kind: str, pretrained: str, revision: str | None = None) -> Any:
    """The configuration of a repository or folder, of this class of transformers."""
    with _explained(pretrained) as (where, _):
        import transformers

        return getattr(transformers, kind).from_pretrained(where, revision=revision)


def processor_of(pretrained: str, revision: str | None = None) -> Any:
    """What prepares pictures and words together for the model of a repository or folder."""
    with _explained(pretrained) as (where, _):
        import transformers

        return transformers.AutoProcessor.from_pretrained(where, revision=revision)


def once(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """lru_cache that makes a thing once, also where several rewards, each in a thread of its own, ask at a time."""

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        cached, lock = lru_cache(maxsize=maxsize)(make), Lock()

        @wraps(make)
        def asked(*arguments: P.args, **more: P.kwargs) -> T:
            with lock:
                return cached(*arguments, **more)  # type: ignore[arg-type]

        return asked

    return decorate


def model_of(kind: str, pretrained: str, revision: str | None, dtype: torch.dtype) -> Any:
    """A model of this class of transformers, frozen. RewardError if a weight of it is missing there."""
    with _explained(pretrained) as (where, _):
        import transformers

        network = getattr(transformers, kind)
        model, report = network.from_pretrained(where, revision=revision, dtype=dtype, output_loading_info=True)
    # transformers fills what is missing with random numbers and goes on.
    if absent := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]):
        raise RewardError(f"{pretrained} is no {kind}: it lacks {len(absent)} weights, such as {absent[0]}.")
    return frozen(model)


def built(make: Callable[[], nn.Module], state: Mapping[str, Tensor], dtype: torch.dtype, source: str) -> Any:
    """What `make` returns with these weights, all of them, frozen; nothing is initialised first."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = make()
    try:
        # assign: the tensors of the file become the parameters, so that a large model is in memory once
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise RewardError(f"the weights of {source} do not fit: {' '.join(str(error).split())[:300]}") from error
    return frozen(model)


def mlp_of(state: Mapping[str, Tensor], source: str, between: type[nn.Module] = nn.Identity) -> nn.Sequential:
    """The linear layers of weights called N.weight and N.bias, in the order of N, with `between` after all but the
    last; published reward heads number their dropouts too, which do nothing here."""
    numbers = sorted({int(name.split(".")[0]) for name in state if name.split(".")[0].isdigit()})
    if not numbers or {f"{n}.{part}" for n in numbers for part in ("weight", "bias")} != set(state):
        raise RewardError(f"{source} holds no head of linear layers; its weights are {sorted(state)[:6]}.")
    layers: list[nn.Module] = []
    for number in numbers:
        weight = state[f"{number}.weight"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": state[f"{number}.bias"].float()})
        layers += [layer, between()]
    return frozen(nn.Sequential(*layers[:-1]))


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What begins with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def frozen(model: nn.Module) -> Any:
    """The model in evaluation, without gradients."""
    return model.eval().requires_grad_(False)


@contextmanager
def _explained(pretrained: str) -> Iterator[tuple[str, bool]]:
    """The folder or hub id, and whether it is a folder.

    Without the library's bar over the weights and its table of those it did not need; its errors in our words.
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
