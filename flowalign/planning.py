"""Check the batch plan of a config from its cheap parts, before a reward or a model is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from flowalign.checks import ConfigError, as_config_errors, check_signatures
from flowalign.checks.errors import one_line
from flowalign.checks.signatures import locate
from flowalign.reward_nodes import held_out, is_evaluated, is_groupwise, objective
from flowalign.rewards.errors import RewardError

if TYPE_CHECKING:  # they import PyTorch, which takes longer than printing a help text
    from flowalign.geometry import Geometry
    from flowalign.steps.base import StepPlan, Steps

log = logging.getLogger("flowalign")
PLAN_GROUPS = {"batch": "batch", "algorithm": "algo", "steps": "steps", "times": "times", "rollout": "rollout"}
"""Config group by the Recipe field that the batch plan depends on."""
CHECKED_GROUPS = ("tune", "encoding", "evaluation", "optimisation", "schedule", "dynamics", "credit")
"""Groups that are instantiated early only for the checks of their classes."""
OBJECTIVE = "val/reward"
"""The metric of the whole objective at evaluations."""
CHECKPOINT_KEYS = ("monitor", "mode", "every_n_train_steps", "every_n_epochs", "train_time_interval")
"""Arguments by which Lightning tells ModelCheckpoints apart."""
MAX_CHECKED_EPOCHS = 1000
"""Epochs whose steps are counted in advance, at most."""


def instantiate(node: Any, **arguments: Any) -> Any:
    """Instantiate a node. Errors of its class become a ConfigError with the class's message instead of Hydra's."""
    try:
        return hydra.utils.instantiate(node, _convert_="object", **arguments)
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        # Lightning's error is recognised by name, since a reward server does not import Lightning.
        is_user_error = isinstance(cause, (ValueError, TypeError, RewardError, ImportError))
        if cause is not None and (is_user_error or type(cause).__name__ == "MisconfigurationException"):
            key = node._get_full_key(None) or str(node.get("_target_"))
            raise ConfigError(f"{key}: {one_line(cause)}") from error
        raise


def check_plan(cfg: DictConfig) -> None:
    """Raise ConfigError for an invalid part of a batch plan, or for a plan that does not fit, naming the nearest."""
    from flowalign.recipe import batch_plan, check_copies

    check_signatures({group: cfg[group] for group in (*PLAN_GROUPS.values(), *CHECKED_GROUPS, "frozen")})
    checked = {group: instantiate(cfg[group]) for group in CHECKED_GROUPS}
    frozen = {name: instantiate(node) for name, node in cfg.frozen.items() if node is not None}
    parts = {field: instantiate(cfg[group]) for field, group in PLAN_GROUPS.items()}
    for name in parts["algorithm"].made_rollout:
        if name in frozen and not frozen[name].takes_over:
            raise ConfigError(
                f"algo takes frozen.{name} for the weights that made the rollout, and it lags behind them, so that the "
                f"importance ratio could never be 1: use frozen.{name}.decay.kind=0 (and no interval)."
            )
    with as_config_errors():
        check_copies(parts["algorithm"], checked["evaluation"], frozen)
    scorer = SimpleNamespace(groupwise=any(map(is_groupwise, objective(cfg.reward).values())))
    with as_config_errors():
        geometry = batch_plan(SimpleNamespace(**parts, scorer=scorer), replicas(cfg))  # type: ignore[arg-type]
    if parts["algorithm"].point == "transition":
        plans = _plans(parts["steps"], parts["rollout"].num_steps, cfg.trainer.max_epochs)
        _check_every_epoch(geometry, plans)
        if locate(cfg.dynamics["_target_"]).still_at_end:
            _check_last_step(parts["rollout"].num_steps, plans)
    if parts["batch"].micro != "auto":
        _check_batches(cfg.trainer, geometry)
    _check_monitors(cfg)
    _check_optimised(cfg)
    _check_checkpoints(cfg.callbacks)


def _plans(steps: Steps, num_steps: int, epochs: Any) -> list[StepPlan]:
    """Step plans of the first epochs of a run."""
    number = epochs if isinstance(epochs, int) and epochs > 0 else MAX_CHECKED_EPOCHS
    return [steps(epoch, num_steps) for epoch in range(min(number, MAX_CHECKED_EPOCHS))]


def _check_every_epoch(geometry: Geometry, plans: Sequence[StepPlan]) -> None:
    """Require the same number of trained steps in every epoch, since the batch size is fixed."""
    for epoch, plan in enumerate(plans):
        if plan.points != geometry.points_per_sample:
            raise ConfigError(
                f"steps trains {geometry.points_per_sample} steps of a picture in epoch 0 and {plan.points} in epoch "
                f"{epoch}, while the batches of a run are of one size: use steps=window, whose windows are always full."
            )


def _check_last_step(num_steps: int, plans: Sequence[StepPlan]) -> None:
    """Reject training of a last step to which the dynamics adds no noise: it has no density."""
    if any(num_steps - 1 in plan.trained for plan in plans):
        raise ConfigError(
            "steps trains the last step, to which this dynamics adds no noise, so that it has no density: use "
            "steps.trained=0.99 (steps=window: steps.skip=1), or dynamics=flow_sde."
        )


def _check_batches(trainer: DictConfig, geometry: Geometry) -> None:
    """Reject a share of an epoch's batches that is none, which Lightning would notice after loading the model."""
    limit = trainer.get("limit_train_batches")
    if isinstance(limit, float) and 0 < limit < 1 and int(limit * geometry.batches_per_epoch) == 0:
        raise ConfigError(
            f"trainer.limit_train_batches={limit} leaves none of an epoch's batches ({geometry.batches_per_epoch}): "
            "use trainer.limit_train_batches=1.0, or a smaller batch.micro."
        )


def _check_monitors(cfg: DictConfig) -> None:
    """Reject callbacks that wait for a val/reward without values; `build_trainer` leaves out checkpoints by it."""
    for name, node in ({} if is_evaluated(cfg.reward) else cfg.callbacks).items():
        if node is not None and node.get("monitor") == OBJECTIVE and not keeps_best(node):
            raise ConfigError(f"callbacks.{name}.monitor={OBJECTIVE} {_unmeasured(cfg.reward, 'val/')}")


def _check_optimised(cfg: DictConfig) -> None:
    """Check that the runs of a sweep can be compared: a search without values would be in vain, a grid is told."""
    stage, _, name = str(cfg.optimized_metric).rpartition("/")
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if not sweeping or name != "reward" or is_evaluated(cfg.reward):
        return
    problem = f"optimized_metric={cfg.optimized_metric} {_unmeasured(cfg.reward, f'{stage}/')}"
    if not HydraConfig.get().sweeper._target_.endswith(".BasicSweeper"):
        raise ConfigError(problem)
    log.warning("the sweep will end without a comparison: %s", problem)


def _unmeasured(reward: DictConfig, stage: str) -> str:
    measured = [f"{stage}{measure}" for measure in held_out(reward)]
    return (
        "has no value with this reward, which is not measured at evaluations (one image per prompt leaves nothing to "
        f"compare): use {' or '.join(measured) or 'a measure that you add under reward.held_out'}."
    )


def _check_checkpoints(callbacks: DictConfig) -> None:
    """Reject two callbacks that keep the best checkpoint by the same metric: Lightning would mix their states."""
    keepers: dict[tuple[Any, ...], str] = {}
    for name, node in callbacks.items():
        if node is None or not str(node["_target_"]).endswith(".ModelCheckpoint"):
            continue
        same = tuple(node.get(key) for key in CHECKPOINT_KEYS)
        if (other := keepers.setdefault(same, str(name))) != name:
            raise ConfigError(
                f"callbacks.{other} and callbacks.{name} keep the same checkpoint, by monitor={same[0]}: leave one "
                f"out, by callbacks.{other}=null, or give it another monitor."
            )


def keeps_best(callback: DictConfig) -> bool:
    """Whether a callback keeps the checkpoint with the best val/reward."""
    return str(callback["_target_"]).endswith(".ModelCheckpoint") and callback.get("monitor") == OBJECTIVE


def replicas(cfg: DictConfig) -> int:
    """Number of data-parallel replicas: ranks that share sequences (`context`) count as one."""
    nodes = cfg.trainer.num_nodes if isinstance(cfg.trainer.num_nodes, int) else 1  # the Trainer rejects other types
    ranks = int(os.environ.get("WORLD_SIZE", 0)) or max(nodes, 1) * devices(cfg.trainer)
    context = OmegaConf.select(cfg, "trainer.strategy.context") if is_sharded(cfg) else 1
    return max(ranks // context, 1)


def devices(trainer: DictConfig) -> int:
    """Number of devices on a node in `trainer.devices`, as Lightning reads it: a number, a list of numbers (also as
    text, "0,1"), or all available ones; a CPU counts as one."""
    given = trainer.devices
    if isinstance(given, str) and given != "auto":
        numbers = [int(part) for part in given.split(",") if part.strip().lstrip("-").isdecimal()]
        given = numbers if "," in given else (numbers or ["auto"])[0]  # the Trainer rejects any other text
    if isinstance(given, int) and given > 0:
        return given
    if isinstance(given, (list, ListConfig)):
        return len(given)
    if trainer.accelerator == "cpu":
        return 1
    import torch

    return max(torch.cuda.device_count(), 1)


def is_sharded(cfg: DictConfig) -> bool:
    """Whether the strategy is one of this package, which shards."""
    return str(OmegaConf.select(cfg, "trainer.strategy._target_")).startswith("flowalign.strategies.")
