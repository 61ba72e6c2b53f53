"""Deterministic sampling."""

import torch
from torch import Tensor

from flowalign.dynamics.base import Dynamics


class ODE(Dynamics):
    """Euler step of dx/dsigma = v: no noise, hence no density."""

    stochastic = False

    def _moments(self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor, s_max: Tensor | None) -> tuple[Tensor, Tensor]:
        del s_max
        dt = s_next - s
        return x + dt * v, torch.zeros_like(dt)

    def log_prob(self, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Raise TypeError: a deterministic step has no density."""
        raise TypeError(
            "steps of the ODE are deterministic and have no density; use FlowSDE, DanceSDE or CPS, or algo=nft."
        )
