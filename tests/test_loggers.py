"""A continued run is one run for every logger, and every logger is told the same."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch.loggers import wandb as lightnings

from flowalign.callbacks.hyperparameters import Hyperparameters
from flowalign.checks import ConfigError
from flowalign.compatibility import check_groups
from flowalign.curves import curves
from flowalign.loggers import Wandb, closing, continue_logs, external_run_ids, read_csv
from flowalign.run import build_recipe, build_trainer, plan_accumulation

if TYPE_CHECKING:
    from lightning import Trainer
    from omegaconf import DictConfig

    from flowalign.module import AlignModule

Train = Callable[..., tuple["AlignModule", "Trainer"]]
FITTING = ("evaluation.num_val=2", "callbacks=[checkpoint,pictures]")


@pytest.fixture
def train(tiny: Callable[..., DictConfig], tmp_path: Path) -> Train:
    """A run from the baseline, or a checkpoint, to the end of its training."""

    def run(folder: str, *words: str, resume: Path | None = None) -> tuple[AlignModule, Trainer]:
        from flowalign.module import AlignModule

        cfg = tiny(*FITTING, f"paths.output_dir={tmp_path / folder}", *words)
        recipe = build_recipe(cfg)
        module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
        continue_logs(trainer.loggers, resume)
        with closing(trainer.loggers):
            trainer.callbacks.append(Hyperparameters(recipe.config))  # type: ignore[attr-defined]
            if resume is None:
                trainer.validate(module, verbose=False)
            trainer.fit(module, ckpt_path=resume)
        return module, trainer

    return run


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


# ------------------------------------------------------------ W&B


class FakeRun:
    """What a W&B run is asked for."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.id = given["id"] or "made"
        self.logged: list[dict[str, Any]] = []
        self.config = SimpleNamespace(update=lambda values, **rest: self.settings.update(values))
        self.settings: dict[str, Any] = {}
        self.ended: int | None = None

    def define_metric(self, name: str, **rest: Any) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], FakeRun]]:
    """Stands in for the package: what was given to `init`, and the run that it gave back."""
    begun: list[tuple[dict[str, Any], FakeRun]] = []

    def init(**given: Any) -> FakeRun:
        begun.append((dict(given), FakeRun(given)))
        return begun[-1][1]

    names = ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run")
    modules = {name: ModuleType(name) for name in names}
    modules["wandb"].__spec__ = ModuleSpec("wandb", None, origin="fake")
    vars(modules["wandb"]).update(
        init=init, run=None, errors=SimpleNamespace(Error=KeyError), Image=lambda image, **rest: image.shape
    )
    vars(modules["wandb.sdk.lib"]).update(RunDisabled=type("RunDisabled", (), {}))
    vars(modules["wandb.wandb_run"]).update(Run=FakeRun)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(lightnings, "_WANDB_AVAILABLE", True)
    return begun


def test_a_run_goes_on_at_wandb_wherever_its_output_folder_is(fake: Any, train: Train, tmp_path: Path):
    train("first", "logger=wandb")
    train("second", "logger=wandb", "trainer.max_epochs=2", resume=last(tmp_path / "first"))
    (_, first), (given, second) = fake
    assert (given["id"], given["resume"]) == (first.id, "allow")
    assert (first.ended, second.ended) == (0, 0)
    assert torch.load(last(tmp_path / "second"), weights_only=True)["flowalign"]["logs"] == {"Wandb": first.id}
    steps = [values["trainer/global_step"] for values in second.logged if "train/loss" in values]
    assert steps == [3]


def test_wandb_gets_settings_numbers_of_parameters_and_pictures(fake: Any, train: Train):
    module, _ = train("run", "logger=wandb")
    ((_, run),) = fake
    assert run.settings["batch"]["group_size"] == 2
    numbers = module.live.parameter_counts()
    assert run.settings["parameters"] == {"trained": numbers["trained"], "all": numbers["parameters"]}
    assert numbers["trained"] < numbers["parameters"]
    shown = [values for values in run.logged if "val/pictures" in values]
    assert [values["trainer/global_step"] for values in shown] == [0, 2]
    assert shown[0]["val/pictures"][0][-1] == 3
    (made,) = [values["rollout/pictures"] for values in run.logged if "rollout/pictures" in values]
    assert made == [(64, 64, 3)] * 2


def test_an_id_of_ones_own_begins_another_branch(fake: Any, train: Train, tmp_path: Path):
    train("first", "logger=wandb")
    words = ("logger=wandb", "+logger.wandb.id=branch", "trainer.max_epochs=2")
    train("second", *words, resume=last(tmp_path / "first"))
    assert [given["id"] for given, _ in fake] == [None, "branch"]


def test_a_run_that_fails_is_told_so_and_the_next_one_does_not_log_into_it(fake: Any):
    def fail() -> None:
        with closing([logger := Wandb()]):
            logger.log_metrics({"a": 1.0}, step=0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [run.ended for _, run in fake] == [1]
    assert external_run_ids([Wandb()]) == {}


def test_who_is_not_logged_in_gets_a_sentence(fake: Any, monkeypatch: pytest.MonkeyPatch):
    def init(**given: Any) -> None:
        raise KeyError("No API key configured.")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(ConfigError, match=r"No API key configured.*logger.wandb.offline=true"):
        _ = Wandb().experiment


@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_a_package_that_is_not_there_is_missed_at_once(
    tiny: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, logger: str
):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, logger, raising=False)
    (tmp_path / logger).mkdir()  # which passes for a package
    with pytest.raises(ConfigError, match=rf"pip install 'flowalign\[{logger}\]', or use logger=tensorboard"):
        check_groups(tiny(f"logger={logger}"))


def records(file: Path) -> Iterator[Any]:
    """What W&B has written: a log of LevelDB's kind, after seven bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the end of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def name_of(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def test_wandb_itself_keeps_every_value_under_one_id(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train("first", "logger=wandb", "logger.wandb.offline=true")
    words = ("logger=[wandb,csv]", "logger.wandb.offline=true", "trainer.max_epochs=2")
    train("second", *words, resume=last(tmp_path / "first"))
    ids, rows, settings = [], [], set()
    for folder in ("first", "second"):
        (file,) = (tmp_path / folder).glob("wandb/offline-run-*/*.wandb")
        for record in records(file):
            kind = record.WhichOneof("record_type")
            ids += [record.run.run_id] if kind == "run" else []
            settings |= {name_of(item) for item in record.config.update} if kind == "config" else set()
            rows += [{name_of(i): json.loads(i.value_json) for i in record.history.item}] if kind == "history" else []
        assert list(file.parent.glob("files/media/images/val/pictures_*.png"))
        assert list(file.parent.glob("files/media/images/rollout/pictures_*.png"))
    assert len(set(ids)) == 1
    assert {"algo", "parameters"} <= settings
    losses = [(row["trainer/global_step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert [step for step, _ in losses] == [1, 3]
    (again,) = [row for row in read_csv(tmp_path / "second" / "csv" / "metrics.csv") if "train/loss" in row]
    assert losses[1][1] == pytest.approx(float(again["train/loss"]))


# ------------------------------------------------------------ MLflow


def test_mlflow_itself_goes_on_with_the_run(train: Train, tmp_path: Path):
    pytest.importorskip("sqlalchemy")
    client_of = pytest.importorskip("mlflow.tracking").MlflowClient
    store = f"sqlite:///{tmp_path}/mlflow.db"
    words = ("logger=mlflow", f"logger.mlflow.tracking_uri={store}", f"logger.mlflow.artifact_location={tmp_path}/art")
    module, _ = train("first", *words)
    train("second", *words, "trainer.max_epochs=2", resume=last(tmp_path / "first"))
    client = client_of(store)
    (run,) = client.search_runs([client.get_experiment_by_name("flowalign").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["parameters.trained"] == str(module.live.parameter_counts()["trained"])
    assert run.data.params["trainer.max_epochs"] == "1"  # as first given: MLflow changes none
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 3]
    assert list(tmp_path.glob("art/**/*.png"))
    with pytest.raises(ConfigError, match="has no run"):
        train("third", *words[:1], f"logger.mlflow.tracking_uri={store}2", resume=last(tmp_path / "second"))


# ------------------------------------------------------------ all of them


def test_several_loggers_are_told_the_same(train: Train, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("run", "logger=[csv,tensorboard]")
    settings = (tmp_path / "run" / "csv" / "hparams.yaml").read_text()
    assert settings == (tmp_path / "run" / "tensorboard" / "hparams.yaml").read_text()
    assert "parameters.trained:" in settings
    assert "parameters.all:" in settings
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["images"]) == {"val/pictures", "rollout/pictures"}
    rows = read_csv(tmp_path / "run" / "csv" / "metrics.csv")
    for tag in ("val/reward", "train/loss", "rollout/reward_mean"):
        shown = [(event.step, pytest.approx(event.value)) for event in board.Scalars(tag)]
        assert [(int(row["step"]), float(row[tag])) for row in rows if tag in row] == shown


def test_a_curve_is_read_from_either_file(train: Train, tmp_path: Path):
    from omegaconf import OmegaConf

    found = {}
    for logger in ("csv", "tensorboard"):
        module, _ = train(logger, f"logger={logger}", "trainer.max_epochs=2")
        (tmp_path / logger / ".hydra").mkdir()
        OmegaConf.save(OmegaConf.create(module.recipe.config), tmp_path / logger / ".hydra" / "config.yaml")
        found[logger] = curves(tmp_path / logger, "val/")
    assert list(found["csv"]["val/reward"]) == [0, 1, 2]
    assert found["csv"].keys() == found["tensorboard"].keys()
    for name, points in found["csv"].items():
        assert points == pytest.approx(found["tensorboard"][name], abs=1e-6)


def test_the_first_epoch_of_one_update_is_not_taken_for_the_baseline(tmp_path: Path):
    """Both have step 0."""
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "csv").mkdir()
    settings = "batch: {updates: 1, passes: 1}\ntrainer: {check_val_every_n_epoch: 1}\n"
    (tmp_path / ".hydra" / "config.yaml").write_text(settings)
    (tmp_path / "csv" / "metrics.csv").write_text("step,val/reward\n0,0.1\n0,0.2\n1,0.3\n2,0.4\n")
    assert curves(tmp_path, "val/") == {"val/reward": {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}}
