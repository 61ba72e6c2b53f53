"""The walk from noise to data: stochastic steps where the plan says so, an ODE solver elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowalign.dynamics import Dynamics
from flowalign.keyed import INITIAL, STEP, keyed_randn
from flowalign.solvers import Solver
from flowalign.steps.base import StepPlan
from flowalign.types import Rollout


@dataclass(frozen=True)
class Sampling:
    """How pictures are made: number of steps, classifier-free guidance (1 = off), ODE solver, pictures at a time."""

    num_steps: int
    solver: Solver
    guidance: float = 1.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 (got {getattr(self, name)}).")


@dataclass(frozen=True)
class Noise:
    """Keyed noise of a set of samples: the same numbers whatever the batch, the rank or the device."""

    seed: int
    epoch: int
    samples: Sequence[int]
    shape: tuple[int, ...]
    device: torch.device | str = "cpu"

    def __call__(self, stream: int) -> Tensor:
        """(B, *shape)"""
        return keyed_randn(self.seed, self.epoch, self.samples, stream, self.shape, self.device)


def deterministic(num_steps: int) -> StepPlan:
    """The plan of an ODE walk: no step is noisy and none is recorded."""
    return StepPlan(noisy=(False,) * num_steps, trained=())


def walk(
    velocity: Callable[[Tensor, Tensor], Tensor],
    sigmas: Tensor,
    plan: StepPlan,
    dynamics: Dynamics,
    solver: Solver,
    noise: Noise,
    keep_mean: bool = False,
) -> Rollout:
    """Walks `sigmas` (T+1,) from keyed noise to x0 with velocity(x, sigma), and records the steps that are trained.

    The log-probability is taken from the very tensors that are stored, so that the ratio is 1 on policy.
    """
    x = noise(INITIAL)
    state = solver.start()
    last = len(sigmas) - 2
    kept: list[tuple[Tensor, ...]] = []
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        v = velocity(x, sigma)
        if not plan.noisy[i]:
            x = state.step(x, v, sigma, sigma_next, i == last)
            continue
        state.push(x, v, sigma)
        step = dynamics.step(x, v, sigma, sigma_next, sigmas[1], noise(STEP + i))
        if i in plan.trained:
            log_prob = dynamics.log_prob(step.x_next, step.mean, step.std)
            kept.append((x, step.x_next, log_prob, *([step.mean] if keep_mean else [])))
        x = step.x_next
    if not kept:
        return Rollout(x0=x, sigmas=sigmas)
    columns = [torch.stack(column, dim=1) for column in zip(*kept, strict=True)]
    return Rollout(x, sigmas, tuple(sorted(plan.trained)), *columns)  # x, x_next, log_prob and, if kept, mean


def join(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of the same plan, one after another."""
    columns = {}
    for name in ("x0", "x", "x_next", "log_prob", "mean"):
        tensors = [getattr(part, name) for part in parts]
        columns[name] = None if tensors[0] is None else torch.cat(tensors)
    return replace(parts[0], **columns)
