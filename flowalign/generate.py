"""Generation with the deterministic ODE, for evaluations and commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowalign.dynamics import ODE
from flowalign.models.base import FlowModel
from flowalign.sampler import Noise, Rows, Sampling, deterministic, walk
from flowalign.size import Size
from flowalign.types import Conditioning


class Generated(NamedTuple):
    """Media in [0, 1], images (B, 3, H, W) or videos (B, F, 3, H, W), and their latents."""

    media: Tensor
    rms: Tensor
    """(B,) root mean square of the velocities."""
    x0: Tensor
    """(B, …) final latents."""


@torch.no_grad()
def generate(
    model: FlowModel,
    cond: Conditioning,
    ids: Sequence[int],
    seed: int,
    sampling: Sampling,
    size: Size,
    device: torch.device,
) -> Generated:
    """Generate one image or video per row of `cond`.

    Noise is keyed by the sample `ids`, so the result for a prompt does not depend on the batch it is in.
    """
    noise = Noise(seed, 0, ids, model.latent_shape(*size.area), device)
    rms: list[Tensor] = []

    def velocity(x: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        v = model.velocity(x, sigma, cond.index(rows), sampling.guidance)
        rms.append(v.float().square().flatten(1).mean(dim=1).sqrt())
        return v

    plan, sigmas = deterministic(sampling.num_steps), model.sigmas(sampling.num_steps, *size.area)
    rollout = walk(velocity, sigmas, plan, ODE(), sampling.solver, noise)
    return Generated(model.decode(rollout.x0), torch.stack(rms).mean(dim=0), rollout.x0)
