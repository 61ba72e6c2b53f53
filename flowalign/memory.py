"""What a run will take of the device's memory, told before it starts, and what to change if that is too much."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowalign.geometry import Geometry
from flowalign.models.base import FlowModel
from flowalign.models.quantised import pieces
from flowalign.policy import Policy
from flowalign.policy.merge import adapted as adapted_layers
from flowalign.recipe import Recipe
from flowalign.tensors import is_sharded, local
from flowalign.types import Conditioning

GIB = 2**30


@dataclass(frozen=True)
class Share:
    """One line of the plan. `remedy` is the setting that makes it smaller, if there is one."""

    name: str
    size: int
    """Bytes."""
    remedy: str = ""


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages on this rank."""
    storages = [piece.untyped_storage() for t in tensors for piece in pieces(local(t))]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def weights(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return held([*module.parameters(), *module.buffers()])


def whole_blocks(model: FlowModel) -> int:
    """Bytes of two blocks in one piece, where weights lie in shards: one runs and the next is being fetched."""
    sizes = [sum(p.nbytes for p in b.parameters()) for b in model.blocks() if any(map(is_sharded, b.parameters()))]
    return 2 * max(sizes, default=0)


def kept_for_backward(
    model: FlowModel, x: Tensor, cond: Conditioning, guidance: float, through_both: bool = True
) -> int:
    """Bytes that a forward pass of x (B, …) keeps for its backward pass, weights excepted: counted, not guessed.

    With gradient checkpointing these are the inputs of the blocks; one block's inside comes on top on the way back.
    """
    held_by_model = [local(p) for d in model.denoisers().values() for p in d.parameters()]
    own = {piece.untyped_storage().data_ptr() for p in held_by_model for piece in pieces(p)}
    seen: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        storages = [piece.untyped_storage() for piece in pieces(t)]
        gathered = isinstance(t if t._base is None else t._base, nn.Parameter)  # whole for as long as its block runs
        if not gathered:
            seen.update({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own})
        return t

    uncompiled = torch.compiler.set_stance("force_eager")  # a version for one row would serve nobody else
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t), uncompiled:
        v = model.velocity(x, torch.full((len(x),), 0.5, device=x.device), cond, guidance, through_both)
        del v
    return sum(seen.values())


def of_trained(policy: Policy) -> int:
    """Bytes of what is trained on this rank, and so of its gradients."""
    return sum(local(p).numel() * p.element_size() for p in policy.trained().values())


def of_latent(recipe: Recipe) -> int:
    """Bytes of one in float32."""
    return math.prod(recipe.model.latent_shape(*recipe.train_size.area)) * 4


def of_points(recipe: Recipe, geometry: Geometry) -> int:
    """Bytes of the training points of an epoch on this rank."""
    # Both ends of a step, and its mean if asked; or the state, the sample and the noise. Then frozen velocities.
    algorithm, velocities = recipe.algorithm, len({*recipe.algorithm.frozen} - recipe.same_as_live)
    states = 2 if recipe.rollout.kept_in is None else 1  # of half the size each
    fields = (states + algorithm.keeps_mean if algorithm.point == "transition" else 3) + velocities
    return int(geometry.trained_local * geometry.points_per_sample * fields * of_latent(recipe))


def of_row(recipe: Recipe, cond: Conditioning) -> int:
    """Bytes that one training point keeps for its backward pass; cond: one row."""
    x = torch.zeros(1, *recipe.model.latent_shape(*recipe.train_size.area), device=next(iter(cond.values())).device)
    wanted = recipe.optimisation
    return kept_for_backward(recipe.model, x, cond, wanted.guidance, wanted.cfg_gradient == "both")


def plan(recipe: Recipe, policy: Policy, geometry: Geometry, cond: Conditioning) -> list[Share]:
    """The lines of the plan for one rank; cond: one row, already on the device of the network."""
    model, moving, micro = recipe.model, of_trained(policy), geometry.micro
    device = next(iter(cond.values())).device
    copies = 0 if recipe.device_of_frozen == "cpu" else len(policy.copies)
    points = geometry.trained_local * geometry.points_per_sample
    text = sum(map(weights, model.text_encoders().values()))
    adapted = held(layer.get_base_layer().weight for layer in adapted_layers(policy.denoisers))
    passing = [t for copy in policy.passing.values() for t in copy.values() if t.device == device]
    adapters = "tune=lora" if recipe.tune.kind == "full" else ""
    lines = [
        Share("denoisers", sum(map(weights, model.denoisers().values())), _narrower(recipe)),
        Share("two blocks in one piece", whole_blocks(model)),
        Share("adapted weights, merged", adapted if policy.merge else 0, "running.merge_adapters=false"),
        Share("text encoders", 0 if recipe.encoding.release else text, "encoding.release=true"),
        Share("VAE", weights(model.pipe.vae)),
        Share("gradients", moving, adapters),
        Share("optimiser: two moments", 2 * moving, adapters),
        Share(f"{copies} frozen copies", copies * moving, "policy.device_of_frozen=cpu"),
        Share("weights from before training", held(passing), "test=false"),
        Share(
            f"kept for backward, {micro} points", micro * of_row(recipe, cond),
            "running.gradient_checkpointing=true, or a smaller batch.micro",
        ),
        Share(f"{points} training points", of_points(recipe, geometry), "fewer pictures or points an epoch"),
        Share(
            f"latents of a rollout batch, {recipe.rollout.batch_size}",
            4 * recipe.rollout.batch_size * of_latent(recipe), "a smaller rollout.batch_size",
        ),
    ]  # fmt: skip
    return [line for line in lines if line.size]


def _narrower(recipe: Recipe) -> str:
    if recipe.model.quantised is None:
        return "model.train_dtype=bfloat16" + ("" if recipe.tune.kind == "full" else ", or model.quantised=int8")
    return "model.quantised=nf4" if recipe.model.quantised == "int8" else ""


def advice(lines: list[Share], available: int) -> list[str]:
    """What to change, largest first, if the plan does not fit into the available bytes; nothing if it does."""
    if sum(line.size for line in lines) <= available:
        return []
    return [f"{line.remedy}  ({line.name}: {line.size / GIB:.2f} GiB)" for line in by_size(lines) if line.remedy]


def by_size(lines: list[Share]) -> list[Share]:
    """Largest first."""
    return sorted(lines, key=lambda line: -line.size)
