import torch
from torch import nn

from flowalign.policy.fingerprint import weights_fingerprint


def network(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {"transformer": nn.Sequential(nn.Linear(50, 70), nn.Linear(70, 3))}


def test_the_same_weights_are_the_same_base_in_any_type():
    assert weights_fingerprint(network()) == weights_fingerprint(network())
    assert weights_fingerprint({"transformer": network()["transformer"].bfloat16()}) == weights_fingerprint(network())


def test_other_weights_names_or_networks_are_another_base():
    nudged = network()
    with torch.no_grad():
        for p in nudged["transformer"].parameters():
            p.mul_(1.01)
    others = [network(1), nudged, {"unet": network()["transformer"]}]
    assert len({weights_fingerprint(network()), *map(weights_fingerprint, others)}) == 4


def test_empty_networks_have_no_identity():
    assert weights_fingerprint({"transformer": network()["transformer"].to("meta")}) == ""
