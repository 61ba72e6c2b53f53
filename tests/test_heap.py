"""Freed memory that stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from flowalign.heap import keep_freed

PASSES = """
import resource
from flowalign.heap import keep_freed

def forward():
    return [bytearray(2**20) for _ in range(32)]

if {kept}:
    assert keep_freed()
forward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    forward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: bool) -> int:
    """Pages that five passes over 32 MiB ask of the system, after one."""
    told = ("trim_threshold", "mmap_threshold", "glibc_tunables")
    environment = {name: value for name, value in os.environ.items() if not any(t in name.lower() for t in told)}
    done = subprocess.run(
        [sys.executable, "-c", PASSES.format(kept=kept)], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc's heap")
def test_what_was_freed_is_there_for_the_next_pass():
    pages = 5 * 32 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults(kept=False) > 0.5 * pages
    assert faults(kept=True) < 0.01 * pages


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "0"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536")],
)
def test_what_the_environment_says_of_the_heap_stays(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(name, value)
    assert not keep_freed()
