"""Efficiency of a remote reward: 1,000 images over 4 replicas whose reward takes 50 ms per image.

Each image encodes its number and the reward reads it, so that lost and mispaired scores are counted. The ideal time is
images × seconds / replicas. `python bench/reward_load.py`; the servers are real processes on the loopback interface.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


@dataclass
class Row:
    """One image size. lost: images without a score; mispaired: images with the score of another one."""

    size: int
    batch_size: int
    in_flight: int
    pictures: int
    replicas: int
    ideal_s: float
    actual_s: float
    efficiency: float
    images_per_s: float
    client_cpu_s: float
    lost: int
    mispaired: int


@contextmanager
def serving(replicas: int, seconds: float) -> Iterator[list[str]]:
    """Start `replicas` servers and yield their URLs."""
    option = f"_target_: flowalign.scoring.Scorer\nobjective: {{ _target_: bench.marked.Marked, seconds: {seconds} }}\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "reward").mkdir()
        (Path(folder) / "reward" / "marked.yaml").write_text(option)
        words = ["-m", "flowalign.cli", "reward-server", "reward=marked", f"config_dir={folder}", "port=0"]
        processes = [
            subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(replicas)
        ]
        try:
            yield [process.stdout.readline().split()[-1] for process in processes if process.stdout]
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()


def measure(urls: list[str], pictures: int, size: int, seconds: float, batch_size: int, in_flight: int) -> Row:
    """Time one call of the reward with all images."""
    import torch

    from bench.marked import marked
    from flowalign.rewards.remote import Remote

    numbers = torch.randperm(1 << 24, generator=torch.Generator().manual_seed(size))[:pictures].tolist()
    media = marked(numbers, size)
    remote = Remote(urls, batch_size=batch_size, in_flight=in_flight)
    remote.self_check()
    remote(media[: 4 * len(urls)], [""] * 4 * len(urls), [{}] * 4 * len(urls))  # opens the connections
    began, cpu = time.perf_counter(), time.process_time()
    scores = remote(media, [""] * pictures, [{}] * pictures)
    actual, cpu = time.perf_counter() - began, time.process_time() - cpu
    lost = scores.isnan()
    ideal = pictures * seconds / len(urls)
    return Row(
        size=size,
        batch_size=batch_size,
        in_flight=in_flight,
        pictures=pictures,
        replicas=len(urls),
        ideal_s=round(ideal, 2),
        actual_s=round(actual, 2),
        efficiency=round(ideal / actual, 3),
        images_per_s=round(pictures / actual, 1),
        client_cpu_s=round(cpu, 2),
        lost=int(lost.sum()),
        mispaired=int((scores != torch.tensor(numbers))[~lost].sum()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.05, help="per image")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 512], help="heights and widths of the images")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--to", type=Path, default=None, help="folder; outputs/bench/<time> unless given")
    given = parser.parse_args()
    names = [field.name for field in fields(Row)]
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    rows = []
    with serving(given.replicas, given.seconds) as urls:
        for size, in_flight in product(given.sizes, given.in_flight):
            rows.append(measure(urls, given.pictures, size, given.seconds, given.batch_size, in_flight))
            print(f"| {' | '.join(map(str, asdict(rows[-1]).values()))} |", flush=True)
    folder = given.to or ROOT / "outputs" / "bench" / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reward_load.json").write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    print(folder / "reward_load.json")


if __name__ == "__main__":
    main()
