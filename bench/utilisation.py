"""Model FLOP utilisation: the FLOPs that training requires, relative to what the device could do in that time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Vendors' dense bfloat16 FLOP/s with float32 accumulation, by a substring of the device name."""


def peak_of(device: str, precision: str) -> float | None:
    """Peak FLOP/s of a device; None if it is not in the table, or if the run does not multiply in 16 bits."""
    if not precision.startswith(("bf16", "16")):
        return None
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def mfu(flops_a_point: float | None, points: int, seconds: float, peak: float | None) -> float | None:
    """Share of the peak, in [0, 1]; None if FLOPs or peak are unknown."""
    if flops_a_point is None or peak is None:
        return None
    return flops_a_point * points / (seconds * peak)


def flops_a_point(module: Any) -> float | None:
    """FLOPs of the forward and backward pass of one training point of the last epoch, guidance included, as counted.

    Recomputation by gradient checkpointing is not counted. None with an attention backend of another package, whose
    FLOPs cannot be counted; diffusers calls PyTorch's own backends native.
    """
    import torch

    r = module.recipe
    if not r.running.native:
        return None
    parameters = list(module.live.trained().values())
    point, cond = module.buffer.gather(torch.zeros(1, dtype=torch.long))

    def forward() -> Any:
        with module._precision():
            return module._velocity(point.x, point.sigma, cond)

    def both() -> None:
        torch.autograd.grad(forward().float().square().mean(), parameters, allow_unused=True)

    with torch.compiler.set_stance("force_eager"), _countable(module.device):
        total = _counted(both)
        if not r.running.gradient_checkpointing:
            return total
        with torch.no_grad():
            return total - _counted(forward)


def _countable(device: Any) -> Any:
    """Select an attention backend whose FLOPs can be counted, which PyTorch's default on CPUs is not."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _counted(call: Callable[[], object]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())
