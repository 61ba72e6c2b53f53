"""Attention under autocast on a CPU."""

import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowalign.flow import at_least_float32


@cache
def use_float32_on_cpu() -> torch.library.Library:
    """From now on attention under autocast on a CPU is that of float32, whatever the type of its inputs.

    PyTorch would take 16 bits there, whose backward pass takes five times as long as that of float32 and more than all
    the rest of a block. Other devices keep their own rule. The library that is returned holds the rule; once a process.
    """
    rules = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        rules.impl("scaled_dot_product_attention", _in_float32, "AutocastCPU")
    return rules


def _in_float32(
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
