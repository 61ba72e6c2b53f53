"""The walk: keyed noise, recorded steps, and the same pictures in batches of any size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowalign.buffer import Buffer
from flowalign.dynamics import CPS, ODE, Dynamics, FlowSDE
from flowalign.points import transitions
from flowalign.sampler import Noise, Rows, Sampling, deterministic, join, walk
from flowalign.solvers import DPM, Euler
from flowalign.steps import All, Branch, Fast, Random, StepPlan, Window
from flowalign.steps.tail import shorten
from flowalign.types import Conditioning, Rollout, required

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0])
SHAPE = (3, 2)


def field(x: Tensor, sigma: Tensor, rows: Rows = slice(None)) -> Tensor:
    """A smooth velocity in which neighbours in a batch do not meet."""
    del rows
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
    x_next, recorded = required(p.x_next, "x_next"), required(p.log_prob, "log_prob")
    assert torch.allclose(dynamics.log_prob(x_next, mean, std), recorded, atol=1e-6)
    wrong = dynamics.log_prob(x_next, mean + 0.1 * std, std)
    assert (wrong - recorded).abs().max() > 1e-4


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
    assert rollout.steps is not None
    assert rollout.steps.tolist() == [list(Random(num=2, seed=0)(3, 4).trained)] * 2
    assert rollout.x.shape == (2, 2, *SHAPE)
    assert rollout.mean is None
    assert sampled(range(2), All()(0, 4), FlowSDE(0.7), keep_mean=True).mean is not None


@pytest.mark.parametrize("keep_in", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dynamics", [FlowSDE(0.7), CPS(0.7)])
def test_a_walk_goes_on_from_the_rounded_states_that_it_keeps(dynamics: Dynamics, keep_in: torch.dtype):
    seen: list[Tensor] = []

    def told(x: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        seen.append(x)
        return field(x, sigma, rows)

    rollout = walk(told, SIGMAS, All()(0, 4), dynamics, Euler(), Noise(5, 0, range(4), SHAPE), state_dtype=keep_in)
    x, x_next = required(rollout.x, "x"), required(rollout.x_next, "x_next")
    assert x.dtype == x_next.dtype == keep_in
    assert torch.equal(x[:, 1:], x_next[:, :-1])
    assert all(torch.equal(x[:, i].float(), seen[i]) for i in range(3))
    assert seen[-1].dtype == rollout.x0.dtype == torch.float32
    buffer = Buffer()
    buffer.fill(0, transitions(rollout, torch.zeros(4)), Conditioning(), torch.zeros(12, dtype=torch.long))
    p, _ = buffer.gather(torch.arange(12))
    assert p.x.dtype == required(p.x_next, "x_next").dtype == torch.float32
    mean, std = dynamics.moments(
        p.x, field(p.x, p.sigma[:, None, None]), p.sigma, required(p.sigma_next, ""), p.sigma_max
    )
    found = dynamics.log_prob(required(p.x_next, "x_next"), mean, std)
    assert torch.allclose(found, required(p.log_prob, "log_prob"), atol=1e-6)
    unrounded = sampled(range(4), All()(0, 4), dynamics)
    assert not torch.equal(required(unrounded.x, "x"), x.float())


@pytest.mark.parametrize("keep_in", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_what_states_are_kept_in_is_no_matter_of_autocast(keep_in: torch.dtype, autocast: torch.dtype):
    """Which is for products, and there are none in this field."""

    def joined() -> Rollout:
        noises = (Noise(5, 0, range(start, start + 2), SHAPE) for start in (0, 2))
        return join([walk(field, SIGMAS, All()(0, 4), FlowSDE(0.7), Euler(), n, state_dtype=keep_in) for n in noises])

    plain = joined()
    with torch.autocast("cpu", autocast):
        inside = joined()
    for name in ("x0", "x", "x_next", "log_prob"):
        assert torch.equal(getattr(inside, name), getattr(plain, name))
        assert getattr(inside, name).dtype == getattr(plain, name).dtype


def test_rounding_to_the_type_that_states_have_changes_nothing():
    plan, noise = All()(0, 4), Noise(5, 0, range(4), SHAPE)
    one, other = (walk(field, SIGMAS, plan, FlowSDE(0.7), Euler(), noise, state_dtype=k) for k in (None, torch.float32))
    for name in ("x0", "x", "x_next", "log_prob"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert Sampling(4, Euler()).state_dtype is None


def test_rounded_pictures_do_not_depend_on_their_batch():
    """Each is stochastic at a step of its own, and rounded at all that are trained."""
    plan = Branch(branches=2, num=3, seed=0)(0, 7)

    def walked(samples: range) -> Rollout:
        noise = Noise(5, 0, samples, SHAPE, sharing=6)
        return walk(field, LONG, plan, FlowSDE(0.7), Euler(), noise, state_dtype=torch.bfloat16)

    together, alone = walked(range(6)), join([walked(range(i, i + 1)) for i in range(6)])
    assert torch.equal(together.x0, alone.x0)
    assert torch.equal(required(together.x, "x"), required(alone.x, "x"))


def test_a_plan_without_noise_is_the_solvers_walk():
    plain = sampled(range(2), deterministic(4), ODE())
    x = Noise(5, 0, range(2), SHAPE)(0)
    for sigma, sigma_next in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
        x = x + (sigma_next - sigma) * field(x, sigma)
    assert torch.allclose(plain.x0, x, atol=1e-6)
    assert plain.x is None
    assert torch.equal(sampled(range(2), deterministic(4), FlowSDE(0.7)).x0, plain.x0)


def test_a_multistep_solver_starts_afresh_with_every_walk():
    solver = DPM(2)
    once, again = (walk(field, SIGMAS, deterministic(4), ODE(), solver, Noise(5, 0, range(2), SHAPE)) for _ in range(2))
    assert torch.equal(once.x0, again.x0)
    assert not torch.allclose(once.x0, sampled(range(2), deterministic(4), ODE()).x0, atol=1e-4)


@pytest.mark.parametrize("plan", [All()(0, 4), deterministic(4)])
def test_joined_parts_are_the_whole(plan: StepPlan):
    whole = sampled(range(6), plan, FlowSDE(0.7), keep_mean=True)
    parts = join([sampled(range(0, 4), plan, FlowSDE(0.7), True), sampled(range(4, 6), plan, FlowSDE(0.7), True)])
    for name in ("x0", "steps", "x", "x_next", "log_prob", "std", "mean"):
        one, other = getattr(whole, name), getattr(parts, name)
        assert one is other is None or torch.equal(required(one, name), required(other, name))


@pytest.mark.parametrize("name", ["num_steps", "batch_size"])
def test_no_steps_and_empty_batches_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        replace(Sampling(num_steps=4, solver=Euler()), **{name: 0})


def test_the_std_of_a_step_is_recorded():
    rollout = sampled(range(3), All()(0, 4), FlowSDE(0.7))
    assert rollout.std is not None
    for column, i in enumerate(range(3)):
        _, std = FlowSDE(0.7).moments(torch.zeros(1, 1), torch.zeros(1, 1), SIGMAS[i], SIGMAS[i + 1], SIGMAS[1])
        assert torch.allclose(rollout.std[:, column], std.flatten().expand(3))


@pytest.mark.parametrize("plan", [All()(0, 4), Window(2, seed=0, skip=0, stay=1)(1, 4), Branch(2, seed=0)(0, 4)])
@pytest.mark.parametrize("dynamics", [FlowSDE(1e-4), CPS(1e-4)])
def test_with_little_noise_every_plan_is_the_ode(plan: StepPlan, dynamics: Dynamics):
    assert torch.allclose(
        sampled(range(6), plan, dynamics).x0, sampled(range(6), deterministic(4), ODE()).x0, atol=2e-3
    )


# ------------------------------------------------------------ what is shared is computed once

LONG = torch.tensor([1.0, 0.95, 0.9, 0.8, 0.65, 0.4, 0.2, 0.0])
SHARED = {
    # plan of 7 steps, samples that start alike → velocities for 2 × 6 samples
    "nothing alike": (All()(0, 7), 1, 12 * 7),
    "noise at once": (All()(0, 7), 6, 2 + 12 * 6),
    "a late window": (Window(2, seed=0, stay=1)(3, 7), 6, 2 * 4 + 12 * 3),
    "a fast window": (Fast(2, seed=0, low=2, high=4)(0, 7), 6, 2 * 3 + 12 * 4),
    # A trunk for each six: at step 0 one row each; then the trunk and 2 branches; trunk and 4; from step 3 on all 6.
    "branches": (StepPlan((True, True, True, *[False] * 4), (0, 1, 2), branches=2), 6, 2 * (1 + 3 + 5 + 6 * 4)),
    "late branches": (StepPlan((False, False, True, True, *[False] * 3), (2, 3), branches=3), 6, 2 * (3 + 4 + 6 * 3)),
    "no noise": (deterministic(7), 6, 2 * 7),
}


def walked(plan: StepPlan, samples: list[int], sharing: int, solver: DPM | Euler) -> tuple[Rollout, int]:
    """The rollout and the rows that the network saw."""
    calls = 0

    def counted(x: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        nonlocal calls
        calls += len(x)
        names = torch.arange(len(samples))[rows]
        assert len(names) == len(x)
        return field(x, sigma)

    noise = Noise(5, 0, samples, SHAPE, sharing=sharing)
    return walk(counted, LONG, plan, FlowSDE(0.7), solver, noise, keep_mean=True), calls


@pytest.mark.parametrize("solver", [Euler(), DPM()])
@pytest.mark.parametrize("name", SHARED)
def test_a_shared_prefix_changes_nothing_and_costs_what_it_must(name: str, solver: DPM | Euler):
    plan, sharing, expected = SHARED[name]
    together, calls = walked(plan, list(range(12)), sharing, solver)
    alone = [walked(plan, [sample], sharing, solver) for sample in range(12)]
    assert calls == expected
    assert sum(count for _, count in alone) == 12 * 7
    apart = join([rollout for rollout, _ in alone])
    for column in ("x0", "steps", "x", "x_next", "log_prob", "std", "mean"):
        one, other = getattr(together, column), getattr(apart, column)
        assert one is other is None or torch.equal(required(one, column), required(other, column)), column


@pytest.mark.parametrize(("start", "calls"), [(0, 217), (2, 171), (4, 125)])
def test_a_group_walks_to_its_first_noise_as_one(start: int, calls: int):
    """24 pictures in ten steps, of 240 calls without sharing: 29 % less with three shared steps, 48 % with five."""
    asked = 0

    def counted(x: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        nonlocal asked
        asked += len(x)
        return field(x, sigma)

    plan = Fast(2, seed=0, low=start, high=start + 2)(0, 10)
    walk(counted, torch.linspace(1, 0, 11), plan, FlowSDE(0.7), Euler(), Noise(5, 0, range(24), SHAPE, sharing=24))
    assert asked == calls == start + 1 + 24 * (9 - start)


def test_the_trunk_of_branches_is_the_ode():
    plan = SHARED["branches"][0]
    rollout, _ = walked(plan, list(range(12)), 6, Euler())
    assert rollout.x is not None
    assert rollout.steps is not None
    assert rollout.steps.flatten().tolist() == [0, 0, 1, 1, 2, 2] * 2
    x = Noise(5, 0, [0, 6], SHAPE)(0)
    for step in range(3):
        recorded = rollout.x[:, 0].unflatten(0, (2, 6))[:, 2 * step : 2 * step + 2]
        assert torch.allclose(recorded, x[:, None].expand_as(recorded), atol=1e-6)
        x = x + (LONG[step + 1] - LONG[step]) * field(x, LONG[step])
    assert len(rollout.x0.flatten(1).unique(dim=0)) == 12


def test_branches_differ_by_their_own_step_alone():
    """Without its noise a branch is the trunk: mean and trunk's next state agree as eta goes to 0."""
    plan = SHARED["branches"][0]
    noise = Noise(5, 0, range(6), SHAPE, sharing=6)
    still = walk(field, LONG, plan, FlowSDE(1e-5), Euler(), noise)
    assert (still.x0 - still.x0[:1]).abs().max() < 1e-3
    moved = walk(field, LONG, plan, FlowSDE(0.7), Euler(), noise)
    assert (moved.x0 - moved.x0[:1]).abs().max() > 1e-2


def test_the_network_is_asked_for_the_conditions_of_the_rows_it_sees():
    """Two prompts in a batch: the velocity of each distinct row is that of its own prompt."""
    prompt = torch.tensor([1.0, 1, 1, 2, 2, 2])[:, None, None]

    def told(x: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        return torch.tanh(x) * prompt[rows] * sigma

    plan = Window(2, seed=0, stay=1)(2, 7)
    shared = walk(told, LONG, plan, FlowSDE(0.7), Euler(), Noise(5, 0, range(6), SHAPE, sharing=3))
    for sample in range(6):

        def own(x: Tensor, sigma: Tensor, rows: Rows, c: Tensor = prompt[sample]) -> Tensor:
            return torch.tanh(x) * c * sigma

        alone = walk(own, LONG, plan, FlowSDE(0.7), Euler(), Noise(5, 0, [sample], SHAPE, sharing=3))
        assert torch.equal(shared.x0[sample], alone.x0[0])


def test_a_full_window_is_flow_grpo():
    one, other = (
        walked(plan, list(range(6)), 1, Euler())[0] for plan in (Window(7, seed=0, skip=0)(5, 7), All(1.0)(5, 7))
    )
    for column in ("x0", "x", "x_next", "log_prob", "std"):
        assert torch.equal(getattr(one, column), getattr(other, column))
    # Without the last steps, the points of the others are still the same.
    short = walked(Window(5, seed=0, skip=2)(5, 7), list(range(6)), 1, Euler())[0]
    assert short.log_prob is not None
    assert one.log_prob is not None
    assert torch.equal(short.log_prob, one.log_prob[:, :5])


# ------------------------------------------------------------ the tail of MixGRPO-Flash


def test_the_tail_is_second_order_from_its_first_step():
    plan = Window(2, seed=0, tail=0.8)(0, 7)
    sigmas = shorten(LONG, plan.last_noisy, 0.8, 3.0)
    assert len(sigmas) == 2 + 4  # two steps of the window, then 4 points, the first of which ends the window
    noise = Noise(5, 0, range(2), SHAPE)
    rollout = walk(field, sigmas, plan, FlowSDE(0.7), Euler(), noise)
    assert rollout.x is not None
    assert rollout.x_next is not None
    x, state = rollout.x_next[:, 1], DPM().start()
    state.push(rollout.x[:, 1], field(rollout.x[:, 1], sigmas[1]), sigmas[1])
    for i in range(2, 5):
        x = state.step(x, field(x, sigmas[i]), sigmas[i], sigmas[i + 1], last=i == 4)
    assert torch.equal(rollout.x0, x)
    euler = walk(field, sigmas, replace(plan, tail=None), FlowSDE(0.7), Euler(), noise)
    assert torch.equal(required(euler.x_next, "x_next"), rollout.x_next)
    assert not torch.allclose(euler.x0, x, atol=1e-3)


@pytest.mark.parametrize("solver", [DPM(1), DPM(3), DPM(rule="heun")])
def test_a_tail_remembers_every_step_before_it(solver: DPM):
    """A third order needs two of them."""
    plan = Window(2, seed=0, tail=0.8, tail_solver=solver)(0, 7)
    sigmas = shorten(LONG, plan.last_noisy, 0.8, 3.0)
    rollout = walk(field, sigmas, plan, FlowSDE(0.7), Euler(), Noise(5, 0, range(2), SHAPE))
    x, state = required(rollout.x_next, "x_next")[:, 1], solver.start()
    for i in range(2):
        before = required(rollout.x, "x")[:, i]
        state.push(before, field(before, sigmas[i]), sigmas[i])
    for i in range(2, 5):
        x = state.step(x, field(x, sigmas[i]), sigmas[i], sigmas[i + 1], last=i == 4, careful=i == 3)
    assert torch.equal(rollout.x0, x)


def test_a_short_tail_saves_steps():
    plan = Window(2, seed=0, tail=0.4)(0, 7)
    sigmas = shorten(LONG, plan.last_noisy, 0.4, 3.0)
    calls = []

    def counted(x: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        calls.append(len(x))
        return field(x, sigma)

    rollout = walk(counted, sigmas, plan, FlowSDE(0.7), Euler(), Noise(5, 0, range(4), SHAPE, sharing=4))
    assert calls == [1, 4, 4]
    assert rollout.x0.isfinite().all()
    assert torch.equal(rollout.sigmas, sigmas)
