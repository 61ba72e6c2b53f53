"""Import libraries without the garbage collector, which would traverse all existing objects again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_gc() -> Iterator[None]:
    """Disable the garbage collector, and freeze all objects that exist on exit: hardly any of the many thousand objects
    that imports create are garbage. For the start of a process, before there is a model."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # or the next collection would take the time that was saved
        if enabled:
            gc.enable()
