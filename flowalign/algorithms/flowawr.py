"""FlowAWR (arXiv:2606.30376): one regression, from the old prediction towards the sample or away from it."""

from typing import ClassVar, Literal

from torch import Tensor

from flowalign.algorithms.base import Algorithm, over_rows
from flowalign.algorithms.errors import size, x0_error
from flowalign.flow import at_least_float32, expand, mean_dims
from flowalign.types import Point


class FlowAWR(Algorithm):
    """|x̂0 - y|^2 / |x̂0 - x0| with y = x̂0_old + E (x0 - x̂0_old) and E the energy of the sample, its credit.

    E = 1 aims at the sample, more beyond it, 0 stays where the old policy is, less goes the other way. The weight is
    the distance to the sample, not to y, and has no gradient.
    """

    point: ClassVar[Literal["transition", "noised"]] = "noised"
    samples_with: ClassVar[str | None] = "old"
    consults: ClassVar[tuple[str, ...]] = ("old",)
    energy: ClassVar[bool] = True

    def __init__(self, kl_beta: float = 1e-4, adv_clip: float = 3.0, mask_zero: bool = False) -> None:
        """adv_clip: bound of |E|; mask_zero: leave out the points whose energy is 0, of the penalty too."""
        super().__init__(kl_beta, adv_clip)
        self.mask_zero = mask_zero

    @property
    def micro_matters(self) -> bool:
        """Where the mean is one over what is kept of it."""
        return self.mask_zero

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class; p is a noised point."""
        v, v_old = at_least_float32(v), at_least_float32(p.frozen["old"])
        energy, error, error_old = self.clipped(p.advantage), x0_error(p, v), x0_error(p, v_old)
        # All relative to x0: y - x0 = (1 - E) (x̂0_old - x0).
        loss = mean_dims((error - (1 - expand(energy, error)) * error_old) ** 2) / size(error) * self._share(p)
        metrics = {"energy": energy, "x0_error": size(error), "v_drift": mean_dims((v - v_old) ** 2)}
        return self.penalised(p, v, loss, metrics)

    def penalty(self, p: Point, v: Tensor) -> Tensor:
        """See the base class; masked as the regression is."""
        return super().penalty(p, v) * self._share(p)

    def _share(self, p: Point) -> Tensor | float:
        """(B,) what makes a mean over rows the one over those that the mask keeps."""
        if not self.mask_zero:
            return 1.0
        kept = (p.advantage != 0).double()
        return kept / over_rows(p, kept).clamp(min=1 / len(kept))
