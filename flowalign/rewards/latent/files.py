"""Saving and loading of latent rewards: the trained weights, and a JSON file that describes them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from flowalign.rewards.base import RewardError
from flowalign.rewards.latent.network import Build, Link, Network
from flowalign.rewards.latent.trunk import Trunk

if TYPE_CHECKING:
    from flowalign.models.base import FlowModel

WEIGHTS, FACTS = "reward.safetensors", "reward.json"
ASSETS = Path(__file__).parents[2] / "assets"
TRAIN = "train one with python -m flowalign.rewards.latent"


def save(network: Network, folder: Path, facts: dict[str, Any]) -> None:
    """Save the trained weights in bfloat16 and a description of the network and its base model, extended by `facts`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in network.trained_parameters().items()
    }
    save_file(tensors, folder / WEIGHTS)
    description = {
        "model": type(network.trunk.view).__name__,
        "pretrained": network.trunk.view.pretrained,
        "base": network.fingerprint(),
        "build": asdict(network.build),
        "link": asdict(network.link),
        **facts,
    }
    (folder / FACTS).write_text(json.dumps(description, indent=2) + "\n")


def find_folder(weights: str) -> Path:
    """Folder of a latent reward, given by path or by its name in this package. Raises RewardError if there is none."""
    for folder in (Path(weights), ASSETS / weights):
        if (folder / FACTS).is_file() and (folder / WEIGHTS).is_file():
            return folder
    known = sorted(path.parent.name for path in ASSETS.glob(f"*/{FACTS}"))
    raise RewardError(
        f"there is no latent reward {weights}: it is a folder with {WEIGHTS} and {FACTS}, or one of "
        f"{', '.join(known)}; {TRAIN}."
    )


def load(model: FlowModel, weights: str) -> Network:
    """Load the network on top of a model's weights, frozen. Raises RewardError if it was trained on other weights."""
    folder = find_folder(weights)
    try:
        facts, tensors = json.loads((folder / FACTS).read_text()), load_file(folder / WEIGHTS)
        build, link, base = Build(**facts["build"]), Link(**facts["link"]), facts["base"]
        width = tensors["head.query"].shape[1]
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise RewardError(f"the latent reward in {folder} is damaged: {str(error).splitlines()[0]}.") from error
    made_for = f"the latent reward {weights} was made for {facts.get('pretrained')} ({facts.get('model')})"
    if type(model).__name__ != facts.get("model"):
        raise RewardError(f"{made_for}, and this is a {type(model).__name__}: {TRAIN} model=….")
    network = Network(Trunk(model, build.blocks), build, width)
    parameters: dict[str, nn.Parameter] = dict(network.named_parameters())
    if wrong := [n for n, t in tensors.items() if n not in parameters or parameters[n].shape != t.shape]:
        raise RewardError(f"{made_for}, whose network is of another size ({wrong[0]}): {TRAIN} for {model.pretrained}.")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in tensors)
    if network.fingerprint() != base:
        raise RewardError(f"{made_for}, and {model.pretrained} has other weights: {TRAIN} for it.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    network.link = link
    return network.requires_grad_(False).eval()
