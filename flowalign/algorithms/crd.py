"""Centred reward distillation, CRD (arXiv:2603.14128): the reward that the policy implies should be the given one."""

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

    Both are centred, by means over the micro-batch without gradient: what is left of r are differences, which need no
    normalising constant. temperature=None takes plain means; otherwise the loss is the mean of two, centred on the
    good samples, softmax(a / temperature), and on the bad ones, softmax(-a / temperature).
    """

    point: ClassVar[Literal["transition", "noised"]] = "noised"
    samples_with: ClassVar[str | None] = "sampling"
    consults: ClassVar[tuple[str, ...]] = ("old",)
    least_micro: ClassVar[int] = 2  # a row alone is its own centre

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
        """adv_range: the |advantage| that makes a 0 or 1, adv_clip unless given. temperature 0: softmax over a > 0,
        and a plain mean. The penalty weighs kl_floor for the worst sample (a = 0) up to kl_beta for the best."""
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
        """The centres are means over it."""
        return True

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class; p is a noised point."""
        a = self._wanted(p)
        r = adaptive(v_error(p, p.frozen["old"])) - adaptive(v_error(p, v))
        loss = self.adv_clip / self.beta * self.contrast(r, a, p.counts)
        drift = mean_dims((at_least_float32(v) - p.frozen["old"]) ** 2)
        return self.penalised(p, v, loss, {"r": a, "implied_reward": r, "v_drift": drift})

    def contrast(self, r: Tensor, a: Tensor, counts: Tensor | None = None) -> Tensor:
        """Distance of the implied reward r (B,) from the wanted one a (B,), both centred: (B,).

        Only the rows that count, (B,) bool, have a part in the centres; None: all.
        """
        counts = torch.ones_like(a, dtype=torch.bool) if counts is None else counts
        parts = [self._distance(self.beta * (r - w @ r.detach()), a - w @ a) for w in self._centres(a, counts)]
        return torch.stack(parts).mean(dim=0)

    def _distance(self, r: Tensor, a: Tensor) -> Tensor:
        if self.distance == "mse":
            return (r - a) ** 2
        return binary_cross_entropy_with_logits(r, a.sigmoid(), reduction="none")

    def _centres(self, a: Tensor, counts: Tensor) -> list[Tensor]:
        plain = counts.to(a) / counts.sum().clamp(min=1)
        if self.temperature is None:
            return [plain]
        if self.temperature > 0:
            return [_softmax(a / self.temperature, counts, plain), _softmax(-a / self.temperature, counts, plain)]
        return [_softmax(a, counts & (a > 0), plain), plain]

    def penalty(self, p: Point, v: Tensor) -> Tensor:
        """See the base class; light on bad samples, so that the policy may leave them, heavy on good ones."""
        floor = min(1.0, self.kl_floor / self.kl_beta)
        return (floor + self._wanted(p) * (1 - floor)) * super().penalty(p, v)

    def _wanted(self, p: Point) -> Tensor:
        return optimality(self.clipped(p.advantage), self.adv_range).double()


def _softmax(x: Tensor, among: Tensor, otherwise: Tensor) -> Tensor:
    """Softmax over the rows `among`, 0 elsewhere; `otherwise` if these are none. All (B,)."""
    return torch.where(among.any(), x.masked_fill(~among, -torch.inf).softmax(0), otherwise)
