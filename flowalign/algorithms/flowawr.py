"""FlowAWR (arXiv:2606.30376): one regression, from the old prediction towards the sample or away from it."""

from typing import ClassVar, Literal

from torch import Tensor

from flowalign.algorithms.base import Algorithm, over_rows
from flowalign.algorithms.errors import size, x0_error
from flowalign.flow import at_least_float32, expand, mean_dims
from flowalign.types import Point


class FlowAWR(Algorithm):
    """|x̂0 - y|^2 / |x̂0 - x0| with y = x̂0_old + E (x0 - x̂0_old) and E the energy of the sample, its credit.

    The target y is the sample if E = 1, a point beyond it if E > 1, the old prediction if E = 0, and a point on its
    other side if E < 0. The denominator is the distance to the sample, not to y, and has no gradient.
    """

    point: ClassVar[Literal["transition", "noised"]] = "noised"
    samples_with: ClassVar[str | None] = "old"
    consults: ClassVar[tuple[str, ...]] = ("old",)
    energy: ClassVar[bool] = True

    def __init__(self, kl_beta: float = 1e-4, adv_clip: float = 3.0, mask_zero: bool = False) -> None:
        """adv_clip: bound of |E|; mask_zero: exclude points with energy 0, also from the penalty."""
        super().__init__(kl_beta, adv_clip)
        self.mask_zero = mask_zero

    @property
    def micro_matters(self) -> bool:
        """True with mask_zero: the mean runs over the unmasked rows of the micro-batch."""
        return self.mask_zero

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics at a noised point."""
        v, v_old = at_least_float32(v), at_least_float32(p.frozen["old"])
        energy, error, error_old = self.clipped(p.advantage), x0_error(p, v), x0_error(p, v_old)
        # Relative to x0: y - x0 = (1 - E) (x̂0_old - x0).
        loss = mean_dims((error - (1 - expand(energy, error)) * error_old) ** 2) / size(error) * self._mask_weight(p)
        metrics = {"energy": energy, "x0_error": size(error), "v_drift": mean_dims((v - v_old) ** 2)}
        return self.penalised(p, v, loss, metrics)

    def penalty(self, p: Point, v: Tensor) -> Tensor:
        """Distance to the reference, (B,), with the same mask as the regression."""
        return super().penalty(p, v) * self._mask_weight(p)

    def _mask_weight(self, p: Point) -> Tensor | float:
        """Weights (B,) that turn a mean over rows into a mean over the unmasked rows."""
        if not self.mask_zero:
            return 1.0
        kept = (p.advantage != 0).double()
        return kept / over_rows(p, kept).clamp(min=1 / len(kept))
