"""The components of a run, and the batch plan that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from flowalign.algorithms.base import Algorithm
from flowalign.conditioner import Encoding
from flowalign.credit import Credit
from flowalign.dynamics import Dynamics
from flowalign.evaluation import Evaluation
from flowalign.geometry import Batch, Geometry, nearest_of
from flowalign.models.base import FlowModel
from flowalign.policy import Tune
from flowalign.policy.follow import Follow
from flowalign.policy.policy import Place
from flowalign.prompt_media import check_images
from flowalign.prompts import Prompt, PromptSet
from flowalign.running import Running
from flowalign.sampler import Sampling
from flowalign.schedule import Schedule
from flowalign.scoring import Scorer
from flowalign.size import Size
from flowalign.steps.base import Steps
from flowalign.times import Times


@dataclass(frozen=True)
class Optimisation:
    """Settings of the optimisation phase: guidance scale of the forward pass (1 = off), savings, and two guards."""

    guidance: float = 1.0
    on_policy_tolerance: float | None = None
    """Largest |ratio − 1| before the first update; None: 1e-5 in float32 (1e-4 with TF32), 1e-3 in 16 bits."""
    max_skipped: int = 3
    """Optimiser steps that a run may skip because of a non-finite loss or gradient; one more ends it."""
    cfg_gradient: Literal["both", "conditional"] = "both"
    """Branches of classifier-free guidance with a gradient; "conditional" treats the unconditional one as constant."""
    kl_share: float = 1.0
    """Share of an image's points at which the KL penalty is computed, drawn anew every epoch."""
    skip_zero: bool = False
    """Skip points with advantage 0 if they contribute no loss."""

    def __post_init__(self) -> None:
        if not 0 < self.kl_share <= 1:
            raise ValueError(f"kl_share is a share of the points, in (0, 1] (got {self.kl_share}).")
        if self.max_skipped < 0 or (self.on_policy_tolerance or 0) < 0:
            raise ValueError(
                f"bounds are 0 or more (got max_skipped={self.max_skipped}, on_policy_tolerance="
                f"{self.on_policy_tolerance})."
            )


@dataclass
class Recipe:
    """The components of a run, one field per config group."""

    model: FlowModel
    algorithm: Algorithm
    dynamics: Dynamics
    steps: Steps
    times: Times
    credit: Credit
    scorer: Scorer
    tune: Tune
    data: Mapping[str, PromptSet]
    batch: Batch
    rollout: Sampling
    evaluation: Evaluation
    optimisation: Optimisation
    train_size: Size
    eval_size: Size
    frozen: Mapping[str, Follow]
    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Schedule
    device_of_frozen: Place = "same"
    encoding: Encoding = field(default_factory=Encoding)
    running: Running = field(default_factory=Running)
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def consulted(self) -> set[str]:
        """Names of the frozen copies that the loss and the rollouts use."""
        return _consulted(self.algorithm)

    @property
    def same_as_live(self) -> set[str]:
        """The consulted copies that equal the live weights whenever they are used, so none is kept or evaluated."""
        steps = self.batch.updates * self.batch.passes
        return {name for name in self.consulted if name in self.frozen and self.frozen[name].stays_live(steps)}


def _consulted(algorithm: Algorithm) -> set[str]:
    return {*algorithm.frozen, algorithm.samples_with} - {None}  # type: ignore[return-value]


def check_copies(algorithm: Algorithm, evaluation: Evaluation, frozen: Mapping[str, Follow]) -> None:
    """Raise ValueError unless `frozen` says how each copy follows that the loss, rollouts and evaluations use."""
    evaluated = set() if evaluation.copy is None else {evaluation.copy}
    missing = sorted((_consulted(algorithm) | evaluated) - frozen.keys() - {"reference"})
    if missing:
        raise ValueError(
            f"the run consults {missing}, but `frozen` does not say how they follow the live weights: leave "
            f"{' and '.join(f'frozen.{name}' for name in missing)} as by default."
        )
    if any(frozen[name].every == "always" for name in evaluated):
        raise ValueError(f"frozen.{evaluation.copy}.every=always is no average: use evaluation.weights=live.")


class Planned(Protocol):
    """The fields of a Recipe from which the batch plan follows."""

    batch: Batch
    algorithm: Algorithm
    steps: Steps
    times: Times
    rollout: Sampling
    scorer: Any
    """Only its `groupwise` is used."""


def check_given_media(recipe: Recipe, evaluated: Iterable[Sequence[Prompt]]) -> None:
    """Raise ValueError for a prompt without the images or videos that the model or the algorithm reads.

    evaluated: the prompts of each evaluation.
    """
    trained = recipe.data["train"]
    if recipe.model.sees_images:
        for prompts in (trained.prompts, *evaluated):
            check_images(prompts, recipe.model.max_images)
    if recipe.algorithm.source == "rollout":
        return
    try:
        trained.require_images(video=recipe.model.modality == "video")
    except ValueError as error:
        otherwise = "algo.sft_weight=0" if recipe.algorithm.source == "both" else "algo=nft"
        raise ValueError(f"{error}, or {otherwise}.") from error
    # An impossible size or a video that is too short is reported here, not in the first rollout.
    trained.images([0], [1], *recipe.train_size.area)


def batch_plan(recipe: Planned, world_size: int = 1) -> Geometry:
    """The batch plan of one rank. An image's points are its recorded steps or its re-noised states."""
    algorithm, num_steps = recipe.algorithm, recipe.rollout.num_steps
    replays = algorithm.point == "transition"
    plan = recipe.steps(0, num_steps) if replays else None
    if not replays:
        recipe.times.check(num_steps)
    sources = 2 if algorithm.source == "both" else 1
    geometry = Geometry(
        recipe.batch,
        recipe.times.count(num_steps) * sources if plan is None else plan.points,
        world_size,
        algorithm.together,
        algorithm.samples_per_group or recipe.batch.members,
        whole=recipe.rollout.same_noise or recipe.scorer.groupwise or (plan is not None and plan.branches > 0),
        trunk=1 if plan is None else plan.trunk,
        least=algorithm.least_micro,
    )
    if recipe.batch.micro == "auto" and algorithm.micro_matters:
        raise ValueError(
            f"batch.micro=auto would let the device choose the result, since {type(algorithm).__name__} takes means "
            f"over a micro-batch here: choose a number, for example batch.micro={nearest_of(geometry.micros(), 16)}."
        )
    return geometry
