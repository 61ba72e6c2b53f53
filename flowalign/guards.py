"""What an optimisation phase refuses to go on with."""

from __future__ import annotations

from torch import Tensor


def check_finite(losses: Tensor, sigma: Tensor, epoch: int, step: int) -> None:
    """FloatingPointError if one of losses (b,) is not finite; sigma (b,) are their noise levels."""
    finite = losses.isfinite()
    if finite.all():
        return
    first = float(sigma[(~finite).nonzero()[0]])
    raise FloatingPointError(
        f"the loss of {int((~finite).sum())} of {len(losses)} points is not finite (first: sigma {first:.3f}, epoch "
        f"{epoch}, step {step}); a lower learning rate or fp32 helps, and algo.adv_clip bounds the credit."
    )


def check_ratio(ratio: Tensor, tolerance: float | None, precision: str) -> float:
    """How far ratios (b,) are from 1 before the first update; RuntimeError if further than the tolerance.

    A tolerance of None is 1e-5 in float32 and 1e-3 in 16 bits.
    """
    gap = float((ratio - 1).abs().max())
    if tolerance is None:
        tolerance = 1e-5 if precision.startswith("32") else 1e-3
    if gap > tolerance:
        raise RuntimeError(
            f"before the first update the importance ratio must be 1, but it is off by {gap:.2e}: rollout and training "
            "disagree (guidance, precision, dropout or resolution). optimisation.on_policy_tolerance sets the limit."
        )
    return gap
