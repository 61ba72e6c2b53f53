"""What decoding takes of the device's memory at its peak."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowalign.alive import Alive, faked
from flowalign.models.base import FlowModel
from flowalign.models.quantised import is_quantised


class Decoding(Alive):
    """Counts copies inside of convolutions, too: cuDNN computes in 16 bits with channels last, and copies what comes
    and goes otherwise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.now + sum(t.nbytes for t in (args[0], made) if _is_copied(t)))
        return made


def _is_copied(t: Tensor) -> bool:
    last = torch.channels_last if t.ndim == 4 else torch.channels_last_3d
    return t.device.type == "cuda" and t.itemsize == 2 and t.ndim > 3 and not t.is_contiguous(memory_format=last)


def of_decoding(model: FlowModel, shape: tuple[int, ...], rows: int, device: torch.device) -> int | None:
    """Bytes beside the VAE and latents of this shape, a row each; None where it cannot be told without decoding.

    Tiling and slicing are the VAE's own, and so have their effect.
    """
    if any(map(is_quantised, model.pipe.vae.parameters())):
        return None
    try:
        with faked([model.pipe.vae]) as weights:
            x = torch.empty(rows, *shape, device=device)
            with Decoding([*weights, x]) as alive:
                model.decode(x)
    except Exception:  # control flow that depends on values, or an operation that fake tensors do not know
        return None
    return alive.peak
