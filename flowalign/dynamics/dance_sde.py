"""Dance-SDE, the dynamics of DanceGRPO (arXiv:2505.07818)."""

import torch
from torch import Tensor

from flowalign.dynamics.sde import SDE


class DanceSDE(SDE):
    """Constant noise rate eta, hence noise also in the last steps, which determine details. Published eta: 0.3."""

    def __init__(self, eta: float = 0.3) -> None:
        super().__init__(eta)

    def rate(self, s: Tensor, s_max: Tensor | None) -> Tensor:
        """The constant eta, (B, 1, …)."""
        del s_max
        return torch.full_like(s, self.eta)
