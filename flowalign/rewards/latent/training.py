"""Training of a latent reward on labelled latents at all noise levels, and its accuracy on unseen ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from flowalign.checks.errors import ConfigError
from flowalign.conditioner import Conditioner
from flowalign.files import atomic_write
from flowalign.flow import interpolate, shifted
from flowalign.prompts import Prompt
from flowalign.rewards.latent.data import Examples
from flowalign.rewards.latent.losses import Loss, accuracy, pairs, pointwise, preference, targets
from flowalign.rewards.latent.network import Network
from flowalign.schedule import Schedule
from flowalign.size import Size
from flowalign.types import Conditioning

log = logging.getLogger("flowalign.latent")


@dataclass(frozen=True)
class Fit:
    """Training settings. `batch` counts examples, or pairs of them for bradley_terry."""

    steps: int
    batch: int
    loss: Loss = "bce"
    lr: float = 1e-5
    """Learning rate of the head; `lr_blocks` is that of the blocks."""
    lr_blocks: float = 1e-6
    weight_decay: float = 0.01
    schedule: Schedule = Schedule()
    shift: float = 5.0
    """Noise levels are sampled uniformly, then shifted towards pure noise by this factor."""
    caption_dropout: float = 0.1
    save_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss is one of {', '.join(get_args(Loss))} (got {self.loss!r}).")


@dataclass
class LabelledSet:
    """Examples with their prompts."""

    examples: Examples
    prompts: Sequence[Prompt]
    conditioner: Conditioner
    size: Size

    def noisy_batch(
        self, rows: Tensor, sigma: Tensor, eps: Tensor, dropped: Tensor
    ) -> tuple[Tensor, Tensor, Conditioning]:
        """Inputs of the network: latents of rows (B,) with noise eps at sigma (B,), and their conditioning.

        Prompts are replaced by the empty one where `dropped` (B,) is true.
        """
        e = self.examples
        prompts = [self.prompts[i] for i in e.prompt[rows].tolist()]
        prompts = [replace(p, text="") if drop else p for p, drop in zip(prompts, dropped.tolist(), strict=True)]
        cond = self.conditioner(prompts, sigma.device, self.size.area)
        x0 = e.x0[e.latent[rows]].to(sigma.device, torch.float32)
        return interpolate(x0, eps.to(sigma.device), sigma), sigma, cond


class Training:
    """Training loop. Each step is a function of (seed, step), so that a resumed run equals an uninterrupted one."""

    def __init__(self, network: Network, data: LabelledSet, fit: Fit, path: Path, device: torch.device) -> None:
        self.network, self.data, self.fit, self.path, self.device = network.to(device), data, fit, path, device
        self.label, network.link = targets(fit.loss, data.examples.label)
        self.pairs = pairs(data.examples.prompt, data.examples.label)
        if not len(self.pairs):
            raise ConfigError(
                "no two latents of a prompt differ in their label, so nothing can be learnt: make more of each "
                "(train.per_prompt), or choose another reward."
            )
        self._freeze_unused()
        own = network.trained_parameters()
        blocks = [p for name, p in own.items() if name.startswith("trunk.")]
        head = [p for name, p in own.items() if not name.startswith("trunk.")]
        groups = [{"params": head, "lr": fit.lr}, {"params": blocks, "lr": fit.lr_blocks}]
        self.optimiser = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=fit.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: fit.schedule(step, fit.steps))
        self.start = self._resume()

    def run(self) -> None:
        """Run the remaining steps."""
        losses: list[float] = []
        for step in range(self.start, self.fit.steps):
            loss = self.loss(step)
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is not finite at step {step}: lower fit.lr and fit.lr_blocks.")
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.trained_parameters().values(), 1.0)
            self.optimiser.step()
            self.scheduler.step()
            losses.append(loss.item())
            if (step + 1) % 50 == 0:
                log.info("step %d of %d: loss %.4f", step + 1, self.fit.steps, np.mean(losses))
                losses = []
            if (step + 1) % self.fit.save_every == 0 or step + 1 == self.fit.steps:
                self._save(step + 1)

    def loss(self, step: int) -> Tensor:
        """Mean loss of one batch, a function of (seed, step)."""
        fit, rng = self.fit, np.random.default_rng([self.fit.seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        # Both examples of a pair get the same noise and noise level.
        per_row = 2 if fit.loss == "bradley_terry" else 1
        candidates = self.pairs if per_row == 2 else torch.arange(len(self.label))[:, None]
        rows = candidates[torch.from_numpy(rng.integers(len(candidates), size=fit.batch))]
        sigma = shifted(torch.rand(fit.batch, generator=generator), fit.shift)
        eps = torch.randn(fit.batch, *self.data.examples.x0.shape[1:], generator=generator)
        dropped = torch.rand(fit.batch, generator=generator) < fit.caption_dropout
        repeated = [t.repeat_interleave(per_row, dim=0) for t in (sigma.to(self.device), eps, dropped)]
        logit = self.network(*self.data.noisy_batch(rows.flatten(), *repeated))
        if per_row == 2:
            better, worse = logit.unflatten(0, (-1, 2)).unbind(1)
            return preference(better, worse).mean()
        return pointwise(fit.loss, logit, self.label[rows[:, 0]].to(logit)).mean()

    def _freeze_unused(self) -> None:
        """Freeze parameters without a gradient: outputs of the last block that only removed blocks would use."""
        self.loss(0).backward()
        for parameter in self.network.trained_parameters().values():
            parameter.requires_grad_(parameter.grad is not None)
        self.network.zero_grad(set_to_none=True)

    def _save(self, step: int) -> None:
        state = {
            "fit": asdict(self.fit),
            "step": step,
            "own": {name: p.detach() for name, p in self.network.trained_parameters().items()},
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        with atomic_write(self.path) as file:
            torch.save(state, file)

    def _resume(self) -> int:
        if not self.path.is_file():
            return 0
        state = torch.load(self.path, weights_only=True, map_location=self.device)
        if state["fit"] != asdict(self.fit) or state["own"].keys() != self.network.trained_parameters().keys():
            raise ConfigError(
                f"{self.path} was begun with other settings of fit or build: set them back, or choose another folder "
                "with hydra.run.dir=…"
            )
        with torch.no_grad():
            for name, parameter in self.network.trained_parameters().items():
                parameter.copy_(state["own"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.load_state_dict(state["scheduler"])
        log.info("resumed at step %d", state["step"])
        return state["step"]


@torch.no_grad()
def accuracies(
    network: Network, data: LabelledSet, sigmas: Sequence[float], batch: int, device: torch.device
) -> dict[str, float]:
    """Fraction of correctly ordered pairs of the same prompt, by noise level. All latents get the same noise."""
    e = data.examples
    compared = pairs(e.prompt, e.label)
    eps = torch.randn(e.x0.shape[1:], generator=torch.Generator().manual_seed(0))
    found = {}
    for sigma in sigmas:
        parts = []
        for rows in torch.arange(len(e.label)).split(batch):
            level, dropped = torch.full((len(rows),), sigma, device=device), torch.zeros(len(rows))
            parts.append(network(*data.noisy_batch(rows, level, eps.expand(len(rows), *eps.shape), dropped)).cpu())
        found[f"{sigma:g}"] = round(accuracy(torch.cat(parts), compared), 4)
    return found
