"""Imports without the garbage collector."""

from __future__ import annotations

import gc

import pytest

from flowalign.imports import uncollected


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_afterwards_as_it_was(on: bool):
    before = gc.isenabled()
    try:
        gc.enable() if on else gc.disable()
        with pytest.raises(ImportError), uncollected():
            assert not gc.isenabled()
            import flowalign.absent  # type: ignore  # noqa: F401
        assert gc.isenabled() == on
    finally:
        gc.enable() if before else gc.disable()
