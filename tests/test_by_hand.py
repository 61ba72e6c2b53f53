"""Whole runs against loops that are written out here from the methods' formulas, without anything of algorithms/,
dynamics/, credit/, points.py or the module: the same weights come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from flowalign.keyed import INITIAL, ORDER, POINT, STEP, TURN, keyed_generator, keyed_randn
from flowalign.module import AlignModule
from flowalign.run import build_recipe, build_trainer, plan_accumulation

if TYPE_CHECKING:
    from omegaconf import DictConfig

GROUPS, K, T, UPDATES, EPOCHS, SEED = 2, 4, 4, 2, 2, 0
N = GROUPS * K
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.5)
"""Not AdamW, which takes steps of one size where a gradient is only rounding."""
WORDS = (
    f"batch.prompts={GROUPS}", f"batch.group_size={K}", "batch.micro=4", f"batch.updates={UPDATES}",
    "rollout.batch_size=3", f"trainer.max_epochs={EPOCHS}", "trainer.check_val_every_n_epoch=99", "tune=full",
    "schedule.kind=constant", "reward=brightness",
)  # fmt: skip


def mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def beside(a: Tensor, x: Tensor) -> Tensor:
    return a.reshape(-1, *[1] * (x.ndim - 1))


class ByHand:
    """The loop that all methods share; a subclass has a rollout, points, a loss, and what copies follow."""

    copies: tuple[str, ...] = ()
    passes = 1

    def __init__(self, cfg: DictConfig) -> None:
        recipe = build_recipe(cfg)
        self.model, self.prompts, size = recipe.model, recipe.data["train"], recipe.train_size.area
        self.live = dict(self.model.denoisers()["transformer"].requires_grad_().named_parameters())
        self.copy = {name: self.now() for name in (*self.copies, "reference")}
        self.sigmas, self.shape = self.model.sigmas(T, *size), self.model.latent_shape(*size)

    def now(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def become(self, values: dict[str, Tensor]) -> None:
        for name, p in self.live.items():
            p.copy_(values[name])

    def follow(self, name: str, d: float) -> None:
        for key, value in self.now().items():
            self.copy[name][key] = d * self.copy[name][key] + (1 - d) * value

    def ask(self, x: Tensor, sigma: Tensor, sample: Tensor) -> Tensor:
        return self.model.velocity(x, sigma, self.cond.index(sample // K))

    def of(self, name: str, x: Tensor, sigma: Tensor, sample: Tensor) -> Tensor:
        now = self.now()
        self.become(self.copy[name])
        with torch.no_grad():
            v = self.ask(x, sigma, sample)
        self.become(now)
        return v

    def run(self) -> ByHand:
        optimizer, self.k = SGD(list(self.live.values())), 0
        for epoch in range(EPOCHS):
            chosen = self.prompts.epoch(SEED, epoch, GROUPS)
            self.cond = self.model.encode([self.prompts.prompts[i].text for i in chosen])
            points, x0 = self.points(epoch)
            reward = self.model.decode(x0).flatten(1).mean(dim=1).double().unflatten(0, (GROUPS, K))
            points["A"] = self.credit(reward).flatten().float()[points["sample"]].clamp(-5, 5)
            for turn in range(self.passes):
                order = torch.randperm(N, generator=keyed_generator(SEED, epoch, 0, TURN + turn))
                for part in order.chunk(UPDATES):
                    rows = torch.isin(points["sample"], part)
                    p = {name: t[rows] for name, t in points.items()}
                    optimizer.zero_grad()
                    self.loss(p, self.ask(p["x"], p["s"], p["sample"])).mean().backward()
                    nn.utils.clip_grad_norm_(list(self.live.values()), 1.0)
                    optimizer.step()
                    self.k += 1
                    self.after_step()
            self.after_rollout()
        return self

    def credit(self, reward: Tensor) -> Tensor:
        """Over the deviation of the epoch."""
        return (reward - reward.mean(dim=1, keepdim=True)) / (reward.std(correction=0) + 1e-4)

    def points(self, epoch: int) -> tuple[dict[str, Tensor], Tensor]:
        raise NotImplementedError

    def loss(self, p: dict[str, Tensor], v: Tensor) -> Tensor:
        raise NotImplementedError

    def after_step(self) -> None: ...

    def after_rollout(self) -> None: ...


class NFT(ByHand):
    """beta 0.5, penalty 0.01, d = min(0.1 k, 0.5), three of four noise levels for each picture, and an average."""

    words = (
        "algo=nft", "times=permuted", "rollout.solver._target_=flowalign.solvers.Euler", "algo.beta=0.5",
        "algo.kl_beta=0.01", "algo.adv_range=null", "frozen.old.decay.kind=[0,0.1,0.5]", "evaluation.weights=ema",
    )  # fmt: skip
    copies = ("old", "ema")

    def points(self, epoch: int) -> tuple[dict[str, Tensor], Tensor]:
        every, x = torch.arange(N), keyed_randn(SEED, epoch, range(N), INITIAL, self.shape)
        for s, s_next in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
            x = x + (s_next - s) * self.of("old", x, s, every)
        levels = [torch.randperm(T, generator=keyed_generator(SEED, epoch, i, ORDER))[:3] for i in range(N)]
        s, sample, x0 = self.sigmas[torch.cat(levels)], every.repeat_interleave(3), x.repeat_interleave(3, dim=0)
        eps = torch.cat([keyed_randn(SEED, epoch, [i], POINT + j, self.shape) for i in range(N) for j in range(3)])
        noisy = (1 - beside(s, x0)) * x0 + beside(s, x0) * eps
        frozen = {f"v_{name}": self.of(name, noisy, s, sample) for name in ("old", "reference")}
        return {"x": noisy, "s": s, "x0": x0, "sample": sample, **frozen}, x

    def loss(self, p: dict[str, Tensor], v: Tensor) -> Tensor:
        def distance(u: Tensor) -> Tensor:
            error = (p["x"] - beside(p["s"], u) * u - p["x0"]).double()
            return mean(error**2) / mean(error.detach().abs()).clamp(min=1e-5)

        r, old = (p["A"] / 10 + 0.5).clamp(0, 1), p["v_old"]
        contrast = r * distance(0.5 * v + 0.5 * old) + (1 - r) * distance(1.5 * old - 0.5 * v)
        return 5 * contrast / 0.5 + 0.01 * mean((v - p["v_reference"]) ** 2)

    def after_step(self) -> None:
        self.follow("ema", min((1 + self.k) / (10 + self.k), 0.9))

    def after_rollout(self) -> None:
        self.follow("old", min(0.1 * self.k, 0.5))


class GRPO(ByHand):
    """Flow-SDE with eta 0.7 on every step, clip 1e-3, penalty 0.04, all steps but the last, each twice."""

    words = ("algo=grpo", "steps=all", "algo.kl_beta=0.04", "rollout.same_noise=false", "batch.passes=2")
    passes = 2

    def credit(self, reward: Tensor) -> Tensor:
        return (reward - reward.mean(dim=1, keepdim=True)) / (reward.std(dim=1, correction=0, keepdim=True) + 1e-4)

    def step(self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, std and noise rate of a step."""
        s, s_next = beside(s.expand(len(x)), x), beside(s_next.expand(len(x)), x)
        rate, dt = 0.7 * (s / (1 - torch.where(s == 1, self.sigmas[1], s))).sqrt(), s_next - s
        drift = x * (1 + rate**2 / (2 * s) * dt) + v * (1 + rate**2 * (1 - s) / (2 * s)) * dt
        return drift, rate * (-dt).sqrt(), rate

    def density(self, y: Tensor, at: Tensor, std: Tensor) -> Tensor:
        return mean(-((y - at) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi))

    @torch.no_grad()
    def points(self, epoch: int) -> tuple[dict[str, Tensor], Tensor]:
        every, x, parts = torch.arange(N), keyed_randn(SEED, epoch, range(N), INITIAL, self.shape), []
        for i, (s, s_next) in enumerate(zip(self.sigmas[:-1], self.sigmas[1:], strict=True)):
            at, std, _ = self.step(x, self.ask(x, s, every), s, s_next)
            y = at + std * keyed_randn(SEED, epoch, range(N), STEP + i, self.shape)
            levels = {"s": s.expand(N), "s_next": s_next.expand(N)}
            parts.append({"x": x, "y": y, "log_p": self.density(y, at, std), "sample": every, **levels})
            x = y
        points = {name: torch.cat([part[name] for part in parts[:-1]]) for name in parts[0]}
        points["v_reference"] = self.of("reference", points["x"], points["s"], points["sample"])
        return points, x

    def loss(self, p: dict[str, Tensor], v: Tensor) -> Tensor:
        at, std, rate = self.step(p["x"], v, p["s"], p["s_next"])
        reference, _, _ = self.step(p["x"], p["v_reference"], p["s"], p["s_next"])
        ratio = (self.density(p["y"], at, std) - p["log_p"]).exp()
        surrogate = torch.maximum(-p["A"] * ratio, -p["A"] * ratio.clamp(1 - 1e-3, 1 + 1e-3))
        return surrogate + 0.04 * mean((at - reference) ** 2 / (2 * rate**2))


@pytest.mark.parametrize("method", [NFT, GRPO])
def test_a_run_is_the_one_by_hand(tiny: Callable[..., DictConfig], method: Any):
    cfg = tiny(*WORDS, *method.words)
    recipe = build_recipe(cfg)
    recipe.optimizer = SGD
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.fit(module)
    hand = method(cfg)
    start = hand.now()
    hand.run()
    ours = {"live": {name.partition(".")[2]: p for name, p in module.live.trained().items()}}
    for name, copy in module.live.copies.items():
        ours[name] = {key.replace("/", ".").partition(".")[2]: p for key, p in copy.items()}  # type: ignore[operator]
    theirs = {"live": hand.now(), **hand.copy}
    moved = distance(theirs["live"], start)
    assert moved > 0.02
    assert set(ours) == {"live", "reference", *method.copies}
    for name, values in ours.items():
        assert distance(values, theirs[name]) < 1e-3 * moved, name


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return math.sqrt(sum(float(((p.detach() - b[name]) ** 2).sum()) for name, p in a.items()))
