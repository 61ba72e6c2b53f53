"""How far from 1 a first ratio may be, and what an algorithm of one's own may get wrong."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowalign.checks.errors import ConfigError
from flowalign.guards import check_ratio, checked_loss


class OnGpu(torch.Tensor):
    """Says of itself that it lies on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("gpu", "products", "precision", "bound"),
    [
        (False, "high", "32-true", 1e-5),
        (True, "high", "32-true", 1e-4),
        (True, "highest", "32-true", 1e-5),
        (True, "high", "bf16-mixed", 1e-3),
    ],
)
def test_the_bound_is_that_of_the_products(gpu: bool, products: str, precision: str, bound: float):
    """In TF32 a merged adapter and an adapter beside the weights differ by more than in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        for gap in (0.9 * bound, 1.1 * bound):
            ratio = torch.tensor([1.0, 1.0 + gap], dtype=torch.float64)
            ratio = ratio.as_subclass(OnGpu) if gpu else ratio
            if gap > bound:
                with pytest.raises(RuntimeError, match="must be 1"):
                    check_ratio(ratio, None, precision)
            else:
                assert check_ratio(ratio, None, precision) == pytest.approx(gap)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (
            lambda p, v: (v.square(), {}),
            r"Mine.loss returned loss of shape \(2, 3\) for 2 points: .* one value a point",
        ),
        (lambda p, v: (v.square().mean(), {}), r"returned loss of shape \(\) for 2 points"),
        (lambda p, v: (v.mean(1), {"gap": v.mean()}), r"returned gap of shape \(\) for 2 points"),
        (lambda p, v: (v.mean(1) + p.frozen["old"].mean(1), {}), r"asks for point.frozen\['old'\], .* in `consults`"),
    ],
)
def test_what_an_own_loss_gets_wrong_is_said_in_a_sentence(loss: Any, sentence: str):
    """A scalar would be taken for the mean of a batch, which also what has no score is a part of."""
    point: Any = SimpleNamespace(frozen={})
    with pytest.raises(ConfigError, match=sentence):
        checked_loss(type("Mine", (), {"loss": staticmethod(loss)})(), point, torch.ones(2, 3), {"old"})


def test_any_other_missing_key_is_no_matter_of_copies():
    mine = SimpleNamespace(loss=lambda p, v: {}["other"])
    with pytest.raises(KeyError, match="other"):
        checked_loss(mine, SimpleNamespace(frozen={}), torch.ones(2, 3), {"old"})  # type: ignore[arg-type]
