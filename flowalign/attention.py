"""Attention under CPU autocast."""

import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowalign.flow import at_least_float32


@cache
def use_float32_attention_on_cpu() -> torch.library.Library:
    """From now on, compute attention under CPU autocast in float32, whatever the dtype of its inputs.

    PyTorch's default there is 16 bits, whose backward pass takes five times as long as in float32, and longer than the
    rest of a block. Other devices are not affected. The returned library holds the override; one per process.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        library.impl("scaled_dot_product_attention", _float32_attention, "AutocastCPU")
    return library


def _float32_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    query, key, value = (at_least_float32(t) for t in (query, key, value))
    mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else at_least_float32(attn_mask)
    with torch.autocast("cpu", enabled=False):
        return scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
