"""TempFlow-GRPO (arXiv:2508.04324): steps weigh by the noise that they explore with."""

from typing import Literal

from torch import Tensor

from flowalign.algorithms.grpo import GRPO
from flowalign.dynamics import Dynamics
from flowalign.types import Point, required


class TempFlow(GRPO):
    """GRPO with the policy term times S / mean of S, S being the std of a step and the mean over the trained ones.

    Made for branches (`steps=branch`), where a reward belongs to the one noisy step of its sample.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        clip: float = 1e-4,
        adv_clip: float = 5.0,
        kl_beta: float = 0.0,
        kl: Literal["x", "gaussian", "v"] = "gaussian",
        scale: float | None = None,
    ) -> None:
        """scale: weights are scale * S instead; the method's code has 2.25 for SD3.5 and 1.73 for FLUX."""
        super().__init__(dynamics, clip, adv_clip, kl_beta, kl)
        if scale is not None and scale <= 0:
            raise ValueError(f"scale multiplies the std of a step and must be positive (got {scale}).")
        self.scale = scale

    def weight(self, p: Point, std: Tensor) -> Tensor:
        """See the class, (B,)."""
        S = std.flatten()
        return S / required(p.std_scale, "std_scale") if self.scale is None else self.scale * S
