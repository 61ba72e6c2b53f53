"""Jobs under a real SLURM that are signalled, requeued and cancelled, in arrays and sweeps, with a table of outcomes.

`python bench/slurm_runs.py` starts its own single-node SLURM (see slurm.py); `--only requeued array` selects cases.
Runs are those of faults.py with more epochs, and are compared with uninterrupted ones without SLURM.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import faults, forked  # noqa: E402
from bench.faults import Bench, Outcome  # noqa: E402
from bench.slurm import Cluster, Job, cluster  # noqa: E402

EPOCHS = ("trainer.max_epochs=12",)
PAIR = (*faults.PAIR, "strategy=ddp")
AGAIN = ("--requeue", "--open-mode=append")
RESUMING = ("ckpt_path=auto", "requeue=true")
PYTHON = shlex.quote(sys.executable)
TORCHRUN = f"{PYTHON} -m torch.distributed.run --standalone --nproc-per-node 2"


class Slurm:
    """Runs as jobs of a cluster."""

    def __init__(self, folder: Path, here: Cluster, long: int = 300) -> None:
        """long: epochs of a run that exceeds its time limit."""
        self.folder, self.here, self.long, self.bench = folder, here, long, Bench(folder, kills=0)

    def submit(self, name: str, *words: str, how: str = f"srun {PYTHON}", options: tuple[str, ...] = ()) -> str:
        """Submit a job that trains in the folder `name`, which may contain variables of the job."""
        quoted = shlex.join(forked.settled(*forked.TINY, *EPOCHS, *words))
        script = self.folder / f"{re.sub(r'[^a-z0-9_]', '', name)}.sh"
        script.write_text(f"#!/bin/sh\n{how} train.py {quoted} hydra.run.dir={self.folder}/{name}\n")
        set_out = (f"--chdir={forked.ROOT}", f"--output={script.with_suffix('')}.out", "--export=ALL,OMP_NUM_THREADS=1")
        return self.here.submit(script, *set_out, *options)

    def begun(self, number: str, name: str, epoch: int = 3, bound: float = 300.0) -> None:
        """Wait until a run with a Trap has begun `epoch`."""
        deadline = time.monotonic() + bound
        while faults.epochs(self.folder / name) <= epoch:
            job = self.here.job(number)
            if time.monotonic() > deadline or job.state not in ("PENDING", "CONFIGURING", "RUNNING"):
                raise TimeoutError(f"{name} is {job.state}: {self.said(name)[-3000:]}")
            time.sleep(0.05)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text(errors="replace")

    def equal(self, name: str, *words: str, ranks: int = 1) -> int:
        return forked.same_end(self.folder / name, self.bench.whole(*EPOCHS, *words, ranks=ranks)[0])

    def row(self, case: str, name: str, job: Job, seconds: float | None = None, **others: str) -> Outcome:
        """The row of a finished job. codes: those of its tasks as srun reports them, then its own."""
        tasks = re.findall(r"[Ee]xit(?:ed with exit)? code (\d+)", self.said(name))
        codes = " ".join([*dict.fromkeys(tasks), f"{job.code} {job.state}"])
        said = f"{job.restarts} restarts" + "; asked for once" * ("could not be put back" not in self.said(name))
        known = {"lost": "", "equal": ""} | others
        return Outcome(
            case, 1, codes, "" if seconds is None else f"{seconds:.1f}", known["lost"], 0, known["equal"], said
        )


def wait_of(job: Job) -> float:
    """Seconds that SLURM makes a requeued job wait."""
    eligible, requeued = (datetime.fromisoformat(job.fields[name]) for name in ("EligibleTime", "SubmitTime"))
    return (eligible - requeued).total_seconds()


def signalled(slurm: Slurm, case: str, name: str, *words: str, how: str, options: tuple[str, ...], to: str) -> Outcome:
    """SIGUSR1 in the middle of a run, which is then requeued and completes."""
    ranks, here = 2 if words else 1, slurm.here
    arguments = (*forked.TRAP, *RESUMING, *words)
    number = slurm.submit(name, *arguments, how=how, options=(*AGAIN, *options))
    slurm.begun(number, name)
    began = time.monotonic()
    here.ask("scancel", *to.split(), "--signal=USR1", number)
    waiting = here.until(number, "PENDING", restarts=1, bound=60)
    seconds, gone = time.monotonic() - began, faults.lost(slurm.folder / name)
    here.start_now(number)
    job = here.ended(number)
    assert "resuming from" in slurm.said(name) or job.code, "it began anew"
    equal = f"{int(job.code == 0 and slurm.equal(name, *words, ranks=ranks))} of 1"
    return slurm.row(
        f"{case}; may start after {wait_of(waiting):.0f} s", name, job, seconds, lost=str(gone), equal=equal
    )


def requeued(slurm: Slurm) -> Iterator[Outcome]:
    """SIGUSR1 to a job of one process."""
    srun, plain = f"srun {PYTHON}", f"exec {PYTHON}"
    yield signalled(slurm, "SIGUSR1 to a task of srun", "task", how=srun, options=(), to="")
    yield signalled(slurm, "SIGUSR1 to the batch script, which is python", "batch", how=plain, options=(), to="--batch")


def ranks(slurm: Slurm) -> Iterator[Outcome]:
    """SIGUSR1 to jobs of two ranks, for each way of starting them."""
    two = ("--cpus-per-task=2",)
    for case, name, how, options, to in (
        ("two tasks of srun", "tasks", f"srun {PYTHON}", ("--ntasks-per-node=2",), ""),
        ("two ranks of torchrun in a task", "torchrun", f"srun {TORCHRUN}", two, ""),
        ("two ranks of Lightning in the batch script", "launched", f"exec {PYTHON}", two, "--full"),
    ):
        yield signalled(slurm, f"SIGUSR1 to {case}", name, *PAIR, how=how, options=options, to=to)


def cancelled(slurm: Slurm) -> Iterator[Outcome]:
    """`scancel`, and a second job that resumes."""
    for name, words, options in (("cancelled", (), ()), ("cancelled_two", PAIR, ("--ntasks-per-node=2",))):
        number = slurm.submit(name, *forked.TRAP, *RESUMING, *words, options=options)
        slurm.begun(number, name)
        began = time.monotonic()
        slurm.here.ask("scancel", number)
        job = slurm.here.ended(number, bound=60)
        while "output folder" not in slurm.said(name) and time.monotonic() < began + 60:  # it ends later
            time.sleep(0.1)
        seconds, gone = time.monotonic() - began, faults.lost(slurm.folder / name)
        outcome = slurm.row(f"scancel of {2 if words else 1} task(s)", name, job, seconds, lost=str(gone))
        again = slurm.here.ended(slurm.submit(name, *RESUMING, *words, options=(*AGAIN, *options)))
        outcome.equal = f"{int(again.code == 0 and slurm.equal(name, *words, ranks=2 if words else 1))} of 1"
        yield outcome


def array(slurm: Slurm) -> Iterator[Outcome]:
    """SIGUSR1 to the job of an array that has the array's own number; the other one continues."""
    here, name = slurm.here, "array$SLURM_ARRAY_TASK_ID"
    options = (*AGAIN, "--array=0-1", f"--output={slurm.folder}/array%a.out")
    number = slurm.submit(name, *forked.TRAP, *RESUMING, options=options)
    for i in (0, 1):
        slurm.begun(f"{number}_{i}", f"array{i}", epoch=1)
    (named,) = (i for i in (0, 1) if here.job(f"{number}_{i}").fields["JobId"] == number)
    here.ask("scancel", "--signal=USR1", f"{number}_{named}")
    here.until(f"{number}_{named}", "PENDING", restarts=1, bound=60)
    here.start_now(f"{number}_{named}")
    for i, case in ((named, "SIGUSR1 to one job of an array"), (1 - named, "the other job of the array")):
        job = here.ended(f"{number}_{i}")
        yield slurm.row(case, f"array{i}", job, equal=f"{int(slurm.equal(f'array{i}'))} of 1")


def limited(slurm: Slurm) -> Iterator[Outcome]:
    """The signal that SLURM sends before the time limit, with the full wait before the restart."""
    limit, epochs = ("--time=2", "--signal=USR1@30"), f"trainer.max_epochs={slurm.long}"
    number = slurm.submit("limited", *forked.TRAP, *RESUMING, epochs, options=(*AGAIN, *limit))
    job = slurm.here.ended(number, bound=3600)
    equal = f"{int(job.code == 0 and slurm.equal('limited', epochs))} of 1"
    yield slurm.row(f"{' '.join(limit)}, {slurm.long} epochs", "limited", job, equal=equal)


def refused(slurm: Slurm) -> Iterator[Outcome]:
    """Two tasks of which the second is never started, and a number of devices that differs from that of tasks."""
    for case, name, how, words in (
        ("--ntasks-per-node=2 without srun", "alone", PYTHON, PAIR),
        ("two tasks and one device", "devices", f"srun {PYTHON}", ()),
    ):
        number = slurm.submit(name, *words, how=how, options=("--ntasks-per-node=2",))
        outcome = slurm.row(case, name, slurm.here.ended(number, bound=60))
        outcome.said = slurm.said(name).splitlines()[0]
        yield outcome


def sweep(slurm: Slurm) -> Iterator[Outcome]:
    """Two runs of a sweep, one job each; one gets the signal that submitit has SLURM send before the time limit.

    With limits of up to ten minutes submitit treats this signal as a timeout whenever it arrives.
    """
    words = [word for word in forked.settled(*forked.TINY, *EPOCHS, *forked.TRAP) if not word.startswith("seed=")]
    folder, here = slurm.folder / "sweep", slurm.here
    launcher = ("hydra/launcher=submitit_slurm", "hydra.launcher.max_num_timeout=3", "hydra.launcher.timeout_min=10")
    command = [sys.executable, "train.py", "-m", *launcher, "seed=0,1", f"hydra.sweep.dir={folder}", "ckpt_path=auto"]
    command += words
    environment = here.environment | {"OMP_NUM_THREADS": "1"}
    with (slurm.folder / "sweep.out").open("w") as file:
        started = subprocess.Popen(command, cwd=forked.ROOT, env=environment, stdout=file, stderr=file)
    try:
        _await_epoch(folder / "0", started)
        (number,) = {line.split("_")[0] for line in here.ask("squeue", "--noheader", "--format=%i").split()}
        here.ask("scancel", "--signal=USR2", f"{number}_0")
        here.until(f"{number}_0", "PENDING", restarts=1, bound=60)
        here.start_now(f"{number}_0")
        code = started.wait(600)
    finally:
        started.kill()
        started.wait()
    for i in (0, 1):
        other = slurm.bench.whole(*EPOCHS, f"seed={i}")[0]
        outcome = slurm.row(
            f"run {i} of a sweep of submitit" + ", sent SIGUSR2" * (i == 0), "sweep", here.job(f"{number}_{i}")
        )
        outcome.equal, outcome.said = (
            f"{int(forked.same_end(folder / str(i), other))} of 1",
            f"{outcome.said}; sweep: {code}",
        )
        yield outcome


def _await_epoch(folder: Path, sweep: subprocess.Popen[bytes]) -> None:
    while faults.epochs(folder) <= 3:
        if sweep.poll() is not None:
            raise TimeoutError("the sweep has ended")
        time.sleep(0.1)


CASES: dict[str, Callable[[Slurm], Iterator[Outcome]]] = {
    function.__name__: function for function in (requeued, ranks, cancelled, array, refused, sweep, limited)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--to", type=Path, default=None, help="folder; outputs/bench/<time> unless given")
    parser.add_argument("--long", type=int, default=300, help="epochs of the run that exceeds its time limit")
    given = parser.parse_args()
    folder = (given.to or forked.ROOT / "outputs" / "bench" / time.strftime("%Y-%m-%d_%H-%M-%S")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    faults.prepare()
    with cluster(folder / "slurm") as here:
        slurm = Slurm(folder, here, given.long)
        faults.measure((row for case in given.only for row in CASES[case](slurm)), folder / "slurm.md")


if __name__ == "__main__":
    main()
