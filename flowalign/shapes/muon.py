"""Muon in float32.

torch.optim.Muon orthogonalises in bfloat16, which CPUs without bfloat16 instructions emulate, many times slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Keller Jordan, 2024)."""


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices, scaled like Adam updates: 0.2 sqrt(longer side)."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters; matrices of the same shape are orthogonalised as a batch."""
        del closure
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                update = orthogonal(torch.stack([self._nesterov(p, group["momentum"]) for p in params]))
                lr = group["lr"] * 0.2 * max(shape) ** 0.5
                values = [p.data for p in params]
                torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(values, list(update.unbind()), alpha=-lr)

    def _nesterov(self, p: nn.Parameter, momentum: float) -> Tensor:
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - momentum)  # type: ignore[arg-type]
        return torch.lerp(p.grad, buffer, momentum)  # type: ignore[arg-type]


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Approximate U Vᵀ of each matrix (n, a, b) by Newton–Schulz iteration: singular values near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
