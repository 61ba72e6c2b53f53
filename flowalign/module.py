"""The LightningModule: each epoch is a rollout phase, then an optimisation phase over the points it has collected.

The mathematics is in dynamics/, points.py and algorithms/. This file moves tensors, logs, and makes resumption exact:
noise is keyed, the order of batches is a function of the epoch, and frozen copies are part of the state dict.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from flowalign.buffer import Buffer, IndexLoader
from flowalign.checks.errors import ConfigError, as_config_errors
from flowalign.collect import Collected, Collector
from flowalign.diversity import diversity
from flowalign.exhausted import explain_oom
from flowalign.forward import Forward
from flowalign.guards import FiniteGuard, check_ratio, checked_loss
from flowalign.loggers import external_run_ids
from flowalign.memory import GIB
from flowalign.points import subsample_weights
from flowalign.policy import Policy
from flowalign.policy.fingerprint import weights_fingerprint
from flowalign.policy.optimiser import check_state
from flowalign.recipe import Recipe, check_copies, check_given_media
from flowalign.schedule import set_rates
from flowalign.scoring import ScoreQueue
from flowalign.settings import differences
from flowalign.strategies.replicated import exclude_from_sync
from flowalign.strategies.sequence import check_tokens
from flowalign.strategies.sharded import Sharded
from flowalign.tensors import full_tensor
from flowalign.types import Point, required

log = logging.getLogger("flowalign")


class AlignModule(Forward):
    """Trains `recipe.model` with `recipe.algorithm`. All randomness is keyed by recipe.seed and the epoch."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.buffer = Buffer()
        self.rollout_shown: Tensor | None = None
        self.stats: dict[str, float] = {}
        self.finite = FiniteGuard(recipe.optimisation.max_skipped)
        self.base = ""
        self.done = (0, 0)
        """Epochs and optimiser steps of the checkpoint that was loaded."""
        self.gap: float | None = None
        """Largest |ρ − 1| on this rank before the first update of the epoch; None without a ratio."""
        for size in (recipe.train_size, recipe.eval_size):
            recipe.model.check_size(*size.area)
        with as_config_errors():
            check_given_media(recipe, self.eval_prompts.values())
        recipe.scorer.bind(recipe.model)

    # ------------------------------------------------------------ building

    @explain_oom("build")
    def configure_model(self) -> None:
        if self.policy is not None:  # Lightning calls this for every fit, validate and test
            return
        r = self.recipe
        with as_config_errors():
            check_copies(r.algorithm, r.evaluation, r.frozen)
        asked = (r.consulted - r.same_as_live) | {r.evaluation.copy}
        kept = [name for name in r.frozen if name in asked]
        copies = [*kept, *(["reference"] if "reference" in r.algorithm.frozen else [])]
        strategy = self.trainer.strategy
        # If sharded, only rank 0 has read the weights.
        self.base = strategy.broadcast(weights_fingerprint(r.model.denoisers()))
        with as_config_errors():
            r.running.check(strategy.root_device, self._compute_dtype())
            self.policy = Policy(
                r.model.denoisers(), r.tune, r.model.lora_targets, copies, r.device_of_frozen, self._finish_networks,
                # A 16-bit merged weight would round away what the adapters have learnt.
                merge=r.running.merge_adapters and str(self.trainer.precision).startswith("32"),
            )  # fmt: skip
            r.running.apply(r.model, rows_vary=r.optimisation.skip_zero)
        exclude_from_sync(self)

    def _finish_networks(self) -> None:
        """Cast and shard the prepared denoisers, before they are copied."""
        if str(self.trainer.precision).startswith("64"):
            # Lightning does so too, but only after reading a checkpoint, whose values float32 would have rounded.
            for denoiser in self.recipe.model.denoisers().values():
                denoiser.double()
        if isinstance(self.trainer.strategy, Sharded):
            self.trainer.strategy.shard(self.recipe.model)

    def setup(self, stage: str) -> None:
        del stage
        r = self.recipe
        self.geometry = self._plan()
        check_tokens(r.model, (r.train_size, r.eval_size), self.context)
        self.collect = Collector(
            r.model, r.algorithm, r.dynamics, r.steps, r.times, r.rollout, r.credit, r.scorer, r.data["train"],
            self.conditioner, self.geometry, r.train_size, r.seed,
        )  # fmt: skip
        planned = r.batch.micro != "auto" and self.trainer.training
        if planned and self.trainer.accumulate_grad_batches != self.geometry.accumulate:
            raise ValueError(
                f"trainer.accumulate_grad_batches follows from the batch plan ({self.geometry.accumulate}): leave "
                "it unset, and set batch.micro and batch.updates."
            )

        if r.encoding.release:
            self._encode_all()

    def _encode_all(self) -> None:
        """Encode every prompt of the run, then release the text encoders.

        With a cache folder each rank encodes a part. Embeddings that another rank has stored out of this one's sight,
        for example on its machine's own disk, are computed again.
        """
        r, strategy = self.recipe, self.trainer.strategy
        if not r.model.text_encoders():  # setup is called for each of fit, validate and test
            return
        r.model.to(strategy.root_device)
        evaluated = [p for prompts in self.eval_prompts.values() for p in prompts]
        for prompts, size in ((r.data["train"].prompts, r.train_size), (evaluated, r.eval_size)):
            mine = prompts if r.encoding.cache is None else prompts[self.global_rank :: self.trainer.world_size]
            self.report.begin("encode", len(mine))
            self.conditioner.prepare_all(mine, size.area, partial(self.report.advance, "encode"))
            strategy.barrier("prompts")
            self.conditioner.prepare_all(self.conditioner.missing(prompts, size.area), size.area)
            self.report.end("encode")
        r.model.release_text_encoders()

    def configure_optimizers(self) -> Any:
        r = self.recipe
        with as_config_errors():  # for example of a negative learning rate
            optimizer = r.optimizer(list(self.live.trained().values()))
            check_state(r.optimizer, self.device)
        # A fused step would unscale float16 gradients itself, after they have been checked and clipped.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        epochs, steps = self.trainer.max_epochs or 1, self.trainer.max_steps
        limits = [self.geometry.steps_per_epoch * epochs] * (epochs > 0) + [steps] * (steps > 0)
        total = min(limits, default=0)  # without a limit only a constant schedule is accepted
        scheduler = LambdaLR(optimizer, partial(r.schedule, total=total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> IndexLoader:
        if self.recipe.batch.micro == "auto":
            self._find_micro()
        return IndexLoader(self.geometry, self.recipe.seed, self.replica)

    # ------------------------------------------------------------ rollout phase

    def on_train_start(self) -> None:
        set_rates(cast(LambdaLR, self.lr_schedulers()))
        self._forget("train")
        self.finite.count_of_epoch()  # of an interrupted fit

    def on_train_epoch_start(self) -> None:
        self._ensure_rollout()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        del batch, batch_idx
        self._ensure_rollout()  # Lightning skips on_train_epoch_start after some kinds of resumption

    def _ensure_rollout(self) -> None:
        if self.buffer.epoch == self.current_epoch:
            return
        self.buffer.clear()
        self.recipe.model.to(self.device)
        started = time.perf_counter()
        g = self.geometry
        self.report.begin("rollout", g.samples_local)
        with self._precision(), ScoreQueue(self.recipe.scorer.ahead) as queue:
            collected = self._collect(queue)
            if self.current_epoch + 1 != self.trainer.max_epochs:
                self.collect.encode_ahead(self.current_epoch + 1, self.replica)  # needs none either
            with explain_oom("rollout"):  # rewards may run out of memory here
                collected.assign_credit()
            spread = diversity(collected.x0, g.batch.group_size, self._gather)
            self.report.end("rollout")
        self.counts["samples"] += g.samples
        self.counts["rollout"] += int(self._all_replicas(torch.tensor(collected.calls, device=self.device)).sum())
        self.rollout_shown = collected.images
        seconds = time.perf_counter() - started
        self.stats = collected.stats | {"diversity": spread, "seconds": seconds, "images_per_s": g.samples / seconds}
        # Not by self.log, which would record them at the end of the epoch: they describe its start.
        for logger in self.trainer.loggers:
            logger.log_metrics({f"rollout/{k}": v for k, v in self.stats.items()}, step=self.global_step)
        self.report.begin("optimise", g.batches_per_epoch)

    def _collect(self, queue: ScoreQueue) -> Collected:
        """Fill the buffer with points and frozen velocities, which need no rewards: those in `queue` may be pending."""
        same, sampler = self.recipe.same_as_live, self.recipe.algorithm.samples_with
        copies = [name for name in self.recipe.algorithm.frozen if name not in same]
        asked = None if sampler in same else sampler
        with explain_oom("rollout"), self.live.use(asked):
            collected = self.collect(
                self.current_epoch, self.replica, self.device, queue, self._gather, self._on_rollout_progress
            )
            self.buffer.fill(self.current_epoch, collected.points, collected.cond, collected.prompt_of_point)
            collected.points.kl_weight = self._kl_weight(collected.points)
            if asked in copies:  # its weights are in place
                self._evaluate_frozen(asked)
        for name in copies:
            if name != asked:
                self._evaluate_frozen(name)
        return collected

    def _on_rollout_progress(self, done: int, reward: float | None) -> None:
        self.report.advance("rollout", done, **({} if reward is None else {"reward": reward}))
        self.between_batches(math.inf)

    def _gather(self, local: Tensor) -> Tensor:
        """Local values (n, …) of all ranks as (n · replicas, …), in global sample order."""
        return self.geometry.in_order(self._all_replicas(local))

    def _all_replicas(self, local: Tensor) -> Tensor:
        """Local values (…) of all replicas as (replicas, …)."""
        return local[None] if self.trainer.world_size == 1 else self.all_gather(local)[:: self.context]  # type: ignore

    @explain_oom("frozen copies")
    def _evaluate_frozen(self, name: str) -> None:
        """Store the velocities of a frozen copy at the points. They are constant during the optimisation phase."""
        batch, points = self.recipe.rollout.batch_size, self.buffer.points
        every_row, weight = torch.arange(len(points.x)), points.kl_weight
        rows = every_row if weight is None or name != "reference" else weight.nonzero().flatten()
        velocity = torch.zeros_like(points.x, dtype=torch.float32)  # stays 0 where it is not needed
        self.report.begin("frozen", len(rows))
        with self.live.use(name):
            for i, part in enumerate(rows.split(batch)):
                p, cond = self.buffer.gather(part)
                velocity[part] = self._velocity(p.x, p.sigma, cond)
                self.report.advance("frozen", i * batch + len(part))
                self.between_batches(math.inf)
        self.report.end("frozen")
        points.frozen[name] = velocity
        self.counts["frozen"] += len(rows) * self.replicas

    def _kl_weight(self, points: Point) -> Tensor | None:
        """Weights of the points at which the KL penalty is computed; None if the reference is needed at every point."""
        r = self.recipe
        if "reference" in r.algorithm.consults or r.optimisation.kl_share == 1:
            return None
        return subsample_weights(r.seed, self.current_epoch, required(points.sample, "sample"), r.optimisation.kl_share)

    # ------------------------------------------------------------ optimisation phase

    @explain_oom("optimise")
    def training_step(self, idx: Tensor, batch_idx: int) -> Tensor:
        planned, idx = len(idx), self._in_the_loss(idx)
        point, cond = self.buffer.gather(idx)
        v = self._velocity(point.x, point.sigma, cond)
        point.frozen |= dict.fromkeys(self.recipe.same_as_live, v.detach())
        if self.recipe.algorithm.follows_reward:
            point.reward = self._predicted_rewards(point, v, cond)
        losses, metrics = checked_loss(self.recipe.algorithm, point, v, self.recipe.frozen)
        finite = self._guard(losses, metrics, point, batch_idx)
        self.counts["train"] += len(idx) * self.replicas
        # Samples without a score have weight 0, in the loss and in its diagnostics.
        weight = required(point.weight, "weight")
        loss = (losses * weight).sum() / planned
        means = {f"train/{name}": (value * weight).mean() for name, value in metrics.items()}
        if "ratio" in metrics:
            means["train/ratio_std"] = metrics["ratio"][point.counts].std(correction=0).nan_to_num()  # 0 without rows
        # The loss is a mean over the planned points, the diagnostics over those that were not skipped.
        for found, rows in ((means, len(idx)), ({"train/loss": loss.detach()}, planned)):
            if not finite:  # every rank has to log the same keys; the weight below is 0
                found = {name: torch.zeros_like(mean) for name, mean in found.items()}
            self._record(found, rows * finite)
        self.report.advance("optimise", batch_idx + 1)
        return loss

    def _in_the_loss(self, idx: Tensor) -> Tensor:
        """The rows of a micro-batch that need a forward pass; at least one, since sharded ranks run it together."""
        if not (self.recipe.optimisation.skip_zero and self.recipe.algorithm.silent_at_zero):
            return idx
        kept = idx[(self.buffer.points.advantage[idx.to(self.device)] != 0).to(idx.device)]
        return kept if len(kept) else idx[:1]

    @explain_oom("optimise")
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)

    def _guard(self, losses: Tensor, metrics: dict[str, Tensor], point: Point, batch_idx: int) -> bool:
        """Whether the losses are finite. If not, the optimiser step is skipped on all ranks."""
        finite = self.finite.check(losses, point.sigma, self.current_epoch, self.global_step)
        if batch_idx < self.geometry.accumulate and "ratio" in metrics:
            self.gap = max(self.gap or 0.0, self._gap_of(metrics["ratio"][point.counts]) if finite else 0.0)
        return finite

    def _gap_of(self, ratio: Tensor) -> float:
        """Largest |ρ − 1| before the first update, 0 without rows. Raises if it is more than rounding."""
        tolerance = self.recipe.optimisation.on_policy_tolerance
        return check_ratio(ratio, tolerance, str(self.trainer.precision)) if len(ratio) else 0.0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.gap is not None:  # on all ranks or none, at the first step of an epoch
            self.log("train/on_policy_gap", self.gap, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")
            self.gap = None
        # Here gradients are unscaled and not clipped yet.
        gradients = [p.grad for p in self.live.trained().values() if p.grad is not None]
        norm = full_tensor(nn.utils.get_total_norm(gradients))
        # float16's scaler finds its factor by letting gradients overflow, and skips those steps itself.
        overflow = not norm.isfinite() and str(self.trainer.precision) != "16-mixed"
        skip = self.trainer.strategy.reduce_boolean_decision(self.finite.failed or bool(overflow), all=False)
        if skip:
            self.finite.skip_step()
            optimizer.zero_grad()  # a step without gradients changes nothing, not even the moments
        else:
            self._record({"train/grad_norm": norm})
        self._record({"train/lr": optimizer.param_groups[0]["lr"]})

    @explain_oom("optimise")
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        skipped = self.finite.skipped
        super().optimizer_step(*args, **kwargs)
        # Lightning would keep gradients until the next backward pass, and rollouts and evaluations need the memory.
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()
        if self.finite.skipped == skipped:
            self._follow("step")

    def on_train_epoch_end(self) -> None:
        self.report.end("optimise")
        self._follow("rollout")
        self.log("train/skipped_steps", float(self.finite.count_of_epoch()))  # the same on all ranks
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / GIB
            self.log("memory/peak_gib", peak, sync_dist=True, reduce_fx="max")

    def _follow(self, when: Literal["step", "rollout"]) -> None:
        # Within optimizer_step, Lightning has not counted the step yet.
        steps = self.global_step + (when == "step")
        for name, follow in self.recipe.frozen.items():
            if name in self.live.copies and follow.due(when, steps):
                self.live.follow(name, follow.decay(steps))

    # ------------------------------------------------------------ checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Trained parameters and frozen copies only; the base model is not stored."""
        kept = {f"policy.{key}" for key in self.live.checkpoint_keys()}
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in kept}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        own = self.state_dict()
        differing = sorted(own.keys() ^ state_dict.keys()) or [
            k for k, t in own.items() if t.shape != state_dict[k].shape
        ]
        if strict and differing:
            raise ConfigError(
                f"the checkpoint does not fit this run ({len(differing)} entries differ, first {differing[0]}): "
                "it was made with another tune, rank, model, or other frozen copies (algo, kl_beta)."
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["flowalign"] = {
            "config": self.recipe.config,
            "base": self.base,
            "baseline": self.baseline,
            "counts": self.counts,
            "skipped": self.finite.skipped,
            "micro": self.geometry.micro,
            "logs": external_run_ids(self.trainer.loggers),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("flowalign", {})
        if saved.get("base", self.base) != self.base:
            then, now = saved["config"]["model"], self.recipe.model
            raise ConfigError(
                f"the checkpoint was trained on another base model: model.pretrained={then['pretrained']} with "
                f"model.quantised={then.get('quantised') or 'null'}, as it was then, and not model.pretrained="
                f"{now.pretrained} with model.quantised={now.quantised or 'null'}, as it is now."
            )
        self._warn_of_differences(saved.get("config", {}))
        self.done = (checkpoint["epoch"] + 1, checkpoint["global_step"])
        self.micro = saved.get("micro")
        self.finite.skipped = saved.get("skipped", 0)
        self.baseline = dict(saved.get("baseline", {}))
        self.counts = dict(saved.get("counts", self.counts))

    def _warn_of_differences(self, then: Mapping[str, Any]) -> None:
        """Warn about changed settings. Those of the optimiser would otherwise be overridden silently by its state."""
        now = self.recipe.config
        if then and now and self.trainer.is_global_zero and (found := differences(then, now)):
            log.warning(
                "the run of the checkpoint had other settings: %s. Those of `optimizer` are restored from the "
                "checkpoint; the others take effect as given now.",
                "; ".join(found),
            )
