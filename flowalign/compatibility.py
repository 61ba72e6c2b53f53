"""Which choices of different groups go together. Runs on the config alone, before anything heavy is imported."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flowalign.checks import ConfigError
from flowalign.checks.signatures import locate


def choice(group: str, cfg: DictConfig) -> str:
    """What the user called it: the option of a group, or the class where it was set by hand."""
    if HydraConfig.initialized():
        return str(HydraConfig.get().runtime.choices.get(group, cfg[group]))
    return str(cfg[group]["_target_"]).rsplit(".", 1)[-1]


def check_groups(cfg: DictConfig) -> None:
    """Raises ConfigError, in a sentence with the nearest valid choice, where two groups contradict each other."""
    algorithm, dynamics = locate(cfg.algo["_target_"]), locate(cfg.dynamics["_target_"])
    if algorithm.stochastic and not dynamics.stochastic:
        raise ConfigError(
            f"algo={choice('algo', cfg)} needs per-step log-probabilities, but dynamics={choice('dynamics', cfg)} "
            "is deterministic: "
            "use dynamics=flow_sde, or algo=nft."
        )
    if algorithm.stochastic and cfg.dynamics.get("eta", 1) == 0:
        raise ConfigError(
            f"dynamics.eta=0 makes dynamics={choice('dynamics', cfg)} deterministic, without a density: use "
            "dynamics.eta=0.7, or algo=nft."
        )
    if algorithm.stochastic and cfg.algo.get("dynamics") != cfg.dynamics:
        raise ConfigError("algo.dynamics must be the dynamics that sampled the rollout: leave it at ${dynamics}.")
    if algorithm.stochastic and cfg.optimisation.guidance != cfg.rollout.guidance:
        raise ConfigError(
            f"optimisation.guidance={cfg.optimisation.guidance} differs from "
            f"rollout.guidance={cfg.rollout.guidance}, so the importance ratio could "
            f"never be 1: leave optimisation.guidance at ${{rollout.guidance}}."
        )
    group_size = cfg.batch.group_size
    if isinstance(group_size, int) and group_size < 2:
        raise ConfigError(
            f"batch.group_size={group_size} gives every advantage 0, so nothing can be learnt: use at least 2 (8 to "
            "24 are usual)."
        )
