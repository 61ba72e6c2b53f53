"""Frozen base weights in 8 or 4 bits under LoRA adapters: a half to a quarter of the memory of bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Kind = Literal["int8", "nf4"]
SUPERBLOCK = 64 * 256
"""Block size of the double quantisation of nf4; a weight whose size is no multiple of it is not quantised."""


def is_quantised(t: Tensor) -> bool:
    """Whether a weight, if not sharded, is stored as codes and scales."""
    return is_traceable_wrapper_subclass(t)


def inner_tensors(t: Tensor) -> list[Tensor]:
    """The plain tensors that store `t`: codes, then scales, if it is quantised."""
    if not is_traceable_wrapper_subclass(t):
        return [t]
    names, _ = t.__tensor_flatten__()
    return [inner for name in names for inner in inner_tensors(getattr(t, name))]


def weight_quantiser(kind: Kind) -> Callable[[Tensor], Tensor]:
    """The function that quantises a weight. Raises ValueError if torchao is not installed.

    int8: one scale per row. nf4: 16 levels of a normal distribution, one 8-bit scale per 64 values.
    """
    try:
        from torchao.quantization import Int8Tensor, PerRow, to_nf4
    except ImportError:
        raise ValueError(f"model.quantised={kind} needs the quant extra: pip install 'flowalign[quant]'.") from None

    def int8(weight: Tensor) -> Tensor:
        return Int8Tensor.from_hp(weight, PerRow())

    return {"int8": int8, "nf4": to_nf4}[kind]


def quantise(blocks: Iterable[nn.Module], kind: Kind, quantiser: Callable[[Tensor], Tensor]) -> None:
    """Quantise the linear layers of these blocks in place, one at a time, with the `weight_quantiser` of `kind`."""
    for block in blocks:
        for name, layer in list(block.named_modules()):
            if type(layer) is nn.Linear and (kind == "int8" or layer.weight.numel() % SUPERBLOCK == 0):
                block.set_submodule(name, QuantisedLinear(layer, quantiser))


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is dequantised for each matrix product and discarded after it."""

    def __init__(self, layer: nn.Linear, quantiser: Callable[[Tensor], Tensor]) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.detach().contiguous()
        # Quantising on an accelerator is faster. The result stays on the device of the weight: the policy moves it.
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else weight.device
        self.weight = nn.Parameter(quantiser(weight.to(device)).to(weight.device), requires_grad=False)
        self.bias = layer.bias  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _QuantisedMatmul.apply(input, self.weight)  # type: ignore[assignment]
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _QuantisedMatmul(torch.autograd.Function):
    """x Wᵀ that saves the codes for the backward pass: autograd alone would save every dequantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        return gradient @ _dequantise(weight, gradient.dtype), None


def _dequantise(weight: Any, dtype: torch.dtype) -> Tensor:
    from torchao.quantization import Int8Tensor

    return weight.dequantize(dtype) if isinstance(weight, Int8Tensor) else weight.to(dtype)
