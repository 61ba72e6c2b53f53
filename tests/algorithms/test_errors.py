"""Errors of a velocity at noised points, whatever these are kept in."""

import torch

from flowalign.algorithms.errors import matching, x0_error
from flowalign.flow import interpolate, velocity, x0_from
from flowalign.types import Point


def test_differences_of_16_bit_tensors_are_taken_in_more():
    """Those of the rounded tensors, computed in float64."""
    x0, eps, v = torch.randn(3, 4, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    sigma = torch.tensor([0.9, 0.5, 0.1, 0.01])
    x = interpolate(x0.float(), eps.float(), sigma).bfloat16()
    p = Point(x, sigma, torch.zeros(4), x0=x0, eps=eps)
    exact = (v.double() - velocity(x0.double(), eps.double())).square().flatten(1).mean(1)
    torch.testing.assert_close(matching(p, v), exact, rtol=1e-6, atol=0)
    way = x0_from(x.double(), v.double(), sigma.double()) - x0.double()
    torch.testing.assert_close(x0_error(p, v), way, rtol=1e-5, atol=1e-6)
