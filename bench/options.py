"""Speedup of each optimisation: the same phase with and without it, alternately in one process, as a ratio.

`python bench/options.py --repeats 7`, or `--only merged prefix_3`. Rollouts and optimisation phases run outside of the
Trainer, after one warm-up epoch; weights do not change. Calls are the rows that the network evaluates.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.measuring import QUIET, TEN_STEPS, built, composed  # noqa: E402

COMMON = (
    "seed=0", "reward=brightness", "reward.self_check=false", "trainer.max_epochs=1", "trainer.accelerator=cpu",
    "evaluation.num_val=2", "evaluation.num_test=2", *QUIET,
)  # fmt: skip
GROUP = ("algo=grpo", "steps=fast", "steps.width=1", "batch.prompts=2", "batch.group_size=24", "batch.micro=24")
SMALL = ("batch.prompts=4", "batch.group_size=8", "batch.micro=8", "batch.updates=2", "rollout.batch_size=32")
LORA = ("algo=nft", "tune=lora", *TEN_STEPS, *SMALL)
GUIDED = ("algo=nft", *TEN_STEPS, *SMALL, "rollout.guidance=3")


def first_noise(step: int) -> tuple[str, ...]:
    """One stochastic step, the `step`-th of ten."""
    return (*GROUP, f"steps.low={step - 1}", f"steps.high={step}")


@dataclass(frozen=True)
class Option:
    """Overrides of both runs, of the plain and of the cheaper one, and the phase that is timed."""

    common: tuple[str, ...]
    plain: tuple[str, ...]
    cheaper: tuple[str, ...]
    phase: str = "rollout"


OPTIONS = {
    "prefix_3": Option(first_noise(3), ("rollout.same_noise=false",), ("rollout.same_noise=true",)),
    "prefix_5": Option(first_noise(5), ("rollout.same_noise=false",), ("rollout.same_noise=true",)),
    "merged": Option(LORA, ("running.merge_adapters=false",), ("running.merge_adapters=true",)),
    "rollout_batch_2": Option(LORA, ("rollout.batch_size=2",), ("rollout.batch_size=16",)),
    "rollout_batch_8": Option(LORA, ("rollout.batch_size=8",), ("rollout.batch_size=16",)),
    "micro_2": Option(LORA, ("batch.micro=2",), ("batch.micro=16",), "optimise"),
    "one_branch": Option(
        GUIDED, ("optimisation.cfg_gradient=both",), ("optimisation.cfg_gradient=conditional",), "optimise"
    ),
}


class Phases:
    """The phases of one run, callable separately."""

    def __init__(self, words: tuple[str, ...], model: list[str], folder: str) -> None:
        self.module, self.trainer = built(composed([*COMMON, *words, *model, f"paths.output_dir={folder}"]))
        self.trainer.fit(self.module)
        self.calls = 0

    def rollout(self) -> None:
        """Images, rewards and points of an epoch."""
        from flowalign.scoring import ScoreQueue

        module = self.module
        with ScoreQueue(module.recipe.scorer.ahead) as queue, module.live.use(None):
            got = module.collect(1, 0, module.device, queue, lambda local: local, lambda done, reward: None)
            got.assign_credit()
        self.calls = got.calls

    def optimise(self) -> None:
        """Forward pass, loss and backward pass for the points of the last epoch."""
        module, self.calls = self.module, 0
        for idx in module.train_dataloader():
            point, cond = module.buffer.gather(idx)
            v = module._velocity(point.x, point.sigma, cond)
            point.frozen |= dict.fromkeys(module.recipe.same_as_live, v.detach())
            module.recipe.algorithm.loss(point, v)[0].mean().backward()
            self.calls += len(idx)
        for p in module.live.trained().values():
            p.grad = None


@dataclass
class Row:
    """Medians. ratio: of paired times, plain ÷ cheaper, with its range."""

    option: str
    phase: str
    plain: str
    cheaper: str
    calls_plain: int
    calls_cheaper: int
    plain_s: float
    cheaper_s: float
    ratio: float
    ratio_range: tuple[float, float]


def timed(call: Callable[[], None]) -> float:
    """CPU seconds of this process."""
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(name: str, repeats: int, model: list[str]) -> Row:
    """Measure both alternately, so that other load slows both."""
    option = OPTIONS[name]
    with tempfile.TemporaryDirectory() as folder:
        one, other = (Phases((*option.common, *words), model, folder) for words in (option.plain, option.cheaper))
        pairs = [[timed(getattr(phases, option.phase)) for phases in (one, other)] for _ in range(repeats + 1)][1:]
    ratios = [plain / cheaper for plain, cheaper in pairs]
    return Row(
        name, option.phase, " ".join(option.plain), " ".join(option.cheaper), one.calls, other.calls,
        round(median(p for p, _ in pairs), 3), round(median(c for _, c in pairs), 3),
        round(median(ratios), 3), (round(min(ratios), 3), round(max(ratios), 3)),
    )  # fmt: skip


def main() -> None:
    import torch

    from bench.epoch import random_model
    from flowalign.process import silence_libraries

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=OPTIONS, default=list(OPTIONS), metavar="OPTION")
    parser.add_argument("--model", default="tiny_sd3", help="or a random one: 8M, 30M (parameters)")
    parser.add_argument("--to", type=Path, default=None, help="folder; outputs/bench/<time> unless given")
    given = parser.parse_args()
    torch.set_num_threads(1)
    silence_libraries()
    folder = given.to or ROOT / "outputs" / "bench" / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        model = random_model(given.model, Path(place))
        for name in given.only:
            rows.append(measure(name, given.repeats, model))
            print(json.dumps(asdict(rows[-1])), flush=True)
            (folder / "options.json").write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    print(folder / "options.json")


if __name__ == "__main__":
    main()
