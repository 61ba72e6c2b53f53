import torch

from flowalign.algorithms import FlowAWR
from flowalign.flow import expand, interpolate, x0_from
from flowalign.types import Point


def test_the_reference_loss_and_gradient_are_reproduced(golden, agrees, precision):
    cast, tolerance = precision
    d = golden("flowawr_0_f64")
    p = Point(interpolate(d["x0"], d["noise"], d["t"]), d["t"], d["energies"], x0=d["x0"], eps=d["noise"])
    p.frozen = {"old": d["v_old"], "reference": d["v_ref"]}
    algorithm = FlowAWR(kl_beta=d["kl_beta"].item())
    v = cast(d["v_new"]).requires_grad_()
    loss, metrics = algorithm.loss(cast(p), v)
    loss.mean().backward()
    assert agrees(p.x, d["xt"], 1e-12)
    assert agrees(metrics["x0_error"], d["weight"].flatten(), tolerance)
    assert agrees(metrics["kl"].mean(), d["kl"], tolerance)
    assert agrees(loss - algorithm.kl_beta * metrics["kl"], d["per_sample_loss"], tolerance)
    assert agrees(loss.mean(), d["loss"], tolerance)
    assert agrees(v.grad, d["grad_v"], tolerance)


def test_the_minimum_is_the_target(noised, gradient):
    p, v = noised([-1.0, 0.0, 0.5, 1.0, 2.0])
    x0_old = x0_from(p.x, v.detach(), p.sigma)
    target = x0_old + expand(p.advantage, x0_old) * (p.x0 - x0_old)
    best = ((p.x - target) / expand(p.sigma, p.x)).requires_grad_()
    assert gradient(FlowAWR(kl_beta=0.0), p, best).abs().max() < 1e-9


def test_energy_zero_stays_and_energy_one_is_flow_matching(noised, gradient):
    p, v = noised([0.0, 1.0, -1.0])
    step = gradient(FlowAWR(kl_beta=0.0), p, v)
    assert not step[0].any()
    way = (v - (p.eps - p.x0)).detach()
    cosine = torch.cosine_similarity(step[1:].flatten(1), way[1:].flatten(1))
    torch.testing.assert_close(cosine, torch.tensor([1.0, -1.0], dtype=torch.float64))


def test_a_mask_takes_the_mean_over_what_is_left(noised):
    p, v = noised([0.0, 1.0, -2.0, 0.0])
    moved = v.detach() + 0.1
    masked, _ = FlowAWR(kl_beta=0.0, mask_zero=True).loss(p, moved)
    plain, _ = FlowAWR(kl_beta=0.0).loss(p, moved)
    assert masked[[0, 3]].tolist() == [0, 0]
    p.frozen["reference"] = v.detach() - torch.rand_like(v)
    penalised, metrics = FlowAWR(kl_beta=0.1, mask_zero=True).loss(p, moved)
    assert penalised[[0, 3]].tolist() == [0, 0]
    way = ((moved - p.frozen["reference"]) ** 2).flatten(1).mean(1)[1:3].mean()
    torch.testing.assert_close(metrics["kl"].mean(), way)
    torch.testing.assert_close(penalised.mean(), masked.mean() + 0.1 * way)
    torch.testing.assert_close(masked.mean(), plain[1:3].mean())
    nothing, _ = FlowAWR(kl_beta=0.0, mask_zero=True).loss(p.index(slice(1)), moved[:1])
    assert nothing.tolist() == [0]


def test_it_says_what_it_needs():
    assert FlowAWR().frozen == ("old", "reference")
    assert FlowAWR(kl_beta=0.0).frozen == ("old",)
    assert FlowAWR.energy
    assert FlowAWR.samples_with == "old"
