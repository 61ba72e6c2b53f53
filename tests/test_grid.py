"""Pictures side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowalign.evaluation import Shown
from flowalign.grid import grid


def shown(number: int, shade: float, height: int = 8, width: int = 8) -> Shown:
    images = torch.zeros(number, 3, height, width)
    images[:, 0] = shade  # red, which no letter is
    return Shown(images, [f"prompt number {i}" for i in range(number)], {"reward": torch.rand(number)})


def places(sheet: np.ndarray, shade: int) -> np.ndarray:
    return np.argwhere((sheet == (shade, 0, 0)).all(axis=-1))


def count(sheet: np.ndarray, shade: int) -> int:
    return len(places(sheet, shade))


def test_every_picture_is_in_the_sheet_in_its_own_colours():
    one, two = grid(shown(1, 0.2)), grid(shown(2, 0.2))
    assert one.dtype == np.uint8
    assert one.shape[2] == 3
    assert count(one, 51) > 0
    assert count(two, 51) == 2 * count(one, 51)


def test_before_and_after_stand_one_above_the_other():
    sheet = grid(shown(3, 0.2), shown(3, 0.6), titles=("before", "after"))
    before, after = (places(sheet, shade) for shade in (51, 153))
    assert len(before) == len(after) > 0
    assert before[:, 0].max() < after[:, 0].min()
    assert before[:, 1].min() == after[:, 1].min()


def test_a_full_row_begins_another():
    assert grid(shown(9, 0.5)).shape[0] > grid(shown(8, 0.5)).shape[0]
    assert grid(shown(8, 0.5)).shape[1] == grid(shown(9, 0.5)).shape[1]


def test_the_shorter_of_two_sets_decides():
    assert grid(shown(2, 0.2), shown(5, 0.6)).shape == grid(shown(2, 0.2), shown(2, 0.6)).shape


@pytest.mark.parametrize(("height", "width"), [(8, 16), (16, 8), (300, 200)])
def test_pictures_of_any_shape_fit(height: int, width: int):
    assert count(grid(shown(1, 0.2, height, width)), 51) > 0
