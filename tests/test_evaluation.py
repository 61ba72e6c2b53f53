"""What is judged and shown."""

import pytest

from flowalign.evaluation import Evaluation
from flowalign.prompts import PromptSet
from flowalign.sampler import Sampling
from flowalign.solvers import Euler


@pytest.mark.parametrize(("number", "shown"), [(128, 16), (512, 16), (8, 16), (7, 3), (16, 16), (512, 1)])
def test_the_pictures_that_are_shown_are_distinct_and_in_order(number: int, shown: int) -> None:
    places = Evaluation(Sampling(1, Euler()), shown=shown).shows(number)
    assert len(places) == min(shown, number)
    assert places == sorted(set(places))
    assert set(places) <= set(range(number))


def test_the_grid_of_test_prompts_is_varied() -> None:
    prompts = PromptSet.read("shapes/test.jsonl", balance="tag")
    chosen = [prompts[i] for i in prompts.fixed(512)]
    shown = [chosen[i] for i in Evaluation(Sampling(1, Euler())).shows(512)]
    assert len({str(p.metadata["include"]) for p in shown}) >= 14
    assert {p.metadata["tag"] for p in shown} == {"single", "two", "counting", "position"}
