"""The two ways to a training point: replay a transition of the walk, or noise the finished sample again.

Rows are ordered sample-major: the points of one sample are neighbours, row = sample * S + s.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.flow import at_least_float32, interpolate
from flowalign.keyed import ORDER, ids, keyed_generator
from flowalign.types import Point, Rollout, given


def transitions(rollout: Rollout, advantage: Tensor) -> Point:
    """Every recorded step as a point: B * S rows. advantage (B,) is shared by the steps of a sample."""
    x, x_next = given(rollout.x, "x"), given(rollout.x_next, "x_next")
    batch, recorded = x.shape[:2]
    sigmas = rollout.sigmas.to(x.device)
    steps = torch.tensor(rollout.steps, device=x.device)
    return Point(
        x=x.flatten(0, 1),
        sigma=sigmas[steps].repeat(batch),
        advantage=_rows(advantage, x, recorded),
        x_next=x_next.flatten(0, 1),
        sigma_next=sigmas[steps + 1].repeat(batch),
        sigma_max=sigmas[1].repeat(batch * recorded),
        log_prob=given(rollout.log_prob, "log_prob").flatten(0, 1),
        mean=None if rollout.mean is None else rollout.mean.flatten(0, 1),
    )


def noised(x0: Tensor, sigmas: Tensor, advantage: Tensor, num: int | None, noise: Tensor, order: Tensor) -> Point:
    """Each clean sample mixed with fresh noise at `num` noise levels of its own: B * num rows.

    x0 (B, …), sigmas (T+1,), advantage (B,), noise (B, num, …), order (B, num) indices into the schedule.
    num=None is 99 % of the T noise levels, which leaves out one of ten.
    """
    num = default_num(len(sigmas) - 1) if num is None else num
    if noise.shape[1] < num or order.shape[1] < num:
        raise ValueError(
            f"{num} points per sample need {num} noises and levels (got {noise.shape[1]}, {order.shape[1]})."
        )
    clean = x0.repeat_interleave(num, dim=0)
    eps = noise[:, :num].flatten(0, 1).to(x0.device)
    sigma = sigmas.to(x0.device)[order[:, :num].flatten().to(x0.device)]
    return Point(x=interpolate(clean, eps, sigma), sigma=sigma, advantage=_rows(advantage, x0, num), x0=clean, eps=eps)


def default_num(num_steps: int) -> int:
    """Points per sample where none is asked for: DiffusionNFT's 99 % of the schedule."""
    return max(1, int(0.99 * num_steps))


def permuted_steps(
    seed: int, epoch: int, sample_ids: Sequence[int] | Tensor, num_steps: int, num: int | None = None
) -> Tensor:
    """(B, num) schedule indices: for every sample the first `num` of its own permutation of 0..num_steps-1."""
    num = default_num(num_steps) if num is None else num
    rows = [
        torch.randperm(num_steps, generator=keyed_generator(seed, epoch, sample, ORDER))[:num]
        for sample in ids(sample_ids)
    ]
    return torch.stack(rows)


def _rows(advantage: Tensor, x: Tensor, times: int) -> Tensor:
    # Credit is float64; a loss on float32 latents should not become float64 through it.
    return advantage.to(x.device, at_least_float32(x[:0]).dtype).repeat_interleave(times)
