"""Evaluation: fixed prompts with fixed noise, sampled and scored, during training or without it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from flowalign.conditioner import Conditioner
from flowalign.evaluation import Positions, Shown, gather_shown, stills
from flowalign.exhausted import explain_oom
from flowalign.generate import generate
from flowalign.policy import Policy
from flowalign.prompts import Prompt
from flowalign.recipe import Recipe
from flowalign.report import Report
from flowalign.scoring import Latents, RewardInput, ScoreQueue, Scores
from flowalign.strategies.sharded import Sharded
from flowalign.types import required


class Evaluating(LightningModule):
    """Evaluates the policy, which a subclass builds, as `recipe.evaluation` says."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.policy: Policy | None = None
        self.report = Report()
        self.counts = {"samples": 0, "rollout": 0, "frozen": 0, "train": 0, "evaluation": 0}
        self.baseline: dict[str, float] = {}
        self.shown: dict[str, Shown] = {}
        self.evaluated_at = -1
        self.between_batches: Callable[[float], None] = lambda left: None
        """Called on all ranks between batches for which Lightning has no hook. The argument estimates the seconds until
        the epoch's checkpoint can be written; math.inf during a rollout."""
        self.queue = ScoreQueue(recipe.scorer.ahead)
        self.meters = nn.ModuleDict()
        guided = (
            max(recipe.rollout.guidance, recipe.evaluation.sampling.guidance, recipe.optimisation.guidance)
            > recipe.model.guidance_off
        )
        self.conditioner = Conditioner(recipe.model, guided, recipe.encoding)
        self.eval_prompts: dict[str, list[Prompt]] = {
            stage: [recipe.data[stage].prompts[i] for i in recipe.data[stage].fixed(number)]
            for stage, number in (("val", recipe.evaluation.num_val), ("test", recipe.evaluation.num_test))
        }

    @property
    def live(self) -> Policy:
        if self.policy is None:
            raise RuntimeError("the policy is built by configure_model, which the Trainer calls.")
        return self.policy

    @property
    def context(self) -> int:
        """Number of neighbouring ranks that share the same samples, each with a part of every sequence."""
        return self.trainer.strategy.context if isinstance(self.trainer.strategy, Sharded) else 1

    @property
    def replica(self) -> int:
        """Index of this rank's share of the samples, out of `replicas`."""
        return self.global_rank // self.context

    @property
    def replicas(self) -> int:
        """Number of groups of ranks that work on different samples."""
        return self.trainer.world_size // self.context

    def _precision(self) -> Any:
        # Lightning enters the precision context only for steps. Outside it, log-probabilities would differ from theirs.
        return self.trainer.precision_plugin.forward_context()

    def _compute_dtype(self) -> torch.dtype:
        """The dtype of the denoisers' matrix products."""
        device = self.trainer.strategy.root_device.type
        with self._precision():
            if torch.is_autocast_enabled(device):
                return torch.get_autocast_dtype(device)
        return next(iter(self.recipe.model.denoisers().values())).dtype  # type: ignore[return-value]

    def val_dataloader(self) -> Positions:
        return self._positions("val")

    def test_dataloader(self) -> Positions:
        return self._positions("test")

    def _positions(self, stage: str) -> Positions:
        batch = self.recipe.evaluation.sampling.batch_size
        return Positions(len(self.eval_prompts[stage]), batch, self.replica, self.replicas)

    def on_validation_epoch_start(self) -> None:
        self._begin_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self._begin_evaluation("test")

    def validation_step(self, positions: Tensor, batch_idx: int) -> None:
        del batch_idx
        self._evaluate("val", positions, self.recipe.evaluation.copy)

    def test_step(self, positions: Tensor, batch_idx: int) -> None:
        del batch_idx
        self._evaluate("test", positions, self.recipe.evaluation.copy)

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._end_evaluation("test")

    def _begin_evaluation(self, stage: str) -> None:
        self.recipe.model.to(self.device)
        self.report.begin("evaluate", len(self._positions(stage).mine))
        self.shown.pop(stage, None)
        self.queue.cancel()  # left by an interrupted evaluation
        tags = sorted({p.tag for p in self.eval_prompts[stage] if p.tag is not None})
        for name in (*self.recipe.scorer.measures, "velocity_rms"):
            for key in (name, *(f"{name}/{tag}" for tag in (*tags, "not_scored") if name != "velocity_rms")):
                self._meter(f"{stage}/{key}").reset()

    def _meter(self, key: str, nan_strategy: Literal["ignore", "disable"] = "ignore") -> MeanMetric:
        key = key.replace(".", "_")
        if key not in self.meters:
            self.meters[key] = MeanMetric(nan_strategy=nan_strategy).to(self.device)
        return self.meters[key]  # type: ignore[return-value]

    def _record(self, found: Mapping[str, Tensor | float], weight: int = 1) -> None:
        """Add values to the weighted means that are logged at the end of the epoch, over all ranks.

        `self.log` is called once an epoch only: it takes twenty times as long as an update of a metric.
        """
        for key, value in found.items():
            meter = self._meter(key, "disable")
            if not meter.update_called:
                self.log(key, meter, on_step=False, on_epoch=True, metric_attribute=f"meters.{key}")
            meter.update(value, weight)

    def _forget(self, stage: str) -> None:
        """Reset the metrics that an interrupted epoch has left."""
        for key in self.meters:
            if key.startswith(f"{stage}/"):
                self._meter(key).reset()

    @explain_oom("evaluate")
    @torch.no_grad()
    def _evaluate(self, stage: str, positions: Tensor, copy: str | None) -> None:
        r, sampling = self.recipe, self.recipe.evaluation.sampling
        ids, all_prompts = positions.tolist(), self.eval_prompts[stage]
        prompts = [all_prompts[i % len(all_prompts)] for i in ids]
        with self.live.use(copy), self._precision():
            cond = self.conditioner(prompts, self.device, r.eval_size.area)
            out = generate(r.model, cond, ids, r.evaluation.seed, sampling, r.eval_size, self.device)
        self.counts["evaluation"] += len(ids) * sampling.num_steps * self.replicas
        if number := sum(i < len(all_prompts) for i in ids):  # the rest is padding, which only the last rows can be
            inputs = RewardInput(prompts, out.media, Latents(out.x0, cond)).index(slice(number))
            self._start_scoring(stage, ids[:number], inputs, out.rms[:number])

    def _start_scoring(self, stage: str, ids: list[int], inputs: RewardInput, rms: Tensor) -> None:
        self._meter(f"{stage}/velocity_rms").update(rms)
        shown = set(self.recipe.evaluation.shown_indices(len(self.eval_prompts[stage])))
        rows = [row for row, i in enumerate(ids) if i in shown]
        images = stills(required(inputs.media, "media")[rows]).cpu()
        pending = self.recipe.scorer.start(inputs, evaluation=True)
        self.queue.add(pending, partial(self._scored, stage, ids, rows, images))

    def _scored(self, stage: str, ids: list[int], rows: list[int], images: Tensor, scores: Scores) -> None:
        """Accumulate the scores of the samples `ids`, of which `rows` are shown."""
        prompts, scores = [self.eval_prompts[stage][i] for i in ids], self.recipe.scorer.summed(scores, len(ids))
        for name, values in scores.items():
            self._meter(f"{stage}/{name}").update(values)
            self._meter(f"{stage}/{name}/not_scored").update(values.isnan().float())
            for tag in {p.tag for p in prompts} - {None}:
                mine = torch.tensor([p.tag == tag for p in prompts], device=values.device)
                self._meter(f"{stage}/{name}/{tag}").update(values[mine])
        if rows:
            shown_scores = {name: values[rows].cpu() for name, values in scores.items()}
            new = Shown(images, [prompts[row].text for row in rows], shown_scores, [ids[row] for row in rows])
            self.shown[stage] = self.shown[stage].concat(new) if stage in self.shown else new
        done = ids[-1] // self.replicas + 1
        self.report.advance("evaluate", done, reward=float(scores["reward"].nanmean()))

    def _end_evaluation(self, stage: str) -> None:
        self.evaluated_at = self.current_epoch
        for key, meter in self._finished_meters(stage).items():
            self.log(key, meter, on_step=False, on_epoch=True, metric_attribute=f"meters.{key}")
        if before := self.baseline.get(f"{stage}/velocity_rms"):
            self.log(f"{stage}/velocity_growth", self._meter(f"{stage}/velocity_rms").compute() / before)
        if stage == "val":
            reward = self._meter("val/reward")
            self.log("hp/val_reward", reward, on_step=False, on_epoch=True, metric_attribute="meters.val/reward")

    def _finished_meters(self, stage: str) -> dict[str, MeanMetric]:
        """Wait for the last scores and return the metrics; shares of unscored samples only if there are any."""
        self.queue.finish()
        self._gather_shown(stage)
        self.report.end("evaluate")
        found = {key: self._meter(key) for key in self.meters if key.startswith(f"{stage}/")}
        return {key: meter for key, meter in found.items() if not key.endswith("/not_scored") or meter.compute()}

    def _gather_shown(self, stage: str) -> None:
        """Send the images of all ranks to the first one, which writes the grids."""
        if self.trainer.world_size > 1:
            mine = self.shown.pop(stage, None) if self.global_rank % self.context == 0 else None
            if (shown := gather_shown(mine, self.trainer.is_global_zero)) is not None:
                self.shown[stage] = shown

    def evaluate_test(self, copy: str) -> dict[str, float]:
        """The metrics that `trainer.test` would compute with the weights of this copy, during training.

        Logs nothing and does not affect the training.
        """
        loader, limit, began = self.test_dataloader(), self.trainer.limit_test_batches, time.monotonic()
        batches = min(limit, len(loader)) if isinstance(limit, int) else int(len(loader) * limit)
        with in_eval_mode(self):
            self._begin_evaluation("test")
            for done, positions in enumerate(islice(loader, batches), start=1):
                self._evaluate("test", positions, copy)
                self.between_batches((time.monotonic() - began) / done * (batches - done))
            return {key: float(meter.compute()) for key, meter in self._finished_meters("test").items()}


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
