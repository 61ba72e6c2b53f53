"""Flow-SDE, the dynamics of Flow-GRPO (arXiv:2505.05470)."""

import torch
from torch import Tensor

from flowalign.dynamics.sde import SDE


class FlowSDE(SDE):
    """Noise rate eta sqrt(sigma / (1 - sigma)): high where the image is decided, 0 at the end.

    Published eta: 0.7 for SD3.5 with 10 steps, 0.9 for FLUX with 6. The rate is infinite at sigma = 1, where it uses
    sigma_max, the second entry of the schedule, instead of sigma. sigma_max may be omitted if sigma < 1; this is then
    checked, at the cost of a GPU synchronisation.
    """

    def __init__(self, eta: float = 0.7) -> None:
        super().__init__(eta)

    def rate(self, s: Tensor, s_max: Tensor | None) -> Tensor:
        """Noise rate g, (B, 1, …). Only the rate replaces sigma = 1; the drift uses sigma itself."""
        return self.eta * torch.sqrt(s / (1 - _below_one(s, s_max)))


def _below_one(s: Tensor, s_max: Tensor | None) -> Tensor:
    if s_max is not None:
        return torch.where(s == 1, s_max, s)
    if bool((s == 1).any()):
        raise ValueError(
            "Flow-SDE's noise rate is infinite at sigma = 1; pass sigma_max, the second entry of the schedule."
        )
    return s
