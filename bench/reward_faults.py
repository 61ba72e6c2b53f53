"""Runs whose reward server fails: a short real training run for every fault, and a table of how they ended.

`python bench/reward_faults.py` (`--only hangs garbage` selects some). A run of two epochs on the embedded model is
scored by bench/faulty_reward.py, which answers correctly in the baseline evaluation and the first epoch and then fails;
cases with `@` fail at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
BOUND = 300.0
"""Seconds after which a run is killed and counts as hung."""
TINY = (
    *("batch.prompts=2", "batch.group_size=2", "batch.micro=3", "batch.updates=2", "tune=lora", "rollout.num_steps=4"),
    *("rollout.batch_size=4", "times.num=null", "evaluation.sampling.num_steps=3", "evaluation.num_val=4"),
    *(
        "test=false",
        "evaluation.shown=2",
        "trainer.max_epochs=2",
        "trainer.accelerator=cpu",
        "trainer.check_val_every_n_epoch=9",
    ),
    *("logger=csv", "seed=0"),
)
REMOTE = (
    *("reward=remote", "reward.objective.batch_size=2", "reward.objective.in_flight=1"),
    *("reward.objective.patience.connect=1", "reward.objective.patience.read=5", "reward.objective.patience.total=25"),
    *("reward.objective.patience.retries=1", "reward.objective.patience.backoff=0.1"),
    "reward.objective.patience.start=15",
)
BEFORE = 4
"""Requests of the baseline evaluation and of the first epoch: 4 + 4 images, 2 per request."""
FAULTS = (
    *("none", "dies", "hangs", "trickles", "cut_off", "garbage", "error_500", "out_of_memory", "busy", "unauthorised"),
    *("too_large", "wrong_id", "missing", "other_reward", "text", "infinite", "null", "one_of_two_dies"),
    *("one_request_fails", "slow_start", "nobody@", "hangs@"),
)


@dataclass
class Outcome:
    """How a run ended. zeros: rewards of exactly 0 in its metrics, which no image here can get."""

    fault: str
    on_failure: str
    seconds: float
    code: int | None
    epochs: int
    scored: str
    zeros: int
    checkpoint: str
    reason: str
    """The first reason that the client logged."""
    end: str
    """The message with which the run ended."""


class Server:
    """bench/faulty_reward.py as a process."""

    def __enter__(self) -> str:
        command = [sys.executable, str(ROOT / "bench/faulty_reward.py")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        return f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


def urls(fault: str, server: str, other: str) -> list[str]:
    """The server URLs of a run."""
    if fault == "nobody@":
        return ["http://127.0.0.1:9"]
    if fault == "one_of_two_dies":
        return [f"{server}/dies/1", f"{other}/none"]
    if fault == "one_request_fails":
        return [f"{server}/too_large/{BEFORE}/1"]
    if fault in ("none", "slow_start"):
        return [f"{server}/{fault}"]
    return [f"{server}/{fault.rstrip('@')}" + ("" if fault.endswith("@") else f"/{BEFORE}")]


def train(fault: str, on_failure: str, folder: Path) -> Outcome:
    run = folder / f"{fault.rstrip('@')}{'_at_once' * fault.endswith('@')}_{on_failure}"
    with Server() as server, Server() as other:
        addresses = ",".join(urls(fault, server, other))
        words = [*TINY, *REMOTE, f"reward.objective.urls=[{addresses}]", f"reward.objective.on_failure={on_failure}"]
        began = time.monotonic()
        code, said = program([*words, f"hydra.run.dir={run}"], folder / f"{run.name}.txt")
        seconds = time.monotonic() - began
    epochs, checkpoint = reached(run)
    scored, zeros = metrics(run)
    return Outcome(fault, on_failure, round(seconds, 1), code, epochs, scored, zeros, checkpoint, *words_of(said))


def program(words: Sequence[str], output: Path) -> tuple[int | None, str]:
    """Exit code (None: it had to be killed) and output of `python train.py …`, forked to save the imports."""
    process = multiprocessing.get_context("fork").Process(target=_program, args=(words, output))
    process.start()
    process.join(BOUND)
    code = process.exitcode
    process.kill()
    process.join()
    return code, output.read_text(errors="replace")


def _program(words: Sequence[str], output: Path) -> None:
    from flowalign.run import main

    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.argv = ["train.py", *words]
    main()


def reached(run: Path) -> tuple[int, str]:
    """Epochs in the newest checkpoint, and whether it can be opened."""
    from flowalign.commands.saved import load_run

    path = run / "checkpoints" / "last.ckpt"
    if not path.is_file():
        return 0, "none"
    try:
        return load_run(str(path), "live").epoch, "opens"
    except Exception as error:
        return 0, f"broken ({type(error).__name__})"


def metrics(run: Path) -> tuple[str, int]:
    """Share of the images of each epoch that were scored, and the number of rewards in the metrics that are 0."""
    import csv

    found = run / "csv" / "metrics.csv"
    if not found.is_file():
        return "", 0
    with found.open() as file:
        rows = list(csv.DictReader(file))
    lost = [float(row["rollout/reward_nan_fraction"]) for row in rows if row.get("rollout/reward_nan_fraction")]
    rewards = [row[name] for row in rows for name in ("rollout/reward_mean", "val/reward") if row.get(name)]
    return " ".join(f"{1 - share:.0%}" for share in lost), sum(float(value) == 0 for value in rewards)


def words_of(said: str) -> tuple[str, str]:
    """The client's first reason, and the line that ended the run; empty if there is none."""
    lines = [re.sub(r"\x1b\[[0-9;]*m|http://127\.0\.0\.1:\d+", "", line).strip() for line in said.splitlines()]
    reasons = [line.partition("could not be scored: ")[2] for line in lines if "could not be scored: " in line]
    ends = [line for line in lines if re.match(r"(\w+\.)*\w*Error: |.*\[ERROR\]", line)]
    return (reasons or [""])[0], (ends or [""])[-1].partition("[ERROR] - ")[2] or (ends or [""])[-1]


def table(outcomes: Sequence[Outcome]) -> str:
    names = list(asdict(outcomes[0]))
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(str(value) for value in asdict(outcome).values())} |" for outcome in outcomes]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=FAULTS, metavar="FAULT")
    parser.add_argument("--on-failure", nargs="+", choices=("drop", "stop"), default=("drop",))
    parser.add_argument("--to", type=Path, default=None, help="folder; outputs/bench/<time> unless given")
    given = parser.parse_args()
    folder = given.to or ROOT / "outputs" / "bench" / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True, exist_ok=True)
    import flowalign.commands.saved
    import flowalign.module  # noqa: F401

    outcomes = []
    for fault in given.only:
        for on_failure in given.on_failure:
            outcomes.append(train(fault, on_failure, folder))
            print(table(outcomes).splitlines()[-1], flush=True)
    (folder / "reward_faults.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n")
    (folder / "reward_faults.md").write_text(table(outcomes) + "\n")
    print(folder / "reward_faults.md")


if __name__ == "__main__":
    main()
