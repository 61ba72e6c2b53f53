"""What travels between the parts: conditioning, a rollout, training points. B samples, T steps, S recorded steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


class Conditioning(dict[str, Tensor]):
    """Everything the network is told beside x and sigma; each tensor has the sample as its leading dim.

    A "neg." prefix marks the unconditional branch and a key that ends in "mask" the validity of a ragged dim 1.
    """

    def index(self, i: Tensor | slice) -> Conditioning:
        """Rows i of every entry."""
        return Conditioning({key: t[i] for key, t in self.items()})

    def repeat_interleave(self, n: int) -> Conditioning:
        """Each sample n times in a row: the order of a group of n images per prompt."""
        return Conditioning({key: t.repeat_interleave(n, dim=0) for key, t in self.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move every entry; dtype applies to the floating ones, so that masks and token ids survive it."""
        return Conditioning(
            {key: t.to(device=device, dtype=dtype if t.is_floating_point() else None) for key, t in self.items()}
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join along samples. Where dim 1 differs (prompts of several lengths) it is padded with zeros on the right."""
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
    """One walk from noise to data for B samples, with the steps which will be trained on."""

    x0: Tensor
    """(B, …) final latent."""
    sigmas: Tensor
    """(T+1,) the schedule that was walked, from 1 to 0. Stored because a recomputed one may differ in the last bit."""
    steps: Tensor | None = None
    """(B, S) long: the recorded steps of each row as indices into the schedule, ascending; None = nothing recorded."""
    x: Tensor | None = None
    """(B, S, …) state before each recorded step, rounded to 16 bits if the walk was to keep it so."""
    x_next: Tensor | None = None
    """(B, S, …) state after it."""
    log_prob: Tensor | None = None
    """(B, S) log-density of x_next under the policy that walked, mean over dims."""
    std: Tensor | None = None
    """(B, S) standard deviation of each recorded step."""
    mean: Tensor | None = None
    """(B, S, …) mean of the step; kept only for the algorithms that ask (`keeps_mean`)."""

    def index(self, i: Tensor | slice) -> Rollout:
        """Rows i."""
        rows = {name: t[i] for name, t in vars(self).items() if isinstance(t, Tensor) and name != "sigmas"}
        return replace(self, **rows)


@dataclass
class Point:
    """What a loss sees besides the live velocity: one state on the path per row, either replayed or re-noised."""

    x: Tensor
    """(B, …) the state."""
    sigma: Tensor
    """(B,) its noise level."""
    advantage: Tensor
    """(B,) credit of the sample, not clipped yet."""
    x0: Tensor | None = None
    """(B, …) noised points: the clean sample."""
    eps: Tensor | None = None
    """(B, …) noised points: the noise that was mixed in."""
    x_next: Tensor | None = None
    """(B, …) transition points: where the rollout went."""
    sigma_next: Tensor | None = None
    """(B,) the noise level there; noised points: the next lower one of the schedule."""
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
    """(B,) number of the sample within its epoch: rows of one sample share it."""
    weight: Tensor | None = None
    """(B,) share of the row in means over rows: 0 if its sample could not be scored, equal for all others; None: 1."""
    kl_weight: Tensor | None = None
    """(B,) factor of the penalty, 0 where the reference was not asked and 1 in the mean; None: 1."""
    real: Tensor | None = None
    """(B,) bool, noised points of both sources: whether the clean sample is a given one and not the policy's."""
    reward: Tensor | None = None
    """(B,) for algorithms that follow it: the reward of where the live velocity lands, with its gradient."""
    frozen: dict[str, Tensor] = field(default_factory=dict)
    """Velocities (B, …) of frozen copies at x, e.g. "old" and "reference"."""

    @property
    def counts(self) -> Tensor:
        """(B,) bool: the rows that are in the loss. A formula with a mean over rows takes it over these."""
        return torch.ones_like(self.sigma, dtype=torch.bool) if self.weight is None else self.weight > 0

    def index(self, i: Tensor | slice) -> Point:
        """Rows i."""
        return self._each(lambda t: t[i])

    def silence(self) -> None:
        """Finite numbers in rows that are not in the loss: what is not finite times 0 would be in the mean."""
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
    """The optional field `name` of a point or a rollout, for a caller that cannot do without it."""
    if value is None:
        raise ValueError(
            f"`{name}` is needed here and missing: transition points come from a rollout that recorded its steps, "
            "noised points from clean samples; see flowalign.points."
        )
    return value
