"""Imports without the garbage collector, which goes through all that is there again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, cycles wait, and what is there at its end is left alone for good: of the many thousand objects that
    libraries leave behind, next to none is garbage. For the start of a process, before there is a model."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # or the next collection would cost what was saved
        if on:
            gc.enable()
