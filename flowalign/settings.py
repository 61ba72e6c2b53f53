"""Flatten the settings of a run, and compare those of two runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RUN_SPECIFIC = (
    "ckpt_path", "paths.", "task_name", "trainer.max_", "trainer.default_root_dir", "logger.", "callbacks.", "train.",
    "test.", "requeue", "hydra", "debug",
)  # fmt: skip
"""Prefixes of settings in which a resumed run may differ; with a dot at the end, `train` is no prefix of `trainer`."""


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Plain values by dotted names; values other than numbers, strings and bools become text."""
    if isinstance(node, Mapping):
        return {k: v for key, child in node.items() for k, v in flatten(child, f"{prefix}{key}.").items()}
    key = prefix.rstrip(".")
    return {key: node if isinstance(node, (int, float, str, bool)) else str(node)}


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], may_differ: tuple[str, ...] = RUN_SPECIFIC
) -> list[str]:
    """Describe each setting that differs, as "name=now instead of then". may_differ: prefixes of those that may."""
    old, new = flatten(then), flatten(now)
    names = [name for name in sorted(old.keys() | new.keys()) if not f"{name}.".startswith(may_differ)]
    return [
        f"{name}={new.get(name, 'absent')} instead of {old.get(name, 'absent')}"
        for name in names
        if old.get(name) != new.get(name) and str(old.get(name)) != str(new.get(name))  # NaN is not equal to itself
    ]
