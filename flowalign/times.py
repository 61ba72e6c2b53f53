"""The noise levels at which clean samples are re-noised, as a function of (seed, epoch, key).

A key is a sample, or a group whose members share their noise levels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from flowalign.flow import shifted
from flowalign.keyed import ORDER, id_list, keyed_generator


class Times(ABC):
    """A rule for `num` noise levels per key; subclasses implement `draw`.

    num=None: 99 % of the schedule's steps, for example 9 of 10. shared=True: all keys of an epoch have the same levels.
    """

    def __init__(self, num: int | None = None, shared: bool = False) -> None:
        if num is not None and num < 1:
            raise ValueError(f"times.num={num}: an image has at least one re-noised point (null = 99 % of the steps).")
        self.num = num
        self.shared = shared

    def count(self, num_steps: int) -> int:
        """Points per sample for a rollout of num_steps steps."""
        return max(1, int(0.99 * num_steps)) if self.num is None else self.num

    def check(self, num_steps: int) -> None:
        """Raise ValueError for a schedule from which `draw` could take no level. Called before sampling."""
        del num_steps

    def __call__(self, seed: int, epoch: int, keys: Sequence[int] | Tensor, sigmas: Tensor) -> Tensor:
        """(B, num) noise levels; sigmas (T+1,) is the schedule of the rollout."""
        drawn: dict[int, Tensor] = {}
        rows = [0 if self.shared else key for key in id_list(keys)]
        for key in rows:
            if key not in drawn:
                drawn[key] = self.draw(keyed_generator(seed, epoch, key, ORDER), sigmas)
        return torch.stack([drawn[key] for key in rows])

    @abstractmethod
    def draw(self, generator: Generator, sigmas: Tensor) -> Tensor:
        """(num,) noise levels of one key."""


class Permuted(Times):
    """Distinct levels of the rollout's schedule, the first of a random permutation (DiffusionNFT, FlowAWR)."""

    def count(self, num_steps: int) -> int:
        """See the base class."""
        if self.num is not None and self.num > num_steps:
            raise ValueError(
                f"times.num={self.num}: an image has at most one re-noised point per noise level of its schedule, so "
                f"1 to {num_steps}."
            )
        return super().count(num_steps)

    def draw(self, generator: Generator, sigmas: Tensor) -> Tensor:
        """See the base class."""
        num_steps = len(sigmas) - 1
        return sigmas[torch.randperm(num_steps, generator=generator)[: self.count(num_steps)].to(sigmas.device)]


Start = Literal["discrete", "without_init", "with_init"]


class Stratified(Times):
    """One level from each of `num` equal strata of the noisiest `share` of the rollout's schedule (AWM).

    without_init excludes sigma = 1; with_init always includes it and stratifies the others.
    """

    def __init__(
        self, num: int | None = None, shared: bool = False, start: Start = "discrete", share: float = 0.9
    ) -> None:
        super().__init__(num, shared)
        if start not in get_args(Start):
            raise ValueError(f"start is one of {', '.join(get_args(Start))} (got {start!r}).")
        if not 0 < share <= 1:
            raise ValueError(f"share is the part of the schedule that is noised, in (0, 1]; usually 0.9 (got {share}).")
        self.start: Start = start
        self.share = share

    def check(self, num_steps: int) -> None:
        """See the base class."""
        self._range(num_steps)

    def draw(self, generator: Generator, sigmas: Tensor) -> Tensor:
        """See the base class."""
        num_steps = len(sigmas) - 1
        num = self.count(num_steps)
        strata = num - 1 if self.start == "with_init" else num
        u = torch.rand(strata, generator=generator)
        return sigmas[self.indices(u, num_steps).to(sigmas.device)]

    def indices(self, u: Tensor, num_steps: int) -> Tensor:
        """Indices into the schedule, (num,), from uniform numbers u, one per stratum."""
        first, end = self._range(num_steps)
        # Bounds are truncated, as in the method's code: strata differ by one index if they do not divide evenly.
        bounds = torch.linspace(first, end, len(u) + 1).long()
        low, high = bounds[:-1], bounds[1:]
        chosen = low + (u * (high - low)).long()
        return torch.cat([chosen.new_zeros(1), chosen]) if self.start == "with_init" else chosen

    def _range(self, num_steps: int) -> tuple[int, int]:
        """First index that may be drawn, and one past the last. Raises ValueError if there is none."""
        first, end = (0 if self.start == "discrete" else 1), int(num_steps * self.share)
        if end <= first:
            raise ValueError(
                f"times.share={self.share} of {num_steps} steps leaves no noise level: use a larger share or more "
                "steps."
            )
        return first, end


class Uniform(Times):
    """Uniform in [low, high], one level from each of `num` equal strata, then shifted towards the noise.

    Draws as the method's code does: uniform numbers in float32, then the order.
    """

    def __init__(
        self, num: int | None = None, shared: bool = False, low: float = 0.2, high: float = 1.0, shift: float = 1.0
    ) -> None:
        super().__init__(num, shared)
        if not 0 <= low < high <= 1:
            raise ValueError(f"noise levels are drawn from 0 ≤ low < high ≤ 1 (got low={low}, high={high}).")
        self.low = low
        self.high = high
        self.shift = positive(shift)

    def draw(self, generator: Generator, sigmas: Tensor) -> Tensor:
        """See the base class."""
        u = strata(self.count(len(sigmas) - 1), generator)
        u = u[torch.rand(len(u), generator=generator).argsort()]
        return shifted(self.low + (self.high - self.low) * u, self.shift).to(sigmas)


class LogitNormal(Times):
    """sigmoid(mean + std · normal), stratified over `num` quantiles, then shifted towards the noise.

    Draws as the method's code does: uniform numbers in float32, then the order.
    """

    def __init__(
        self, num: int | None = None, shared: bool = False, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
    ) -> None:
        super().__init__(num, shared)
        self.mean = mean
        self.std = positive(std, "std")
        self.shift = positive(shift)

    def draw(self, generator: Generator, sigmas: Tensor) -> Tensor:
        """See the base class."""
        num = self.count(len(sigmas) - 1)
        normal = torch.special.ndtri(strata(num, generator).clamp(1e-7, 1 - 1e-7))
        normal = normal[torch.randperm(num, generator=generator)]
        level = shifted(torch.sigmoid(self.mean + self.std * normal), self.shift)
        return level.clamp(0.01, 1 - 1e-6).to(sigmas)  # the method's bounds; at 0 there is nothing to predict


def strata(num: int, generator: Generator) -> Tensor:
    """(num,) uniform numbers in float64, ascending, one from each of `num` equal parts of [0, 1)."""
    return (torch.arange(num) + torch.rand(num, generator=generator).double()) / num


def positive(number: float, name: str = "shift") -> float:
    """Return the number. Raises ValueError if it is not positive."""
    if number <= 0:
        raise ValueError(f"times.{name} must be positive, where a shift of 1 changes nothing (got {number}).")
    return number
