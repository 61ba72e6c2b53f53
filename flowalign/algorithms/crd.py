"""Centred reward distillation, CRD (arXiv:2603.14128): fit the reward implied by the policy to the given one."""

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from flowalign.algorithms.base import Algorithm, optimality
from flowalign.algorithms.errors import adaptive, v_error
from flowalign.flow import at_least_float32, mean_dims
from flowalign.types import Point


class CRD(Algorithm):
    """|beta r_c - a_c|^2 adv_clip / beta with r = error of the old policy - error of the live one, and a in [0, 1].

    r is the implied reward, a the mapped advantage. Both are centred by a mean over the micro-batch, without gradient:
    this leaves differences of r, which need no normalising constant. temperature=None uses plain means. Otherwise the
    loss averages two terms, one centred on the good samples by the weights softmax(a / temperature), one on the bad
    samples by softmax(-a / temperature).
    """

    point: ClassVar[Literal["transition", "noised"]] = "noised"
    samples_with: ClassVar[str | None] = "sampling"
    consults: ClassVar[tuple[str, ...]] = ("old",)
    least_micro: ClassVar[int] = 2  # a single row is its own centre

    def __init__(
        self,
        beta: float = 1.0,
        adv_clip: float = 5.0,
        adv_range: float | None = None,
        distance: Literal["mse", "bce"] = "mse",
        temperature: float | None = None,
        kl_beta: float = 0.1,
        kl_floor: float = 1e-4,
    ) -> None:
        """adv_range: the |advantage| at which a is 0 or 1; None: adv_clip. temperature=0: one term uses softmax(a) over
        a > 0, the other a plain mean. The penalty has weight kl_floor for the worst sample (a = 0), rising to kl_beta
        for the best."""
        super().__init__(kl_beta, adv_clip)
        self.adv_range = adv_clip if adv_range is None else adv_range
        if min(beta, self.adv_range) <= 0:
            raise ValueError(f"beta and adv_range must be positive (got beta={beta}, adv_range={adv_range}).")
        if distance not in ("mse", "bce"):
            raise ValueError(f'distance is "mse" or "bce" (got {distance!r}).')
        if temperature is not None and temperature < 0:
            raise ValueError(f"temperature is null for plain means, or ≥ 0 (got {temperature}).")
        self.beta = beta
        self.distance = distance
        self.temperature = temperature
        self.kl_floor = kl_floor

    @property
    def micro_matters(self) -> bool:
        """True: the centres are means over the micro-batch."""
        return True

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics at a noised point."""
        a = self._target(p)
        r = adaptive(v_error(p, p.frozen["old"])) - adaptive(v_error(p, v))
        loss = self.adv_clip / self.beta * self.contrast(r, a, p.counts)
        drift = mean_dims((at_least_float32(v) - p.frozen["old"]) ** 2)
        return self.penalised(p, v, loss, {"r": a, "implied_reward": r, "v_drift": drift})

    def contrast(self, r: Tensor, a: Tensor, counts: Tensor | None = None) -> Tensor:
        """Distance between the implied reward r (B,) and its target a (B,), both centred: (B,).

        counts: (B,) bool, the rows that contribute to the centres; None: all.
        """
        counts = torch.ones_like(a, dtype=torch.bool) if counts is None else counts
        parts = [self._distance(self.beta * (r - w @ r.detach()), a - w @ a) for w in self._centre_weights(a, counts)]
        return torch.stack(parts).mean(dim=0)

    def _distance(self, r: Tensor, a: Tensor) -> Tensor:
        if self.distance == "mse":
            return (r - a) ** 2
        return binary_cross_entropy_with_logits(r, a.sigmoid(), reduction="none")

    def _centre_weights(self, a: Tensor, counts: Tensor) -> list[Tensor]:
        """Weights (B,) of the mean that centres each term of the loss."""
        plain = counts.to(a) / counts.sum().clamp(min=1)
        if self.temperature is None:
            return [plain]
        if self.temperature > 0:
            scaled = a / self.temperature
            return [_masked_softmax(scaled, counts, plain), _masked_softmax(-scaled, counts, plain)]
        return [_masked_softmax(a, counts & (a > 0), plain), plain]

    def penalty(self, p: Point, v: Tensor) -> Tensor:
        """Distance to the reference, (B,), scaled down for bad samples so that the policy may leave them."""
        floor = min(1.0, self.kl_floor / self.kl_beta)
        return (floor + self._target(p) * (1 - floor)) * super().penalty(p, v)

    def _target(self, p: Point) -> Tensor:
        return optimality(self.clipped(p.advantage), self.adv_range).double()


def _masked_softmax(x: Tensor, mask: Tensor, fallback: Tensor) -> Tensor:
    """Softmax over the rows of `mask`, 0 elsewhere; `fallback` if the mask is empty. All (B,)."""
    return torch.where(mask.any(), x.masked_fill(~mask, -torch.inf).softmax(0), fallback)
