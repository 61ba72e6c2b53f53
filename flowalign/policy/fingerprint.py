"""Fingerprint of the base weights: adapters and checkpoints are valid only for the base they were trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from flowalign.models.quantised import inner_tensors

SAMPLED = 1024
"""Values hashed per parameter: many thousands in all, so that another training run of the same network differs."""


def weights_fingerprint(denoisers: Mapping[str, nn.Module]) -> str:
    """32 hex digits from the names, shapes and evenly spaced values of untrained networks; "" for meta parameters.

    Values are hashed in bfloat16, so that the same weights in another dtype are the same base. A quantised base is a
    different one, and only its codes are hashed: scales come from means, whose rounding differs between processors.
    """
    digest = hashlib.sha256()
    for name, denoiser in denoisers.items():
        for key, p in denoiser.named_parameters():
            if p.is_meta:
                return ""
            flat = inner_tensors(p.detach())[0].flatten()
            values = flat[:: max(len(flat) // SAMPLED, 1)][:SAMPLED].to("cpu", torch.bfloat16).contiguous()
            digest.update(f"{name} {key} {tuple(p.shape)} ".encode())
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
