"""How a run's processes come to be: what they agree on before Hydra makes a folder, and what cannot be started."""

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
"""Names the folder of a run; conf/train.yaml takes the time of day where it is not set."""
PATIENCE = timedelta(minutes=5)
"""Until rank 0 must have come as far as the others."""


def agree(argv: Sequence[str]) -> list[str]:
    """The arguments for this rank. All ranks take the folder of rank 0, which alone writes what Hydra writes there.

    Processes that Lightning starts need nothing: it tells them.
    """
    rank = launched_rank(os.environ)
    if rank is None:
        return list(argv)
    os.environ[STARTED] = os.environ.get(STARTED) or started(os.environ, rank)
    own = [] if rank == 0 else ["hydra.output_subdir=null", f"hydra.job.name=rank{rank}"]
    return [*argv, *own]


def launched_rank(environment: Mapping[str, str]) -> int | None:
    """This process's rank under torchrun or srun; None without them."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return int(environment["RANK"])
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return int(environment["SLURM_PROCID"])
    return None


def local_rank(environment: Mapping[str, str]) -> int:
    """This process's number on its machine: of torchrun, of Lightning for those that it starts, or of srun."""
    own = environment.get("SLURM_LOCALID", "0") if launched_rank(environment) is not None else "0"
    return int(environment.get("LOCAL_RANK", own))


def choose_device(trainer: DictConfig) -> None:
    """Makes this process's GPU the current one before a reward or a model is loaded: Lightning does so after that, and
    until then every process of a machine would use the first one."""
    import torch

    if torch.backends.mps.is_available():
        _pass_over_apples(trainer)
    elif trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(f"trainer.accelerator={trainer.accelerator}: PyTorch finds no GPU here; use trainer=cpu.")
    if trainer.accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return
    there = torch.cuda.device_count()
    named = trainer.devices if isinstance(trainer.devices, ListConfig) else range(there)
    place = local_rank(os.environ)
    if place < len(named) and named[place] < there:  # what is not there, the Trainer refuses
        torch.cuda.set_device(named[place])


def _pass_over_apples(trainer: DictConfig) -> None:
    """Lightning would choose their GPUs, which lack float64."""
    if trainer.accelerator == "auto":
        trainer.accelerator = "cpu"
    elif trainer.accelerator in ("gpu", "mps"):
        raise ConfigError(
            f"trainer.accelerator={trainer.accelerator}: Apple's GPUs have no float64, in which losses and advantages "
            "are computed here: use trainer=cpu."
        )


def started(environment: Mapping[str, str], rank: int) -> str:
    """The same text on every rank, however far apart they start: the time of rank 0, or the number of the job."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return f"slurm_{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return environment["TORCHELASTIC_RUN_ID"]
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), timeout=PATIENCE)
    again = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = PrefixStore(f"flowalign/{environment['TORCHELASTIC_RUN_ID']}/{again}", store)
    if rank == 0:
        shared.set(STARTED, time.strftime("%Y-%m-%d_%H-%M-%S"))
    return shared.get(STARTED).decode()


def check_launch(cfg: DictConfig, multirun: bool) -> None:
    """ConfigError for a sweep whose runs would each start processes out of this one: these would repeat the sweep; and
    for tasks of SLURM that are not the devices of the run.
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
    """ConfigError where Lightning would wait for tasks that nobody starts, or leave devices out: it counts the tasks of
    SLURM, but for torchrun and interactive shells.
    """
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_NTASKS" not in environment or "TORCHELASTIC_RUN_ID" in environment or interactive:
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
