"""Data structures: conditioning, rollouts and training points. B samples, T steps, S recorded steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


class Conditioning(dict[str, Tensor]):
    """The inputs of the network other than x and sigma. Dim 0 of each tensor is the sample.

    Keys with the prefix "neg." belong to the unconditional branch; keys that end in "mask" mask a ragged dim 1.
    """

    @property
    def batch_size(self) -> int:
        """Number of samples."""
        return next(iter(self.values())).shape[0]

    def index(self, i: Tensor | slice) -> Conditioning:
        """Rows i of every entry."""
        return Conditioning({key: t[i] for key, t in self.items()})

    def repeat_interleave(self, n: int) -> Conditioning:
        """Each sample n times in succession: the order of a group of n images per prompt."""
        return Conditioning({key: t.repeat_interleave(n, dim=0) for key, t in self.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move every entry. Only floating-point entries take the dtype; masks and token ids keep theirs."""
        return Conditioning(
            {key: t.to(device=device, dtype=dtype if t.is_floating_point() else None) for key, t in self.items()}
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate along samples. A dim 1 that differs (prompt length) is padded on the right with zeros."""
        for part in parts:
            if differing := part.keys() ^ parts[0].keys():
                raise ValueError(f"only conditionings with the same entries can be joined; {sorted(differing)} differ.")
        return Conditioning({key: _cat_ragged([part[key] for part in parts]) for key in parts[0]})


def _cat_ragged(tensors: list[Tensor]) -> Tensor:
    if tensors[0].ndim < 2:
        return torch.cat(tensors)
    longest = max(t.shape[1] for t in tensors)
    return torch.cat([_pad(t, longest) for t in tensors])


def _pad(t: Tensor, length: int) -> Tensor:
    missing = length - t.shape[1]
    return torch.cat([t, t.new_zeros(t.shape[0], missing, *t.shape[2:])], dim=1) if missing else t


@dataclass
class Rollout:
    """The trajectories of B samples from noise to data, with the steps to train on."""

    x0: Tensor
    """(B, …) final latents."""
    sigmas: Tensor
    """(T+1,) the schedule used, from 1 to 0. Stored because a recomputed one may differ in the last bit."""
    steps: Tensor | None = None
    """(B, S) long: the recorded steps of each row as indices into the schedule, ascending; None: nothing recorded."""
    x: Tensor | None = None
    """(B, S, …) state before each recorded step, in 16 bits if `Sampling.keep_in` says so."""
    x_next: Tensor | None = None
    """(B, S, …) state after it."""
    log_prob: Tensor | None = None
    """(B, S) log-density of x_next under the sampling policy, mean over dims."""
    std: Tensor | None = None
    """(B, S) standard deviation of each recorded step."""
    mean: Tensor | None = None
    """(B, S, …) mean of the step; kept only for algorithms with `keeps_mean`."""

    def index(self, i: Tensor | slice) -> Rollout:
        """Rows i."""
        rows = {name: t[i] for name, t in vars(self).items() if isinstance(t, Tensor) and name != "sigmas"}
        return replace(self, **rows)


@dataclass
class Point:
    """The inputs of a loss other than the live velocity: per row one state of a transition or of a noised sample."""

    x: Tensor
    """(B, …) the state."""
    sigma: Tensor
    """(B,) its noise level."""
    advantage: Tensor
    """(B,) credit of the sample, unclipped."""
    x0: Tensor | None = None
    """(B, …) noised points: the clean sample."""
    eps: Tensor | None = None
    """(B, …) noised points: the noise mixed in."""
    x_next: Tensor | None = None
    """(B, …) transition points: the next state of the rollout."""
    sigma_next: Tensor | None = None
    """(B,) its noise level; noised points: the next lower level of the schedule."""
    sigma_max: Tensor | None = None
    """(B,) transition points: second entry of the schedule, which Flow-SDE needs at sigma = 1."""
    log_prob: Tensor | None = None
    """(B,) transition points: recorded log-density."""
    mean: Tensor | None = None
    """(B, …) transition points: recorded mean of the step."""
    std_scale: Tensor | None = None
    """(B,) transition points: mean standard deviation of the trained steps, which normalises weights by noise."""
    group: Tensor | None = None
    """(B,) number of the credit group."""
    sample: Tensor | None = None
    """(B,) number of the sample within its epoch; the rows of one sample share it."""
    weight: Tensor | None = None
    """(B,) weight in means over rows: 0 if the sample could not be scored, equal for all others; None: 1."""
    kl_weight: Tensor | None = None
    """(B,) factor of the KL penalty, 1 on average, 0 where the reference was not evaluated; None: 1."""
    real: Tensor | None = None
    """(B,) bool, noised points of both sources: whether the clean sample is a given image, not the policy's sample."""
    reward: Tensor | None = None
    """(B,) for algorithms with reward gradients: differentiable reward of what the live velocity leads to."""
    frozen: dict[str, Tensor] = field(default_factory=dict)
    """Velocities (B, …) of frozen copies at x, e.g. "old" and "reference"."""

    @property
    def counts(self) -> Tensor:
        """(B,) bool: the rows that count in the loss. A formula with a mean over rows averages over these."""
        return torch.ones_like(self.sigma, dtype=torch.bool) if self.weight is None else self.weight > 0

    def index(self, i: Tensor | slice) -> Point:
        """Rows i."""
        return self._each(lambda t: t[i])

    def silence(self) -> None:
        """Replace non-finite values by 0 in rows that do not count: a weight of 0 would not remove them from a mean."""
        rows = (~self.counts).nonzero().flatten()
        if not len(rows):
            return
        for t in (*vars(self).values(), *self.frozen.values()):
            if isinstance(t, Tensor) and t.is_floating_point():
                t[rows] = t[rows].nan_to_num(0.0, 0.0, 0.0)

    def _each(self, f: Callable[[Tensor], Tensor]) -> Point:
        given_fields = {name: f(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **given_fields, frozen={name: f(v) for name, v in self.frozen.items()})


def required(value: Tensor | None, name: str) -> Tensor:
    """Return the value of the optional field `name` of a point or a rollout. Raises ValueError if it is None."""
    if value is None:
        raise ValueError(
            f"`{name}` is needed here and missing: transition points come from a rollout that recorded its steps, "
            "noised points from clean samples; see flowalign.points."
        )
    return value
