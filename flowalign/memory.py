"""The memory plan: what a run will need of the device's memory, and what to change if that is too much."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.alive import PeakMemory, fake_tensors
from flowalign.decoding import decoding_bytes
from flowalign.geometry import Geometry
from flowalign.models.base import FlowModel
from flowalign.models.quantised import inner_tensors, is_quantised
from flowalign.policy import Policy
from flowalign.policy.merge import adapter_layers
from flowalign.policy.optimiser import state_share
from flowalign.recipe import Recipe
from flowalign.rollouts import SHOWN
from flowalign.tensors import is_sharded, local
from flowalign.types import Conditioning

log = logging.getLogger(__name__)
GIB = 2**30
Precision = Callable[[], AbstractContextManager[object]]
"""Makes the precision context of a forward pass; the backward pass runs outside it."""


@dataclass(frozen=True)
class PlanLine:
    """One line of the plan. `remedy` is the setting that reduces it, if there is one."""

    name: str
    size: int
    """Bytes."""
    remedy: str = ""


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages on this rank."""
    storages = [piece.untyped_storage() for t in tensors for piece in inner_tensors(local(t))]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def weight_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return storage_bytes([*module.parameters(), *module.buffers()])


def gathered_block_bytes(model: FlowModel) -> int:
    """Bytes of two full blocks if weights are sharded: one runs while the next is gathered. Otherwise 0."""
    sizes = [sum(p.nbytes for p in b.parameters()) for b in model.blocks() if any(map(is_sharded, b.parameters()))]
    return 2 * max(sizes, default=0)


def saved_for_backward(
    model: FlowModel, x: Tensor, cond: Conditioning, guidance: float, through_both: bool = True
) -> int:
    """Bytes that a forward pass of x (B, …) saves for its backward pass, without the weights; measured by running it.

    With gradient checkpointing these are the inputs of the blocks, and the backward pass adds the inside of one block.
    The pass runs without compilation.
    """
    parameters = [local(p) for d in model.denoisers().values() for p in d.parameters()]
    own = {piece.untyped_storage().data_ptr() for p in parameters for piece in inner_tensors(p)}
    seen: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        storages = [piece.untyped_storage() for piece in inner_tensors(t)]
        # A sharded weight is gathered only while its block runs.
        gathered = isinstance(t if t._base is None else t._base, nn.Parameter)
        if not gathered:
            seen.update({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own})
        return t

    eager = torch.compiler.set_stance("force_eager")  # a graph compiled for one row would not be used again
    with eager, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        v = model.velocity(x, torch.full((len(x),), 0.5, device=x.device), cond, guidance, through_both)
        del v
    return sum(seen.values())


def trained_bytes(policy: Policy) -> int:
    """Bytes of the trained parameters on this rank, and so of their gradients."""
    return sum(local(p).numel() * p.element_size() for p in policy.trained().values())


def latent_bytes(recipe: Recipe) -> int:
    """Bytes of one latent in float32."""
    return math.prod(recipe.model.latent_shape(*recipe.train_size.area)) * 4


def point_bytes(recipe: Recipe, geometry: Geometry) -> int:
    """Bytes of the training points of an epoch on this rank."""
    # Transitions: both ends of a step, and its mean if needed. Noised points: state, sample and noise. Both: velocities
    # of frozen copies.
    algorithm, velocities = recipe.algorithm, len({*recipe.algorithm.frozen} - recipe.same_as_live)
    states = 2 if recipe.rollout.state_dtype is None else 1  # 16-bit states have half the size
    fields = (states + algorithm.keeps_mean if algorithm.point == "transition" else 3) + velocities
    return int(geometry.trained_local * geometry.points_per_sample * fields * latent_bytes(recipe))


def pass_bytes(recipe: Recipe, cond: Conditioning, precision: Precision, rows: int, accumulated: bool = True) -> int:
    """Peak bytes of a forward and backward pass on `rows` training points, in addition to weights and gradients.

    From `simulated_pass_bytes`, or only the `activation_bytes` where that is not possible.
    """
    simulated = simulated_pass_bytes(recipe, cond, precision, rows, accumulated)
    return activation_bytes(recipe, cond, precision, rows) if simulated is None else simulated


def simulated_pass_bytes(
    recipe: Recipe, cond: Conditioning, precision: Precision, rows: int, accumulated: bool
) -> int | None:
    """`pass_bytes` by simulation with fake tensors; None, with the reason in the debug log, where these do not work.

    cond: one row. accumulated: whether all gradients exist before the pass. If not, they are allocated while
    activations are freed, and the result is the peak of both minus the gradients.
    """
    model, shape = recipe.model, recipe.model.latent_shape(*recipe.train_size.area)
    if not recipe.running.native or _has_weights(is_sharded, model) or _has_weights(is_quantised, model):
        return None
    try:
        return simulate_pass(model, shape, cond, precision, rows, *_guidance(recipe), accumulated)
    except Exception:  # such as value-dependent control flow; a real error will reappear in activation_bytes
        log.debug("The inside of a pass is not in the memory plan:", exc_info=True)
        return None


def activation_bytes(recipe: Recipe, cond: Conditioning, precision: Precision, rows: int) -> int:
    """Bytes that `rows` points save for their backward pass, extrapolated from passes on one and two points."""
    model, shape = recipe.model, recipe.model.latent_shape(*recipe.train_size.area)
    sharded = _has_weights(is_sharded, model)
    with precision():
        return _extrapolate(lambda few: _saved(model, shape, cond, few, *_guidance(recipe)), rows, sharded)


def _guidance(recipe: Recipe) -> tuple[float, bool]:
    """The guidance scale of training, and whether its gradient flows through both branches."""
    return recipe.optimisation.guidance, recipe.optimisation.cfg_gradient == "both"


def _extrapolate(measure: Callable[[int], int], rows: int, from_one: bool) -> int:
    """Linear in the rows, from one and two of them, since a part is shared by all rows.

    from_one: proportional, from one row only, where two might not fit.
    """
    one = measure(1)
    return rows * one if from_one or rows == 1 else one + (rows - 1) * (measure(2) - one)


def _saved(model: FlowModel, shape: tuple[int, ...], cond: Conditioning, rows: int, *guidance: Any) -> int:
    x = torch.zeros(rows, *shape, device=_device(cond))
    return saved_for_backward(model, x, cond.repeat_interleave(rows), *guidance)


def _has_weights(kind: Callable[[Tensor], bool], model: FlowModel) -> bool:
    """Whether any denoiser weight is of this kind."""
    return any(kind(p) for d in model.denoisers().values() for p in d.parameters())


def _device(cond: Conditioning) -> torch.device:
    return next(iter(cond.values())).device


def simulate_pass(
    model: FlowModel,
    shape: tuple[int, ...],
    cond: Conditioning,
    precision: Precision,
    rows: int,
    guidance: float = 1.0,
    through_both: bool = True,
    accumulated: bool = True,
) -> int:
    """`simulated_pass_bytes` for latents of this shape. Reraises what the fake tensors raise where they do not work."""
    device = _device(cond)
    # Under detect_anomaly an error of the fake pass would print its trace although the caller catches it.
    with fake_tensors(model.denoisers().values()) as weights, torch.autograd.set_detect_anomaly(False):
        trained = [p for p in weights if p.requires_grad]
        if accumulated:
            for p in trained:
                p.register_post_accumulate_grad_hook(_drop_grad)
        x, sigma = torch.empty(rows, *shape, device=device), torch.full((rows,), 0.5, device=device)
        cond = Conditioning({k: torch.empty(rows, *t.shape[1:], dtype=t.dtype, device=device) for k, t in cond.items()})
        with PeakMemory([*weights, x, *cond.values()]) as memory, torch.enable_grad():
            with precision():
                loss = model.velocity(x, sigma, cond, guidance, through_both).square().mean()
            loss.backward()
    return memory.peak if accumulated else max(memory.peak - sum(p.nbytes for p in trained), 0)


def _drop_grad(p: Tensor) -> None:
    p.grad = None


def media_bytes(recipe: Recipe, geometry: Geometry, device: torch.device) -> int:
    """Peak bytes of decoding a batch of the rollout or of the evaluation, the larger of the two; 0 where unknown."""
    model, evaluation = recipe.model, recipe.evaluation
    rollout_rows = min(recipe.rollout.batch_size, geometry.samples_local)
    if not recipe.scorer.sees_media:  # only the images for display are decoded
        rollout_rows = min(-(-rollout_rows // geometry.batch.group_size), SHOWN)
    if recipe.algorithm.source == "images":
        rollout_rows = 0
    eval_rows = min(evaluation.sampling.batch_size, max(evaluation.num_val, evaluation.num_test))
    batches = {(recipe.train_size.area, rollout_rows), (recipe.eval_size.area, eval_rows)}
    sizes = [decoding_bytes(model, model.latent_shape(*area), rows, device) for area, rows in batches if rows]
    return max((size for size in sizes if size is not None), default=0)


def plan(
    recipe: Recipe, policy: Policy, geometry: Geometry, cond: Conditioning, precision: Precision
) -> list[PlanLine]:
    """The plan of one rank. cond: one row, on the device of the network."""
    model, trained, micro = recipe.model, trained_bytes(policy), geometry.micro
    device = _device(cond)
    copies = 0 if recipe.device_of_frozen == "cpu" else len(policy.copies)
    points = geometry.trained_local * geometry.points_per_sample
    text = sum(map(weight_bytes, model.text_encoders().values()))
    adapted = storage_bytes(layer.get_base_layer().weight for layer in adapter_layers(policy.denoisers))
    before = [t for copy in policy.snapshots.values() for t in copy.values() if t.device == device]
    adapters = "tune=lora" if recipe.tune.kind == "full" else ""
    simulated = simulated_pass_bytes(recipe, cond, precision, micro, geometry.accumulate > 1)
    training_pass = activation_bytes(recipe, cond, precision, micro) if simulated is None else simulated
    # Gradients and activations are freed before images are decoded, so decoding counts only as far as it exceeds them.
    with precision():
        media = media_bytes(recipe, geometry, device) - trained - training_pass
    lines = [
        PlanLine("denoisers", sum(map(weight_bytes, model.denoisers().values())), _weight_remedy(recipe)),
        PlanLine("two gathered blocks", gathered_block_bytes(model)),
        PlanLine("adapted weights, merged", adapted if policy.merge else 0, "running.merge_adapters=false"),
        PlanLine("text encoders", 0 if recipe.encoding.release else text, "encoding.release=true"),
        PlanLine("VAE", weight_bytes(model.pipe.vae)),
        PlanLine("gradients", trained, adapters),
        PlanLine("optimiser's state", round(state_share(recipe.optimizer, device) * trained), adapters),
        PlanLine(f"{copies} frozen copies", copies * trained, "policy.device_of_frozen=cpu"),
        PlanLine("weights from before training", storage_bytes(before), "test=false"),
        PlanLine(
            f"{'kept for the backward pass' if simulated is None else 'forward and backward'} of {micro} points",
            training_pass, "running.gradient_checkpointing=true, or a smaller batch.micro",
        ),
        PlanLine(f"{points} training points", point_bytes(recipe, geometry), "fewer images or points per epoch"),
        PlanLine(
            f"latents of a rollout batch, {recipe.rollout.batch_size}",
            4 * recipe.rollout.batch_size * latent_bytes(recipe), "a smaller rollout.batch_size",
        ),
        PlanLine("decoding, beyond gradients and activations", max(media, 0), _decoding_remedy(recipe)),
    ]  # fmt: skip
    return [line for line in lines if line.size]


def _decoding_remedy(recipe: Recipe) -> str:
    vae, batches = recipe.model.pipe.vae, "a smaller rollout.batch_size and evaluation.sampling.batch_size"
    methods = {"vae_slicing": "enable_slicing", "vae_tiling": "enable_tiling"}
    unused = [key for key, method in methods.items() if hasattr(vae, method) and not getattr(recipe.running, key)]
    return ", ".join([*(f"running.{key}=true" for key in unused), batches])


def _weight_remedy(recipe: Recipe) -> str:
    if recipe.model.quantised is None:
        return "model.train_dtype=bfloat16" + ("" if recipe.tune.kind == "full" else ", or model.quantised=int8")
    return "model.quantised=nf4" if recipe.model.quantised == "int8" else ""


def advice(lines: list[PlanLine], available: int) -> list[str]:
    """The settings to change, largest saving first, if the plan exceeds the available bytes; empty if it fits."""
    if sum(line.size for line in lines) <= available:
        return []
    return [f"{line.remedy}  ({line.name}: {line.size / GIB:.2f} GiB)" for line in largest_first(lines) if line.remedy]


def largest_first(lines: list[PlanLine]) -> list[PlanLine]:
    return sorted(lines, key=lambda line: -line.size)
