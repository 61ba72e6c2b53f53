import torch

from flowalign.algorithms import SFT
from flowalign.flow import mean_dims


def test_it_is_flow_matching_whatever_the_advantage(noised, gradient):
    p, v = noised([1.0, -1.0, 0.0])
    loss, metrics = SFT().loss(p, v)
    torch.testing.assert_close(loss, mean_dims((v - (p.eps - p.x0)) ** 2))
    assert torch.equal(metrics["matching"], loss)
    assert not gradient(SFT(), p, (p.eps - p.x0).requires_grad_()).any()


def test_it_learns_from_given_pictures_alone():
    assert SFT.source == "images"
    assert SFT().frozen == ()
    assert SFT(kl_beta=0.1).frozen == ("reference",)
