"""Launching a run's processes: what they agree on before Hydra creates a folder, and which launches are invalid."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig

from flowalign.checks import ConfigError
from flowalign.planning import devices

STARTED = "FLOWALIGN_STARTED"
"""Environment variable that names the folder of a run; conf/train.yaml uses the time of day if it is not set."""
START_TIMEOUT = timedelta(minutes=5)
"""How long the other ranks wait for rank 0 to set the name."""


def rank_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments for this rank. All ranks use the folder of rank 0, where only rank 0 writes Hydra's files.

    Processes started by Lightning need no change: Lightning passes them their arguments.
    """
    rank = launched_rank(os.environ)
    if rank is None:
        return list(argv)
    os.environ[STARTED] = os.environ.get(STARTED) or launch_id(os.environ, rank)
    own = [] if rank == 0 else ["hydra.output_subdir=null", f"hydra.job.name=rank{rank}"]
    return [*argv, *own]


def launched_rank(environment: Mapping[str, str]) -> int | None:
    """This process's rank under torchrun or srun; None otherwise."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return int(environment["RANK"])
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return int(environment["SLURM_PROCID"])
    return None


def local_rank(environment: Mapping[str, str]) -> int:
    """This process's rank on its machine, as set by torchrun, Lightning's launcher or srun."""
    own = environment.get("SLURM_LOCALID", "0") if launched_rank(environment) is not None else "0"
    return int(environment.get("LOCAL_RANK", own))


def choose_device(trainer: DictConfig) -> None:
    """Make this process's GPU current before a reward or a model is loaded.

    Lightning does so later; until then every process on a machine would use the first GPU.
    """
    import torch

    if torch.backends.mps.is_available():
        _avoid_mps(trainer)
    elif trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(f"trainer.accelerator={trainer.accelerator}: PyTorch finds no GPU here; use trainer=cpu.")
    if trainer.accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return
    available = torch.cuda.device_count()
    gpus = trainer.devices if isinstance(trainer.devices, ListConfig) else range(available)
    rank = local_rank(os.environ)
    if rank < len(gpus) and gpus[rank] < available:  # the Trainer rejects missing devices
        torch.cuda.set_device(gpus[rank])


def _avoid_mps(trainer: DictConfig) -> None:
    """Use the CPU where Lightning would choose an Apple GPU, which lacks float64; ConfigError if it was asked for."""
    if trainer.accelerator == "auto":
        trainer.accelerator = "cpu"
    elif trainer.accelerator in ("gpu", "mps"):
        raise ConfigError(
            f"trainer.accelerator={trainer.accelerator}: Apple's GPUs have no float64, in which losses and advantages "
            "are computed here: use trainer=cpu."
        )


def launch_id(environment: Mapping[str, str], rank: int) -> str:
    """A text that is the same on every rank, however far apart they start: the time of rank 0, or the job's id."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return f"slurm_{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return environment["TORCHELASTIC_RUN_ID"]
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), timeout=START_TIMEOUT)
    restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = PrefixStore(f"flowalign/{environment['TORCHELASTIC_RUN_ID']}/{restart}", store)
    if rank == 0:
        shared.set(STARTED, time.strftime("%Y-%m-%d_%H-%M-%S"))
    return shared.get(STARTED).decode()


def check_launch(cfg: DictConfig, multirun: bool) -> None:
    """Raise ConfigError for a sweep whose runs would each start processes from this one, which would repeat the sweep,
    and for SLURM tasks that do not match the devices of the run.
    """
    node = HydraConfig.get()
    number = devices(cfg.trainer)
    launcher = str(node.launcher._target_).rsplit(".", 1)[-1]
    here = launcher in ("BasicLauncher", "JoblibLauncher")
    if here:
        check_tasks(os.environ, number, cfg.trainer.num_nodes)
    elif launcher == "SlurmLauncher" and (tasks := node.launcher.tasks_per_node) != number:
        raise ConfigError(
            f"hydra.launcher.tasks_per_node={tasks} and trainer.devices={number}: every device is a task of SLURM, so "
            f"write hydra.launcher.tasks_per_node={number}."
        )
    if number > 1 and here and (multirun or node.mode == RunMode.MULTIRUN) and launched_rank(os.environ) is None:
        raise ConfigError(
            f"a sweep in one process has one device a run (trainer.devices={cfg.trainer.devices}): start it with "
            f"torchrun --nproc-per-node {number} train.py -m …, or give every run a job of its own with "
            "hydra/launcher=submitit_slurm."
        )


def check_tasks(environment: Mapping[str, str], number: int, nodes: int) -> None:
    """Raise ConfigError if Lightning would wait for tasks that are never started, or leave devices unused.

    Lightning counts SLURM's tasks, except under torchrun and in interactive shells. With one device it does not count
    torchrun's processes, each of which would then be a whole run in the same folder.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        started, local = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
        if started != number * nodes:
            raise ConfigError(
                f"torchrun has started {started} process(es), and the run has {number} device(s) on {nodes} node(s): "
                f"every device is a process, so write trainer.devices={local} trainer.num_nodes={started // local}."
            )
        return
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_NTASKS" not in environment or interactive:
        return
    tasks = int(environment["SLURM_NTASKS"])
    if tasks > 1 and launched_rank(environment) is None:
        raise ConfigError(f"the job has {tasks} tasks of SLURM and this is none of them: write srun python train.py ….")
    if tasks != number * nodes:
        raise ConfigError(
            f"SLURM has {tasks} task(s), and the run {number} device(s) on {nodes} node(s): every device is a task, so "
            f"write --nodes={nodes} --ntasks-per-node={number}."
        )
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
        raise ConfigError(f"write --ntasks-per-node={number} for SLURM: Lightning does not count on --ntasks alone.")
