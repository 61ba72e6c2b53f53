"""Peak memory of decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowalign.alive import PeakMemory, fake_tensors
from flowalign.models.base import FlowModel
from flowalign.models.quantised import is_quantised


class DecodingMemory(PeakMemory):
    """Also counts the copies inside convolutions: in 16 bits cuDNN computes in channels-last format, and copies inputs
    and outputs that have another."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.now + sum(t.nbytes for t in (args[0], out) if _is_copied(t)))
        return out


def _is_copied(t: Tensor) -> bool:
    channels_last = torch.channels_last if t.ndim == 4 else torch.channels_last_3d
    return (
        t.device.type == "cuda" and t.itemsize == 2 and t.ndim > 3 and not t.is_contiguous(memory_format=channels_last)
    )


def decoding_bytes(model: FlowModel, shape: tuple[int, ...], rows: int, device: torch.device) -> int | None:
    """Peak bytes of decoding `rows` latents of this shape, without the VAE and the latents; None if fake tensors fail.

    Tiling and slicing count as they are set on the VAE.
    """
    if any(map(is_quantised, model.pipe.vae.parameters())):
        return None
    try:
        with fake_tensors([model.pipe.vae]) as weights:
            x = torch.empty(rows, *shape, device=device)
            with DecodingMemory([*weights, x]) as memory:
                model.decode(x)
    except Exception:  # value-dependent control flow, or an operation without a fake implementation
        return None
    return memory.peak
