"""Check that the choices of different config groups are compatible, before anything heavy is imported."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from flowalign.checks import ConfigError, as_config_errors
from flowalign.checks.explain import SET_BY_THE_RUN
from flowalign.checks.signatures import locate
from flowalign.planning import is_sharded, replicas
from flowalign.reward_nodes import held_out, is_evaluated, objective

if TYPE_CHECKING:
    from flowalign.steps.base import Steps

OPTIONS = {"FlowSDE": "flow_sde", "DanceSDE": "dance_sde", "CPS": "cps", "ODE": "ode"}
"""Option names of the dynamics classes."""

LOGGERS = {"Wandb": "wandb", "MLFlow": "mlflow"}
"""Loggers that need a package of this name, which is also the name of their extra and of their option."""


def choice(group: str, cfg: DictConfig) -> str:
    """The chosen option of a group, or the class name if it was set by hand."""
    if HydraConfig.initialized():
        return str(HydraConfig.get().runtime.choices.get(group, cfg[group]))
    return str(cfg[group]["_target_"]).rsplit(".", 1)[-1]


def check_groups(cfg: DictConfig) -> None:
    """Raise ConfigError, with the nearest valid choice, if two groups contradict each other."""
    algorithm, dynamics = locate(cfg.algo["_target_"]), locate(cfg.dynamics["_target_"])
    if algorithm.stochastic:
        _check_density(cfg, dynamics)
    if algorithm.dynamics_only and dynamics.__name__ not in algorithm.dynamics_only:
        known = [OPTIONS.get(name, name) for name in algorithm.dynamics_only]
        raise ConfigError(
            f"algo={choice('algo', cfg)} is not defined for dynamics={choice('dynamics', cfg)}: use "
            f"dynamics={known[0]}, or algo=grpo."
        )
    if algorithm.energy and locate(cfg.credit["_target_"]).__name__ != "Energies":
        raise ConfigError(
            f"algo={choice('algo', cfg)} takes energies for its credit, and credit={choice('credit', cfg)} gives "
            "advantages: use credit=energies, or algo=nft."
        )
    if algorithm.follows_reward:
        _check_gradient(cfg)
    if isinstance(cfg.batch.group_size, int) and cfg.batch.group_size < 2:
        raise ConfigError(
            f"batch.group_size={cfg.batch.group_size} gives every advantage 0, so nothing can be learnt: use at least "
            "2 (8 to 24 are usual)."
        )
    _check_loggers(cfg)
    _check_numbers(cfg)
    _check_trainer(cfg)
    _check_precision(cfg)
    _check_strategy(cfg)
    _check_quantised(cfg)
    _check_running(cfg)
    _check_noise(cfg, algorithm, dynamics)
    _check_extremes(cfg, algorithm)
    _check_kept(cfg, algorithm)
    _check_guard(cfg)
    if (steps := _instantiate_or_none(cfg.steps)) is not None:
        _check_steps(cfg, steps, algorithm, dynamics)


def _check_loggers(cfg: DictConfig) -> None:
    """Check that the loggers' packages are installed; Lightning would notice only after the model has been loaded."""
    for node in cfg.logger.values():
        name = LOGGERS.get(str(node["_target_"]).rsplit(".", 1)[-1]) if node is not None else None
        # A folder of that name, such as W&B's output, is found as a namespace package, without an origin.
        if name is not None and ((found := find_spec(name)) is None or found.origin is None):
            raise ConfigError(
                f"logger={name} needs a package that is not there: pip install 'flowalign[{name}]', or use "
                "logger=tensorboard."
            )


def _check_gradient(cfg: DictConfig) -> None:
    """Check that every reward of the objective scores noisy latents, where its gradient is computed."""
    names = [str(node["_target_"]) for node in objective(cfg.reward).values()]
    without = [name for name in names if not hasattr(locate(name), "of_noisy")]
    if without:
        raise ConfigError(
            f"algo={choice('algo', cfg)} follows the gradient of a reward of noisy latents, and "
            f"reward={choice('reward', cfg)} has none ({without[0].rsplit('.', 1)[-1]}): use reward=latent, or "
            "algo=nft."
        )


def _check_density(cfg: DictConfig, dynamics: Any) -> None:
    """Check what an algorithm with per-step log-probabilities needs from the other groups."""
    # algo=nft is no alternative for choices of steps that need an algorithm with replay.
    otherwise = "" if locate(cfg.steps["_target_"]).replayed else ", or algo=nft"
    if not dynamics.stochastic:
        raise ConfigError(
            f"algo={choice('algo', cfg)} needs per-step log-probabilities, but dynamics={choice('dynamics', cfg)} "
            f"is deterministic: use dynamics=flow_sde{otherwise}."
        )
    if cfg.dynamics.get("eta", 1) == 0:
        raise ConfigError(
            f"dynamics.eta=0 makes dynamics={choice('dynamics', cfg)} deterministic, without a density: use "
            f"dynamics.eta=0.7{otherwise}."
        )
    if cfg.algo.get("dynamics") != cfg.dynamics:
        raise ConfigError("algo.dynamics must be the dynamics that sampled the rollout: leave it at ${dynamics}.")
    if cfg.optimisation.guidance != cfg.rollout.guidance:
        raise ConfigError(
            f"optimisation.guidance={cfg.optimisation.guidance} differs from "
            f"rollout.guidance={cfg.rollout.guidance}, so the importance ratio could "
            f"never be 1: leave optimisation.guidance at ${{rollout.guidance}}."
        )


def _check_numbers(cfg: DictConfig) -> None:
    """Check numbers for which neither a class of this package nor the Trainer has a clear error."""
    rate, trainer = cfg.optimizer.get("lr", 0.0), cfg.trainer
    if type(rate) not in (int, float) or not 0 <= rate < math.inf:
        raise ConfigError(f"optimizer.lr is a number from 0 on (got {rate}).")
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**32:  # NumPy's generator takes no larger one
        raise ConfigError(f"seed is a whole number from 0 to {2**32 - 1} (got {cfg.seed}).")
    if isinstance(every := trainer.check_val_every_n_epoch, int) and every < 1:
        raise ConfigError(
            f"trainer.check_val_every_n_epoch={every} counts epochs, from 1 on: a number above trainer.max_epochs "
            "evaluates at the end only."
        )
    if cfg.schedule.kind != "constant" and trainer.max_epochs == trainer.max_steps == -1:
        raise ConfigError(
            f"schedule.kind={cfg.schedule.kind} falls towards the end of the run, and trainer.max_epochs=-1 has none: "
            "use schedule.kind=constant, or set trainer.max_steps."
        )


def _check_trainer(cfg: DictConfig) -> None:
    """Refuse arguments of the Trainer that a run sets itself: the given ones would be ignored."""
    for key, instead in SET_BY_THE_RUN.items():
        if key in cfg.trainer:
            raise ConfigError(f"trainer.{key} is set by the run: {instead}.")


def _check_precision(cfg: DictConfig) -> None:
    """Require float32 for trained weights: in 16 bits, small updates are rounded away."""
    precision = str(cfg.trainer.precision)
    if precision in ("16-true", "bf16-true"):
        raise ConfigError(
            f"trainer.precision={precision} would keep what is trained in 16 bits, where small updates are rounded "
            f"away: use trainer.precision={precision.removesuffix('true')}mixed."
        )
    loaded = cfg.model.get("train_dtype", "float32")
    if locate(cfg.tune["_target_"]).kind == "full" and loaded not in (None, "float32"):
        raise ConfigError(
            f"tune={choice('tune', cfg)} trains float32 weights, and model={choice('model', cfg)} loads them in "
            f"{loaded}: use model.train_dtype=float32 (and trainer.precision=bf16-mixed for speed), or tune=lora."
        )


def _check_strategy(cfg: DictConfig) -> None:
    """Reject plain DDP for several denoisers: it waits for gradients of all weights, but a batch may skip an expert."""
    several = len(locate(cfg.model["_target_"]).denoiser_names) > 1
    strategy = OmegaConf.select(cfg, "trainer.strategy")
    if several and (strategy == "ddp" or (strategy == "auto" and replicas(cfg) > 1)):
        raise ConfigError(
            f"model={choice('model', cfg)} has several denoisers, and not every batch uses each of them: use "
            "trainer.strategy=ddp_find_unused_parameters_true, or strategy=fsdp."
        )


def _check_quantised(cfg: DictConfig) -> None:
    """Reject full tuning and sharding of quantised weights, which are frozen and whole on every device."""
    if (kind := cfg.model.get("quantised")) is None:
        return
    if locate(cfg.tune["_target_"]).kind == "full":
        raise ConfigError(
            f"model.quantised={kind} freezes the denoiser's weights, and tune={choice('tune', cfg)} trains them: use "
            "tune=lora."
        )
    if is_sharded(cfg):
        raise ConfigError(
            f"model.quantised={kind} cannot be cut into shards, and every device holds all of it: use strategy=ddp, or "
            "model.quantised=null."
        )


def _check_running(cfg: DictConfig) -> None:
    """Check what the model family supports, before its weights are loaded."""
    if (running := _instantiate_or_none(cfg.running)) is not None:
        with as_config_errors():
            running.check_family(locate(cfg.model["_target_"]))


def _check_noise(cfg: DictConfig, algorithm: Any, dynamics: Any) -> None:
    """Check that the images of a group can differ, by their initial noise or by the dynamics."""
    still = not dynamics.stochastic or cfg.dynamics.get("eta", 1) == 0
    if cfg.rollout.get("same_noise") and still and algorithm.source == "rollout":
        raise ConfigError(
            f"rollout.same_noise=true with dynamics={choice('dynamics', cfg)}, which adds no noise, makes the "
            "pictures of a group equal: use rollout.same_noise=false, or dynamics=flow_sde."
        )


def _check_extremes(cfg: DictConfig, algorithm: Any) -> None:
    """Check that batch.extremes, which selects by reward, suits the algorithm and its steps."""
    if (extremes := cfg.batch.get("extremes")) is None:
        return
    name, keep = choice("algo", cfg), "leave batch.extremes=null"
    if algorithm.samples_per_group is not None:
        raise ConfigError(
            f"batch.extremes={extremes} contradicts algo={name}, which trains on {algorithm.samples_per_group} "
            f"pictures of each group by its own rule: {keep}."
        )
    if locate(cfg.steps["_target_"]).__name__ == "Branch":
        raise ConfigError(
            f"batch.extremes={extremes} compares the pictures of a prompt, and steps={choice('steps', cfg)} compares "
            f"those of a branch: {keep}."
        )
    if algorithm.source == "images":
        raise ConfigError(
            f"batch.extremes={extremes} chooses by reward, and algo={name} learns from given pictures without any: "
            f"{keep}."
        )


def _check_kept(cfg: DictConfig, algorithm: Any) -> None:
    """Check that rollout.keep_in, a type for recorded states, comes with an algorithm that records them."""
    if cfg.rollout.get("keep_in") in ("bfloat16", "float16") and algorithm.point != "transition":
        raise ConfigError(
            f"rollout.keep_in={cfg.rollout.keep_in} rounds the states of recorded steps, and "
            f"algo={choice('algo', cfg)} records none: use rollout.keep_in=float32, or algo=grpo."
        )


def _check_guard(cfg: DictConfig) -> None:
    """Check that the hacking guard's metrics are measured."""
    if (guard := OmegaConf.select(cfg, "callbacks.hacking_guard")) is None:
        return
    several = [name for name in objective(cfg.reward) if name != "reward"]
    names = [*(["reward"] if is_evaluated(cfg.reward) else []), *several, *held_out(cfg.reward)]
    for key in ("objective", "gold"):
        stage, _, name = str(guard[key]).partition("/")
        if stage != "val" or name.partition("/")[0] not in names:
            raise ConfigError(
                f"callbacks.hacking_guard.{key}={guard[key]} is measured by no reward; there are "
                f"{', '.join(f'val/{name}' for name in names)}, and what is held out in addition (docs/rewards.md)."
            )


def _instantiate_or_none(node: DictConfig) -> Any:
    """The object of a cheap group, or None if its class rejects the node, which check_plan reports."""
    try:
        return instantiate(node)
    except InstantiationException:
        return None


def _check_steps(cfg: DictConfig, steps: Steps, algorithm: Any, dynamics: Any) -> None:
    """Check that the algorithm replays the selected steps, and that their number is the same in all epochs."""
    name = choice("steps", cfg)
    if steps.replayed and algorithm.point != "transition":
        raise ConfigError(
            f"steps={name} chooses the steps that are replayed, and algo={choice('algo', cfg)} replays none: use "
            f"steps=all{', or algo=grpo' if dynamics.stochastic else ''}."
        )
    if cfg.steps.get("parity"):
        raise ConfigError(
            "steps.parity=true has windows of several sizes, and even empty ones, while the batches of a run are of "
            "one size: use steps.parity=false (parity is for comparing the course of the window)."
        )
    if algorithm.point == "transition" and isinstance(cfg.rollout.num_steps, int):
        try:
            steps(0, cfg.rollout.num_steps)
        except ValueError as error:
            raise ConfigError(str(error)) from error
