"""How far from 1 a first ratio may be."""

import pytest
import torch

from flowalign.guards import check_ratio


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
