"""The settings of a run as flat names and values, and the differences between two runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RUN_SPECIFIC = (
    "ckpt_path", "paths.", "task_name", "trainer.max_", "trainer.default_root_dir", "logger.", "callbacks.", "test",
    "requeue", "hydra", "debug",
)  # fmt: skip
"""Name prefixes of settings that may differ in a resumed run."""


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted name. Values other than numbers and strings are converted to strings."""
    if isinstance(node, Mapping):
        return {k: v for key, child in node.items() for k, v in flatten(child, f"{prefix}{key}.").items()}
    key = prefix.rstrip(".")
    return {key: node if isinstance(node, (int, float, str, bool)) else str(node)}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "name=now instead of then" for each setting that a resumed run has changed, run-specific ones excepted."""
    old, new = flatten(then), flatten(now)
    names = [name for name in sorted(old.keys() | new.keys()) if not name.startswith(RUN_SPECIFIC)]
    return [
        f"{name}={new.get(name, 'absent')} instead of {old.get(name, 'absent')}"
        for name in names
        if old.get(name) != new.get(name)
    ]
