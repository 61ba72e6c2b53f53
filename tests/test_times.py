from typing import Any

import pytest
import torch

from flowalign.times import LogitNormal, Permuted, Start, Stratified, Times, Uniform

SIGMAS = torch.cat([torch.linspace(1, 0.1, 14), torch.zeros(1)])
"""14 steps, as AWM walks."""
RULES = [Permuted(4), Stratified(6), Stratified(6, start="with_init"), Uniform(5, shift=3.0), LogitNormal(5, shift=3.0)]


@pytest.mark.parametrize("times", RULES)
def test_levels_belong_to_the_key_and_the_epoch(times: Times):
    levels = times(1, 2, [3, 4, 5], SIGMAS)
    assert levels.shape == (3, times.count(14))
    assert levels.dtype == SIGMAS.dtype
    assert torch.equal(times(1, 2, torch.tensor([5, 3, 5]), SIGMAS), levels[[2, 0, 2]])
    assert not torch.equal(times(1, 3, [3, 4, 5], SIGMAS), levels)
    assert len({tuple(row) for row in times(0, 0, range(20), SIGMAS).tolist()}) > 5


@pytest.mark.parametrize("times", RULES)
def test_levels_lie_on_the_path_and_the_global_generator_is_left_alone(times: Times):
    state = torch.get_rng_state()
    levels = times(0, 0, range(200), SIGMAS)
    assert torch.equal(torch.get_rng_state(), state)
    assert levels.min() > 0
    assert levels.max() <= 1


@pytest.mark.parametrize("rule", [Permuted, Stratified, Uniform, LogitNormal])
def test_shared_levels_are_those_of_every_key_of_an_epoch(rule: type[Times]):
    levels = rule(4, shared=True)(0, 0, range(5), SIGMAS)
    assert torch.equal(levels, levels[:1].expand(5, 4))
    assert not torch.equal(levels[0], rule(4, shared=True)(0, 1, [0], SIGMAS)[0])


@pytest.mark.parametrize("rule", [Permuted, Stratified, Uniform, LogitNormal])
def test_all_but_one_of_a_short_schedule_is_the_default(rule: type[Times]):
    assert rule().count(10) == 9
    assert rule().count(1) == 1
    with pytest.raises(ValueError, match=r"times.num=0.*at least one"):
        rule(0)


# ------------------------------------------------------------ permuted


def test_every_row_is_a_permutation_of_the_schedule():
    levels = Permuted(14)(0, 0, range(50), SIGMAS)
    assert torch.equal(levels.sort(dim=1, descending=True).values, SIGMAS[:-1].expand(50, 14))
    assert len({tuple(row) for row in levels.tolist()}) > 45


def test_every_noise_level_is_visited_equally_often():
    levels = Permuted(5)(0, 0, range(2000), torch.linspace(1, 0, 11))
    counts = levels.flatten().unique(return_counts=True)[1]
    assert len(counts) == 10
    assert counts.min() > 880
    assert counts.max() < 1120


def test_more_points_than_levels_are_refused():
    with pytest.raises(ValueError, match=r"times.num=15.*so 1 to 14"):
        Permuted(15).count(14)


# ------------------------------------------------------------ stratified


@pytest.mark.parametrize(
    ("start", "lowest", "highest"),
    [
        ("discrete", [0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]),
        # Bounds 1, 2.83, 4.67, 6.5, 8.33, 10.17, 12, truncated.
        ("without_init", [1, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]),
        # 0 and then 1, 3.2, 5.4, 7.6, 9.8, 12.
        ("with_init", [0, 1, 3, 5, 7, 9], [0, 2, 4, 6, 8, 11]),
    ],
)
def test_awm_takes_one_index_of_each_truncated_stratum(start: Start, lowest: list[int], highest: list[int]):
    times = Stratified(6, start=start)
    strata = 5 if start == "with_init" else 6
    assert times.indices(torch.zeros(strata), 14).tolist() == lowest
    assert times.indices(torch.full((strata,), 0.999), 14).tolist() == highest


def test_the_cleanest_tenth_is_never_noised_and_the_start_is_a_choice():
    for start, first, always in (
        ("discrete", 1.0, False),
        ("without_init", SIGMAS[1], False),
        ("with_init", 1.0, True),
    ):
        levels = Stratified(3, start=start)(0, 0, range(300), SIGMAS)
        assert levels.min() >= SIGMAS[11]
        assert levels.max() == first
        assert bool((levels[:, 0] == 1).all()) is always


def test_one_point_with_the_start_is_the_start():
    assert Stratified(1, start="with_init")(0, 0, [0], SIGMAS).tolist() == [[1.0]]


@pytest.mark.parametrize("arguments", [{"start": "noise"}, {"share": 0.0}, {"share": 1.5}])
def test_an_impossible_choice_of_strata_is_refused(arguments: Any):
    with pytest.raises(ValueError, match=r"start is one of|in \(0, 1\]"):
        Stratified(2, **arguments)
    with pytest.raises(ValueError, match="leaves no noise level"):
        Stratified(2, start="without_init", share=0.1)(0, 0, [0], SIGMAS)


# ------------------------------------------------------------ continuous


def test_uniform_levels_are_uniform_before_the_shift():
    plain = Uniform(4, low=0.2, high=0.8)(0, 0, range(1000), SIGMAS)
    assert 0.2 <= plain.min() < 0.21
    assert 0.79 < plain.max() <= 0.8
    assert abs(plain.mean() - 0.5) < 0.01
    moved = Uniform(4, low=0.2, high=0.8, shift=3.0)(0, 0, range(1000), SIGMAS)
    assert torch.allclose(moved, 3 * plain / (1 + 2 * plain))


def test_logit_normal_levels_have_one_in_each_quantile():
    levels = LogitNormal(4)(0, 0, range(1000), SIGMAS).sort(dim=1).values
    quartiles = torch.special.expit(torch.special.ndtri(torch.tensor([0.25, 0.5, 0.75])))
    assert (levels[:, :-1] <= quartiles + 1e-6).all()
    assert (levels[:, 1:] >= quartiles - 1e-6).all()
    first = LogitNormal(4)(0, 0, range(1000), SIGMAS)[:, 0]
    assert abs(first.mean() - 0.5) < 0.03  # in no order


def test_the_draws_are_those_of_the_method_in_its_order():
    """float32 uniform numbers, a level a stratum, then the order: Flow-Factory's samplers from the same generator."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        u = (torch.arange(6) + torch.rand(6, generator=generator)) / 6
        level = (0.2 + 0.8 * u)[torch.rand(6, generator=generator).argsort()]
        ours = Uniform(6, shift=3.0).draw(torch.Generator().manual_seed(seed), SIGMAS)
        torch.testing.assert_close(ours, 3 * level / (1 + 2 * level), rtol=1e-6, atol=0)
        normal = torch.distributions.Normal(0.0, 1.0).icdf(u)
        generator = torch.Generator().manual_seed(seed)
        torch.rand(6, generator=generator)
        level = normal[torch.randperm(6, generator=generator)].sigmoid()
        ours = LogitNormal(6, shift=3.0).draw(torch.Generator().manual_seed(seed), SIGMAS)
        torch.testing.assert_close(ours, (3 * level / (1 + 2 * level)).clamp(min=0.01), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "wrong", [lambda: Uniform(2, low=0.5, high=0.5), lambda: Uniform(2, shift=0), lambda: LogitNormal(2, std=-1)]
)
def test_an_empty_range_is_refused(wrong):
    with pytest.raises(ValueError, match="low < high|must be positive"):
        wrong()
