"""What decoding takes of the device's memory at its peak."""

from __future__ import annotations

import torch

from flowalign.alive import Alive, faked
from flowalign.models.base import FlowModel
from flowalign.models.quantised import is_quantised


def of_decoding(model: FlowModel, shape: tuple[int, ...], rows: int, device: torch.device) -> int | None:
    """Bytes beside the VAE and latents of this shape, a row each; None where it cannot be told without decoding.

    Tiling and slicing are the VAE's own, and so have their effect. The workspace of a convolution is not in it.
    """
    if not rows or any(map(is_quantised, model.pipe.vae.parameters())):
        return 0 if not rows else None
    try:
        with faked([model.pipe.vae]) as weights:
            x = torch.empty(rows, *shape, device=device)
            with Alive([*weights, x]) as alive:
                model.decode(x)
    except Exception:  # control flow that depends on values, or an operation that fake tensors do not know
        return None
    return alive.peak
