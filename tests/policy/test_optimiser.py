"""Optimisers of other packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowalign.policy.optimiser import check_state, state_share

CPU = torch.device("cpu")


class Coded(Tensor):
    """A state of a class of its own, as torchao's in 8 bits."""


class Heavy(torch.optim.Optimizer):
    """Gradient descent with momentum, kept as `kept` makes it."""

    def __init__(self, params: Sequence[nn.Parameter], lr: float, kept: Callable[[Tensor], Any] = Tensor.clone) -> None:
        super().__init__(params, {"lr": lr})
        self.kept = kept

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        del closure
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = {"codes": self.kept(p.grad)}


def test_a_state_in_tensors_of_another_class_is_refused():
    with pytest.raises(ValueError, match=r"Heavy keeps its state in Coded, .* use torch.optim.AdamW"):
        check_state(partial(Heavy, lr=0.1, kept=lambda t: t.as_subclass(Coded)), CPU)


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (partial(Heavy, lr=0.1), 1),
        (partial(Heavy, lr=0.1, kept=lambda t: t.to(torch.int8)), 0.25),
        (partial(torch.optim.SGD, lr=0.1), 0),
        (partial(torch.optim.AdamW, lr=0.1, fused=True), 2),
        (partial(torch.optim.AdamW, lr=0.1, amsgrad=True), 3),
        (partial(torch.optim.LBFGS, lr=0.1), 0),
    ],
)
def test_plain_state_is_accepted_and_counted(make: Callable[..., Any], share: float):
    check_state(make, CPU)
    assert state_share(make, CPU) == share


def test_it_is_refused_before_training(tiny: Callable[..., Any], random_sd3: tuple[str, ...]):
    from flowalign.checks import ConfigError
    from flowalign.module import AlignModule
    from flowalign.run import build_recipe, build_trainer, plan_accumulation

    kept = "+optimizer.kept={_target_: tests.policy.test_optimiser.coding}"
    removed = [f"~optimizer.{key}" for key in ("betas", "weight_decay", "eps", "fused")]
    cfg = tiny(*random_sd3, "optimizer._target_=tests.policy.test_optimiser.Heavy", *removed, kept)
    recipe = build_recipe(cfg)
    trainer = build_trainer(cfg, plan_accumulation(cfg, recipe))
    with pytest.raises(ConfigError, match="keeps its state in Coded"):
        trainer.fit(AlignModule(recipe))


def coding() -> Callable[[Tensor], Tensor]:
    return lambda t: t.as_subclass(Coded)
