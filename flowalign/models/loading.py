"""Loading of diffusers pipelines, with errors that say in one sentence what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from flowalign.hub import explain_hub_errors, is_hub_id

ASSETS = Path(__file__).parents[1] / "assets"


def resolve(pretrained: str) -> str:
    """The folder of the embedded pipeline of this name; any other folder or hub id unchanged."""
    embedded = ASSETS / pretrained
    if "/" not in pretrained and (embedded / "model_index.json").is_file():
        return str(embedded)
    return pretrained


_without_weights: ContextVar[bool] = ContextVar("without_weights", default=False)


@contextmanager
def without_weights(on: bool = True) -> Iterator[None]:
    """Within this context, trained networks are built on the meta device: another rank will send their weights."""
    token = _without_weights.set(on)
    try:
        yield
    finally:
        _without_weights.reset(token)


def _meta_component(where: str, index: dict[str, Any], name: str, revision: str | None) -> Any:
    """A component with meta parameters but real buffers, which are computed rather than stored in the checkpoint."""
    import diffusers
    from accelerate import init_empty_weights

    kind = getattr(diffusers, index[name][1])
    with init_empty_weights(include_buffers=False):
        return kind.from_config(kind.load_config(where, subfolder=name, revision=revision))


@contextmanager
def progress_bars_disabled() -> Iterator[None]:
    """Hide the libraries' loading bars, which would clutter the output before every message of ours."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    enabled = [log for log in (diffusers_log, transformers_log) if log.is_progress_bar_enabled()]
    for log in enabled:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in enabled:
            log.enable_progress_bar()


def load_pipeline(
    name: str,
    pretrained: str,
    revision: str | None,
    variant: str | None,
    dtypes: Mapping[str, torch.dtype],
    arguments: dict[str, Any],
    trained: Sequence[str],
) -> Any:
    """Load a diffusers pipeline of class `name`. HF_HOME and HF_HUB_OFFLINE apply, as diffusers itself reads them.

    dtypes: those in which components are read, by name; "default" is that of the others. Raises ValueError if
    `pretrained` does not exist, is incomplete or holds another pipeline class. Within `without_weights` the `trained`
    components have meta parameters, in float32.
    """
    import diffusers

    where = resolve(pretrained)
    index = Path(where) / "model_index.json"
    if index.is_file():
        found = json.loads(index.read_text()).get("_class_name", "pipeline without a class name")
        if found.startswith("CogVideoX"):
            raise ValueError(
                f"{pretrained} holds a {found}, which is no flow-matching model: CogVideoX is a variance-preserving "
                "diffusion over discrete times, whose prediction is not the velocity eps - x0."
            )
        if found != name:
            raise ValueError(
                f"{pretrained} holds a {found}, but this model adapter drives a {name}: choose another model=… or "
                "folder."
            )
    elif Path(where).is_dir() or not is_hub_id(where):
        known = sorted(p.parent.name for p in ASSETS.glob("*/model_index.json"))
        raise ValueError(
            f"{pretrained} is neither a folder in diffusers layout (no model_index.json) nor a hub id like "
            f"org/name; embedded pipelines: {', '.join(known)}."
        )
    with progress_bars_disabled(), explain_hub_errors(pretrained, ValueError, index.is_file()):
        pipeline = getattr(diffusers, name)
        if _without_weights.get():
            config = pipeline.load_config(where, revision=revision)
            arguments = arguments | {part: _meta_component(where, config, part, revision) for part in trained}
        return pipeline.from_pretrained(where, revision=revision, variant=variant, dtype=dict(dtypes), **arguments)


def keep_dtype(vae: Any) -> None:
    """Let a VAE compute in the dtype of its weights, whatever autocast says."""
    for name in ("encode", "decode"):
        setattr(vae, name, _without_autocast(getattr(vae, name)))


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return call


TEXT_FOLDERS = ("text_encoder*", "tokenizer*")
IMAGE_FOLDERS = ("vae", "image_*", "processor", "feature_extractor")
"""Folders of the pipeline components that encode prompts, and of those that encode the images given with them."""


def fingerprint(pretrained: str, revision: str | None, folders: Sequence[str]) -> str:
    """Identify these parts of a pipeline: by the files of a local one, by the commit in the cache of a hub one."""
    where = Path(resolve(pretrained))
    if where.is_dir():
        files = sorted(p for part in folders for p in where.glob(f"{part}/*") if p.is_file())
        states = [(p.relative_to(where).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return f"{where.resolve()} {states}"
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(pretrained, "model_index.json", revision=revision)
    return f"{pretrained}@{Path(index).parent.name if isinstance(index, str) else revision}"
