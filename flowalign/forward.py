"""The forward pass of a training step, and the search for its micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowalign.evaluating import Evaluating
from flowalign.fitting import available_bytes, fits_by_estimate, fits_by_trial, search
from flowalign.geometry import Geometry
from flowalign.memory import PlanLine, pass_bytes, plan, point_bytes, trained_bytes
from flowalign.recipe import Recipe, batch_plan
from flowalign.strategies.sharded import Sharded
from flowalign.types import Conditioning, Point


class Forward(Evaluating):
    """Computes the inputs of the loss: the live velocity, and for reward gradients the reward of its prediction."""

    geometry: Geometry

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.micro: int | None = None
        """The result of batch.micro=auto, found in this process or restored from a checkpoint."""

    def _plan(self) -> Geometry:
        """The batch plan, with the micro-batch that was found, if any."""
        return batch_plan(self.recipe, self.replicas).with_micro(self.micro)

    def memory_plan(self) -> list[PlanLine]:
        """The memory that the run will need on this rank's device."""
        return plan(self.recipe, self.live, self.geometry, self._longest(), self._precision)

    def _longest(self) -> Conditioning:
        """The conditioning of the longest prompt, one row: in some families it sets the sequence length."""
        longest = max(self.recipe.data["train"].prompts, key=lambda prompt: len(prompt.text))
        return self.conditioner([longest], self.device, self.recipe.train_size.area)

    # ------------------------------------------------------------ forward pass

    def _velocity(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        settings = self.recipe.optimisation
        return self.recipe.model.velocity(x, sigma, cond, settings.guidance, settings.cfg_gradient == "both")

    def _predicted_rewards(self, point: Point, v: Tensor, cond: Conditioning) -> Tensor:
        """Differentiable rewards (B,) of the predictions; 0 for points of given images, which are not scored."""
        x, sigma = self.recipe.algorithm.lands(point, v)
        reward = torch.zeros_like(sigma)
        rows = torch.arange(len(x), device=x.device) if point.real is None else (~point.real).nonzero().flatten()
        if not len(rows):
            return reward
        return reward.index_copy(
            0, rows, self.recipe.scorer.of_noisy(x[rows], sigma[rows], cond.index(rows), self.current_epoch)
        )

    # ------------------------------------------------------------ batch.micro=auto

    def _find_micro(self) -> None:
        """Find the micro-batch unless it is known. Requires the model on its device and the checkpoint loaded."""
        if self._plan().batch.micro == "auto":
            self.micro = search(
                self.geometry.micros(), self._fits(), partial(self.trainer.strategy.reduce_boolean_decision, all=True)
            )
        self.geometry = self._plan()
        self.trainer.accumulate_grad_batches = self.geometry.accumulate

    def _fits(self) -> Callable[[int], bool]:
        """A test whether a micro-batch of n points fits beside what the optimisation phase keeps in memory."""
        r, gradients = self.recipe, trained_bytes(self.live)
        r.model.to(self.device)
        cond, other = self._longest(), point_bytes(r, self.geometry)
        if not any(optimizer.state for optimizer in self.trainer.optimizers):
            other += 2 * gradients
        if self._can_try():
            return fits_by_trial(partial(self._try, cond), list(self.live.trained().values()), other, self.device)
        needed = partial(pass_bytes, r, cond, self._precision)
        return fits_by_estimate(needed, other + gradients, available_bytes(self.device, self.trainer.num_devices))

    def _can_try(self) -> bool:
        """Whether trial passes are safe. On a CPU they could exhaust the machine; with sharded weights a rank that runs
        out of memory would leave the others waiting."""
        return self.device.type != "cpu" and not isinstance(self.trainer.strategy, Sharded)

    def _try(self, cond: Conditioning, rows: int) -> None:
        """Run a forward and backward pass on points of zeros, which accumulates into the gradients."""
        x = torch.zeros(rows, *self.recipe.model.latent_shape(*self.recipe.train_size.area), device=self.device)
        sigma = torch.full((rows,), 0.5, device=self.device)
        cond = cond.index(torch.zeros(rows, dtype=torch.long, device=self.device))
        with torch.enable_grad(), self._precision():
            v = self._velocity(x, sigma, cond)
            loss = v.square().mean()
            if self.recipe.algorithm.follows_reward:
                loss = loss + self._predicted_rewards(Point(x, sigma, sigma, sigma_next=sigma / 2), v, cond).sum()
        loss.backward()
