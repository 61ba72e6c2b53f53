"""How a pipeline's own call asks its scheduler for noise levels."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def euler(scheduler: Any) -> Any:
    """The scheduler itself if it is the flow-matching Euler one, else that one with the same static shift.

    Some families ship a multistep solver (Wan: UniPC, Sana: DPM-Solver++). A rollout needs one velocity a step, and
    the solver is chosen by `rollout.solver`; only the shift of the schedule is the family's.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return scheduler
    return FlowMatchEulerDiscreteScheduler(shift=float(scheduler.config.get("flow_shift") or 1.0))


def sigmas(scheduler: Any, num_steps: int, evenly: bool, mu: float | None) -> Tensor:
    """(num_steps + 1,) float32 on the CPU, falling to 0; the scheduler is left alone.

    evenly: the pipeline passes 1, …, 1/num_steps, else the scheduler spaces them itself. mu: of a shift that depends on
    the resolution.
    """
    scheduler = copy.deepcopy(scheduler)
    shifted = {} if mu is None else {"mu": mu}
    if evenly:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), **shifted)
    else:
        scheduler.set_timesteps(num_steps, **shifted)
    return from_one(scheduler.sigmas.float().cpu())


def from_one(sigmas: Tensor) -> Tensor:
    """The same noise levels, of which one within rounding of 1 is exactly 1.

    For some shifts s the quotient s / (1 + (s - 1)) is a neighbour of 1: above it for 1.57, below it for 1.67. There
    Flow-SDE's noise rate and the log-SNR of a solver are not those of 1 but imaginary, or as good as infinite.
    """
    return torch.where((sigmas - 1).abs() < 1e-6, 1.0, sigmas)


def linear_mu(config: Any, tokens: int, max_shift: float = 1.15) -> float:
    """mu on the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift) of a config."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (top - base) / (high - low)
    return tokens * slope + (base - slope * low)


def shift(config: Any, mu: float | None) -> float:
    """s of sigma = s u / (1 + (s - 1) u) for an even time u: s > 1 is more time in noise."""
    if mu is None:
        return float(config.get("shift") or 1.0)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
