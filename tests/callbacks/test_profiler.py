"""Traces of the phases of an epoch, read back."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flowalign.callbacks.profiler import Profiler
from flowalign.checks.errors import ConfigError
from flowalign.module import AlignModule
from flowalign.report import Report
from flowalign.run import build_recipe, build_trainer, plan_accumulation

if TYPE_CHECKING:
    from omegaconf import DictConfig

Fit = Callable[..., AlignModule]


@pytest.fixture
def fit(tiny: Callable[..., DictConfig], random_sd3: tuple[str, ...]) -> Fit:
    """Two epochs of three rollout batches, four of a frozen copy and four micro-batches."""

    def run(*overrides: str) -> AlignModule:
        words = ("algo=nft", "algo.kl_beta=0.1", "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=99")
        sizes = ("batch.prompts=3", "batch.micro=3", "batch.updates=2", "rollout.batch_size=2")
        cfg = tiny(*random_sd3, *words, *sizes, *overrides)
        recipe = build_recipe(cfg)
        module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
        trainer.fit(module)
        return module

    return run


def names(path: Path) -> Counter[str]:
    """How often something occurs in a trace."""
    with gzip.open(path, "rt") as file:
        return Counter(event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X")


def test_every_phase_of_the_chosen_epoch_leaves_a_trace_and_a_table(fit: Fit, tmp_path: Path):
    module = fit("callbacks=profiler", "callbacks.profiler.batches=2", "callbacks.profiler.micro_batches=3")
    folder = tmp_path / "profile"
    phases = {"rollout": 2, "frozen": 2, "optimise": 3}
    files = {f"epoch001_{phase}.{kind}" for phase in phases for kind in ("json.gz", "txt")}
    assert {path.name for path in folder.iterdir()} == files
    for phase, marks in phases.items():
        found = names(folder / f"epoch001_{phase}.json.gz")
        assert found[phase] == marks
        assert not any(found[other] for other in phases.keys() - {phase})
        assert found["aten::addmm"] > 0
        assert ("aten::native_layer_norm_backward" in found) == (phase == "optimise")
        table = (folder / f"epoch001_{phase}.txt").read_text()
        assert "aten::addmm" in table
        assert phase in table
    assert type(module.report) is Report  # whoever listened before listens again


def test_a_recorded_run_is_the_same_run(fit: Fit):
    recorded, plain = fit("callbacks=profiler", "callbacks.profiler.micro_batches=null"), fit()
    others = plain.live.trained()
    assert all(torch.equal(p, others[name]) for name, p in recorded.live.trained().items())


def test_what_stops_an_epoch_stops_its_recording(fit: Fit, monkeypatch: Any, tmp_path: Path):
    def failing(self: AlignModule, *_: Any) -> None:
        raise KeyError("frozen")

    monkeypatch.setattr(AlignModule, "_velocity", failing)
    words = ("callbacks=profiler", "callbacks.profiler.epochs=[0]")
    with pytest.raises(KeyError, match="frozen"):
        fit(*words)
    assert not (tmp_path / "profile").exists()
    monkeypatch.undo()
    fit(*words)  # which torch would refuse while another recording goes on
    assert len(list((tmp_path / "profile").iterdir())) == 6


def test_an_epoch_that_never_comes_is_refused(fit: Fit):
    with pytest.raises(ConfigError, match=r"trainer.max_epochs=2 reaches none .* use callbacks.profiler.epochs=\[1\]"):
        fit("callbacks=profiler", "callbacks.profiler.epochs=[2,3]")


@pytest.mark.parametrize("words", [{"epochs": []}, {"epochs": [-1]}, {"batches": 0}, {"micro_batches": 0}, {"rows": 0}])
def test_numbers_that_mean_nothing_are_refused(words: dict[str, Any]):
    with pytest.raises(ValueError, match=f"callbacks.profiler.{next(iter(words))}"):
        Profiler("anywhere", **words)
