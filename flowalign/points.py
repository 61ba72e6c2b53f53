"""The two kinds of training points: recorded transitions of a rollout, and re-noised clean samples.

Rows are sample-major: the points of one sample are adjacent, row = sample * S + s.
"""

from dataclasses import replace

import torch
from torch import Tensor

from flowalign.flow import at_least_float32, interpolate
from flowalign.keyed import PENALTY, id_list, keyed_generator
from flowalign.types import Point, Rollout, required


def transitions(
    rollout: Rollout,
    advantage: Tensor,
    group: Tensor | None = None,
    sample: Tensor | None = None,
    weight: Tensor | None = None,
) -> Point:
    """Every recorded step as a point: B * S rows. The steps of a sample share its values of the (B,) arguments."""
    x, x_next, steps = required(rollout.x, "x"), required(rollout.x_next, "x_next"), required(rollout.steps, "steps")
    sigmas, steps = rollout.sigmas.to(x.device), steps.to(x.device)
    recorded = x.shape[1]
    return Point(
        x=x.flatten(0, 1),
        sigma=sigmas[steps].flatten(),
        advantage=_credit(advantage, x, recorded),
        x_next=x_next.flatten(0, 1),
        sigma_next=sigmas[steps + 1].flatten(),
        sigma_max=sigmas[1].repeat(steps.numel()),
        log_prob=required(rollout.log_prob, "log_prob").flatten(0, 1),
        mean=None if rollout.mean is None else rollout.mean.flatten(0, 1),
        std_scale=None if rollout.std is None else _mean_of_steps(rollout.std, steps).repeat(steps.numel()),
        group=_rows(group, x, recorded),
        sample=_rows(sample, x, recorded),
        weight=None if weight is None else _credit(weight, x, recorded),
    )


def noised(
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    advantage: Tensor,
    group: Tensor | None = None,
    sample: Tensor | None = None,
    weight: Tensor | None = None,
) -> Point:
    """Each clean sample mixed with new noise at its own noise levels: B * num rows.

    x0 (B, …), sigma (B, num), noise (B, num, …); advantage, group, sample and weight (B,).
    """
    num = sigma.shape[1]
    clean = x0.repeat_interleave(num, dim=0)
    eps, level = noise.flatten(0, 1).to(x0.device), sigma.flatten().to(x0.device)
    return Point(
        x=interpolate(clean, eps, level),
        sigma=level,
        advantage=_credit(advantage, x0, num),
        x0=clean,
        eps=eps,
        group=_rows(group, x0, num),
        sample=_rows(sample, x0, num),
        weight=None if weight is None else _credit(weight, x0, num),
    )


def next_level(sigmas: Tensor, sigma: Tensor) -> Tensor:
    """The next lower level of a schedule (T+1,), descending to 0, for each sigma (B,); 0 for 0."""
    ascending = sigmas.flip(0).to(sigma)
    return ascending[(torch.searchsorted(ascending, sigma.contiguous()) - 1).clamp(min=0)]


def interleave(own: Point, real: Point, samples: int) -> Point:
    """Points of the policy's samples and of as many given images: for each sample its own, then those of the image."""

    def merged(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([t.unflatten(0, (samples, -1)) for t in (a, b)], dim=1).flatten(0, 1)

    fields = {name: merged(t, getattr(real, name)) for name, t in vars(own).items() if isinstance(t, Tensor)}
    is_real = torch.zeros_like(own.sigma, dtype=torch.bool), torch.ones_like(real.sigma, dtype=torch.bool)
    return replace(own, **fields, real=merged(*is_real))


def subsample_weights(seed: int, epoch: int, sample: Tensor, share: float) -> Tensor:
    """Weights (B,), 1 on average, that select a random share of the points; the weighted sum stays unbiased.

    sample (B,) is the sample number of each row. Of the S points of a sample, k = max(1, round(share · S)) have weight
    S / k and the others 0: equally many in every sample, hence on every rank.
    """
    distinct = id_list(sample.unique_consecutive())
    points = len(sample) // len(distinct)
    count = max(1, round(share * points))
    weight = torch.zeros(len(distinct), points)
    for row, number in zip(weight, distinct, strict=True):
        row[torch.randperm(points, generator=keyed_generator(seed, epoch, number, PENALTY))[:count]] = points / count
    return weight.flatten().to(sample.device)


def _mean_of_steps(std: Tensor, steps: Tensor) -> Tensor:
    """Mean over distinct steps of each step's mean std, since rows may record different steps. std, steps (B, S)."""
    distinct, member = steps.flatten().unique(return_inverse=True)
    total = std.new_zeros(len(distinct)).index_add_(0, member, std.flatten())
    return (total / member.bincount()).mean()


def _credit(advantage: Tensor, x: Tensor, times: int) -> Tensor:
    # Credit is float64, and must not promote a loss on float32 latents.
    return advantage.to(x.device, at_least_float32(x[:0]).dtype).repeat_interleave(times)


def _rows(number: Tensor | None, x: Tensor, times: int) -> Tensor | None:
    return None if number is None else number.to(x.device).repeat_interleave(times)
