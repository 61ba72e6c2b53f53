"""Who starts a run's processes, what they agree on, and how a sweep survives its runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowalign.checks import ConfigError
from flowalign.launching import STARTED, check_tasks, choose_device, launch_id, launched_rank, rank_arguments
from tests.conftest import ROOT, TINY, installed, settled

SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
SHORT = settled(*TINY, "trainer.fast_dev_run=true", "logger=none", "callbacks=none")
slow = pytest.mark.slow


def shell(folder: Path, *words: str, launcher: tuple[str, ...] = (), **more: str) -> subprocess.CompletedProcess[str]:
    """train.py in a folder of its own, where outputs/ appears."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"} | more
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


# ------------------------------------------------------------ one GPU for each process


@pytest.mark.parametrize(
    ("environment", "devices", "own"),
    [
        ({}, 1, 0),
        ({}, [3], 3),
        ({"LOCAL_RANK": "2"}, 4, 2),
        ({"LOCAL_RANK": "1"}, [5, 7], 7),
        ({"LOCAL_RANK": "3"}, "auto", 3),
        (SLURM | {"SLURM_LOCALID": "2"}, 4, 2),
        ({"SLURM_LOCALID": "2"}, 4, 0),  # of the shell in which it was started
    ],
)
def test_a_process_has_its_own_gpu_before_a_reward_is_loaded(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], devices: Any, own: int
):
    import torch
    from omegaconf import DictConfig

    for name in ("LOCAL_RANK", "SLURM_LOCALID", "TORCHELASTIC_RUN_ID", *SLURM):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for accelerator in ("cpu", "gpu"):
        choose_device(DictConfig({"accelerator": accelerator, "devices": devices}))
    choose_device(DictConfig({"accelerator": "gpu", "devices": [9, 9, 9, 9]}))  # which the Trainer refuses
    assert chosen == [own]


def test_a_mac_trains_on_its_cpu_since_its_gpu_lacks_float64(monkeypatch: pytest.MonkeyPatch):
    import torch
    from omegaconf import DictConfig

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    trainer = DictConfig({"accelerator": "auto", "devices": 1})
    choose_device(trainer)
    assert trainer.accelerator == "cpu"
    choose_device(trainer)
    for given in ("gpu", "mps"):
        with pytest.raises(ConfigError, match=r"float64.*use trainer=cpu"):
            choose_device(DictConfig({"accelerator": given, "devices": 1}))


# ------------------------------------------------------------ one folder for all ranks


def test_without_a_launcher_nothing_is_changed(monkeypatch: pytest.MonkeyPatch):
    for name in ("TORCHELASTIC_RUN_ID", STARTED, *SLURM):
        monkeypatch.delenv(name, raising=False)
    assert rank_arguments(["seed=1"]) == ["seed=1"]
    assert STARTED not in os.environ


def test_ranks_of_slurm_name_their_job_and_only_the_first_writes_hydras_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(STARTED, "")  # so that it is put back
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert rank_arguments(["seed=1"]) == ["seed=1", "hydra.output_subdir=null", "hydra.job.name=rank3"]
    assert os.environ[STARTED] == "slurm_77.0"
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert rank_arguments(["seed=1"]) == ["seed=1"]
    assert launched_rank(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None  # sbatch without srun


BATCH = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "job.sh"}
TWO = BATCH | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, 4),
        (BATCH, 4),  # a batch script without tasks: Lightning starts the others
        (BATCH | {"SLURM_NTASKS": "1"}, 1),
        (TWO | STEP, 2),
        (TWO | {"SLURM_JOB_NAME": "bash"}, 2),
        (BATCH | {"SLURM_NTASKS": "1"} | TORCHRUN, 2),  # srun torchrun
        (TORCHRUN, 2),
    ],
)
def test_processes_that_are_the_devices_are_taken(environment: dict[str, str], number: int):
    check_tasks(environment, number, 1)


@pytest.mark.parametrize(
    ("environment", "number", "sentence"),
    [
        (TWO, 2, "write srun python train.py"),  # would wait for a second process
        (TWO | STEP, 1, "--ntasks-per-node=1"),
        (BATCH | {"SLURM_NTASKS": "1"}, 2, "--ntasks-per-node=2"),  # would train on one, with batches for two
        (BATCH | {"SLURM_NTASKS": "2"} | STEP, 2, "write --ntasks-per-node=2"),
        (TORCHRUN, 1, "write trainer.devices=2 trainer.num_nodes=1"),  # would be two runs in one folder
        (TORCHRUN | {"WORLD_SIZE": "8"}, 2, "write trainer.devices=2 trainer.num_nodes=4"),
    ],
)
def test_processes_that_are_not_the_devices_are_refused(environment: dict[str, str], number: int, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        check_tasks(environment, number, 1)


def test_ranks_of_torchrun_take_the_time_of_the_first(monkeypatch: pytest.MonkeyPatch):
    """However late they come, and another one after a restart."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    times = iter(["first", "second"])
    monkeypatch.setattr("flowalign.launching.time.strftime", lambda form: next(times))
    assert [launch_id(environment, rank) for rank in (0, 1, 2)] == ["first"] * 3
    again = environment | {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert [launch_id(again, rank) for rank in (0, 1)] == ["second"] * 2
    assert launch_id({"TORCHELASTIC_RUN_ID": "mine"}, 0) == "mine"


def test_the_name_of_the_folder_is_the_agreed_one(compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    monkeypatch.setenv(STARTED, "agreed")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = hydra_compose("train", return_hydra_config=True).hydra
        assert node.run.dir == "outputs/train/agreed"
        assert node.sweep.dir == "outputs/train/multirun_agreed"
        monkeypatch.delenv(STARTED)
        assert len(node.run.dir) == len("outputs/train/2026-01-31_12-00-00")


@slow
def test_torchrun_makes_one_folder(tmp_path: Path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    words = settled(*SHORT, "trainer.devices=2", "strategy=ddp")
    done = shell(tmp_path, *words, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "outputs" / "train").iterdir()
    assert {"summary.json", ".hydra", "run.log", "rank1.log"} <= {path.name for path in folder.iterdir()}


# ------------------------------------------------------------ sweeps


@pytest.mark.parametrize("words", [("-m", "seed=0,1"), ("hparams_search=grid",)])
def test_a_sweep_of_runs_with_several_devices_is_refused_with_the_command(
    say: Callable[..., tuple[int, str, str]], words: tuple[str, ...]
):
    from flowalign.run import main

    code, _, err = say(main, *words, "trainer.devices=2", "strategy=ddp")
    assert code == 2
    assert "start it with torchrun --nproc-per-node 2 train.py -m" in err
    assert err.count("\n") == 1


def test_a_failed_run_leaves_a_record_and_the_table_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from omegaconf import OmegaConf

    from flowalign import sweeps

    node = {
        "mode": "MULTIRUN",
        "runtime": {"output_dir": str(tmp_path / "1")},
        "overrides": {"task": ["test=false", "seed=1"]},
    }
    cfg = OmegaConf.create(node | {"sweeper": {"_target_": "hydra._internal.BasicSweeper"}})
    cfg.mode = sweeps.RunMode.MULTIRUN
    monkeypatch.setattr(sweeps.HydraConfig, "get", lambda: cfg)
    monkeypatch.setattr(sweeps, "_sweeps", {tmp_path: {"test=false"}})

    def refused(cfg: Any) -> float:
        try:
            raise ValueError("use seed=2.")
        except ValueError:
            raise SystemExit(2) from None

    def broken(cfg: Any) -> float:
        raise ZeroDivisionError("division by zero")

    assert sweeps.record_failures(lambda cfg: 1.5)(cfg) == 1.5
    assert sweeps.report() == 0
    assert sweeps.record_failures(refused)(cfg) is None
    assert sweeps.report() == 2
    assert capsys.readouterr().err == "1 failed:\n     1  seed=1  use seed=2.\n"
    for code in (143, -1):  # a signal that was obeyed by us, by submitit
        with pytest.raises(SystemExit):
            sweeps.record_failures(lambda cfg, code=code: sys.exit(code))(cfg)
    assert sweeps.record_failures(broken)(cfg) is None
    assert sweeps.report() == 1
    assert sweeps.record_failures(lambda cfg: 1.5)(cfg) == 1.5  # the sweep is repeated in its folder
    assert sweeps.report() == 0
    cfg.sweeper._target_ = "some.OptunaSweeper"  # which has to know
    with pytest.raises(RuntimeError, match="division by zero"):
        sweeps.record_failures(broken)(cfg)
    cfg.mode = sweeps.RunMode.RUN
    with pytest.raises(SystemExit):
        sweeps.record_failures(refused)(cfg)


FAILING = ("data.val.limit=4,0,3", "hydra.sweep.dir=sweep")
"""The second of three runs is refused once it has begun."""


def check_survived(folder: Path, done: subprocess.CompletedProcess[str], code: int) -> None:
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    assert "1 failed:\n     1  data.val.limit=0  data.val: limit keeps the first prompts" in done.stderr
    assert sorted(path.parent.name for path in (folder / "sweep").glob("*/summary.json")) == ["0", "2"]
    assert json.loads((folder / "sweep" / "1" / "failure.json").read_text())["refused"] is True


@slow
def test_a_refused_run_does_not_end_a_sweep(tmp_path: Path):
    check_survived(tmp_path, shell(tmp_path, "-m", *SHORT, *FAILING), 2)


@slow
@pytest.mark.skipif(not installed("hydra_plugins.hydra_joblib_launcher"), reason="needs the extra sweep")
def test_a_refused_run_does_not_end_a_sweep_of_joblib(tmp_path: Path):
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    check_survived(tmp_path, shell(tmp_path, "-m", *joblib, *SHORT, *FAILING), 2)


@slow
@pytest.mark.skipif(not installed("hydra_plugins.hydra_optuna_sweeper"), reason="needs the extra sweep")
def test_a_search_gets_its_numbers_and_survives_a_trial(tmp_path: Path):
    """fast_dev_run logs no metrics, hence a real epoch."""
    words = settled(*TINY, "logger=none", "callbacks=none", "test=false")
    search = ("hparams_search=optuna", "hydra.sweeper.n_trials=3")
    swept = ("data.val.limit=choice(0,4)", "hydra.sweeper.sampler.seed=7")
    done = shell(tmp_path, "-m", *words, *search, *swept, "hydra.sweep.dir=sweep")
    assert done.returncode == 2, done.stderr[-3000:]
    best = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    assert "data.val.limit: 4" in best
    assert float(best.partition("best_value: ")[2]) > 0
    assert " failed:\n" in done.stderr
    assert (tmp_path / "outputs" / "optuna.db").is_file()


@pytest.mark.skipif(not installed("hydra_plugins.hydra_submitit_launcher"), reason="needs the extra slurm")
def test_jobs_of_slurm_compose(compose: Callable[..., Any]):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = ["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=4", "trainer.devices=4"]
        node = hydra_compose("train", words, return_hydra_config=True).hydra
    assert node.launcher._target_.endswith("SlurmLauncher")
    assert node.launcher.tasks_per_node == 4


@pytest.mark.skipif(not installed("hydra_plugins.hydra_submitit_launcher"), reason="needs the extra slurm")
def test_a_sweep_whose_jobs_have_other_tasks_than_devices_is_refused(say: Callable[..., tuple[int, str, str]]):
    from flowalign.run import main

    code, _, err = say(main, "-m", "hydra/launcher=submitit_slurm", "seed=0,1", "trainer.devices=2", "strategy=ddp")
    assert code == 2
    assert "write hydra.launcher.tasks_per_node=2." in err
