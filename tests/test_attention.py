"""Attention under autocast on a CPU is that of float32."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowalign.attention import use_float32_attention_on_cpu

use_float32_attention_on_cpu()


def inputs(dtype: torch.dtype, number: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 7, 16, generator=generator).to(dtype).requires_grad_() for _ in range(number)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_it_and_its_gradient_are_those_of_float32(dtype: torch.dtype, mask: str):
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()
    given = {"none": None, "bool": allowed, "added": torch.where(allowed, 0.0, -1e4).to(dtype)}[mask]
    own, wide = inputs(dtype), inputs(torch.float32)
    for narrow, exact in zip(own, wide, strict=True):
        exact.data.copy_(narrow)
    with torch.autocast("cpu", torch.bfloat16):
        got = scaled_dot_product_attention(*own, attn_mask=given, scale=0.3)
    same = given.float() if mask == "added" else given
    expected = scaled_dot_product_attention(*wide, attn_mask=same, scale=0.3)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    for result in (got, expected):
        result.square().sum().backward()
    for narrow, exact in zip(own, wide, strict=True):
        assert torch.equal(narrow.grad, exact.grad.to(dtype))


def test_without_autocast_it_keeps_the_type_of_its_inputs():
    assert scaled_dot_product_attention(*inputs(torch.bfloat16)).dtype == torch.bfloat16


def test_asking_twice_leaves_one_rule():
    assert use_float32_attention_on_cpu() is use_float32_attention_on_cpu()


@pytest.mark.slow
def test_compiled_code_has_the_same_rule():
    def attended(*qkv: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return scaled_dot_product_attention(*qkv)

    assert torch.equal(torch.compile(attended)(*inputs(torch.bfloat16)), attended(*inputs(torch.bfloat16)))
