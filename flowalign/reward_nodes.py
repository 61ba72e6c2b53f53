"""The rewards that a config names, read from their nodes before any of them is built."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from flowalign.checks.signatures import locate


def objective(reward: DictConfig) -> dict[str, DictConfig]:
    """Nodes of the rewards that are trained on, by the names that the Scorer gives them."""
    return {name: _unwrapped(node) for name, node in _objective(reward)}


def held_out(reward: DictConfig) -> dict[str, DictConfig]:
    """Nodes of the rewards that are only measured, by name."""
    return {name: _unwrapped(node) for name, node in _held_out(reward)}


def final_weights(reward: DictConfig) -> dict[str, float]:
    """Weights of the rewards that are trained on, by name, as at the end of a ramp."""
    given = reward.get("weights") or {}
    found = {}
    for part, node in (reward.get("parts") or {}).items():
        inside = final_weights(node)
        found |= {part if name == "reward" else name: _final(given.get(part)) * w for name, w in inside.items()}
    for name, node in _objective(DictConfig({"objective": reward.get("objective")})):
        found[name] = _final(given.get(name, node.get("weight") if _is_measure(node) else None))
    return found


def _final(weight: float | DictConfig | None) -> float:
    return 1.0 if weight is None else float(weight["values"][-1] if isinstance(weight, DictConfig) else weight)


def is_groupwise(node: DictConfig) -> bool:
    """Whether a reward compares the samples of a group."""
    return bool(node.get("groupwise", getattr(locate(node["_target_"]), "groupwise", False)))


def is_evaluated(reward: DictConfig) -> bool:
    """Whether evaluations measure a reward of the objective; if not, val/reward is NaN."""
    return any(
        not is_groupwise(_unwrapped(node)) and (not _is_measure(node) or node.get("evaluate", True))
        for _, node in _objective(reward)
    )


def _objective(reward: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    for part, node in (reward.get("parts") or {}).items():
        yield from ((str(part) if name == "reward" else name, found) for name, found in _objective(node))
    given = reward.get("objective")
    if isinstance(given, DictConfig):
        named = {"reward": given} if "_target_" in given else given
        yield from ((str(name), node) for name, node in named.items() if isinstance(node, DictConfig))


def _held_out(reward: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    trained = {name for name, _ in _objective(reward)}
    for part in (reward.get("parts") or {}).values():
        yield from ((name, node) for name, node in _held_out(part) if name not in trained)
    for name, node in (reward.get("held_out") or {}).items():
        yield str(name), node


def _unwrapped(node: DictConfig) -> DictConfig:
    """The reward within a Measure, whose settings belong to a run."""
    return node.reward if _is_measure(node) else node


def _is_measure(node: DictConfig) -> bool:
    return str(node.get("_target_")).endswith(".Measure") and isinstance(node.get("reward"), DictConfig)
