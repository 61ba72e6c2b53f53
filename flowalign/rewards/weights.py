"""Opens networks of transformers for rewards, each once however many rewards look with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any


@lru_cache(maxsize=8)
def opened(model: str, processor: str, pretrained: str) -> tuple[Any, Any]:
    """A network in float32, ready to look, and what prepares its input; both by the name of their class.

    pretrained: a hub id or a folder; HF_HOME and HF_HUB_OFFLINE are honoured. Raises ValueError with the reason.
    """
    import transformers

    where = Path(pretrained).expanduser()
    if not where.is_dir() and (pretrained.count("/") != 1 or pretrained.startswith((".", "~"))):
        raise ValueError(f"{pretrained} is neither a folder with weights nor a hub id like org/name.")
    source = str(where) if where.is_dir() else pretrained
    with _quietly():
        try:
            prepare = getattr(transformers, processor).from_pretrained(source)
            network = getattr(transformers, model).from_pretrained(source, dtype="float32")
        except ImportError as error:
            raise ValueError(f"{pretrained} needs a further package: {_first_line(error)}") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{pretrained} cannot be opened as {model}: {_first_line(error)}") from error
    return network.eval().requires_grad_(False), prepare


@contextmanager
def _quietly() -> Iterator[None]:
    """Inside, transformers neither shows bars nor says that it would rather have torchvision."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
