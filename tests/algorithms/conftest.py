"""Points made by hand, of both kinds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowalign.dynamics import Dynamics, FlowSDE
from flowalign.flow import interpolate
from flowalign.types import Point

COPIES = ("old", "reference", "anchor")
Made = tuple[Point, Tensor]


@pytest.fixture
def transition() -> Callable[..., Made]:
    """Steps drawn under v, which is given beside them as a leaf: on policy unless it is moved."""

    def make(advantage: list[float], dynamics: Dynamics | None = None) -> Made:
        generator, B = torch.Generator().manual_seed(0), len(advantage)
        dynamics = FlowSDE(0.7) if dynamics is None else dynamics
        x, v, noise, ref = torch.randn(4, B, 4, 6, dtype=torch.float64, generator=generator)
        sigma = torch.tensor([1.0, 0.8, 0.5, 0.3, 0.7, 0.6], dtype=torch.float64)[:B]
        recorded = {"sigma_next": sigma - 0.1, "sigma_max": torch.full_like(sigma, 0.9)}
        step = dynamics.step(x, v, sigma, *recorded.values(), noise)
        A = torch.tensor(advantage, dtype=torch.float64)
        p = Point(x, sigma, A, x_next=step.x_next, log_prob=dynamics.log_prob(*step), mean=step.mean, **recorded)
        p.frozen = {"reference": ref}
        return p, v.clone().requires_grad_()

    return make


@pytest.fixture
def noised() -> Callable[..., Made]:
    """Re-noised samples in groups of `members` with shared noise, and a v at which every frozen copy still is."""

    def make(advantage: list[float], members: int = 1) -> Made:
        generator, B = torch.Generator().manual_seed(0), len(advantage)
        x0, v, eps = torch.randn(3, B, 3, 5, dtype=torch.float64, generator=generator)
        draws, group = B // members, torch.arange(B) // members
        sigma = torch.linspace(1, 0.2, draws, dtype=torch.float64).repeat_interleave(members)
        eps = eps[:draws].repeat_interleave(members, dim=0)
        A = torch.tensor(advantage, dtype=torch.float64)
        p = Point(interpolate(x0, eps, sigma), sigma, A, x0=x0, eps=eps, group=group, sample=torch.arange(B))
        p.frozen = {name: v.clone() for name in COPIES}
        return p, v.clone().requires_grad_()

    return make


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def precision(request: pytest.FixtureRequest) -> tuple[Callable, float]:
    """A cast of a tensor or point to the precision in which a loss is computed, and how well it must agree in it."""

    def cast(it: Tensor | Point):
        if isinstance(it, Point):
            return it._each(lambda t: t.to(request.param) if t.is_floating_point() else t)
        return it.to(request.param)

    return cast, 1e-9 if request.param == torch.float64 else 1e-6


@pytest.fixture
def golden_transition(golden: Callable[[str], dict]) -> Callable[[str], tuple[dict, Point]]:
    """One of the reference blocks for replayed steps of SD3.5's schedule of ten, all at one step."""

    def load(name: str) -> tuple[dict, Point]:
        d = golden(name)
        rows = torch.ones(len(d["sample"]), dtype=torch.float64)
        # The guard and tempflow files do not say their sigmas; all are of step 0.
        sigma, sigma_next = (d.get(key, value) * rows for key, value in (("sigma", 1.0), ("sigma_next", SECOND)))
        p = Point(d["sample"], sigma, d["advantages"], x_next=d["prev_sample"], sigma_next=sigma_next)
        p.sigma_max, p.log_prob, p.mean = SECOND * rows, d["log_prob_old"], d.get("mean_old")
        p.frozen = {"reference": d["v_ref"]} if "v_ref" in d else {}
        return d, p

    return load


SECOND = 0.9601293206214905
"""Second sigma of SD3.5's schedule of ten steps."""


@pytest.fixture
def gradient() -> Callable[..., Tensor]:
    def of(algorithm, p: Point, v: Tensor) -> Tensor:
        return torch.autograd.grad(algorithm.loss(p, v)[0].sum(), v)[0]

    return of
