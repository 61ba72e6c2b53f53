"""The sampling loop from noise to data: stochastic steps where the plan says so, an ODE solver elsewhere.

Samples that start from the same noise are identical until their first stochastic step; until then the network is
evaluated once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.dtypes import torch_dtype
from flowalign.dynamics import Dynamics
from flowalign.dynamics.base import Step
from flowalign.keyed import INITIAL, STEP, keyed_randn
from flowalign.solvers import Solver
from flowalign.steps.base import StepPlan
from flowalign.types import Rollout


@dataclass(frozen=True)
class Sampling:
    """Sampling settings: number of steps, ODE solver, classifier-free guidance scale (1 = off), batch size.

    same_noise: the members of a group start from the same noise. keep_in: dtype in which recorded states are stored.
    """

    num_steps: int
    solver: Solver
    guidance: float = 1.0
    batch_size: int = 64
    same_noise: bool = False
    keep_in: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 (got {getattr(self, name)}).")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be 0 or more (got {self.guidance}).")

    @property
    def state_dtype(self) -> torch.dtype | None:
        """`keep_in` as a dtype; None for float32, the dtype that states have anyway."""
        return None if self.keep_in == "float32" else torch_dtype(self.keep_in)


@dataclass(frozen=True)
class Noise:
    """Keyed noise of a set of samples: the same for every batch, rank and device."""

    seed: int
    epoch: int
    samples: Sequence[int]
    shape: tuple[int, ...]
    device: torch.device | str = "cpu"
    sharing: int = 1
    """Number of neighbouring samples that start from the same noise."""

    def __call__(self, stream: int) -> Tensor:
        """(B, *shape)"""
        samples = self.initial_ids() if stream == INITIAL else self.samples
        return keyed_randn(self.seed, self.epoch, samples, stream, self.shape, self.device)

    def initial_ids(self) -> list[int]:
        """For each sample, the sample whose noise it starts from."""
        return [s // self.sharing * self.sharing for s in self.samples]

    def index(self, rows: list[int]) -> Noise:
        """The noise of the samples at these positions."""
        return replace(self, samples=[self.samples[row] for row in rows])


Rows = Tensor | slice
"""Positions (b,) in the batch, or slice(None) for all of it."""


class Deduplicator:
    """Evaluates the velocity once for all samples that are still identical."""

    def __init__(self, initial_ids: Sequence[int]) -> None:
        # Samples with equal ids are identical: the initial id at first, a unique negative one after noise of its own.
        self.ids = list(initial_ids)

    def diverge(self, rows: Sequence[int]) -> None:
        """Mark samples that have received noise of their own."""
        for row in rows:
            self.ids[row] = -1 - row

    def __call__(self, velocity: Callable[[Tensor, Tensor, Rows], Tensor], x: Tensor, sigma: Tensor) -> Tensor:
        """The velocity of every sample from one call on the distinct ones."""
        first: dict[int, int] = {}
        for row, i in enumerate(self.ids):
            first.setdefault(i, row)
        if len(first) == len(x):
            return velocity(x, sigma, slice(None))
        position = {i: n for n, i in enumerate(first)}
        rows = torch.tensor(list(first.values()), device=x.device)
        return velocity(x[rows], sigma, rows)[torch.tensor([position[i] for i in self.ids], device=x.device)]


def deterministic(num_steps: int) -> StepPlan:
    """The plan of pure ODE sampling: no step is noisy and none is recorded."""
    return StepPlan(noisy=(False,) * num_steps, trained=())


def walk(
    velocity: Callable[[Tensor, Tensor, Rows], Tensor],
    sigmas: Tensor,
    plan: StepPlan,
    dynamics: Dynamics,
    solver: Solver,
    noise: Noise,
    keep_mean: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Rollout:
    """Sample from keyed noise to x0 along `sigmas` (T+1,), and record the steps to train on.

    velocity(x, sigma, rows) is called for the distinct samples only: x (b, …) at sigma (0-d), the `rows` of the batch.
    With a tail in the plan, sigmas is the shortened schedule; after the last stochastic step the plan's own solver
    takes over, with the history of all earlier predictions. Log-probabilities are computed from the tensors that are
    stored, so that the ratio is 1 on policy. state_dtype: dtype of stored states, None for their own; sampling
    continues from the rounded states.
    """
    x, deduplicated, record = noise(INITIAL), Deduplicator(noise.initial_ids()), Recorder(keep_mean, state_dtype)
    state, tail = solver.start(), plan.tail_solver.start()
    last, last_noisy = len(sigmas) - 2, plan.last_noisy
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        if i in plan.trained:
            x = round_to(x, state_dtype)
        v = deduplicated(velocity, x, sigma)
        rows = plan.rows(i, noise.samples) if i <= last_noisy else []
        x_before, all_rows = x, len(rows) == len(x)
        if plan.tail is not None and i <= last_noisy:
            tail.push(x, v, sigma)
        if all_rows:
            state.push(x, v, sigma)
        else:
            x = state.step(x, v, sigma, sigma_next, i == last, careful=i == last - 1 and last + 1 < 15)
        if plan.tail is not None and i == last_noisy:
            state = tail
        if not rows:
            continue
        deduplicated.diverge(rows)
        noisy: Rows = slice(None) if all_rows else torch.tensor(rows, device=x.device)
        z = (noise if all_rows else noise.index(rows))(STEP + i)
        step = dynamics.step(x_before[noisy], v[noisy], sigma, sigma_next, sigmas[1], z)
        if i in plan.trained:
            step = step._replace(x_next=round_to(step.x_next, state_dtype))
        x = step.x_next if all_rows else x.index_copy(0, noisy, step.x_next)  # type: ignore[arg-type]
        if i in plan.trained:
            record(i, rows, x_before[noisy], step, dynamics.log_prob(step.x_next, step.mean, step.std))
    return record.rollout(x, sigmas)


def round_to(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x rounded to the precision of `dtype`, in its own dtype; None: x itself."""
    return x if dtype is None else x.to(dtype).to(x.dtype)


class Recorder:
    """Collects the trained steps, each of some of the samples, and returns them by sample.

    States are stored in `state_dtype`, None for their own; those already rounded to it lose nothing.
    """

    def __init__(self, keep_mean: bool, state_dtype: torch.dtype | None) -> None:
        self.keep_mean, self.state_dtype = keep_mean, state_dtype
        self.rows: list[int] = []
        self.parts: dict[str, list[Tensor]] = {}

    def __call__(self, i: int, rows: list[int], x: Tensor, step: Step, log_prob: Tensor) -> None:
        """Add step i of the samples at `rows`."""
        self.rows += rows
        index = torch.full((len(rows),), i, device=x.device)
        x, x_next = x.to(self.state_dtype or x.dtype), step.x_next.to(self.state_dtype or x.dtype)
        parts = {"steps": index, "x": x, "x_next": x_next, "log_prob": log_prob, "std": step.std.flatten()}
        for name, part in (parts | ({"mean": step.mean} if self.keep_mean else {})).items():
            self.parts.setdefault(name, []).append(part)

    def rollout(self, x0: Tensor, sigmas: Tensor) -> Rollout:
        """The rollout, with (B, S, …) columns: every sample has recorded equally many steps."""
        if not self.rows:
            return Rollout(x0=x0, sigmas=sigmas)
        order = torch.tensor(self.rows, device=x0.device).argsort(stable=True)
        columns = {name: _joined(parts)[order].unflatten(0, (len(x0), -1)) for name, parts in self.parts.items()}
        return Rollout(x0, sigmas, **columns)


def join(parts: Sequence[Rollout]) -> Rollout:
    """Concatenate rollouts of the same plan. The parts lose their tensors, to bound peak memory."""
    columns = {}
    for name in ("x0", "steps", "x", "x_next", "log_prob", "std", "mean"):
        tensors = [part.__dict__.pop(name) for part in parts]
        columns[name] = None if tensors[0] is None else _joined(tensors)
    return Rollout(sigmas=parts[0].sigmas, **columns)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """torch.cat without autocast, which rejects tensors of a 16-bit dtype other than its own."""
    with torch.autocast(parts[0].device.type, enabled=False):
        return torch.cat(list(parts))
