"""Learning-rate factors as functions of the step."""

from __future__ import annotations

import pytest

from flowalign.schedule import Schedule


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_warm_up_rises_in_equal_steps_to_the_full_rate(kind: str):
    schedule = Schedule(kind=kind, warmup=4)  # type: ignore[arg-type]
    assert [schedule(k, 100) for k in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule(4, 100) == 1.0


@pytest.mark.parametrize(("kind", "middle"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)])
def test_the_rate_falls_to_its_floor_at_the_end_and_stays(kind: str, middle: float):
    schedule = Schedule(kind=kind, warmup=10, floor=0.1)  # type: ignore[arg-type]
    assert schedule(60, 110) == pytest.approx(middle)
    end = 1.0 if kind == "constant" else 0.1
    assert schedule(110, 110) == pytest.approx(end)
    assert schedule(500, 110) == pytest.approx(end)


def test_the_cosine_is_slower_at_both_ends_than_the_line():
    cosine, line = Schedule("cosine"), Schedule("linear")
    assert cosine(10, 100) > line(10, 100)
    assert cosine(90, 100) < line(90, 100)


def test_a_run_shorter_than_its_warm_up_does_not_divide_by_zero():
    assert Schedule("linear", warmup=5)(5, 5) == 1.0
