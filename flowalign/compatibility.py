"""Which choices of different groups go together. Runs on the config alone, before anything heavy is imported."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from flowalign.checks import ConfigError, refusals
from flowalign.checks.signatures import locate
from flowalign.planning import is_sharded, objective, replicas

if TYPE_CHECKING:
    from flowalign.steps.base import Steps

OPTIONS = {"FlowSDE": "flow_sde", "DanceSDE": "dance_sde", "CPS": "cps", "ODE": "ode"}
"""What the dynamics classes are called in a command."""

LOGGERS = {"Wandb": "wandb", "MLFlow": "mlflow"}
"""Those that want a package of this name, which is the name of an extra and of their option too."""


def choice(group: str, cfg: DictConfig) -> str:
    """What the user called it: the option of a group, or the class where it was set by hand."""
    if HydraConfig.initialized():
        return str(HydraConfig.get().runtime.choices.get(group, cfg[group]))
    return str(cfg[group]["_target_"]).rsplit(".", 1)[-1]


def check_groups(cfg: DictConfig) -> None:
    """Raises ConfigError, in a sentence with the nearest valid choice, where two groups contradict each other."""
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
    _check_precision(cfg)
    _check_strategy(cfg)
    _check_quantised(cfg)
    _check_running(cfg)
    _check_average(cfg)
    _check_noise(cfg, algorithm, dynamics)
    _check_extremes(cfg, algorithm)
    _check_kept(cfg, algorithm)
    _check_guard(cfg)
    if (steps := _built(cfg.steps)) is not None:
        _check_steps(cfg, steps, algorithm, dynamics)


def _check_loggers(cfg: DictConfig) -> None:
    """Lightning would miss their packages only after the model has been loaded."""
    for node in cfg.logger.values():
        name = LOGGERS.get(str(node["_target_"]).rsplit(".", 1)[-1]) if node is not None else None
        # A folder of that name, such as W&B's own, passes for a package without a file.
        if name is not None and ((found := find_spec(name)) is None or found.origin is None):
            raise ConfigError(
                f"logger={name} needs a package that is not there: pip install 'flowalign[{name}]', or use "
                "logger=tensorboard."
            )


def _check_gradient(cfg: DictConfig) -> None:
    """Every reward of the objective must judge noisy latents, since its gradient is followed there."""
    names = [str(node["_target_"]) for node in objective(cfg.reward)]
    without = [name for name in names if not hasattr(locate(name), "of_noisy")]
    if without:
        raise ConfigError(
            f"algo={choice('algo', cfg)} follows the gradient of a reward of noisy latents, and "
            f"reward={choice('reward', cfg)} has none ({without[0].rsplit('.', 1)[-1]}): use reward=latent, or "
            "algo=nft."
        )


def _check_density(cfg: DictConfig, dynamics: Any) -> None:
    """What an algorithm that weighs recorded steps needs of the other groups."""
    # An algorithm that replays nothing has no use for some choices of steps either.
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
    """What neither a class of ours nor the Trainer refuses in a sentence."""
    rate, trainer = cfg.optimizer.get("lr", 0.0), cfg.trainer
    if type(rate) not in (int, float) or not 0 <= rate < math.inf:
        raise ConfigError(f"optimizer.lr is a number from 0 on (got {rate}).")
    if isinstance(cfg.seed, int) and cfg.seed < 0:  # another type is refused by its annotation
        raise ConfigError(f"seed is a number from 0 on (got {cfg.seed}).")
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


def _check_precision(cfg: DictConfig) -> None:
    """What is trained is trained in float32: in 16 bits small updates are rounded away."""
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
    """Plain DDP waits for gradients of every weight, and a batch may leave an expert without."""
    several = len(locate(cfg.model["_target_"]).denoiser_names) > 1
    strategy = OmegaConf.select(cfg, "trainer.strategy")
    if several and (strategy == "ddp" or (strategy == "auto" and replicas(cfg) > 1)):
        raise ConfigError(
            f"model={choice('model', cfg)} has several denoisers, and not every batch asks each of them: use "
            "trainer.strategy=ddp_find_unused_parameters_true, or strategy=fsdp."
        )


def _check_quantised(cfg: DictConfig) -> None:
    """Quantised weights are frozen, and every device holds all of them."""
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
    """What a family cannot do is known before its weights are loaded."""
    if (running := _built(cfg.running)) is not None:
        with refusals():
            running.check_family(locate(cfg.model["_target_"]))


def _check_average(cfg: DictConfig) -> None:
    """Live weights are no average of themselves."""
    copy = cfg.evaluation.weights
    if copy != "live" and OmegaConf.select(cfg, f"frozen.{copy}.every") == "always":
        raise ConfigError(f"frozen.{copy}.every=always is no average: use evaluation.weights=live.")


def _check_noise(cfg: DictConfig, algorithm: Any, dynamics: Any) -> None:
    """Somewhere the pictures of a group must come to differ."""
    still = not dynamics.stochastic or cfg.dynamics.get("eta", 1) == 0
    if cfg.rollout.get("same_noise") and still and algorithm.source == "rollout":
        raise ConfigError(
            f"rollout.same_noise=true with dynamics={choice('dynamics', cfg)}, which adds no noise, makes the "
            "pictures of a group equal: use rollout.same_noise=false, or dynamics=flow_sde."
        )


def _check_extremes(cfg: DictConfig, algorithm: Any) -> None:
    """The best and the worst are chosen where there are rewards, and where the method does not choose by itself."""
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
    """A type for recorded states wants an algorithm that has them."""
    if cfg.rollout.get("keep_in") in ("bfloat16", "float16") and algorithm.point != "transition":
        raise ConfigError(
            f"rollout.keep_in={cfg.rollout.keep_in} rounds the states of recorded steps, and "
            f"algo={choice('algo', cfg)} records none: use rollout.keep_in=float32, or algo=grpo."
        )


def _check_guard(cfg: DictConfig) -> None:
    """The hacking guard watches rewards that there are."""
    if (guard := OmegaConf.select(cfg, "callbacks.hacking_guard")) is None:
        return
    several = cfg.reward.objective if "_target_" not in cfg.reward.objective else {}
    names = ["reward", *several, *(OmegaConf.select(cfg, "reward.held_out") or {})]
    for key in ("objective", "gold"):
        stage, _, name = str(guard[key]).partition("/")
        if stage != "val" or name.partition("/")[0] not in names:
            raise ConfigError(
                f"callbacks.hacking_guard.{key}={guard[key]} is measured by no reward; there are "
                f"{', '.join(f'val/{name}' for name in names)}, and what is held out in addition (docs/rewards.md)."
            )


def _built(node: DictConfig) -> Any:
    """The object of a light group, or None where its class refuses: that is said by the check of signatures."""
    try:
        return instantiate(node)
    except InstantiationException:
        return None


def _check_steps(cfg: DictConfig, steps: Steps, algorithm: Any, dynamics: Any) -> None:
    """Chosen steps are to be replayed, and a batch plan is one for all epochs."""
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
        except ValueError as refusal:
            raise ConfigError(str(refusal)) from refusal
