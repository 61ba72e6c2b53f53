"""TempFlow-GRPO (arXiv:2508.04324): steps are weighted by their noise, the amount of exploration."""

from typing import Literal

from torch import Tensor

from flowalign.algorithms.grpo import GRPO
from flowalign.dynamics import Dynamics
from flowalign.types import Point, required


class TempFlow(GRPO):
    """GRPO with the policy term times S / mean S, where S is the std of a step and the mean is over the trained steps.

    Intended for branches (`steps=branch`), where a reward is due to the one noisy step of its sample.
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
        """scale: the weights are scale * S instead; the authors' code uses 2.25 for SD3.5 and 1.73 for FLUX."""
        super().__init__(dynamics, clip, adv_clip, kl_beta, kl)
        if scale is not None and scale <= 0:
            raise ValueError(f"scale multiplies the std of a step and must be positive (got {scale}).")
        self.scale = scale

    def weight(self, p: Point, std: Tensor) -> Tensor:
        """S / mean S, or scale * S, (B,)."""
        S = std.flatten()
        return S / required(p.std_scale, "std_scale") if self.scale is None else self.scale * S
