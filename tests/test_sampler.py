"""The walk: keyed noise, recorded steps, and the same pictures in batches of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from flowalign.dynamics import CPS, ODE, Dynamics, FlowSDE
from flowalign.points import transitions
from flowalign.sampler import Noise, Sampling, deterministic, join, walk
from flowalign.solvers import DPM2, Euler
from flowalign.steps import All, Random, StepPlan

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from flowalign.collect import Collected

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0])
SHAPE = (3, 2)


def field(x: Tensor, sigma: Tensor) -> Tensor:
    """A smooth velocity in which neighbours in a batch do not meet."""
    return torch.tanh(x) * (1 + sigma)


def sampled(ids: range, plan: StepPlan, dynamics: Dynamics, keep_mean: bool = False, epoch: int = 0):
    return walk(field, SIGMAS, plan, dynamics, Euler(), Noise(5, epoch, ids, SHAPE), keep_mean)


def test_noise_is_the_same_whatever_the_batch():
    whole = Noise(5, 2, range(8), SHAPE)(0)
    parts = torch.cat([Noise(5, 2, range(start, start + 2), SHAPE)(0) for start in range(0, 8, 2)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, Noise(5, 3, range(8), SHAPE)(0))
    assert not torch.equal(whole, Noise(5, 2, range(8), SHAPE)(1))


@pytest.mark.parametrize("dynamics", [FlowSDE(0.7), CPS(0.7)])
def test_the_recorded_log_probability_is_that_of_the_recorded_step(dynamics: Dynamics):
    rollout = sampled(range(4), All()(0, 4), dynamics)
    p = transitions(rollout, torch.zeros(4))
    assert p.sigma_next is not None
    mean, std = dynamics.moments(p.x, field(p.x, p.sigma[:, None, None]), p.sigma, p.sigma_next, p.sigma_max)
    assert torch.allclose(dynamics.log_prob(p.x_next, mean, std), p.log_prob, atol=1e-6)
    wrong = dynamics.log_prob(p.x_next, mean + 0.1 * std, std)
    assert (wrong - p.log_prob).abs().max() > 1e-4


def test_recorded_steps_join_end_to_end():
    rollout = sampled(range(2), StepPlan(noisy=(True,) * 4, trained=(0, 1, 2, 3)), FlowSDE(0.7))
    assert rollout.x is not None
    assert rollout.x_next is not None
    assert torch.equal(rollout.x[:, 1:], rollout.x_next[:, :-1])
    assert torch.equal(rollout.x_next[:, -1], rollout.x0)
    assert torch.equal(rollout.x[:, 0], Noise(5, 0, range(2), SHAPE)(0))


def test_only_the_trained_steps_are_kept():
    rollout = sampled(range(2), Random(num=2, seed=0)(3, 4), FlowSDE(0.7))
    assert rollout.x is not None
    assert rollout.steps == Random(num=2, seed=0)(3, 4).trained
    assert rollout.x.shape == (2, 2, *SHAPE)
    assert rollout.mean is None
    assert sampled(range(2), All()(0, 4), FlowSDE(0.7), keep_mean=True).mean is not None


def test_a_plan_without_noise_is_the_solvers_walk():
    plain = sampled(range(2), deterministic(4), ODE())
    x = Noise(5, 0, range(2), SHAPE)(0)
    for sigma, sigma_next in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
        x = x + (sigma_next - sigma) * field(x, sigma)
    assert torch.allclose(plain.x0, x, atol=1e-6)
    assert plain.x is None
    assert torch.equal(sampled(range(2), deterministic(4), FlowSDE(0.7)).x0, plain.x0)


def test_a_multistep_solver_starts_afresh_with_every_walk():
    solver = DPM2(2)
    once, again = (walk(field, SIGMAS, deterministic(4), ODE(), solver, Noise(5, 0, range(2), SHAPE)) for _ in range(2))
    assert torch.equal(once.x0, again.x0)
    assert not torch.allclose(once.x0, sampled(range(2), deterministic(4), ODE()).x0, atol=1e-4)


@pytest.mark.parametrize("plan", [All()(0, 4), deterministic(4)])
def test_joined_parts_are_the_whole(plan: StepPlan):
    whole = sampled(range(6), plan, FlowSDE(0.7), keep_mean=True)
    parts = join([sampled(range(0, 4), plan, FlowSDE(0.7), True), sampled(range(4, 6), plan, FlowSDE(0.7), True)])
    for name in ("x0", "x", "x_next", "log_prob", "mean"):
        one, other = getattr(whole, name), getattr(parts, name)
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("name", ["num_steps", "batch_size"])
def test_no_steps_and_empty_batches_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        replace(Sampling(num_steps=4, solver=Euler()), **{name: 0})


# ------------------------------------------------------------ with the embedded model


@pytest.fixture
def collected(tiny: Callable[..., DictConfig]) -> Callable[[str, int, int], Collected]:
    def collect(algo: str, batch_size: int, rank: int = 0, ranks: int = 1) -> Collected:
        from flowalign.collect import Collector
        from flowalign.conditioner import Conditioner
        from flowalign.geometry import Geometry
        from flowalign.module import points_per_sample
        from flowalign.run import build_recipe

        r = build_recipe(tiny(f"algo={algo}", "batch.group_size=4", f"rollout.batch_size={batch_size}"))
        geometry = Geometry(r.batch, points_per_sample(r), ranks)
        collector = Collector(
            r.model, r.algorithm, r.dynamics, r.steps, r.rollout, r.credit, r.scorer, r.data["train"],
            Conditioner(r.model, guided=False), geometry, r.train_size, r.seed, points_per_sample(r),
        )  # fmt: skip
        everyone = torch.arange(geometry.samples).float()
        with torch.no_grad():
            return collector(0, rank, torch.device("cpu"), lambda _: everyone, lambda done, reward: None)

    return collect


@pytest.mark.parametrize("algo", ["grpo", "nft"])
def test_a_rollout_does_not_depend_on_its_batch_size(collected: Callable[..., Collected], algo: str):
    small, large = collected(algo, 2).points, collected(algo, 8).points
    assert torch.equal(small.sigma, large.sigma)
    assert torch.equal(small.advantage, large.advantage)
    assert torch.allclose(small.x, large.x, atol=5e-5)  # matrix products round differently with the batch
    if small.eps is not None:
        assert torch.equal(small.eps, large.eps)
        assert torch.allclose(small.x0, large.x0, atol=5e-5)
    else:
        assert torch.allclose(small.log_prob, large.log_prob, atol=1e-5)


def test_ranks_divide_what_one_process_would_make(collected: Callable[..., Collected]):
    whole = collected("nft", 8)
    halves = [collected("nft", 8, rank, 2) for rank in range(2)]
    per_sample = len(whole.points.x) // 8
    for rank, half in enumerate(halves):
        mine = whole.points.x.reshape(8, per_sample, *whole.points.x.shape[1:])[rank::2].flatten(0, 1)
        assert torch.allclose(half.points.x, mine, atol=1e-5)
        assert torch.equal(half.points.advantage, whole.points.advantage.reshape(8, -1)[rank::2].flatten())
