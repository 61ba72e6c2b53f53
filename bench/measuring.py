"""A training put together in this process, silent, for a measuring program; and processes of their own."""

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
"""Overrides that leave the bare epochs."""
Result = TypeVar("Result")


def cpu() -> float:
    """CPU seconds of this process so far."""
    return time.process_time()


def settled(words: Iterable[str]) -> list[str]:
    """The last word on every key, since Hydra refuses two choices of one group."""
    return list({word.partition("=")[0]: word for word in words}.values())


def composed(words: Iterable[str]) -> DictConfig:
    """The config of these overrides, of which later ones win."""
    from hydra import compose, initialize_config_dir

    from flowalign.process import silence_libraries
    from flowalign.run import CONF

    silence_libraries()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", settled(words))


def built(cfg: DictConfig) -> tuple[AlignModule, Trainer]:
    """What train.py would run, without the evaluations around it."""
    from flowalign.module import AlignModule
    from flowalign.run import build_recipe, build_trainer, plan_accumulation

    recipe = build_recipe(cfg)
    return AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))


def alone(call: Callable[..., Result], *arguments: Any) -> Result:
    """The same in a process of its own, since peak memory only ever rises. Raises RuntimeError with the words of what
    it raises, or BrokenProcessPool if the process was killed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(told, call, *arguments).result()


def told(call: Callable[..., Result], *arguments: Any) -> Result:
    """The same, with exceptions that another process can read: some of ours and of others cannot be pickled."""
    try:
        return call(*arguments)
    except Exception as error:
        traceback.print_exc()
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
