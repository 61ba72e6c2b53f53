"""What a run will take of the device's memory, told before it starts, and what to change if that is too much."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.alive import Alive, faked
from flowalign.decoding import of_decoding
from flowalign.geometry import Geometry
from flowalign.models.base import FlowModel
from flowalign.models.quantised import inner_tensors, is_quantised
from flowalign.policy import Policy
from flowalign.policy.merge import adapter_layers
from flowalign.recipe import Recipe
from flowalign.rollouts import SHOWN
from flowalign.tensors import is_sharded, local
from flowalign.types import Conditioning

log = logging.getLogger(__name__)
GIB = 2**30
Precision = Callable[[], AbstractContextManager[object]]
"""Makes the context in which a forward pass runs; a backward pass runs outside."""


@dataclass(frozen=True)
class Share:
    """One line of the plan. `remedy` is the setting that makes it smaller, if there is one."""

    name: str
    size: int
    """Bytes."""
    remedy: str = ""


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages on this rank."""
    storages = [piece.untyped_storage() for t in tensors for piece in inner_tensors(local(t))]
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
    Blocks are not compiled for it.
    """
    held_by_model = [local(p) for d in model.denoisers().values() for p in d.parameters()]
    own = {piece.untyped_storage().data_ptr() for p in held_by_model for piece in inner_tensors(p)}
    seen: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        storages = [piece.untyped_storage() for piece in inner_tensors(t)]
        gathered = isinstance(t if t._base is None else t._base, nn.Parameter)  # whole for as long as its block runs
        if not gathered:
            seen.update({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own})
        return t

    eager = torch.compiler.set_stance("force_eager")  # a version for one row would serve nobody else
    with eager, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
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


def of_pass(recipe: Recipe, cond: Conditioning, precision: Precision, rows: int, accumulated: bool = True) -> int:
    """Bytes that a forward and backward pass of so many training points takes beside weights and gradients, at most.

    Where that cannot be told, only what the points keep for their backward pass. See the two below.
    """
    whole = of_whole_pass(recipe, cond, precision, rows, accumulated)
    return of_kept(recipe, cond, precision, rows) if whole is None else whole


def of_whole_pass(recipe: Recipe, cond: Conditioning, precision: Precision, rows: int, accumulated: bool) -> int | None:
    """The same as fake tensors tell it, None where they do not do; why is in the log.

    cond: one row; accumulated: whether all gradients are there before. Otherwise they come while activations go, and
    this is what both together are more than the gradients.
    """
    model, shape = recipe.model, recipe.model.latent_shape(*recipe.train_size.area)
    if not recipe.running.native or _is(is_sharded, model) or _is(is_quantised, model):
        return None
    try:
        return peak_of_pass(model, shape, cond, precision, rows, *_asked(recipe), accumulated)
    except Exception:  # control flow that depends on values, for instance; what is wrong otherwise shows in of_kept
        log.debug("The inside of a pass is not in the memory plan:", exc_info=True)
        return None


def of_kept(recipe: Recipe, cond: Conditioning, precision: Precision, rows: int) -> int:
    """Bytes that so many points keep for their backward pass, as one and two of them tell."""
    model, shape = recipe.model, recipe.model.latent_shape(*recipe.train_size.area)
    with precision():
        return _extrapolated(lambda few: _kept(model, shape, cond, few, *_asked(recipe)), rows, _is(is_sharded, model))


def _asked(recipe: Recipe) -> tuple[float, bool]:
    """Guidance, and whether its gradient goes through both branches."""
    return recipe.optimisation.guidance, recipe.optimisation.cfg_gradient == "both"


def _extrapolated(measure: Callable[[int], int], rows: int, by_one: bool) -> int:
    """From one row and two, since some is there once for all; by_one: from one, where a second could be too much."""
    one = measure(1)
    return rows * one if by_one or rows == 1 else one + (rows - 1) * (measure(2) - one)


def _kept(model: FlowModel, shape: tuple[int, ...], cond: Conditioning, rows: int, *asked: Any) -> int:
    x = torch.zeros(rows, *shape, device=_device(cond))
    return kept_for_backward(model, x, cond.repeat_interleave(rows), *asked)


def _is(kind: Callable[[Tensor], bool], model: FlowModel) -> bool:
    """Whether there are such weights."""
    return any(kind(p) for d in model.denoisers().values() for p in d.parameters())


def _device(cond: Conditioning) -> torch.device:
    return next(iter(cond.values())).device


def peak_of_pass(
    model: FlowModel,
    shape: tuple[int, ...],
    cond: Conditioning,
    precision: Precision,
    rows: int,
    guidance: float = 1.0,
    through_both: bool = True,
    accumulated: bool = True,
) -> int:
    """The same on fake tensors, for latents of this shape. Raises what they raise where they do not do."""
    device = _device(cond)
    # Under detect_anomaly an error of the fake pass, which is caught, would print its trace.
    with faked(model.denoisers().values()) as weights, torch.autograd.set_detect_anomaly(False):
        trained = [p for p in weights if p.requires_grad]
        if accumulated:
            for p in trained:
                p.register_post_accumulate_grad_hook(_forget)
        x, sigma = torch.empty(rows, *shape, device=device), torch.full((rows,), 0.5, device=device)
        cond = Conditioning({k: torch.empty(rows, *t.shape[1:], dtype=t.dtype, device=device) for k, t in cond.items()})
        with Alive([*weights, x, *cond.values()]) as alive, torch.enable_grad():
            with precision():
                loss = model.velocity(x, sigma, cond, guidance, through_both).square().mean()
            loss.backward()
    return alive.peak if accumulated else max(alive.peak - sum(p.nbytes for p in trained), 0)


def _forget(p: Tensor) -> None:
    p.grad = None


def of_media(recipe: Recipe, geometry: Geometry, device: torch.device) -> int:
    """Bytes that the larger of the decodings of a rollout and of an evaluation takes, 0 where that cannot be told."""
    model, evaluation = recipe.model, recipe.evaluation
    rolled = min(recipe.rollout.batch_size, geometry.samples_local)
    if not recipe.scorer.sees_media:  # only what is looked at
        rolled = min(-(-rolled // geometry.batch.group_size), SHOWN)
    if recipe.algorithm.source == "images":
        rolled = 0
    judged = min(evaluation.sampling.batch_size, max(evaluation.num_val, evaluation.num_test))
    wanted = {(recipe.train_size.area, rolled), (recipe.eval_size.area, judged)}
    told = [of_decoding(model, model.latent_shape(*area), rows, device) for area, rows in wanted if rows]
    return max((size for size in told if size is not None), default=0)


def plan(recipe: Recipe, policy: Policy, geometry: Geometry, cond: Conditioning, precision: Precision) -> list[Share]:
    """The lines of the plan for one rank; cond: one row, already on the device of the network."""
    model, moving, micro = recipe.model, of_trained(policy), geometry.micro
    device = _device(cond)
    copies = 0 if recipe.device_of_frozen == "cpu" else len(policy.copies)
    points = geometry.trained_local * geometry.points_per_sample
    text = sum(map(weights, model.text_encoders().values()))
    adapted = held(layer.get_base_layer().weight for layer in adapter_layers(policy.denoisers))
    before = [t for copy in policy.snapshots.values() for t in copy.values() if t.device == device]
    adapters = "tune=lora" if recipe.tune.kind == "full" else ""
    whole = of_whole_pass(recipe, cond, precision, micro, geometry.accumulate > 1)
    passing = of_kept(recipe, cond, precision, micro) if whole is None else whole
    # Gradients and activations are gone when pictures are decoded, so that only what that takes beyond them counts.
    with precision():
        media = of_media(recipe, geometry, device) - moving - passing
    lines = [
        Share("denoisers", sum(map(weights, model.denoisers().values())), _narrower(recipe)),
        Share("two blocks in one piece", whole_blocks(model)),
        Share("adapted weights, merged", adapted if policy.merge else 0, "running.merge_adapters=false"),
        Share("text encoders", 0 if recipe.encoding.release else text, "encoding.release=true"),
        Share("VAE", weights(model.pipe.vae)),
        Share("gradients", moving, adapters),
        Share("optimiser: two moments", 2 * moving, adapters),
        Share(f"{copies} frozen copies", copies * moving, "policy.device_of_frozen=cpu"),
        Share("weights from before training", held(before), "test=false"),
        Share(
            f"{'kept for the backward pass' if whole is None else 'forward and backward'} of {micro} points", passing,
            "running.gradient_checkpointing=true, or a smaller batch.micro",
        ),
        Share(f"{points} training points", of_points(recipe, geometry), "fewer pictures or points an epoch"),
        Share(
            f"latents of a rollout batch, {recipe.rollout.batch_size}",
            4 * recipe.rollout.batch_size * of_latent(recipe), "a smaller rollout.batch_size",
        ),
        Share("decoding, beyond gradients and activations", max(media, 0), _in_parts(recipe)),
    ]  # fmt: skip
    return [line for line in lines if line.size]


def _in_parts(recipe: Recipe) -> str:
    vae, batches = recipe.model.pipe.vae, "a smaller rollout.batch_size and evaluation.sampling.batch_size"
    ways = {"vae_slicing": "enable_slicing", "vae_tiling": "enable_tiling"}
    left = [key for key, switch in ways.items() if hasattr(vae, switch) and not getattr(recipe.running, key)]
    return ", ".join([*(f"running.{key}=true" for key in left), batches])


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
