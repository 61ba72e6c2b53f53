"""The walk from noise to data: stochastic steps where the plan says so, an ODE solver elsewhere.

Samples that start from the same noise are the same until their first stochastic step, and until then the network is
asked once for all of them.
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
    """How pictures are made: number of steps, classifier-free guidance (1 = off), ODE solver, pictures at a time.

    same_noise: the members of a group start from the same noise. keep_in: type in which recorded states are kept.
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
    """Keyed noise of a set of samples: the same numbers whatever the batch, the rank or the device."""

    seed: int
    epoch: int
    samples: Sequence[int]
    shape: tuple[int, ...]
    device: torch.device | str = "cpu"
    sharing: int = 1
    """So many neighbouring samples start from the same noise."""

    def __call__(self, stream: int) -> Tensor:
        """(B, *shape)"""
        samples = self.initial_ids() if stream == INITIAL else self.samples
        return keyed_randn(self.seed, self.epoch, samples, stream, self.shape, self.device)

    def initial_ids(self) -> list[int]:
        """The sample whose noise each one starts from."""
        return [s // self.sharing * self.sharing for s in self.samples]

    def index(self, rows: list[int]) -> Noise:
        """The noise of some of the samples, by position."""
        return replace(self, samples=[self.samples[row] for row in rows])


Rows = Tensor | slice
"""Positions (b,) in the batch of a walk, or slice(None) for all of it."""


class Deduplicator:
    """Which samples of a walk are still the same, and hence which ones the network has to see."""

    def __init__(self, initial_ids: Sequence[int]) -> None:
        # A sample is known by where it started until it has had noise of its own, and by its place (below 0) then.
        self.names = list(initial_ids)

    def diverge(self, rows: Sequence[int]) -> None:
        """These samples have had noise of their own."""
        for row in rows:
            self.names[row] = -1 - row

    def __call__(self, velocity: Callable[[Tensor, Tensor, Rows], Tensor], x: Tensor, sigma: Tensor) -> Tensor:
        """The velocity of every sample from one call on the distinct ones."""
        first: dict[int, int] = {}
        for row, name in enumerate(self.names):
            first.setdefault(name, row)
        if len(first) == len(x):
            return velocity(x, sigma, slice(None))
        place = {name: i for i, name in enumerate(first)}
        rows = torch.tensor(list(first.values()), device=x.device)
        return velocity(x[rows], sigma, rows)[torch.tensor([place[name] for name in self.names], device=x.device)]


def deterministic(num_steps: int) -> StepPlan:
    """The plan of an ODE walk: no step is noisy and none is recorded."""
    return StepPlan(noisy=(False,) * num_steps, trained=())


def walk(
    velocity: Callable[[Tensor, Tensor, Rows], Tensor],
    sigmas: Tensor,
    plan: StepPlan,
    dynamics: Dynamics,
    solver: Solver,
    noise: Noise,
    keep_mean: bool = False,
    keep_in: torch.dtype | None = None,
) -> Rollout:
    """Walks `sigmas` (T+1,) from keyed noise to x0, and records the steps that are trained.

    velocity(x, sigma, rows) is asked for the distinct samples only: x (b, …) at sigma (0-d), which are `rows` of the
    batch. With a tail in the plan, sigmas is the shortened schedule, and after the last stochastic step the plan's own
    solver takes over, which remembers all predictions before. The log-probability is taken from the very tensors that
    are stored, so that the ratio is 1 on policy. keep_in: the type they are stored in, if another; the walk then goes
    on from the rounded states.
    """
    x, distinct, record = noise(INITIAL), Deduplicator(noise.initial_ids()), Recorder(keep_mean, keep_in)
    state, tail = solver.start(), plan.tail_solver.start()
    last, last_noisy = len(sigmas) - 2, plan.last_noisy
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        if i in plan.trained:
            x = round_to(x, keep_in)
        v = distinct(velocity, x, sigma)
        rows = plan.rows(i, noise.samples) if i <= last_noisy else []
        x_before, every = x, len(rows) == len(x)
        if plan.tail is not None and i <= last_noisy:
            tail.push(x, v, sigma)
        if every:
            state.push(x, v, sigma)
        else:
            x = state.step(x, v, sigma, sigma_next, i == last, careful=i == last - 1 and last + 1 < 15)
        if plan.tail is not None and i == last_noisy:
            state = tail
        if not rows:
            continue
        distinct.diverge(rows)
        some: Rows = slice(None) if every else torch.tensor(rows, device=x.device)
        z = (noise if every else noise.index(rows))(STEP + i)
        step = dynamics.step(x_before[some], v[some], sigma, sigma_next, sigmas[1], z)
        if i in plan.trained:
            step = step._replace(x_next=round_to(step.x_next, keep_in))
        x = step.x_next if every else x.index_copy(0, some, step.x_next)  # type: ignore[arg-type]
        if i in plan.trained:
            record(i, rows, x_before[some], step, dynamics.log_prob(step.x_next, step.mean, step.std))
    return record.rollout(x, sigmas)


def round_to(x: Tensor, keep_in: torch.dtype | None) -> Tensor:
    """What is left of x when it is kept in another type, in its own type; None: x itself."""
    return x if keep_in is None else x.to(keep_in).to(x.dtype)


class Recorder:
    """The trained steps of a walk as they come, each for some of the samples, and at the end by sample.

    States are stored in `keep_in` (None: as they come), which loses nothing of rounded ones.
    """

    def __init__(self, keep_mean: bool, keep_in: torch.dtype | None) -> None:
        self.keep_mean, self.keep_in = keep_mean, keep_in
        self.rows: list[int] = []
        self.parts: dict[str, list[Tensor]] = {}

    def __call__(self, i: int, rows: list[int], x: Tensor, step: Step, log_prob: Tensor) -> None:
        """Step i of the samples at `rows`."""
        self.rows += rows
        number = torch.full((len(rows),), i, device=x.device)
        x, x_next = x.to(self.keep_in or x.dtype), step.x_next.to(self.keep_in or x.dtype)
        parts = {"steps": number, "x": x, "x_next": x_next, "log_prob": log_prob, "std": step.std.flatten()}
        for name, part in (parts | ({"mean": step.mean} if self.keep_mean else {})).items():
            self.parts.setdefault(name, []).append(part)

    def rollout(self, x0: Tensor, sigmas: Tensor) -> Rollout:
        """With (B, S, …) columns: every sample has recorded equally many steps."""
        if not self.rows:
            return Rollout(x0=x0, sigmas=sigmas)
        order = torch.tensor(self.rows, device=x0.device).argsort(stable=True)
        columns = {name: torch.cat(parts)[order].unflatten(0, (len(x0), -1)) for name, parts in self.parts.items()}
        return Rollout(x0, sigmas, **columns)


def join(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of the same plan, one after another. The parts lose their tensors, so that few are there twice."""
    columns = {}
    for name in ("x0", "steps", "x", "x_next", "log_prob", "std", "mean"):
        tensors = [part.__dict__.pop(name) for part in parts]
        columns[name] = None if tensors[0] is None else torch.cat(tensors)
    return Rollout(sigmas=parts[0].sigmas, **columns)
