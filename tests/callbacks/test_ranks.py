"""A rank that is in another run than rank 0 is refused, instead of being mixed with it."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from flowalign.callbacks.ranks import Ranks, check_same_run
from flowalign.checks import ConfigError

CONFIG = {"seed": 0, "optimizer": {"lr": 3e-4}, "encoding": {"cache": "/scratch/a"}, "trainer": {"max_epochs": 3}}


def check(config: dict[str, Any], ckpt_path: str | None = None, first: dict[str, Any] | None = None) -> None:
    """As rank 1 of two, where rank 0 has the config `first`, by default CONFIG, and no checkpoint."""
    sent: list[Any] = []
    zero = SimpleNamespace(
        global_rank=0, ckpt_path=None, strategy=SimpleNamespace(broadcast=lambda own: sent.append(own) or own)
    )
    check_same_run(zero, first or CONFIG)  # type: ignore[arg-type]
    one = SimpleNamespace(global_rank=1, ckpt_path=ckpt_path, strategy=SimpleNamespace(broadcast=lambda own: sent[0]))
    check_same_run(one, config)  # type: ignore[arg-type]


@pytest.mark.parametrize("own", [{"encoding": {"cache": "/scratch/b"}}, {"logger": {"name": "18-59-60"}}])
def test_the_same_run_may_have_paths_and_names_of_its_own(own: dict[str, Any]):
    check(CONFIG | own)


def test_a_number_that_is_none_is_the_same():
    check(CONFIG | {"none": float("nan")}, first=CONFIG | {"none": float("nan")})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (CONFIG | {"seed": 1}, "seed=1 instead of 0"),
        (CONFIG | {"trainer": {"max_epochs": 4}}, "trainer.max_epochs=4 instead of 3"),
    ],
)
def test_another_run_is_refused(config: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=f"rank 1 was to do another run than rank 0: {named}"):
        check(config)


def test_one_rank_that_sees_no_checkpoint_is_refused():
    with pytest.raises(ConfigError, match="resumes=True instead of False"):
        check(CONFIG, "last.ckpt")


def test_a_finished_run_of_a_sweep_is_not_kept_by_its_heartbeat():
    """The thread goes on until the process ends, and a trainer holds the networks."""

    class Run(SimpleNamespace):
        """A trainer."""

    environment = SimpleNamespace(main_address="127.0.0.1")
    strategy = SimpleNamespace(
        cluster_environment=environment, launcher=None, broadcast=lambda own: own, barrier=lambda name: None
    )
    trainer: Any = Run(world_size=2, global_rank=0, strategy=strategy)
    callback, kept = Ranks(), weakref.ref(trainer)
    callback.setup(trainer, SimpleNamespace(), "fit")  # type: ignore[arg-type]
    callback.teardown(trainer, SimpleNamespace(), "fit")  # type: ignore[arg-type]
    heartbeat = callback.heartbeat
    assert heartbeat is not None
    del trainer
    gc.collect()
    assert heartbeat.is_alive()
    assert kept() is None
    heartbeat.stop()
