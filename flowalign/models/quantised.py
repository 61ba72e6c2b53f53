"""Frozen weights in 8 or 4 bits under adapters: a quarter to a half of what bfloat16 takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Kind = Literal["int8", "nf4"]
SUPERBLOCK = 64 * 256
"""Values that share a scale of scales in nf4; a weight of another multiple stays as it is."""


def is_quantised(t: Tensor) -> bool:
    """Whether a weight that is whole on this rank consists of codes and scales."""
    return is_traceable_wrapper_subclass(t)


def pieces(t: Tensor) -> list[Tensor]:
    """The plain tensors that hold it: of a quantised one its codes, then its scales."""
    if not is_traceable_wrapper_subclass(t):
        return [t]
    names, _ = t.__tensor_flatten__()
    return [piece for name in names for piece in pieces(getattr(t, name))]


def packing(kind: Kind) -> Callable[[Tensor], Tensor]:
    """What makes a quantised weight of a whole one. Raises ValueError where its library is absent.

    int8: a scale a row. nf4: 16 levels of a normal distribution, a scale in 8 bits for 64 values.
    """
    try:
        from torchao.quantization import Int8Tensor, PerRow, to_nf4
    except ImportError:
        raise ValueError(f"model.quantised={kind} needs the quant extra: pip install 'flowalign[quant]'.") from None

    def int8(weight: Tensor) -> Tensor:
        return Int8Tensor.from_hp(weight, PerRow())

    return {"int8": int8, "nf4": to_nf4}[kind]


def quantise(blocks: Iterable[nn.Module], kind: Kind, pack: Callable[[Tensor], Tensor]) -> None:
    """Quantises the linear weights of these blocks in place, one after another; pack: that of `kind`."""
    for block in blocks:
        for name, layer in list(block.named_modules()):
            if type(layer) is nn.Linear and (kind == "int8" or layer.weight.numel() % SUPERBLOCK == 0):
                block.set_submodule(name, QuantisedLinear(layer, pack))


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is made whole for one product at a time."""

    def __init__(self, layer: nn.Linear, pack: Callable[[Tensor], Tensor]) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.detach().contiguous()
        # One at a time through an accelerator, which is quicker; where the codes live is for the policy to say.
        there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else weight.device
        self.weight = nn.Parameter(pack(weight.to(there)).to(weight.device), requires_grad=False)
        self.bias = layer.bias  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input, self.weight)  # type: ignore[assignment]
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ that keeps the codes for its backward pass: left to autograd, every layer would keep its whole weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        return gradient @ _whole(weight, gradient.dtype), None


def _whole(weight: Any, dtype: torch.dtype) -> Tensor:
    from torchao.quantization import Int8Tensor

    return weight.dequantize(dtype) if isinstance(weight, Int8Tensor) else weight.to(dtype)
