"""The settings of a run as flat names and values, and in what those of two runs differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RUN_SPECIFIC = (
    "ckpt_path", "paths.", "task_name", "trainer.max_", "trainer.default_root_dir", "logger.", "callbacks.", "test",
    "requeue", "hydra", "debug",
)  # fmt: skip
"""What a continued run has of its own, by how the names begin."""


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Plain values by their names, with dots; what is neither a number nor a text is one."""
    if isinstance(node, Mapping):
        return {k: v for key, child in node.items() for k, v in flatten(child, f"{prefix}{key}.").items()}
    key = prefix.rstrip(".")
    return {key: node if isinstance(node, (int, float, str, bool)) else str(node)}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "name=now instead of then" for each setting that a continued run and the one before do not share."""
    old, new = flatten(then), flatten(now)
    names = [name for name in sorted(old.keys() | new.keys()) if not name.startswith(RUN_SPECIFIC)]
    return [
        f"{name}={new.get(name, 'absent')} instead of {old.get(name, 'absent')}"
        for name in names
        if old.get(name) != new.get(name)
    ]
