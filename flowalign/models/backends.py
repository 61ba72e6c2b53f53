"""Attention backends of diffusers: whether one can be used here, and how the layers of a denoiser come to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
"""The backends that are kernels of PyTorch."""


def backends() -> list[str]:
    """The names of all backends, installed or not."""
    return [backend.value for backend in AttentionBackendName]


def check_installed(name: str) -> None:
    """Raise ValueError if the package of this backend is not installed."""
    try:
        with attention_backend(name):
            pass
    except Exception as error:  # kernels are downloaded from a hub, which fails in many ways
        raise ValueError(f"running.attention={name} cannot be used: {error}") from error


def check_kernel(name: str, owner: str) -> None:
    """Raise ValueError unless this backend is a kernel of PyTorch, for an owner whose layers call PyTorch directly."""
    if name not in ("native", *KERNELS):
        raise ValueError(
            f"running.attention={name}: in diffusers the layers of {owner} call PyTorch's attention, whatever backend "
            f"is set, and only its kernel can be chosen: use null, or {', '.join(KERNELS)}."
        )


def set_backend(denoiser: nn.Module, name: str) -> None:
    """Let the layers of a denoiser attend with this backend. Raises ValueError if they cannot.

    In some families they do not ask diffusers for it: they call PyTorch's attention, of which a kernel can be chosen.
    """
    layers = [module for module in denoiser.modules() if isinstance(module, (Attention, AttentionModuleMixin))]
    if any(hasattr(layer.processor, "_attention_backend") for layer in layers):
        with attention_backend("native"):  # otherwise it would become the default of later runs in this process too
            denoiser.set_attention_backend(name)  # type: ignore[operator]
        return
    check_kernel(name, type(denoiser).__name__)
    for layer in layers if name in KERNELS else ():
        layer.forward = _with_kernel(layer.forward, KERNELS[name])


def _with_kernel(forward: Callable[..., Any], kernel: SDPBackend) -> Callable[..., Any]:
    # Around the layer, not around the network: checkpointed blocks are computed again within the backward pass.
    def attend(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(kernel):
            return forward(*args, **kwargs)

    return attend


def check_gradient(name: str, device: torch.device, dtype: torch.dtype, setting: str) -> None:
    """Raise ValueError, naming the setting, if this backend does not run on this device, or has no backward pass.

    Kernels for inference, such as SageAttention's, return tensors without history: a training would then go on, with
    wrong gradients.
    """
    q, k, v = (torch.ones(1, 128, 2, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        with attention_backend(name), torch.enable_grad():
            out = dispatch_attention_fn(q, k, v)
            if out.requires_grad:
                out.sum().backward()
    except Exception as error:  # whatever another package raises
        raise ValueError(f"{setting}={name} does not work in {dtype} on {device.type}: {error}") from error
    if any(tensor.grad is None for tensor in (q, k, v)):
        raise ValueError(
            f"{setting}={name} has no backward pass, so that gradients would be wrong: leave it out, or choose a "
            "backend for training such as flash."
        )
