"""Which weights of a denoiser are trained: low-rank adapters, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import nn

from flowalign.checks.suggest import suggest
from flowalign.policy.adapters import load_adapters


class Tune(Protocol):
    """Prepares a denoiser in place, such that exactly the trained parameters require gradients."""

    kind: str

    def __call__(self, denoiser: nn.Module, targets: Sequence[str], name: str) -> None: ...


class Lora:
    """LoRA through peft on `targets` (None: the family's defaults). B starts at 0: the initial policy is the base."""

    kind = "lora"

    def __init__(
        self,
        rank: int = 32,
        alpha: float = 64,
        dropout: float = 0.0,
        init: Literal["gaussian", "kaiming"] = "gaussian",
        targets: Sequence[str] | None = None,
        seed: int = 0,
        start: str | None = None,
    ) -> None:
        """start: trained adapters to start from, as a file, folder or hub id; they are then the reference too."""
        if rank < 1:
            raise ValueError(f"tune.rank must be at least 1 (got {rank}).")
        if alpha <= 0:
            raise ValueError(f"tune.alpha scales what adapters add and must be positive (got {alpha}).")
        if dropout:
            # Rollout and training would drop different units and be two policies: the ratio would never be 1.
            raise ValueError(f"tune.dropout must be 0 for reinforcement learning (got {dropout}).")
        self.rank, self.alpha, self.init, self.targets, self.seed = rank, alpha, init, targets, seed
        self.start = start

    def __call__(self, denoiser: nn.Module, targets: Sequence[str], name: str) -> None:
        from peft import LoraConfig

        _check_targets(denoiser, self.targets or ())
        denoiser.requires_grad_(False)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
            target_modules=list(self.targets or targets),
        )
        with torch.random.fork_rng(devices=[]):  # adapters are made on the CPU
            torch.manual_seed(self.seed)  # the same initialisation on every rank, whatever was drawn before
            denoiser.add_adapter(config)  # type: ignore
        if self.start is not None:
            load_adapters(denoiser, self.start, name, self.rank, self.alpha)
        for parameter in denoiser.parameters():
            if parameter.requires_grad:  # adapters train in float32 even on a bfloat16 base
                parameter.data = parameter.data.float()


def _check_targets(denoiser: nn.Module, targets: Sequence[str]) -> None:
    """Raise ValueError for a target that is no module's name or the end of one; peft ignores it beside others."""
    modules = dict(denoiser.named_modules())
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in modules):
            linear = {_short(name) for name, module in modules.items() if isinstance(module, nn.Linear)}
            hint = suggest(_short(target), linear)
            raise ValueError(f"tune.targets: {type(denoiser).__name__} has no layer {target}; {hint}")


def _short(name: str) -> str:
    """The last part of a module's name, or the last two for one in a list: to_q, to_out.0."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdecimal() else parts[-1:])


class Full:
    """Full fine-tuning of a denoiser in float32. Raises ValueError for weights of another dtype."""

    kind = "full"

    def __call__(self, denoiser: nn.Module, targets: Sequence[str], name: str) -> None:
        del targets, name
        if {p.dtype for p in denoiser.parameters()} != {torch.float32}:
            # A relative update of 1e-4 is below the resolution of bfloat16 and would be rounded away.
            raise ValueError(
                "tune=full trains float32 weights: set model.train_dtype=float32 (and trainer.precision=bf16-mixed for "
                "speed)."
            )
        denoiser.requires_grad_(True)
