"""Statistics of an epoch's rewards, under the metric names of docs/metrics.md."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flowalign.credit import group_stats


def statistics(
    rewards: Tensor, groups: Tensor, valid: Tensor, weights: Tensor, names: Sequence[str]
) -> dict[str, float]:
    """Statistics of the weighted sum, and of each reward if there are several.

    rewards (N, R), groups (N,), valid (N,) bool the samples to train on, weights (R,). Statistics of a single reward
    cover all samples that it has scored, even those that lack another score.
    """
    counts = (weights != 0).to(rewards.device)
    unscored = rewards[:, counts].isnan().any(dim=1)
    stats = _named(group_stats(rewards, groups, valid, weights), "")
    stats |= {"reward_nan_fraction": _share(unscored), "dropped_fraction": _share(~valid)}
    if len(names) > 1:
        for name, reward, weight in zip(names, rewards.T, weights.tolist(), strict=True):
            stats |= _named(group_stats(reward, groups), f"/{name}")
            stats |= {f"reward_nan_fraction/{name}": _share(reward.isnan()), f"reward_weight/{name}": weight}
            stats[f"reward/{name}"] = stats.pop(f"reward_mean/{name}")
    return stats


def _named(found: dict[str, float], suffix: str) -> dict[str, float]:
    names = {"mean": "reward_mean", "within_std": "reward_within_std"}
    return {f"{names.get(key, key)}{suffix}": value for key, value in found.items()}


def _share(these: Tensor) -> float:
    return float(these.double().mean())
