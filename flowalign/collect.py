"""The rollout phase: prompts to pictures, pictures to rewards, rewards to credit, and points to train on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from flowalign.algorithms.base import Algorithm
from flowalign.checks.errors import as_config_errors
from flowalign.conditioner import Conditioner
from flowalign.credit import Credit
from flowalign.dynamics import Dynamics
from flowalign.geometry import Geometry
from flowalign.keyed import PICTURE, POINT, REAL, keyed_integer, keyed_randn
from flowalign.models.base import FlowModel
from flowalign.points import below, beside, noised, transitions
from flowalign.prompts import Prompt, PromptSet
from flowalign.sampler import Noise, Rows, Sampling, deterministic, join, walk
from flowalign.scoring import Coming, Latents, Scorer, Seen, Turns
from flowalign.scoring.stats import statistics
from flowalign.steps.base import StepPlan, Steps
from flowalign.steps.tail import shorten
from flowalign.times import Times
from flowalign.types import Conditioning, Point, Rollout, required

Progress = Callable[[int, float | None], None]
SHOWN = 16
"""Pictures of a rollout that are kept to be looked at."""


@dataclass(frozen=True)
class Size:
    """Height, width in pixels, and frames for video."""

    height: int
    width: int
    frames: int | None = None
    fps: float | None = None
    """Frames a second of a written video; None: 16."""

    @staticmethod
    def of(sides: Any) -> Size:
        """From the side of a square, [height, width] or [height, width, frames]; anything else is a ValueError."""
        given = [sides, sides] if type(sides) is int else sides
        if not isinstance(given, list) or len(given) not in (2, 3) or not all(type(n) is int for n in given):
            raise ValueError(
                "a resolution is the side of a square, [height, width], [height, width, frames], or a mapping "
                f"(got {sides})."
            )
        return Size(*given)

    @property
    def area(self) -> tuple[int, int, int | None]:
        """As the methods of a model take it."""
        return (self.height, self.width, self.frames)


@dataclass(frozen=True)
class Credited:
    """What every sample of an epoch has been given for its rewards."""

    advantage: Tensor
    """(N,)"""
    valid: Tensor
    """(N,) bool; the others are not trained on."""
    stats: dict[str, float] = field(default_factory=dict)
    """What the rewards look like."""

    @staticmethod
    def equal(number: int) -> Credited:
        """1 for everybody."""
        return Credited(torch.ones(number), torch.ones(number, dtype=torch.bool))


@dataclass
class Collected:
    """What a rollout phase leaves on one rank. The last rewards may still be on their way."""

    points: Point
    """Without credit (NaN) before `settle`."""
    cond: Conditioning
    """A row for each prompt of this rank."""
    prompt_of_point: Tensor
    """(points,) rows of it."""
    x0: Tensor
    """(n, …) the final latents of all samples of this rank."""
    images: Tensor
    prompts: list[Prompt]
    calls: int
    """Rows that the network was asked for."""
    trained: Tensor
    """(N,) bool: the samples of the epoch whose points there are."""
    mine: Tensor
    """(n,) the numbers of those whose points are here."""
    earned: Callable[[], Credited]
    """Waits for the rewards of all samples."""
    stats: dict[str, float] = field(default_factory=dict)
    """Of the rewards, after `settle`."""

    def settle(self) -> None:
        """Waits for the last rewards and gives the points their credit; all ranks together, once.

        Raises what a reward has raised, and RewardError where too many scores are missing.
        """
        earned = self.earned()
        # The mean over what is in the loss, on all ranks alike.
        weight = earned.valid / earned.valid[self.trained].double().mean()
        for place, credit in (
            (self.points.advantage, earned.advantage),
            (required(self.points.weight, "weight"), weight),
        ):
            place.unflatten(0, (len(self.mine), -1)).copy_(credit[self.mine, None])
        self.points.silence()
        self.stats = earned.stats | {"advantage_abs": float(earned.advantage.abs().mean())}


@dataclass
class Share:
    """The samples of one rank."""

    epoch: int
    samples: list[int]
    """Their global numbers."""
    prompts: list[Prompt]
    cond: Conditioning
    """One row a sample."""
    device: torch.device


@dataclass
class Pictures:
    """What became of them."""

    rollout: Rollout
    images: Tensor
    """The first picture of each group, of SHOWN at most, on the CPU."""
    calls: int = 0


@dataclass
class Collector:
    """Everything a rollout phase needs, and no state of its own."""

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

    def plan(self, epoch: int) -> StepPlan:
        """Which steps are noisy: none for a deterministic dynamics, or those that the `steps` group chooses."""
        if not self.dynamics.stochastic:
            return deterministic(self.sampling.num_steps)
        plan = self.steps(epoch, self.sampling.num_steps)
        if self.algorithm.point == "noised":
            return replace(plan, trained=(), branches=0)  # nothing to replay
        if plan.points != self.geometry.points_per_sample:
            raise ValueError(
                f"the plan of epoch {epoch} trains {plan.points} steps of a picture, but the batches of the run were "
                f"made for {self.geometry.points_per_sample}: `steps` must choose equally many in every epoch."
            )
        return plan

    def __call__(
        self,
        epoch: int,
        rank: int,
        device: torch.device,
        turns: Turns,
        gather: Callable[[Tensor], Tensor],
        report: Progress,
    ) -> Collected:
        """`turns`: where rewards wait, of the caller, who cancels them if anything fails before the result is settled.

        `gather`: local (n,) to the global one in sample order; `report`: pictures done, their mean reward if any.
        """
        group_size = self.geometry.batch.group_size
        chosen = self._chosen(epoch)
        local, groups = self.geometry.local_samples(rank), self._groups(rank)
        row_of = {group: row for row, group in enumerate(groups)}
        rows = torch.tensor([row_of[sample // group_size] for sample in local], device=device)
        cond = self.conditioner([self.prompts.prompts[chosen[group]] for group in groups], device, self.size.area)
        which = [chosen[sample // group_size] for sample in local]
        share = Share(epoch, local, [self.prompts.prompts[i] for i in which], cond.index(rows), device)
        if self.algorithm.source == "images":
            made, earned = self._real(share, which, report), partial(Credited.equal, self.geometry.samples)
        else:
            rewards = Coming(self.scorer, turns, epoch)
            made = self._pictures(share, rewards, report)
            earned = cache(partial(self._earned, rewards, share, chosen, gather, report))
        trained = self._trained(earned)
        kept = torch.tensor([i for i, sample in enumerate(local) if trained[sample]])
        mine = torch.tensor(local)[kept]
        rollout = made.rollout if len(kept) == len(local) else made.rollout.index(kept)
        points = self._points(epoch, rollout, mine)
        if self.algorithm.source == "both":
            real = self._real(share, which, lambda done, reward: None).rollout.index(kept)
            points = beside(points, self._points(epoch, real, mine, REAL), len(kept))
        of_point = rows[kept].repeat_interleave(self.geometry.points_per_sample)
        return Collected(
            points, cond, of_point, made.rollout.x0, made.images, share.prompts, made.calls, trained, mine, earned
        )  # fmt: skip

    def foresee(self, epoch: int, rank: int) -> None:
        """Encodes the prompts of an epoch to come, for a moment that would otherwise be spent waiting."""
        chosen = self._chosen(epoch)
        self.conditioner.prepare([self.prompts.prompts[chosen[group]] for group in self._groups(rank)], self.size.area)

    def _groups(self, rank: int) -> list[int]:
        """Those whose prompts a rank encodes: its own, or all where rows are padded to the longest of the epoch.

        Padding counts in the last bit, and a rollout does not depend on the number of ranks.
        """
        if not self.model.one_text_length:
            return list(range(self.geometry.batch.prompts))
        return sorted({sample // self.geometry.batch.group_size for sample in self.geometry.local_samples(rank)})

    def _chosen(self, epoch: int) -> list[int]:
        return self.prompts.epoch(self.seed, epoch, self.geometry.batch.prompts)

    # ------------------------------------------------------------ pictures

    def _pictures(self, share: Share, rewards: Coming, report: Progress) -> Pictures:
        """Walks of the policy, decoded and given to the rewards, some at a time."""
        plan = self.plan(share.epoch)
        sigmas, shape = self._schedule(plan), self._latent_shape()
        batch, alike = self._batch(plan)
        parts, images, calls = [], [], 0
        unscored: list[tuple[Tensor, Tensor | None]] = []
        for start in range(0, len(share.samples), batch):
            samples = share.samples[start : start + batch]
            end = start + len(samples)
            cond = share.cond.index(slice(start, end))

            def velocity(x: Tensor, sigma: Tensor, rows: Rows, cond: Conditioning = cond) -> Tensor:
                nonlocal calls
                calls += len(x)
                return self.model.velocity(x, sigma, cond.index(rows), self.sampling.guidance)

            noise = Noise(self.seed, share.epoch, samples, shape, share.device, alike)
            part = walk(
                velocity, sigmas, plan, self.dynamics, self.sampling.solver, noise, self.algorithm.keeps_mean,
                self.sampling.kept_in,
            )  # fmt: skip
            media, shown = self._decoded(part.x0, self._first_of_groups(samples), SHOWN - len(images))
            parts.append(part)
            images += shown
            unscored.append((part.x0, media))
            if self._complete(share.samples, end):
                seen, unscored = self._seen(share, unscored, end, plan), []
                rewards.add(seen)
            report(end, rewards.mean())
        return Pictures(join(parts), _stacked(images), calls)

    def _batch(self, plan: StepPlan) -> tuple[int, int]:
        """Samples walked together, and how many neighbours start alike: whole groups of what belongs together, if they
        fit."""
        group = self.geometry.batch.group_size
        alike = group if self.sampling.same_noise else plan.trunk
        together = math.lcm(alike, self._compared(plan)) if self.scorer.groupwise else alike
        return self.sampling.batch_size // together * together or self.sampling.batch_size, alike

    def _compared(self, plan: StepPlan) -> int:
        """Neighbouring samples that are one credit group."""
        return plan.branches or self.geometry.batch.group_size

    def _decoded(self, x0: Tensor, firsts: list[int], room: int) -> tuple[Tensor | None, list[Tensor]]:
        """Media of all samples, None if no reward sees them; and those to be looked at, which are made anyway."""
        firsts = firsts[:room]
        if self.scorer.sees_media:
            media = self.model.decode(x0)
            return media, list(media[firsts].cpu())
        return None, list(self.model.decode(x0[firsts]).cpu()) if firsts else []

    def _complete(self, samples: list[int], end: int) -> bool:
        """Whether the first `end` samples can be scored: groupwise rewards want whole groups."""
        following = samples[end] if end < len(samples) else 0
        return not self.scorer.groupwise or following % self.geometry.batch.group_size == 0

    def _seen(self, share: Share, unscored: list[tuple[Tensor, Tensor | None]], end: int, plan: StepPlan) -> Seen:
        """The samples before `end` that are not scored yet: x0 and media by batch."""
        x0 = torch.cat([x0 for x0, _ in unscored])
        decoded = [media for _, media in unscored if media is not None]
        rows = slice(end - len(x0), end)
        groups = torch.tensor(share.samples[rows]) // self._compared(plan)
        media = torch.cat(decoded) if decoded else None
        return Seen(share.prompts[rows], media, Latents(x0, share.cond.index(rows)), groups)

    def _real(self, share: Share, which: list[int], report: Progress) -> Pictures:
        """Real pictures or videos of the prompts instead, encoded; the network is not asked."""
        latents, images, batch = [], [], self.sampling.batch_size
        for start in range(0, len(which), batch):
            samples = share.samples[start : start + batch]
            numbers = [keyed_integer(self.seed, share.epoch, s, PICTURE) for s in samples]
            with as_config_errors():
                media = self.prompts.images(which[start : start + batch], numbers, *self.size.area)
            latents.append(self.model.encode_images(media.to(share.device)))
            images += list(media[self._first_of_groups(samples)[: SHOWN - len(images)]])
            report(start + len(samples), None)
        x0 = torch.cat(latents)
        given = Rollout(x0, self._schedule(deterministic(0)))
        return Pictures(given, _stacked(images))

    def _schedule(self, plan: StepPlan) -> Tensor:
        area = self.size.area
        sigmas = self.model.sigmas(self.sampling.num_steps, *area)
        return sigmas if plan.tail is None else shorten(sigmas, plan.last_noisy, plan.tail, self.model.shift(*area))

    def _latent_shape(self) -> tuple[int, ...]:
        return self.model.latent_shape(*self.size.area)

    def _first_of_groups(self, samples: Sequence[int]) -> list[int]:
        return [i for i, s in enumerate(samples) if s % self.geometry.batch.group_size == 0]

    # ------------------------------------------------------------ credit

    def _earned(
        self, rewards: Coming, share: Share, chosen: list[int], gather: Callable[[Tensor], Tensor], report: Progress
    ) -> Credited:
        """The credit of all samples of the epoch, once the last rewards are there."""
        scores = rewards.all()
        report(len(share.samples), rewards.mean())
        return self._credit(gather(scores).cpu(), share.epoch, chosen)

    def _credit(self, rewards: Tensor, epoch: int, chosen: list[int]) -> Credited:
        """The credit of all samples of the epoch for their rewards (N, R)."""
        weights, names = self.scorer.weights(epoch), list(self.scorer.objective)
        branches = self.plan(epoch).branches
        # The same prompt drawn twice is one group; branches are compared with those of their own step and trunk.
        groups = torch.tensor(
            [
                s // branches if branches else chosen[s // self.geometry.batch.group_size]
                for s in range(self.geometry.samples)
            ]
        )
        valid = self.scorer.missing.valid(rewards, groups, weights, names)
        stats = statistics(rewards, groups, valid, weights, names)
        stats |= self.credit.stats(rewards, groups, valid, weights)
        return Credited(self.credit(rewards, groups, valid, weights), valid, stats)

    def _trained(self, earned: Callable[[], Credited]) -> Tensor:
        """(N,) bool: the samples to train on. Rewards are waited for only where they choose."""
        members = self.geometry.members
        if members is None:
            return torch.ones(self.geometry.samples, dtype=torch.bool)
        return self._best_and_worst(earned(), members)

    def _best_and_worst(self, credit: Credited, members: int) -> Tensor:
        """(N,) bool: so many of each group, the best and the worst in equal numbers.

        Who has no score comes between these, and is kept only where its group has too few others.
        """
        worst = members // 2
        best = members - worst
        group_size = self.geometry.batch.group_size
        scored = credit.advantage.masked_fill(~credit.valid, -torch.inf).unflatten(0, (-1, group_size))
        place = scored.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        place = torch.where(place < best, place, place + group_size)
        place[~credit.valid.unflatten(0, (-1, group_size))] = best
        rank = place.argsort(dim=1, stable=True).argsort(dim=1)
        return ((rank < best) | (rank >= group_size - worst)).flatten()

    # ------------------------------------------------------------ points

    def _points(self, epoch: int, rollout: Rollout, sample: Tensor, stream: int = POINT) -> Point:
        """Without credit, whose place is made."""
        advantage = weight = torch.full((len(sample),), torch.nan)
        group_size = self.geometry.batch.group_size
        group = sample // (self.plan(epoch).branches or group_size)
        if self.algorithm.point == "transition":
            return transitions(rollout, advantage, group, sample, weight)
        keys = sample // group_size * group_size if self.algorithm.shared_noise else sample
        shape, device = tuple(rollout.x0.shape[1:]), rollout.x0.device
        sigma = self.times(self.seed, epoch, keys, rollout.sigmas)
        draws = [keyed_randn(self.seed, epoch, keys, stream + j, shape, device) for j in range(sigma.shape[1])]
        points = noised(rollout.x0, sigma, torch.stack(draws, dim=1), advantage, group, sample, weight)
        points.sigma_next = below(rollout.sigmas, points.sigma)
        return points


def _stacked(images: list[Tensor]) -> Tensor:
    """(n, …), also of nothing: a rank may have no first picture of a group."""
    return torch.stack(images) if images else torch.empty(0)
