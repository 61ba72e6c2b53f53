"""The rollout phase: prompts to pictures, pictures to rewards, rewards to credit, and points to train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowalign.algorithms.base import Algorithm
from flowalign.conditioner import Conditioner
from flowalign.credit import GroupCredit, group_stats
from flowalign.dynamics import Dynamics
from flowalign.geometry import Geometry
from flowalign.keyed import POINT, keyed_randn
from flowalign.models.base import FlowModel
from flowalign.points import noised, permuted_steps, transitions
from flowalign.prompts import Prompt, PromptSet
from flowalign.sampler import Noise, Sampling, deterministic, join, walk
from flowalign.scoring import Scorer
from flowalign.steps.base import StepPlan, Steps
from flowalign.types import Conditioning, Point, Rollout


@dataclass(frozen=True)
class Size:
    """Height, width in pixels, and frames for video."""

    height: int
    width: int
    frames: int | None = None


@dataclass
class Collected:
    """What a rollout phase leaves on one rank."""

    points: Point
    cond: Conditioning
    prompt_of_point: Tensor
    stats: dict[str, float]
    images: Tensor
    prompts: list[Prompt]


@dataclass
class Collector:
    """Everything a rollout phase needs, and no state of its own."""

    model: FlowModel
    algorithm: Algorithm
    dynamics: Dynamics
    steps: Steps
    sampling: Sampling
    credit: GroupCredit
    scorer: Scorer
    prompts: PromptSet
    conditioner: Conditioner
    geometry: Geometry
    size: Size
    seed: int
    points_per_sample: int | None

    def plan(self, epoch: int) -> StepPlan:
        """Which steps are noisy: none for a deterministic dynamics, or those that the `steps` group chooses."""
        if not self.dynamics.stochastic:
            return deterministic(self.sampling.num_steps)
        plan = self.steps(epoch, self.sampling.num_steps)
        return plan if self.algorithm.point == "transition" else replace(plan, trained=())  # nothing to replay

    def __call__(
        self,
        epoch: int,
        rank: int,
        device: torch.device,
        gather: Callable[[Tensor], Tensor],
        report: Callable[[int, float], None],
    ) -> Collected:
        """`gather`: local (n,) to the global one in sample order; `report`: pictures done, mean reward so far."""
        chosen = self.prompts.epoch(self.seed, epoch, self.geometry.batch.prompts)
        local = self.geometry.local_samples(rank)
        rows = torch.tensor([sample // self.geometry.batch.group_size for sample in local], device=device)
        cond = self.conditioner([self.prompts.prompts[i] for i in chosen], device)
        prompts = [self.prompts.prompts[chosen[row]] for row in rows.tolist()]
        rollout, images, rewards = self._pictures(epoch, local, cond.index(rows), prompts, device, report)
        everyone = gather(rewards)
        # The same prompt drawn twice is one group.
        groups = torch.tensor([chosen[s // self.geometry.batch.group_size] for s in range(self.geometry.samples)])
        if not everyone.isfinite().any():
            raise RuntimeError(
                "not a single picture of this epoch could be scored: every reward is NaN. Is the reward installed "
                "and reachable?"
            )
        advantage = self.credit(everyone.cpu(), groups)
        points = self._points(epoch, rollout, local, advantage[list(local)])
        stats = {
            **{
                f"reward_{k}" if k != "zero_std_fraction" else k: float(v)
                for k, v in group_stats(everyone.cpu(), groups).items()
            },
            "reward_nan_fraction": float((~everyone.isfinite()).float().mean()),
            "advantage_abs": float(advantage.abs().mean()),
        }
        per_sample = len(points.x) // len(rows)
        return Collected(points, cond, rows.repeat_interleave(per_sample), stats, images, prompts)

    def _pictures(
        self,
        epoch: int,
        local: range,
        cond: Conditioning,
        prompts: list[Prompt],
        device: torch.device,
        report: Callable[[int, float], None],
    ) -> tuple[Rollout, Tensor, Tensor]:
        size, batch = self.size, self.sampling.batch_size
        sigmas = self.model.sigmas(self.sampling.num_steps, size.height, size.width, size.frames)
        shape = self.model.latent_shape(size.height, size.width, size.frames)
        plan, parts, images, rewards = self.plan(epoch), [], [], []
        for start in range(0, len(local), batch):
            ids = local[start : start + batch]
            part_cond = cond.index(slice(start, start + len(ids)))

            def velocity(x: Tensor, sigma: Tensor, c: Conditioning = part_cond) -> Tensor:
                return self.model.velocity(x, sigma, c, self.sampling.guidance)

            noise = Noise(self.seed, epoch, ids, shape, device)
            part = walk(velocity, sigmas, plan, self.dynamics, self.sampling.solver, noise, self.algorithm.keeps_mean)
            media = self.model.decode(part.x0)
            parts.append(part)
            images.append(media[[i for i, s in enumerate(ids) if s % self.geometry.batch.group_size == 0]].cpu())
            rewards.append(self.scorer.reward(media, prompts[start : start + len(ids)]))
            report(start + len(ids), float(torch.cat(rewards).nanmean()))
        return join(parts), torch.cat(images), torch.cat(rewards)

    def _points(self, epoch: int, rollout: Rollout, local: range, advantage: Tensor) -> Point:
        if self.algorithm.point == "transition":
            return transitions(rollout, advantage)
        order = permuted_steps(self.seed, epoch, local, self.sampling.num_steps, self.points_per_sample)
        shape = tuple(rollout.x0.shape[1:])
        draws = [
            keyed_randn(self.seed, epoch, local, POINT + j, shape, rollout.x0.device) for j in range(order.shape[1])
        ]
        return noised(rollout.x0, rollout.sigmas, advantage, order.shape[1], torch.stack(draws, dim=1), order)
