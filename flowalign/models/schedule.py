"""Noise schedules, computed by the scheduler in the same way as in the pipeline's own call."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def euler(scheduler: Any) -> Any:
    """The scheduler itself if it is the flow-matching Euler one, otherwise an Euler one with the same static shift.

    Some families ship a multistep solver (Wan: UniPC, Sana: DPM-Solver++), of which only the shift is used: rollouts
    need one velocity per step, and `rollout.solver` chooses the solver.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return scheduler
    return FlowMatchEulerDiscreteScheduler(shift=float(scheduler.config.get("flow_shift") or 1.0))


def sigmas(scheduler: Any, num_steps: int, evenly: bool, mu: float | None) -> Tensor:
    """(num_steps + 1,) float32 on the CPU, decreasing to 0. The scheduler is not modified.

    evenly: the pipeline passes sigmas 1, …, 1/num_steps; otherwise the scheduler spaces them. mu: of a shift that
    depends on the resolution.
    """
    scheduler = copy.deepcopy(scheduler)
    dynamic = {} if mu is None else {"mu": mu}
    if evenly:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), **dynamic)
    else:
        scheduler.set_timesteps(num_steps, **dynamic)
    return from_one(scheduler.sigmas.float().cpu())


def from_one(sigmas: Tensor) -> Tensor:
    """Replace a sigma within rounding of 1 by exactly 1.

    For some shifts s the quotient s / (1 + (s - 1)) is a neighbour of 1, above it for 1.57 and below it for 1.67. There
    the noise rate of Flow-SDE and the log-SNR of a solver would be imaginary, or almost infinite. Raises ValueError for
    a schedule that is not a number: one step cannot both begin at 1 and end at the scheduler's shift_terminal.
    """
    if not sigmas.isfinite().all():
        raise ValueError(f"this model's schedule is not defined for num_steps={len(sigmas) - 1}: use at least 2.")
    return torch.where((sigmas - 1).abs() < 1e-6, 1.0, sigmas)


def linear_mu(config: Any, tokens: int, max_shift: float = 1.15) -> float:
    """Interpolate mu between (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift) of a config."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (top - base) / (high - low)
    return tokens * slope + (base - slope * low)


def shift(config: Any, mu: float | None) -> float:
    """The shift s in sigma = s u / (1 + (s - 1) u) for uniform time u; s > 1 spends more steps on noise."""
    if mu is None:
        return float(config.get("shift") or 1.0)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
