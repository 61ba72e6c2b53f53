import math

import pytest
import torch

from flowalign.algorithms import DPO
from flowalign.algorithms.errors import matching
from flowalign.flow import interpolate
from flowalign.types import Point


def pairs(d: dict, dtype: torch.dtype = torch.float64) -> tuple[Point, torch.Tensor]:
    """The reference's three pairs, winners before losers."""
    x0, eps, t = (
        torch.cat([d["x_win"], d["x_lose"]]).to(dtype),
        d["noise"].repeat(2, 1, 1, 1).to(dtype),
        d["t"].repeat(2),
    )
    p = Point(interpolate(x0, eps, t), t, torch.tensor([1.0] * 3 + [-1.0] * 3), x0=x0, eps=eps)
    p.group, p.frozen = torch.arange(3).repeat(2), {"reference": d["v_ref"].to(dtype)}
    return p, d["v_new"].to(dtype).requires_grad_()


def test_the_reference_loss_and_gradient_are_reproduced(golden, agrees):
    d = golden("dpo_beta100")
    p, v = pairs(d)
    loss, metrics = DPO(beta=d["beta"].item()).loss(p, v)
    loss.mean().backward()
    # The reference subtracts means of float32: what is left of them has an error of 1e-5.
    assert agrees(metrics["margin"][:3], d["inside_term"], 2e-5)
    assert agrees(loss.mean(), d["loss"], 1e-6)
    assert agrees(v.grad, d["grad_v"], 1e-6)


def test_rows_may_come_in_any_order(golden):
    p, v = pairs(golden("dpo_beta100"))
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    torch.testing.assert_close(DPO().loss(p.index(order), v[order])[0], DPO().loss(p, v)[0][order])


def test_a_pair_by_hand(noised):
    p, v = noised([1.0, -1.0, -1.0, 1.0], members=2)
    moved = v.detach() + 0.1
    d = (matching(p, moved) - matching(p, v)).tolist()
    margins = [-50 * (d[0] - d[1]), -50 * (d[3] - d[2])]
    loss, metrics = DPO(beta=100.0).loss(p, moved)
    assert metrics["margin"].tolist() == pytest.approx([margins[0]] * 2 + [margins[1]] * 2)
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-m)) for m in margins for _ in range(2)])


def test_at_the_reference_the_winner_attracts_and_the_loser_repels(noised, gradient):
    p, v = noised([1.0, -1.0], members=2)
    assert DPO().loss(p, v)[0].tolist() == pytest.approx([math.log(2)] * 2)
    step, way = gradient(DPO(), p, v), (v - (p.eps - p.x0)).detach()
    cosine = torch.cosine_similarity(step.flatten(1), way.flatten(1))
    torch.testing.assert_close(cosine, torch.tensor([1.0, -1.0], dtype=torch.float64))


@pytest.mark.parametrize("advantage", [[0.0, 0.0], [2.0, 2.0]])
def test_a_tie_teaches_nothing(noised, gradient, advantage):
    p, v = noised(advantage, members=2)
    assert not gradient(DPO(), p, v).any()


def test_only_rows_of_one_draw_are_a_pair(noised, gradient):
    p, v = noised([1.0, -1.0], members=2)
    p.eps = p.eps + torch.arange(2)[:, None, None]
    assert not gradient(DPO(), p, v).any()


def test_it_says_what_it_needs():
    assert DPO().frozen == ("reference",)
    assert DPO(kl_beta=0.1).frozen == ("reference",)
    assert (DPO.together, DPO.shared_noise, DPO.samples_per_group) == ("group", True, 2)
    with pytest.raises(ValueError, match="beta"):
        DPO(beta=0.0)
