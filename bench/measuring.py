"""Helpers of the benchmarks: a silent training run in this process, and calls in a new process."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from lightning import Trainer
    from omegaconf import DictConfig

    from flowalign.module import AlignModule

ROOT = Path(__file__).parents[1]
QUIET = (
    "logger=none", "callbacks=none", "trainer.check_val_every_n_epoch=9999", "+trainer.enable_checkpointing=false",
)  # fmt: skip
"""Overrides that leave nothing but the epochs themselves."""
TEN_STEPS = ("times=permuted", "rollout.num_steps=10", "rollout.solver._target_=flowalign.solvers.Euler")
"""For `nft`: the rollouts and noise levels of the other algorithms."""
Result = TypeVar("Result")


def cpu() -> float:
    """CPU seconds of this process so far."""
    return time.process_time()


def settled(words: Iterable[str]) -> list[str]:
    """Keep the last override of every key, since Hydra rejects two choices of one group."""
    return list({word.partition("=")[0]: word for word in words}.values())


def composed(words: Iterable[str]) -> DictConfig:
    """Compose the config of these overrides, of which later ones win."""
    from hydra import compose, initialize_config_dir

    from flowalign.process import silence_libraries
    from flowalign.run import CONF

    silence_libraries()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", settled(words))


def built(cfg: DictConfig) -> tuple[AlignModule, Trainer]:
    """Build the module and trainer that train.py would run, without the evaluations around it."""
    from flowalign.module import AlignModule
    from flowalign.run import build_recipe, build_trainer, plan_accumulation

    recipe = build_recipe(cfg)
    return AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))


def alone(call: Callable[..., Result], *arguments: Any) -> Result:
    """Run `call` in a new process, since peak memory never decreases. Raises RuntimeError with the message of its
    exception, or BrokenProcessPool if the process was killed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(told, call, *arguments).result()


def told(call: Callable[..., Result], *arguments: Any) -> Result:
    """Run `call` and convert its exceptions to RuntimeError, since some exceptions cannot be pickled."""
    try:
        return call(*arguments)
    except Exception as error:
        traceback.print_exc()
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
