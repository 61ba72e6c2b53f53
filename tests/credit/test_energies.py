import pytest
import torch

from flowalign.credit import Energies


@pytest.mark.parametrize("reward", ["r1", "r2", "r3"])
@pytest.mark.parametrize("std", ["global", "group"])
@pytest.mark.parametrize("gate", ["soft", "hard"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_reference_energies_are_reproduced(golden, agrees, reward, std, gate, temperature):
    d = golden("flowawr_energies")
    credit = Energies(gate, temperature, d["energy_max"].item(), d["adv_clip_max"].item(), std)
    theirs = d[f"energy_{reward}_{std}_{gate}_tau{temperature:g}"]
    assert agrees(credit(d[reward], d["group_id"]), theirs, 1e-12)


@pytest.mark.parametrize("gate", ["soft", "hard"])
def test_the_reference_mean_of_several_energies_is_reproduced(golden, agrees, gate):
    d = golden("flowawr_energies")
    rewards = torch.stack([d["r1"], d["r2"], d["r3"]], dim=1)
    energies = Energies(gate, aggregate="energies")(rewards, d["group_id"], weights=d["weights"])
    assert agrees(energies, d[f"gdpo_energy_{gate}"][:, 0], 1e-12)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_weight_that_sinks_to_nothing_ends_without_a_jump():
    rewards, group = torch.stack([f64(0, 1, 2), f64(1, 0, 5)], dim=1), torch.zeros(3)
    credit = Energies(aggregate="energies", std="group")
    nearly, at_last = (credit(rewards, group, weights=f64(1, last)) for last in (1e-30, 0))
    torch.testing.assert_close(at_last, nearly, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at_last, credit(rewards[:, :1], group) / 2, rtol=1e-12, atol=1e-12)


def test_a_pair_by_hand():
    # Advantages ±1 give p = e / (e + 1/e) and 1 - p.
    energies = Energies(std="group", eps=0.0)(f64(2, 6), torch.zeros(2))
    p = (1 / (1 + f64(-2).exp())).item()
    torch.testing.assert_close(energies, f64(1 - 2 * p, 2 * p - 1))


def test_energies_of_a_group_add_up_to_zero_and_none_is_below_minus_one():
    rewards, group = torch.randn(60, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 5
    energies = Energies(clip=50.0, temperature=0.2)(rewards, group)
    total = torch.zeros(5, dtype=torch.float64).index_add_(0, group, energies)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)
    assert energies.min() >= -1
    assert energies.max() > 3
    clipped = Energies(temperature=0.2)(rewards, group)
    torch.testing.assert_close(clipped, energies.clamp(max=3))


def test_a_hard_gate_makes_a_small_difference_large():
    rare, group = f64(*[0.0] * 23, 1.0), torch.zeros(24)
    soft, hard = (Energies(gate, temperature=20.0, std="group")(rare, group)[23] for gate in ("soft", "hard"))
    assert 0 < 3 * soft < hard


def test_a_colder_softmax_trusts_fewer_samples():
    rewards, group = torch.randn(48, generator=torch.Generator().manual_seed(0)), torch.arange(48) % 4
    sizes = [Energies(temperature=t).stats(rewards, group)["effective_samples"] for t in (10.0, 1.0, 0.1)]
    assert 12 > sizes[0] > sizes[1] > sizes[2] >= 1


def test_effective_samples_by_hand():
    # Four equal ones carry all weight, and a pair with e : 1/e has (e + 1/e)^2 / (e^2 + 1/e^2) of them.
    rewards, group = f64(5, 5, 5, 5, 0, 2, float("nan")), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    pair = (2 + 2 * torch.cosh(f64(2)).item()) / (2 * torch.cosh(f64(2)).item())
    stats = Energies(std="group", eps=0.0).stats(rewards, group)
    assert stats["effective_samples"] == pytest.approx((4 + pair) / 2)
    assert stats["effective_share"] == pytest.approx((1 + pair / 2) / 2)


@pytest.mark.parametrize("wrong", [{"gate": "some"}, {"aggregate": "advantages"}, {"temperature": 0.0}, {"clip": -1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) if "clip" not in wrong else "clips"):
        Energies(**wrong)
