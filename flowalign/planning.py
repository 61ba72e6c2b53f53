"""The batch plan of a config, from its light parts: refused before a reward or a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from flowalign.checks import ConfigError, check_signatures, refusals
from flowalign.checks.errors import one_line
from flowalign.checks.signatures import locate
from flowalign.rewards.errors import RewardError

if TYPE_CHECKING:  # PyTorch takes longer to import than a help text to be written
    from flowalign.geometry import Geometry
    from flowalign.steps.base import StepPlan, Steps

LIGHT = {"batch": "batch", "algorithm": "algo", "steps": "steps", "times": "times", "rollout": "rollout"}
"""Fields of a Recipe that a plan follows from, by config group."""
ALSO = ("tune", "encoding", "evaluation", "optimisation", "schedule", "dynamics", "credit")
"""Groups that are made beforehand only to hear what their classes refuse."""
LOOKED_AT = 1000
"""Epochs whose steps are counted beforehand."""


def instantiate(node: Any, **arguments: Any) -> Any:
    """The object that a node describes. What its class refuses is said in the class's own words, not in Hydra's."""
    try:
        return hydra.utils.instantiate(node, _convert_="object", **arguments)
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        # Lightning's refusal is known by its name: a reward server has no Lightning.
        told = isinstance(cause, (ValueError, TypeError, RewardError, ImportError))
        if cause is not None and (told or type(cause).__name__ == "MisconfigurationException"):
            where = node._get_full_key(None) or str(node.get("_target_"))
            raise ConfigError(f"{where}: {one_line(cause)}") from error
        raise


def check_plan(cfg: DictConfig) -> None:
    """Raises ConfigError for a batch plan that does not fit, with the nearest that does, or for one of its parts."""
    from flowalign.recipe import batch_plan

    check_signatures({group: cfg[group] for group in (*LIGHT.values(), *ALSO, "frozen")})
    for group in ALSO:
        instantiate(cfg[group])
    frozen = {name: instantiate(node) for name, node in cfg.frozen.items() if node is not None}
    parts = {field: instantiate(cfg[group]) for field, group in LIGHT.items()}
    for name in parts["algorithm"].made_rollout:
        if name in frozen and not frozen[name].takes_over:
            raise ConfigError(
                f"algo takes frozen.{name} for the weights that made the rollout, and it lags behind them, so that the "
                f"importance ratio could never be 1: use frozen.{name}.decay.kind=0 (and no interval)."
            )
    scorer = SimpleNamespace(groupwise=any(map(_is_groupwise, objective(cfg.reward))))
    with refusals():
        geometry = batch_plan(SimpleNamespace(**parts, scorer=scorer), replicas(cfg))  # type: ignore[arg-type]
    if parts["algorithm"].point == "transition":
        plans = _plans(parts["steps"], parts["rollout"].num_steps, cfg.trainer.max_epochs)
        _check_every_epoch(geometry, plans)
        if locate(cfg.dynamics["_target_"]).still_at_end:
            _check_last_step(parts["rollout"].num_steps, plans)


def _plans(steps: Steps, num_steps: int, epochs: Any) -> list[StepPlan]:
    """Of the first epochs of a run."""
    number = epochs if isinstance(epochs, int) and epochs > 0 else LOOKED_AT
    return [steps(epoch, num_steps) for epoch in range(min(number, LOOKED_AT))]


def _check_every_epoch(geometry: Geometry, plans: Sequence[StepPlan]) -> None:
    """The batches of a run are of one size, so every epoch has to train equally many steps."""
    for epoch, plan in enumerate(plans):
        if plan.points != geometry.points_per_sample:
            raise ConfigError(
                f"steps trains {geometry.points_per_sample} steps of a picture in epoch 0 and {plan.points} in epoch "
                f"{epoch}, while the batches of a run are of one size: use steps=window, whose windows are always full."
            )


def _check_last_step(num_steps: int, plans: Sequence[StepPlan]) -> None:
    """A step without noise has no density to be weighed by."""
    if any(num_steps - 1 in plan.trained for plan in plans):
        raise ConfigError(
            "steps trains the last step, to which this dynamics adds no noise, so that it has no density: use "
            "steps.trained=0.99 (steps=window: steps.skip=1), or dynamics=flow_sde."
        )


def objective(reward: DictConfig) -> list[DictConfig]:
    """Nodes of the rewards that are trained on: one, or several by name, each perhaps in a Measure."""

    def inside(node: Any) -> list[DictConfig]:
        if not isinstance(node, DictConfig):
            return []
        if "_target_" not in node:
            return [found for child in node.values() for found in inside(child)]
        return inside(node.get("reward")) if str(node["_target_"]).endswith(".Measure") else [node]

    return inside(reward.get("objective"))


def _is_groupwise(reward: DictConfig) -> bool:
    return bool(reward.get("groupwise", getattr(locate(reward["_target_"]), "groupwise", False)))


def replicas(cfg: DictConfig) -> int:
    """Devices that have samples of their own: all, or those that share sequences counted once."""
    nodes = cfg.trainer.num_nodes if isinstance(cfg.trainer.num_nodes, int) else 1  # refused where the trainer is
    ranks = int(os.environ.get("WORLD_SIZE", 0)) or max(nodes, 1) * devices(cfg.trainer)
    alike = OmegaConf.select(cfg, "trainer.strategy.context") if is_sharded(cfg) else 1
    return max(ranks // alike, 1)


def devices(trainer: DictConfig) -> int:
    """How many `trainer.devices` asks for on a node, as Lightning reads it: a number, a list of numbers (also as text,
    "0,1"), or all that there are, of which a CPU is one."""
    given = trainer.devices
    if isinstance(given, str) and given != "auto":
        numbers = [int(part) for part in given.split(",") if part.strip().lstrip("-").isdecimal()]
        given = numbers if "," in given else (numbers or ["auto"])[0]  # what else it is, the Trainer refuses
    if isinstance(given, int) and given > 0:
        return given
    if isinstance(given, (list, ListConfig)):
        return len(given)
    if trainer.accelerator == "cpu":
        return 1
    import torch

    return max(torch.cuda.device_count(), 1)


def is_sharded(cfg: DictConfig) -> bool:
    """Whether the strategy is one of ours, which shard."""
    return str(OmegaConf.select(cfg, "trainer.strategy._target_")).startswith("flowalign.strategies.")
