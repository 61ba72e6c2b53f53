"""Real runs of `python train.py …` as processes that can be signalled, killed and waited for. They are forked, since
importing everything takes longer than one of these runs.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BOUND = 300.0
"""Seconds after which a run is killed and counts as hung; generous, as the machine may be busy."""
TINY = (
    *("batch.prompts=2", "batch.group_size=2", "batch.micro=2", "batch.updates=2", "tune=lora", "rollout.num_steps=2"),
    *("rollout.batch_size=1", "times.num=null", "evaluation.sampling.num_steps=1", "evaluation.sampling.batch_size=1"),
    *("evaluation.num_val=4", "test=false", "evaluation.shown=2", "trainer.max_epochs=3", "trainer.accelerator=cpu"),
    *("trainer.check_val_every_n_epoch=1", "logger=none", "callbacks=[checkpoint,preemption,ranks]", "seed=0"),
    *("reward=brightness", "~reward.held_out", "optimizer.lr=0.003", "callbacks.ranks.limit=10"),
)
TRAP = ("+callbacks.trap._target_=bench.trap.Trap", "+callbacks.trap.folder=${paths.output_dir}")


@dataclass
class Started:
    """The ranks of a run."""

    folder: Path
    processes: list[Any]

    def send(self, number: int) -> None:
        """Signal every rank and its process group, as a terminal does."""
        for process in self.processes:
            if process.is_alive():
                os.killpg(process.pid, number)

    def wait(self, bound: float = BOUND) -> Ended:
        """Wait for all ranks; those still running after `bound` seconds are killed."""
        until = time.monotonic() + bound
        for process in self.processes:
            process.join(max(until - time.monotonic(), 0))
        ended, hung = time.time(), any(process.is_alive() for process in self.processes)
        for process in self.processes:
            process.kill()
            process.join()
        codes = tuple(process.exitcode for process in self.processes)
        said = "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("said*.txt")))
        snapped = [float(file.read_text()) for file in self.folder.glob("snapped*")]
        return Ended(codes, hung, ended - min(snapped) if snapped else None, said)


@dataclass
class Ended:
    """How a run ended. seconds: from the first signal of a Trap to the end of the last rank; said: the output."""

    codes: tuple[int, ...]
    hung: bool
    seconds: float | None
    said: str

    @property
    def last_words(self) -> str:
        """The last warning or error that the run logged."""
        said = re.findall(r"\[flowalign\]\[(?:ERROR|WARNING)\] - (.*)", re.sub(r"\x1b\[[0-9;]*m", "", self.said))
        return said[-1] if said else ""


def start(folder: Path, *words: str, ranks: int = 1, environment: Mapping[str, str] | None = None) -> Started:
    """Start `train.py` with TINY and these overrides in `folder`, one process per rank as under torchrun."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("said*.txt"), *folder.glob("snapped*")):
        old.unlink()
    words = settled(*TINY, *words, f"hydra.run.dir={folder}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        told = dict(environment or {})
        if ranks > 1:
            told |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
            told |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            told |= {"TORCHELASTIC_RUN_ID": "faults"}
        arguments = (words, rank, told, folder / f"said{rank}.txt")
        processes.append(multiprocessing.get_context("fork").Process(target=_program, args=arguments))
        processes[-1].start()
    return Started(folder, processes)


def settled(*words: str) -> tuple[str, ...]:
    """Keep the last override of every key, since Hydra rejects two choices of one group."""
    return tuple({word.partition("=")[0]: word for word in words}.values())


def _program(words: Sequence[str], rank: int, environment: Mapping[str, str], output: Path) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from flowalign.run import main

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # The parent may have replaced these objects, as pytest does.
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.update(environment)
    rank_zero_only.rank = rank  # Lightning determined it at import
    os.chdir(ROOT)
    sys.argv = ["train.py", *words]
    sys.modules["__main__"].__spec__ = None  # Lightning's launcher then starts train.py
    main()


def run(folder: Path, *words: str, ranks: int = 1, environment: Mapping[str, str] | None = None) -> Ended:
    """`start` a run and wait for it."""
    return start(folder, *words, ranks=ranks, environment=environment).wait()


def torchrun(folder: Path, *words: str, ranks: int = 2, terminated_after: Path | None = None) -> Ended:
    """Run under a real torchrun and return its exit code; it gets SIGTERM once `terminated_after` exists."""
    folder.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    with (folder / "said0.txt").open("w") as file:
        agent = subprocess.Popen(
            [sys.executable, *launcher, *settled(*TINY, *words, f"hydra.run.dir={folder}")],
            cwd=ROOT, env=environment, start_new_session=True, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    while terminated_after is not None and not terminated_after.exists() and agent.poll() is None:
        time.sleep(0.05)
    if terminated_after is not None and agent.poll() is None:
        (folder / "snapped").write_text(str(time.time()))
        agent.terminate()
    try:
        agent.wait(BOUND)
    except subprocess.TimeoutExpired:
        hung = True
    else:
        hung = bool(of_session(agent.pid))
    ended = time.time()
    if hung:
        os.killpg(agent.pid, signal.SIGKILL)
    snapped = [float(file.read_text()) for file in folder.glob("snapped*")]
    said = (folder / "said0.txt").read_text(errors="replace")
    return Ended((agent.wait(),), hung, ended - min(snapped) if snapped else None, said)


def of_session(leader: int) -> list[str]:
    """Processes that are left of a session."""
    return subprocess.run(["pgrep", "-s", str(leader)], capture_output=True, text=True).stdout.split()


def last(folder: Path) -> dict[str, Any]:
    """Load last.ckpt of a run. Raises ValueError if it is damaged, and FileNotFoundError if there is none."""
    from flowalign.strategies.folders import read
    from flowalign.strategies.intact import check_intact

    path = folder / "checkpoints" / "last.ckpt"
    check_intact(path)
    return read(path)


def differing(one: Any, other: Any, place: str = "") -> list[str]:
    """Paths at which two nested structures differ, bit for bit."""
    import torch

    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return [place]
        return [found for key in one for found in differing(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return differing(dict(enumerate(one)), dict(enumerate(other)), place)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [place]
    return [] if one == other else [place]


def same_end(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, copies, optimiser state and counters."""
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    first, second = last(one), last(other)
    return not [place for part in parts for place in differing(first[part], second[part], part)]
