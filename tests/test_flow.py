import pytest
import torch

from flowalign.flow import at_least_float32, eps_from, expand, interpolate, mean_dims, velocity, x0_from


def test_three_numbers_by_hand():
    x0, eps = torch.tensor([[2.0]]), torch.tensor([[6.0]])
    assert interpolate(x0, eps, 0.25).item() == 3.0  # 0.75 * 2 + 0.25 * 6
    assert velocity(x0, eps).item() == 4.0


@pytest.mark.parametrize("sigma", [0.3, torch.tensor(0.3), torch.tensor([0.1, 0.5, 1.0])])
def test_the_true_velocity_leads_back_to_both_ends(sigma):
    x0, eps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    x, v = interpolate(x0, eps, sigma), velocity(x0, eps)
    torch.testing.assert_close(x0_from(x, v, sigma), x0)
    torch.testing.assert_close(eps_from(x, v, sigma), eps)


def test_the_ends_of_the_path_are_data_at_zero_and_noise_at_one():
    x0, eps = torch.randn(2, 3, 4)
    assert torch.equal(interpolate(x0, eps, 0.0), x0)
    assert torch.equal(interpolate(x0, eps, 1.0), eps)


@pytest.mark.parametrize("sigma", [0.5, torch.tensor(0.5), torch.tensor([0.5, 0.25])])
def test_expand_gives_one_value_per_sample(sigma):
    s = expand(sigma, torch.zeros(2, 3, 4, 4))
    assert s.shape == (2, 1, 1, 1)
    assert s[0].item() == 0.5


def test_expand_keeps_precision_but_never_goes_below_float32():
    assert expand(0.1, torch.zeros(1, 2, dtype=torch.float64)).item() == 0.1
    assert expand(torch.tensor(0.1), torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_mean_dims_never_mixes_samples():
    x = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    assert mean_dims(x).tolist() == [2.0, 20.0]
    assert mean_dims(x[:, 0]).tolist() == [1.0, 10.0]


def test_half_precision_is_lifted_and_double_is_kept():
    assert at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
