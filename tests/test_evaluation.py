"""What is judged and shown."""

import pytest

from flowalign.evaluation import Evaluation, Positions
from flowalign.prompts import PromptSet
from flowalign.sampler import Sampling
from flowalign.solvers import Euler


@pytest.mark.parametrize(("number", "shown"), [(128, 16), (512, 16), (8, 16), (7, 3), (16, 16), (512, 1)])
def test_the_pictures_that_are_shown_are_distinct_and_in_order(number: int, shown: int) -> None:
    places = Evaluation(Sampling(1, Euler()), shown=shown).shown_indices(number)
    assert len(places) == min(shown, number)
    assert places == sorted(set(places))
    assert set(places) <= set(range(number))


def test_the_grid_of_test_prompts_is_varied() -> None:
    prompts = PromptSet.read("shapes/test.jsonl", balance="tag")
    chosen = [prompts[i] for i in prompts.fixed(512)]
    shown = [chosen[i] for i in Evaluation(Sampling(1, Euler())).shown_indices(512)]
    assert len({str(p.metadata["include"]) for p in shown}) >= 14
    assert {p.metadata["tag"] for p in shown} == {"single", "two", "counting", "position"}


@pytest.mark.parametrize(("number", "ranks"), [(128, 1), (128, 3), (5, 4), (2, 4), (12, 4)])
@pytest.mark.parametrize("batch", [1, 2, 50])
def test_ranks_have_equally_many_positions_and_every_one_of_the_set_once(number: int, ranks: int, batch: int) -> None:
    dealt = [[part.tolist() for part in Positions(number, batch, rank, ranks)] for rank in range(ranks)]
    assert len({tuple(map(len, parts)) for parts in dealt}) == 1  # batch by batch, so that all ask together
    every = sorted(i for parts in dealt for part in parts for i in part)
    assert every == list(range(len(every)))
    assert number <= len(every) < number + ranks
