"""The rollout phase: prompts to samples, samples to rewards, rewards to credit, and points to train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from flowalign.algorithms.base import Algorithm
from flowalign.conditioner import Conditioner
from flowalign.credit import Credit
from flowalign.dynamics import Dynamics
from flowalign.extremes import best_and_worst
from flowalign.geometry import Geometry
from flowalign.keyed import POINT, REAL, keyed_randn
from flowalign.models.base import FlowModel
from flowalign.points import interleave, next_level, noised, transitions
from flowalign.prompts import Prompt, PromptSet
from flowalign.rollouts import LocalSamples, Progress, Rollouts
from flowalign.sampler import Sampling
from flowalign.scoring import RolloutScores, ScoreQueue, Scorer
from flowalign.scoring.stats import statistics
from flowalign.size import Size
from flowalign.steps.base import StepPlan, Steps
from flowalign.times import Times
from flowalign.types import Conditioning, Point, Rollout, required


@dataclass(frozen=True)
class SampleCredit:
    """The credit of all N samples of an epoch."""

    advantage: Tensor
    """(N,)"""
    valid: Tensor
    """(N,) bool; the other samples are not trained on."""
    stats: dict[str, float] = field(default_factory=dict)
    """Statistics of the rewards, by metric name."""

    @staticmethod
    def uniform(number: int) -> SampleCredit:
        """Advantage 1 for every sample."""
        return SampleCredit(torch.ones(number), torch.ones(number, dtype=torch.bool))


class Renoise(NamedTuple):
    """What clean samples are mixed with."""

    sigma: Tensor
    """(n, S)"""
    noise: Tensor
    """(n, S, …)"""


@dataclass
class Collected:
    """The result of a rollout phase on one rank. The last rewards may still be pending."""

    points: Point
    """Their advantages are NaN until `assign_credit`."""
    cond: Conditioning
    """One row per prompt of this rank."""
    prompt_of_point: Tensor
    """(points,) row of `cond` of each point."""
    x0: Tensor
    """(n, …) final latents of all samples of this rank."""
    images: Tensor
    prompts: list[Prompt]
    calls: int
    """Rows that the network has evaluated."""
    trained: Tensor
    """(N,) bool: the samples of the epoch that are trained on."""
    mine: Tensor
    """(n,) global numbers of those of this rank, in the order of the points."""
    credit: Callable[[], SampleCredit]
    """Waits for the rewards of all samples."""
    stats: dict[str, float] = field(default_factory=dict)
    """Statistics of the rewards, after `assign_credit`."""

    def assign_credit(self) -> None:
        """Wait for the last rewards and set the advantages of the points. Collective; to be called once.

        Reraises the exception of a reward that failed. Raises RewardError if too many scores are missing.
        """
        credit = self.credit()
        # Weights average to 1 over all trained samples of all ranks, so that those without a score change no scale.
        weight = credit.valid / credit.valid[self.trained].double().mean()
        for field_of_points, values in (
            (self.points.advantage, credit.advantage),
            (required(self.points.weight, "weight"), weight),
        ):
            field_of_points.unflatten(0, (len(self.mine), -1)).copy_(values[self.mine, None])
        self.points.silence()
        self.stats = credit.stats | {"advantage_abs": float(credit.advantage.abs().mean())}


@dataclass
class Collector:
    """Runs rollout phases. Stateless: an epoch's result follows from its number and the weights."""

    model: FlowModel
    algorithm: Algorithm
    dynamics: Dynamics
    steps: Steps
    times: Times
    sampling: Sampling
    credit: Credit
    scorer: Scorer
    prompts: PromptSet
    conditioner: Conditioner
    geometry: Geometry
    size: Size
    seed: int

    @cached_property
    def rollouts(self) -> Rollouts:
        return Rollouts(
            self.model, self.algorithm, self.dynamics, self.steps, self.sampling, self.scorer, self.prompts,
            self.geometry, self.size, self.seed,
        )  # fmt: skip

    def plan(self, epoch: int) -> StepPlan:
        """The stochastic and trained steps of an epoch."""
        return self.rollouts.plan(epoch)

    def __call__(
        self,
        epoch: int,
        rank: int,
        device: torch.device,
        queue: ScoreQueue,
        gather: Callable[[Tensor], Tensor],
        report: Progress,
    ) -> Collected:
        """Collect one rank's points of an epoch.

        `queue` holds pending scores; its owner cancels it if anything fails before `assign_credit`. `gather` maps local
        values (n, …) to those of all ranks in global sample order.
        """
        group_size = self.geometry.batch.group_size
        chosen = self._chosen(epoch)
        ids, groups = self.geometry.local_samples(rank), self._groups(rank)
        row_of = {group: row for row, group in enumerate(groups)}
        rows = torch.tensor([row_of[sample // group_size] for sample in ids], device=device)
        cond = self.conditioner([self.prompts.prompts[chosen[group]] for group in groups], device, self.size.area)
        prompt_ids = [chosen[sample // group_size] for sample in ids]
        prompts = [self.prompts.prompts[i] for i in prompt_ids]
        local = LocalSamples(epoch, ids, prompt_ids, prompts, cond.index(rows), device)
        early = self._renoise_early(epoch, ids, device)
        if self.algorithm.source == "images":
            samples = self.rollouts.given(local, report)
            credit = partial(SampleCredit.uniform, self.geometry.samples)
        else:
            scores = RolloutScores(self.scorer, queue, epoch)
            samples = self.rollouts.generated(local, scores, report)
            credit = cache(partial(self._credit, scores, local, chosen, gather, report))
        trained = self._trained(credit)
        kept = torch.tensor([i for i, sample in enumerate(ids) if trained[sample]])
        mine = torch.tensor(ids)[kept]
        rollout = samples.rollout if len(kept) == len(ids) else samples.rollout.index(kept)
        points = self._points(epoch, rollout, mine, early)
        if self.algorithm.source == "both":
            given = self.rollouts.given(local, lambda done, reward: None).rollout.index(kept)
            real = self._renoise(epoch, mine, given.sigmas, device, REAL)
            points = interleave(points, self._points(epoch, given, mine, real), len(kept))
        of_point = rows[kept].repeat_interleave(self.geometry.points_per_sample)
        return Collected(
            points, cond, of_point, samples.rollout.x0, samples.images, prompts, samples.calls, trained, mine, credit
        )  # fmt: skip

    def encode_ahead(self, epoch: int, rank: int) -> None:
        """Encode the prompts of a later epoch, in time that would otherwise be spent waiting."""
        chosen = self._chosen(epoch)
        self.conditioner.prepare([self.prompts.prompts[chosen[group]] for group in self._groups(rank)], self.size.area)

    def _groups(self, rank: int) -> list[int]:
        """The groups whose prompts this rank encodes: its own, or all of them if rows are padded to the longest prompt.

        Padding changes the last bit, and a rollout must not depend on the number of ranks.
        """
        if not self.model.one_text_length:
            return list(range(self.geometry.batch.prompts))
        return sorted({sample // self.geometry.batch.group_size for sample in self.geometry.local_samples(rank)})

    def _chosen(self, epoch: int) -> list[int]:
        """The prompt of each group of the epoch, as an index into the prompt set."""
        return self.prompts.epoch(self.seed, epoch, self.geometry.batch.prompts)

    # ------------------------------------------------------------ credit

    def _credit(
        self,
        scores: RolloutScores,
        local: LocalSamples,
        chosen: list[int],
        gather: Callable[[Tensor], Tensor],
        report: Progress,
    ) -> SampleCredit:
        """Wait for the rewards (N, R) of all samples of the epoch and turn them into credit."""
        mine = scores.all()
        report(len(local.ids), scores.mean())
        rewards = gather(mine).cpu()
        weights, names = self.scorer.weights(local.epoch), list(self.scorer.objective)
        branches = self.plan(local.epoch).branches
        # A prompt drawn twice is one group; branches are compared within their own step and trunk.
        groups = torch.tensor(
            [
                s // branches if branches else chosen[s // self.geometry.batch.group_size]
                for s in range(self.geometry.samples)
            ]
        )
        valid = self.scorer.missing.valid(rewards, groups, weights, names)
        stats = statistics(rewards, groups, valid, weights, names)
        stats |= self.credit.stats(rewards, groups, valid, weights)
        return SampleCredit(self.credit(rewards, groups, valid, weights), valid, stats)

    def _trained(self, credit: Callable[[], SampleCredit]) -> Tensor:
        """(N,) bool: the samples to train on. Waits for the rewards only if they decide which."""
        members = self.geometry.members
        if members is None:
            return torch.ones(self.geometry.samples, dtype=torch.bool)
        known = credit()
        return best_and_worst(known.advantage, known.valid, self.geometry.batch.group_size, members)

    # ------------------------------------------------------------ points

    def _points(self, epoch: int, rollout: Rollout, sample: Tensor, renoise: Renoise | None) -> Point:
        """Training points of the samples `sample` (n,); advantages and weights are NaN until credit is assigned."""
        advantage = weight = torch.full((len(sample),), torch.nan)
        group = sample // (self.plan(epoch).branches or self.geometry.batch.group_size)
        if self.algorithm.point == "transition":
            return transitions(rollout, advantage, group, sample, weight)
        sigma, noise = renoise or self._renoise(epoch, sample, rollout.sigmas, rollout.x0.device)
        points = noised(rollout.x0, sigma, noise, advantage, group, sample, weight)
        points.sigma_next = next_level(rollout.sigmas, points.sigma)
        return points

    def _renoise_early(self, epoch: int, ids: list[int], device: torch.device) -> Renoise | None:
        """The re-noising of all generated samples, unless their rewards decide which ones are trained on.

        Drawn before the rollout, since afterwards the rewards of its last batch hold the interpreter, for which each of
        these thousands of small operations would wait.
        """
        if self.algorithm.point != "noised" or self.algorithm.source == "images" or self.geometry.members is not None:
            return None
        return self._renoise(epoch, torch.tensor(ids), self.rollouts.schedule(self.plan(epoch)), device)

    def _renoise(
        self, epoch: int, sample: Tensor, sigmas: Tensor, device: torch.device, stream: int = POINT
    ) -> Renoise:
        """Noise levels and noise of the samples `sample` (n,), for the schedule `sigmas` of their rollout."""
        group_size = self.geometry.batch.group_size
        keys = sample // group_size * group_size if self.algorithm.shared_noise else sample
        sigma = self.times(self.seed, epoch, keys, sigmas)
        shape = self.model.latent_shape(*self.size.area)
        draws = [keyed_randn(self.seed, epoch, keys, stream + j, shape, device) for j in range(sigma.shape[1])]
        return Renoise(sigma, torch.stack(draws, dim=1))
