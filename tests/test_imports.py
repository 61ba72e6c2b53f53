"""Imports without the garbage collector."""

from __future__ import annotations

import gc
from importlib import import_module

import pytest

from flowalign.imports import without_gc


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_afterwards_as_it_was(on: bool):
    before = gc.isenabled()
    try:
        gc.enable() if on else gc.disable()
        with pytest.raises(ImportError), without_gc():
            import_module("flowalign.absent")
        with without_gc():
            assert not gc.isenabled()
        assert gc.isenabled() == on
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
        gc.enable() if before else gc.disable()
