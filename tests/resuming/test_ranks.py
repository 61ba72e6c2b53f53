"""How many ranks there are changes who does what, and not what is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.loggers import read_csv
from flowalign.strategies import folders
from tests.resuming.cells import BY_THE_CLOCK, EPOCHS, words
from tests.strategies.jobs import Job, run, together

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

RANKS = (1, 2, 4)
SAME = (
    "batch.prompts=4", "batch.group_size=4", "batch.micro=2", "batch.updates=1", "optimizer.eps=1e-3",
    "trainer.max_epochs=1", "evaluation.num_val=5", "evaluation.sampling.batch_size=1", "evaluation.shown=5",
)  # fmt: skip
"""eps as in tests/strategies: with 1e-8 an entry whose gradient is zero but for rounding moves by a whole step."""
ALGORITHMS = ("nft", "grpo")


def on(ranks: int) -> tuple[str, ...]:
    return () if ranks == 1 else ("strategy=ddp", f"trainer.devices={ranks}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], Job]:
    """Every algorithm on 1, 2 and 4 ranks: with pictures walked 4 at a time on each, and one at a time."""
    folder = tmp_path_factory.mktemp("ranks")
    made = {
        (algo, ranks, batch): Job(
            str(folder / f"{algo}_{ranks}_{batch}"),
            [*words(algo, "lora"), *SAME, f"rollout.batch_size={batch}", *on(ranks)],
            keeps=True,
        )
        for algo in ALGORITHMS
        for ranks in RANKS
        for batch in ("4", "1")
    }
    for ranks in RANKS:
        jobs = [job for (_, number, _), job in made.items() if number == ranks]
        if ranks == 1:
            for job in jobs:
                run(job)
        else:
            together(jobs, folder, ranks)
    return made


def points(job: Job, ranks: int) -> dict[str, torch.Tensor]:
    """Of all ranks, in one order."""
    parts = [torch.load(Path(job.folder) / f"points{rank}.pt", weights_only=True) for rank in range(ranks)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = sorted(range(len(joined["sample"])), key=lambda i: (int(joined["sample"][i]), float(joined["sigma"][i])))
    return {name: values[order] for name, values in joined.items()}


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("ranks", RANKS[1:])
def test_rollouts_and_advantages_do_not_depend_on_the_ranks(made: dict[Any, Job], algo: str, ranks: int):
    """To the last bit, where equally many pictures are walked at a time: 4 of 16 on one rank, of 8 or 4 on several."""
    for batch in ("4", "1"):
        one, other = points(made[algo, 1, batch], 1), points(made[algo, ranks, batch], ranks)
        assert one["advantage"].abs().max() > 0.1
        for name, values in one.items():
            assert torch.equal(values, other[name]), name
        assert rollouts(made[algo, 1, batch]) == rollouts(made[algo, ranks, batch])


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_an_evaluation_that_does_not_divide_is_that_of_one_rank(made: dict[Any, Job], ranks: int):
    """Five pictures on two ranks and on four; to rounding, since two trainings and sums over ranks lie before."""
    one, other = (made["nft", n, "4"].metrics[-1] for n in (1, ranks))
    judged = [name for name in one if name.startswith("val/")]
    assert {"val/reward", "val/strict", "val/quality"} <= set(judged)
    assert [one[name] for name in judged] == pytest.approx([other[name] for name in judged], abs=1e-3)
    alone, several = (made["nft", n, "4"].rank(0)["shown"]["val"] for n in (1, ranks))
    assert len(alone) == 5
    assert alone == several  # the grid has the pictures of all ranks


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_other_batches_change_a_rollout_by_rounding_only(made: dict[Any, Job], algo: str):
    """Products of another number of rows are rounded otherwise."""
    one, other = (points(made[algo, 1, batch], 1) for batch in ("4", "1"))
    assert torch.equal(one["sigma"], other["sigma"])
    torch.testing.assert_close(one["x"], other["x"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("ranks", RANKS[1:])
def test_one_update_of_the_whole_epoch_is_the_same(made: dict[Any, Job], algo: str, ranks: int):
    """To rounding: gradients are summed in another order."""
    one, other = (folders.read(made[algo, n, "4"].last)["state_dict"] for n in (1, ranks))
    assert one.keys() == other.keys()
    assert max(float((t - other[name]).abs().max()) for name, t in one.items()) <= 1e-6


def rollouts(job: Job) -> list[dict[str, str]]:
    """What was logged of each rollout: rewards of all ranks together."""
    logged = read_csv(Path(job.folder) / "csv" / "metrics.csv")
    found = [{k: v for k, v in row.items() if k not in BY_THE_CLOCK} for row in logged if "rollout/reward_mean" in row]
    assert found
    return found


def test_a_run_goes_on_with_other_ranks_and_its_next_rollout_is_exact(tmp_path: Path):
    """Two epochs on one rank, then on two, and the other way round."""
    given = [*words("nft", "lora_ddp"), "rollout.batch_size=2"]
    alone = [word for word in given if not word.startswith(("strategy=", "trainer.devices="))]
    straight = Job(str(tmp_path / "straight"), alone)
    first = Job(str(tmp_path / "first"), alone, killed=EPOCHS // 2)
    run(straight)
    run(first)
    second = Job(str(tmp_path / "first"), given, resume=str(first.last))
    start = Job(str(tmp_path / "start"), given, killed=EPOCHS // 2)
    together([second, start], tmp_path)
    run(back := Job(str(tmp_path / "start"), alone, resume=str(start.last)))
    assert rollouts(straight)[: EPOCHS // 2 + 1] == rollouts(second)[: EPOCHS // 2 + 1]
    for job in (straight, second, back):
        assert len(rollouts(job)) == EPOCHS
        assert folders.read(job.last)["global_step"] == 2 * EPOCHS
