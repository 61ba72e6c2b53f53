"""Fault injection: runs that are killed, signalled, starved or given damaged files, with a table of the outcomes.

`python bench/faults.py` runs everything; `--only killed disk` selects cases, `--kills 50` sets the number of random
kills. A run is three epochs of the embedded model; a resumed run is compared bit for bit with an uninterrupted one.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import forked  # noqa: E402
from bench.forked import Ended  # noqa: E402

PAIR = ("trainer.devices=2", "batch.micro=1")
"""Overrides of a run with two ranks."""
GRACE = 10.0
"""Seconds for Python's own helper processes to notice that they are orphans."""


@dataclass
class Outcome:
    """One row. seconds: longest time from the fault to the end of the last process; lost: most epochs that had to be
    repeated; equal: number of resumed runs equal to the uninterrupted one."""

    case: str
    runs: int
    codes: str
    seconds: str
    lost: str
    hung: int
    equal: str
    said: str


class Bench:
    """Runs in a folder, and the uninterrupted runs that they are compared with."""

    def __init__(self, folder: Path, kills: int) -> None:
        self.folder, self.kills = folder, kills
        self._whole: dict[tuple[str, ...], tuple[Path, float]] = {}

    def whole(self, *words: str, ranks: int = 1) -> tuple[Path, float]:
        """The folder of an uninterrupted run, and how long it took."""
        key = (*words, str(ranks))
        if key not in self._whole:
            folder, began = self.folder / f"whole{len(self._whole)}", time.monotonic()
            ended = forked.run(folder, *words, ranks=ranks)
            assert set(ended.codes) == {0}, ended.said[-3000:]
            self._whole[key] = folder, time.monotonic() - began
        return self._whole[key]

    def resumed(self, folder: Path, *words: str, ranks: int = 1) -> bool:
        """Resume a run. Returns whether it ends like the uninterrupted one."""
        ended = forked.run(folder, *words, "ckpt_path=auto", ranks=ranks)
        return set(ended.codes) == {0} and forked.same_end(folder, self.whole(*words, ranks=ranks)[0])

    def row(self, case: str, ended: list[Ended], lost: Sequence[int] = (), equal: int | None = None) -> Outcome:
        codes = sorted({code for one in ended for code in one.codes})
        times = [one.seconds for one in ended if one.seconds is not None]
        return Outcome(
            case, len(ended), " ".join(map(str, codes)), f"{max(times):.1f}" if times else "",
            str(max(lost)) if lost else "", sum(one.hung for one in ended),
            "" if equal is None else f"{int(equal)} of {len(ended)}",
            ended[-1].last_words.replace(str(self.folder), "…"),
        )  # fmt: skip


def begun(run: forked.Started, epoch: int = 0) -> None:
    """Wait until a run with a Trap has begun `epoch`."""
    while run.processes[0].is_alive() and epochs(run.folder) <= epoch:
        time.sleep(0.05)


def epochs(folder: Path) -> int:
    """Number of epochs that a run with a Trap has begun."""
    return int((folder / "epoch").read_text() or 0) + 1 if (folder / "epoch").exists() else 0


def lost(folder: Path) -> int:
    """Number of epochs that were begun and are not in the checkpoint."""
    written = (folder / "checkpoints" / "last.ckpt").exists()
    return epochs(folder) - (int(forked.last(folder)["epoch"]) + 1 if written else 0)


# ------------------------------------------------------------ deaths


def killed(bench: Bench) -> Iterator[Outcome]:
    """kill -9 at random moments of random epochs, then resume."""
    draw, (_, length) = random.Random(0), bench.whole()
    ended, folders, repeated, equal = [], [], [], 0
    for i in range(bench.kills):
        folders.append(bench.folder / f"killed{i}")
        started = forked.start(folders[-1], *forked.TRAP)
        begun(started, draw.randrange(3))
        time.sleep(draw.uniform(0, length / 10))  # about an epoch
        began = time.time()
        started.send(signal.SIGKILL)
        ended.append(started.wait())
        ended[-1].seconds = time.time() - began
        repeated.append(lost(folders[-1]))
        equal += bench.resumed(folders[-1])
        print(f"killed {i + 1}: repeated {repeated}, {equal} equal", file=sys.stderr, flush=True)
    yield bench.row("kill -9 at a random moment", ended, repeated, equal)


def dead_rank(bench: Bench) -> Iterator[Outcome]:
    """One of two ranks is killed."""
    for strategy in ("ddp", "fsdp"):
        for rank in (0, 1):
            for moment in ("rollout", "optimisation"):
                folder = bench.folder / f"dead_{strategy}{rank}_{moment}"
                trap = trapped(moment, [rank], "SIGKILL")
                ended = forked.run(folder, *PAIR, f"strategy={strategy}", *trap, ranks=2)
                yield bench.row(f"{strategy}: kill -9 of rank {rank} during {moment}", [ended], [lost(folder)])


def launched(bench: Bench) -> Iterator[Outcome]:
    """Two ranks, the second started by Lightning: how the process ends that the user has started."""
    for send, rank in (("SIGKILL", 1), ("SIGTERM", 0), ("SIGTERM", 1)):
        folder = bench.folder / f"launched_{send}{rank}"
        ended = forked.run(folder, *PAIR, "strategy=ddp", *trapped("rollout", [rank], send))
        yield bench.row(f"Lightning's launcher: {send} to rank {rank} during rollout", [ended], [lost(folder)])


def torchrun(bench: Bench) -> Iterator[Outcome]:
    """Two ranks under a real torchrun: SIGKILL to one rank, SIGTERM to one rank, SIGTERM to the launcher."""
    words = (*PAIR, "strategy=ddp")
    for send, rank in (("SIGKILL", 1), ("SIGTERM", 0), ("SIGTERM", None)):
        name = f"{send} to {'the launcher' if rank is None else f'rank {rank}'} during rollout"
        folder = bench.folder / f"torchrun_{send}{rank}"
        if rank is None:  # it has written a checkpoint by then
            written = folder / "checkpoints" / "last.ckpt"
            ended = forked.torchrun(folder, *words, *forked.TRAP, terminated_after=written)
        else:
            ended = forked.torchrun(folder, *words, *trapped("rollout", [rank], send))
        yield bench.row(f"torchrun: {name}", [ended], [lost(folder)], bench.resumed(folder, *words, ranks=2))


# ------------------------------------------------------------ signals


def trapped(moment: str, ranks: list[int], send: str) -> tuple[str, ...]:
    at = "+callbacks.trap."
    return *forked.TRAP, f"{at}moment={moment}", f"{at}send={send}", f"{at}ranks={str(ranks).replace(' ', '')}"


def terminated(bench: Bench) -> Iterator[Outcome]:
    """SIGTERM to one or both of two ranks, then resume."""
    words = (*PAIR, "strategy=ddp")
    for ranks in ([0], [1], [0, 1]):
        for moment in ("rollout", "optimisation", "validation", "writing"):
            folder = bench.folder / f"term{''.join(map(str, ranks))}_{moment}"
            ended = forked.run(folder, *words, *trapped(moment, ranks, "SIGTERM"), ranks=2)
            gone, equal = lost(folder), bench.resumed(folder, *words, ranks=2)
            name = "both ranks" if len(ranks) == 2 else f"rank {ranks[0]}"
            yield bench.row(f"SIGTERM to {name} during {moment}", [ended], [gone], equal)


def requeued(bench: Bench) -> Iterator[Outcome]:
    """SIGUSR1 under SLURM, with a scontrol that only records its arguments."""
    folder = bench.folder / "requeued"
    folder.mkdir(parents=True)
    scontrol = folder / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ > {folder}/asked\n")
    scontrol.chmod(0o755)
    slurm = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    ended = forked.run(folder, "requeue=true", *trapped("optimisation", [0], "SIGUSR1"), environment=slurm)
    asked = (folder / "asked").read_text().strip() if (folder / "asked").exists() else "nothing"
    name = f"SIGUSR1 under SLURM, requeue=true: scontrol is asked `{asked}`"
    yield bench.row(name, [ended], [lost(folder)], bench.resumed(folder))


def interrupted(bench: Bench) -> Iterator[Outcome]:
    """Ctrl-C with rewards in worker processes."""
    workers = ("reward=brightness", "~reward.held_out", "reward.objective._target_=flowalign.rewards.workers.InWorkers")
    reward = "+reward.objective.reward={_target_: flowalign.rewards.brightness.Brightness}"
    folder = bench.folder / "interrupted"
    started = forked.start(folder, *workers, reward, *trapped("optimisation", [], "SIGINT"))
    group = started.processes[0].pid
    begun(started)
    began = time.time()
    started.send(signal.SIGINT)
    ended = started.wait()
    ended.seconds = time.time() - began
    time.sleep(GRACE)
    left = subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True).stdout.split()
    yield bench.row(f"Ctrl-C with rewards in processes: {len(left)} left after {GRACE:.0f} s", [ended])


# ------------------------------------------------------------ files


def disk(bench: Bench) -> Iterator[Outcome]:
    """A disk that is full from the second checkpoint on; needs root."""
    folder = bench.folder / "disk"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], check=True)
    try:
        ended = forked.run(folder, "~callbacks.best")
        epoch = forked.last(folder)["epoch"]
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    yield bench.row(f"disk full: last.ckpt is whole, of epoch {epoch}", [ended])


class Bomb:
    """A pickle that executes a command when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {self.target}",)


def spoilt(whole: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield invalid checkpoints, with what is wrong with each."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    content = bytearray((whole / "checkpoints" / "last.ckpt").read_bytes())
    for name, data in (("empty", b""), ("truncated", content[: len(content) // 2]), ("foreign", b"GIF89a" * 99)):
        (folder / f"{name}.ckpt").write_bytes(data)
        yield name, folder / f"{name}.ckpt"
    content[len(content) // 2] ^= 1
    (folder / "upset.ckpt").write_bytes(content)
    yield "one bit upset", folder / "upset.ckpt"
    torch.save({"state_dict": Bomb(folder / "executed")}, folder / "code.ckpt")
    yield "code in it, zipped", folder / "code.ckpt"
    (folder / "pickle.ckpt").write_bytes(pickle.dumps(Bomb(folder / "executed")))
    yield "code in it, a plain pickle", folder / "pickle.ckpt"
    torch.save({"state_dict": {}}, folder / "other.ckpt")
    yield "of another program", folder / "other.ckpt"


def checkpoints(bench: Bench) -> Iterator[Outcome]:
    """Resume from invalid checkpoints."""
    whole, _ = bench.whole()
    for name, path in spoilt(whole, bench.folder / "spoilt"):
        ended = forked.run(bench.folder / f"from_{path.stem}", f"ckpt_path={path}")
        executed = (bench.folder / "spoilt" / "executed").exists()
        yield bench.row(f"checkpoint: {name}" + (" (EXECUTED)" if executed else ""), [ended])


def another_base(bench: Bench) -> Iterator[Outcome]:
    """Resume with other weights in the pipeline."""
    from safetensors.torch import load_file, save_file

    import flowalign

    base = bench.folder / "another_base"
    shutil.copytree(Path(flowalign.__file__).parent / "assets" / "tiny_sd3", base)
    file = next((base / "transformer").glob("*.safetensors"))
    save_file({key: t * 1.01 for key, t in load_file(file).items()}, file)
    ckpt = bench.whole()[0] / "checkpoints" / "last.ckpt"
    ended = forked.run(bench.folder / "on_another_base", f"model.pretrained={base}", f"ckpt_path={ckpt}")
    yield bench.row("checkpoint: of another base", [ended])


def cache(bench: Bench) -> Iterator[Outcome]:
    """Cached prompt encodings that are truncated, and one with a flipped bit."""
    kept, whole = bench.folder / "cache", bench.whole()[0]
    first = forked.run(bench.folder / "cached", f"encoding.cache={kept}")
    files = sorted(kept.glob("**/*.safetensors"))
    for file in files[1:]:
        file.write_bytes(file.read_bytes()[:-100])
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    second = bench.folder / "cached_again"
    ended = forked.run(second, f"encoding.cache={kept}")
    again = ended.said.count("is encoded again")
    equal = forked.same_end(second, whole)
    assert first.codes == (0,), first.said[-3000:]
    yield bench.row(f"prompt cache: {again} of {len(files)} damaged files made again", [ended], equal=equal)


def two(bench: Bench) -> Iterator[Outcome]:
    """A second run in the folder of one that is still running."""
    folder = bench.folder / "two"
    first = forked.start(folder, *forked.TRAP)
    begun(first)
    second = forked.run(bench.folder / "second", f"paths.output_dir={folder}")
    first.send(signal.SIGKILL)
    first.wait()
    yield bench.row("second run in a folder that is in use", [second])


# ------------------------------------------------------------ numbers and memory


def not_finite(bench: Bench) -> Iterator[Outcome]:
    """A NaN loss in one step, on one of two ranks, and in every epoch."""
    trap = "+callbacks.trap._target_=bench.trap.NotFinite"
    ddp = (*PAIR, "strategy=ddp", "+callbacks.trap.rank=1")
    for name, words, ranks in (
        ("NaN in one step", ("+callbacks.trap.epochs=[1]",), 1),
        ("NaN in one step, on rank 1 of 2", ("+callbacks.trap.epochs=[1]", *ddp), 2),
        ("NaN in every epoch, max_skipped=1", ("+callbacks.trap.epochs=[0,1,2]", "optimisation.max_skipped=1"), 1),
    ):
        folder = bench.folder / "".join(filter(str.isalnum, name))
        yield bench.row(name, [forked.run(folder, trap, *words, ranks=ranks)])


def memory(bench: Bench) -> Iterator[Outcome]:
    """CPU memory runs out, in the baseline evaluation and in the second rollout."""
    for pictures, phase in ((0, "evaluation"), (13, "rollout")):
        folder = bench.folder / f"memory_{phase}"
        reward = ("reward.objective._target_=bench.trap.Hungry", f"+reward.objective.pictures={pictures}")
        yield bench.row(f"out of memory in the {phase}", [forked.run(folder, *reward)])


CASES: dict[str, Callable[[Bench], Iterator[Outcome]]] = {
    function.__name__: function
    for function in (
        *(killed, dead_rank, launched, torchrun, terminated, requeued, interrupted, disk, checkpoints, another_base),
        *(cache, two, not_finite, memory),
    )
}


def table(outcomes: list[Outcome]) -> str:
    names = list(asdict(outcomes[0]))
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(str(value) for value in asdict(outcome).values())} |" for outcome in outcomes]
    return "\n".join(lines)


def measure(rows: Iterator[Outcome], to: Path) -> None:
    """Write the table `to`, and its values to a JSON file beside it, row by row."""
    outcomes = []
    for outcome in rows:
        outcomes.append(outcome)
        print(table(outcomes).splitlines()[-1], flush=True)
        to.with_suffix(".json").write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n")
        to.write_text(table(outcomes) + "\n")
    print(to)


def prepare() -> None:
    """Import what every run needs, once, before forking."""
    import torch

    import flowalign.callbacks.checkpoint_io
    import flowalign.callbacks.preemption
    import flowalign.callbacks.ranks
    import flowalign.summary  # noqa: F401

    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--to", type=Path, default=None, help="folder; outputs/bench/<time> unless given")
    given = parser.parse_args()
    folder = (given.to or forked.ROOT / "outputs" / "bench" / time.strftime("%Y-%m-%d_%H-%M-%S")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare()
    bench = Bench(folder, given.kills)
    measure((outcome for case in given.only for outcome in CASES[case](bench)), folder / "faults.md")


if __name__ == "__main__":
    main()
