"""The LightningModule: an epoch is a rollout phase, then an optimisation phase over the points that it left.

Mathematics is in dynamics/, points.py and algorithms/; this file moves tensors, logs, and keeps the promises about
exact resumption: noise is keyed, the order of batches is a function of the epoch, copies are in the state dict.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from flowalign.buffer import Buffer, IndexLoader
from flowalign.checks.errors import ConfigError, refusals
from flowalign.collect import Collector
from flowalign.conditioner import Conditioner
from flowalign.evaluation import Positions, Shown, stills
from flowalign.generate import generate
from flowalign.memory import GIB, Share, plan
from flowalign.policy import Policy
from flowalign.prompts import Prompt
from flowalign.recipe import Recipe, batch_plan
from flowalign.report import Report
from flowalign.strategies.sequence import check_tokens
from flowalign.strategies.sharded import Sharded
from flowalign.tensors import whole


class AlignModule(LightningModule):
    """Trains `recipe.model` by `recipe.algorithm`. All randomness is keyed by recipe.seed and the epoch."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.policy: Policy | None = None
        self.buffer = Buffer()
        self.report = Report()
        self.counts = {"samples": 0, "rollout": 0, "frozen": 0, "train": 0, "evaluation": 0}
        self.baseline: dict[str, float] = {}
        self.shown: dict[str, Shown] = {}
        self.rollout_shown: Tensor | None = None
        self.stats: dict[str, float] = {}
        self.evaluated_at = -1
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
        for size in (recipe.train_size, recipe.eval_size):
            recipe.model.check_size(*size.area)
        if recipe.algorithm.source == "images":
            recipe.data["train"].require_images()

    # ------------------------------------------------------------ building

    def configure_model(self) -> None:
        if self.policy is not None:  # Lightning calls this at every fit, validate and test
            return
        r = self.recipe
        consulted = {*r.algorithm.frozen, *([r.algorithm.samples_with] if r.algorithm.samples_with else [])}
        kept = [name for name in r.frozen if name in consulted or name == r.evaluation.copy]
        missing = consulted - set(kept) - {"reference"}
        if missing:
            raise ConfigError(
                f"the algorithm consults {sorted(missing)}, but `frozen` does not say how they follow the live weights."
            )
        copies = [*kept, *(["reference"] if "reference" in r.algorithm.frozen else [])]
        strategy = self.trainer.strategy
        shard = partial(strategy.shard, r.model) if isinstance(strategy, Sharded) else None
        with refusals():
            self.policy = Policy(r.model.denoisers(), r.tune, r.model.lora_targets, copies, r.device_of_frozen, shard)
            r.running.apply(r.model)

    @property
    def live(self) -> Policy:
        if self.policy is None:
            raise RuntimeError("the policy is built by configure_model, which the Trainer calls.")
        return self.policy

    @property
    def alike(self) -> int:
        """Neighbouring ranks that work on the same samples, each on a part of every sequence."""
        return self.trainer.strategy.context if isinstance(self.trainer.strategy, Sharded) else 1

    @property
    def replica(self) -> int:
        """Whose samples this rank works on, out of `replicas`."""
        return self.global_rank // self.alike

    @property
    def replicas(self) -> int:
        return self.trainer.world_size // self.alike

    def setup(self, stage: str) -> None:
        del stage
        r = self.recipe
        self.geometry = batch_plan(r, self.replicas)
        check_tokens(r.model, (r.train_size, r.eval_size), self.alike)
        self.collect = Collector(
            r.model, r.algorithm, r.dynamics, r.steps, r.times, r.rollout, r.credit, r.scorer, r.data["train"],
            self.conditioner, self.geometry, r.train_size, r.seed,
        )  # fmt: skip
        if self.trainer.accumulate_grad_batches != self.geometry.accumulate and self.trainer.training:
            raise ValueError(
                f"trainer.accumulate_grad_batches follows from the batch plan ({self.geometry.accumulate}): leave "
                "it unset, and set batch.micro and batch.updates."
            )

        if r.encoding.release:
            self._encode_all()

    def _encode_all(self) -> None:
        """Every prompt of the run is encoded now, by rank 0 first where a folder keeps it; then the encoders go."""
        r, strategy = self.recipe, self.trainer.strategy
        if not r.model.text_encoders():  # setup comes once for each of fit, validate and test
            return
        r.model.to(strategy.root_device)
        evaluated = [p for prompts in self.eval_prompts.values() for p in prompts]
        for prompts, size in ((r.data["train"].prompts, r.train_size), (evaluated, r.eval_size)):
            self.report.begin("encode", len(prompts))
            advance = partial(self.report.advance, "encode")
            if r.encoding.cache is not None and self.trainer.is_global_zero:
                self.conditioner.prepare(prompts, size.area, advance)
            strategy.barrier("prompts")
            self.conditioner.prepare(prompts, size.area, advance)
            self.report.end("encode")
        r.model.release_text_encoders()

    def memory_plan(self) -> list[Share]:
        """What the run will take of this rank's device."""
        cond = self.conditioner(self.recipe.data["train"].prompts[:1], self.device, self.recipe.train_size.area)
        with self._precision():
            return plan(self.recipe, self.live, self.geometry, cond)

    def configure_optimizers(self) -> Any:
        r = self.recipe
        optimizer = r.optimizer(list(self.live.trained().values()))
        total = self.geometry.steps_per_epoch * (self.trainer.max_epochs or 1)
        if self.trainer.max_steps > 0:
            total = min(total, self.trainer.max_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(r.schedule, total=total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> IndexLoader:
        return IndexLoader(self.geometry, self.recipe.seed, self.replica)

    def val_dataloader(self) -> Positions:
        return self._positions("val")

    def test_dataloader(self) -> Positions:
        return self._positions("test")

    def _positions(self, stage: str) -> Positions:
        batch = self.recipe.evaluation.sampling.batch_size
        return Positions(len(self.eval_prompts[stage]), batch, self.replica, self.replicas)

    # ------------------------------------------------------------ rollout phase

    def on_train_epoch_start(self) -> None:
        self._ensure_rollout()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        del batch, batch_idx
        self._ensure_rollout()  # Lightning skips on_train_epoch_start after some kinds of resumption

    def _ensure_rollout(self) -> None:
        if self.buffer.epoch == self.current_epoch:
            return
        self.recipe.model.to(self.device)
        started = time.perf_counter()
        g = self.geometry
        self.report.begin("rollout", g.samples_local)
        with self._precision():
            with self.live.use(self.recipe.algorithm.samples_with):
                got = self.collect(self.current_epoch, self.replica, self.device, self._gather, self._rolled)
            self.buffer.fill(self.current_epoch, got.points, got.cond, got.prompt_of_point)
            self.report.end("rollout")
            self._consult_frozen()
        self.counts["samples"] += g.samples
        self.counts["rollout"] += int(self._everyones(torch.tensor(got.calls, device=self.device)).sum())
        self.rollout_shown = got.images
        seconds = time.perf_counter() - started
        self.stats = got.stats | {"seconds": seconds, "images_per_s": g.samples / seconds}
        # Straight to the loggers: these values belong to the start of the epoch, self.log would date them at its end.
        for logger in self.trainer.loggers:
            logger.log_metrics({f"rollout/{k}": v for k, v in self.stats.items()}, step=self.global_step)
        self.report.begin("optimise", g.batches_per_epoch)

    def _rolled(self, done: int, reward: float | None) -> None:
        self.report.advance("rollout", done, **({} if reward is None else {"reward": reward}))

    def _gather(self, local: Tensor) -> Tensor:
        """(n,) on every rank to (n · ranks,) in global sample order."""
        return self.geometry.in_order(self._everyones(local))

    def _everyones(self, local: Tensor) -> Tensor:
        """(replicas, …)"""
        return local[None] if self.trainer.world_size == 1 else self.all_gather(local)[:: self.alike]  # type: ignore

    def _precision(self) -> Any:
        # Hooks run without the precision context; without it, log-probabilities would differ from training_step's.
        return self.trainer.precision_plugin.forward_context()

    def _consult_frozen(self) -> None:
        """Velocities of the frozen copies at every point, once: they do not change during the optimisation phase."""
        for name in self.recipe.algorithm.frozen:
            with self.live.use(name):
                parts = [
                    self._velocity(p.x, p.sigma, cond) for p, cond in self.buffer.split(self.recipe.rollout.batch_size)
                ]
            self.buffer.points.frozen[name] = torch.cat(parts)
            self.counts["frozen"] += len(self.buffer.points.x) * self.replicas

    # ------------------------------------------------------------ optimisation phase

    def _velocity(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return self.recipe.model.velocity(x, sigma, cond, self.recipe.optimisation.guidance)

    def training_step(self, idx: Tensor, batch_idx: int) -> Tensor:
        point, cond = self.buffer.gather(idx)
        losses, metrics = self.recipe.algorithm.loss(point, self._velocity(point.x, point.sigma, cond))
        self._guard(losses, metrics, idx, batch_idx)
        self.counts["train"] += len(idx) * self.replicas
        means = {f"train/{name}": value.mean() for name, value in metrics.items()}
        means["train/loss"] = losses.detach().mean()
        if "ratio" in metrics:
            means["train/ratio_std"] = metrics["ratio"].std(correction=0)
        self.log_dict(means, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(idx))
        self.report.advance("optimise", batch_idx + 1)
        return losses.mean()

    def _guard(self, losses: Tensor, metrics: dict[str, Tensor], idx: Tensor, batch_idx: int) -> None:
        finite = losses.isfinite()
        if not finite.all():
            row = int((~finite).nonzero()[0])
            sigma = float(self.buffer.points.sigma[idx[row].to(self.device)])
            raise FloatingPointError(
                f"the loss of {int((~finite).sum())} of {len(losses)} points is not finite (first: sigma "
                f"{sigma:.3f}, epoch {self.current_epoch}, "
                f"step {self.global_step}); a lower learning rate or fp32 helps, and algo.adv_clip bounds the credit."
            )
        first_update = batch_idx < self.geometry.accumulate
        if first_update and "ratio" in metrics:
            gap = float((metrics["ratio"] - 1).abs().max())
            self.log("train/on_policy_gap", gap, on_step=False, on_epoch=True, reduce_fx="max")
            if gap > self._on_policy_tolerance():
                raise RuntimeError(
                    f"before the first update the importance ratio must be 1, but it is off by {gap:.2e}: rollout "
                    "and training disagree "
                    "(guidance, precision, dropout or resolution). optimisation.on_policy_tolerance sets the limit."
                )

    def _on_policy_tolerance(self) -> float:
        given = self.recipe.optimisation.on_policy_tolerance
        return given if given is not None else 1e-5 if str(self.trainer.precision).startswith("32") else 1e-3

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        del optimizer  # its gradients are unscaled here and not clipped yet
        gradients = [p.grad for p in self.live.trained().values() if p.grad is not None]
        self.log("train/grad_norm", whole(nn.utils.get_total_norm(gradients)), on_step=False, on_epoch=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._follow("step")

    def on_train_epoch_end(self) -> None:
        self.report.end("optimise")
        self._follow("rollout")
        if self.device.type == "cuda":
            self.log("memory/peak_gib", torch.cuda.max_memory_allocated(self.device) / GIB)

    def _follow(self, when: str) -> None:
        # Inside optimizer_step Lightning has not counted the step yet.
        steps = self.global_step + (when == "step")
        for name, follow in self.recipe.frozen.items():
            if name in self.live.copies and follow.every == when:
                self.live.follow(name, follow.decay(steps))

    # ------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        self._begin_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self._begin_evaluation("test")

    def validation_step(self, positions: Tensor, batch_idx: int) -> None:
        del batch_idx
        self._evaluate("val", positions)

    def test_step(self, positions: Tensor, batch_idx: int) -> None:
        del batch_idx
        self._evaluate("test", positions)

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._end_evaluation("test")

    def _begin_evaluation(self, stage: str) -> None:
        self.recipe.model.to(self.device)
        self.report.begin("evaluate", len(self._positions(stage).mine))
        self.shown.pop(stage, None)
        tags = sorted({str(p.metadata["tag"]) for p in self.eval_prompts[stage] if "tag" in p.metadata})
        for name in (*self.recipe.scorer.measures, "velocity_rms"):
            for key in (name, *(f"{name}/{tag}" for tag in tags if name != "velocity_rms")):
                self._meter(f"{stage}/{key}").reset()

    def _meter(self, key: str) -> MeanMetric:
        key = key.replace(".", "_")
        if key not in self.meters:
            self.meters[key] = MeanMetric(nan_strategy="ignore").to(self.device)
        return self.meters[key]  # type: ignore[return-value]

    @torch.no_grad()
    def _evaluate(self, stage: str, positions: Tensor) -> None:
        r, sampling = self.recipe, self.recipe.evaluation.sampling
        ids = positions.tolist()
        prompts = [self.eval_prompts[stage][i] for i in ids]
        with self.live.use(r.evaluation.copy), self._precision():
            cond = self.conditioner(prompts, self.device, r.eval_size.area)
            media, rms = generate(r.model, cond, ids, r.evaluation.seed, sampling, r.eval_size, self.device)
        self._meter(f"{stage}/velocity_rms").update(rms)
        self.counts["evaluation"] += len(ids) * sampling.num_steps * self.replicas
        scores = r.scorer.all(media, prompts)
        for name, values in scores.items():
            self._meter(f"{stage}/{name}").update(values)
            for tag in {p.metadata.get("tag") for p in prompts} - {None}:
                mine = torch.tensor([p.metadata.get("tag") == tag for p in prompts], device=values.device)
                self._meter(f"{stage}/{name}/{tag}").update(values[mine])
        self._show(stage, ids, media, scores)
        self.report.advance("evaluate", ids[-1] // self.replicas + 1, reward=float(scores["reward"].nanmean()))

    def _show(self, stage: str, ids: list[int], media: Tensor, scores: dict[str, Tensor]) -> None:
        wanted = set(self.recipe.evaluation.shows(len(self.eval_prompts[stage])))
        rows = [row for row, i in enumerate(ids) if i in wanted]
        if not rows:
            return
        texts = [self.eval_prompts[stage][ids[row]].text for row in rows]
        new = Shown(stills(media[rows]).cpu(), texts, {k: v[rows].cpu() for k, v in scores.items()})
        self.shown[stage] = self.shown[stage].followed_by(new) if stage in self.shown else new

    def _end_evaluation(self, stage: str) -> None:
        self.report.end("evaluate")
        self.evaluated_at = self.current_epoch
        for key, meter in self.meters.items():
            if key.startswith(f"{stage}/"):
                self.log(key, meter, on_step=False, on_epoch=True, metric_attribute=f"meters.{key}")  # type: ignore
        if before := self.baseline.get(f"{stage}/velocity_rms"):
            self.log(f"{stage}/velocity_growth", self._meter(f"{stage}/velocity_rms").compute() / before)
        if stage == "val":
            reward = self._meter("val/reward")
            self.log("hp/val_reward", reward, on_step=False, on_epoch=True, metric_attribute="meters.val/reward")

    # ------------------------------------------------------------ checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Only what is trained, and the frozen copies: the base is not ours to store."""
        kept = {f"policy.{key}" for key in self.live.kept_keys()}
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
        checkpoint["flowalign"] = {"config": self.recipe.config, "baseline": self.baseline, "counts": self.counts}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint.get("flowalign", {})
        self.baseline = dict(kept.get("baseline", {}))
        self.counts = dict(kept.get("counts", self.counts))
