"""What blocks ask of PyTorch's compiler. It is imported with this file, which takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.utils._triton import has_triton

aten = torch.ops.aten


class BiasesApart(CustomGraphPass):
    """addmm(bias, x, w) becomes mm(x, w) + bias, and the sum a part of the kernel that reads it.

    In float32 on a CPU only: the library's addmm begins with a copy of the bias to every row. On a GPU the compiler
    does so itself; in bfloat16 the product would be rounded before the sum.
    """

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            if _has_a_bias_to_part(node):
                _part(graph, node)

    def uuid(self) -> bytes:
        """For the compiler's cache: other code, other blocks."""
        return get_hash_for_files((__file__,))


def _has_a_bias_to_part(node: Node) -> bool:
    bias, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return bias.ndim == 1 and not node.kwargs and result.device.type == "cpu" and result.dtype == torch.float32


def _part(graph: Graph, node: Node) -> None:
    bias, x, w = node.args
    with graph.inserting_before(node):
        product = graph.call_function(aten.mm.default, (x, w))
        total = graph.call_function(aten.add.Tensor, (product, bias))
    product.meta, total.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def check_compiler(device: torch.device) -> None:
    """Raises ValueError where blocks could not be compiled, which PyTorch would say at the first batch."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ValueError(
                "running.compile=true needs a C++ compiler where the CPU computes, and none was found: install g++ or "
                "clang, or name one in the environment as CXX, or use running.compile=false."
            ) from error
    elif device.type == "cuda" and not has_triton():
        raise ValueError(
            "running.compile=true needs Triton on a GPU, and it is not there or does not know this one: install the "
            "package triton, or use running.compile=false."
        )


COMPILED: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp.use_decompose_tanh": True,
    # Before forward and backward are parted, so that products are kept rather than sums, and after the compiler's own
    # passes, which join the two again.
    "joint_custom_post_pass": BiasesApart(),
    "post_grad_custom_post_pass": BiasesApart(),
}
"""Options. On a CPU tanh comes of one exp, a few ulps of 1 off: most of what GELU costs, which is a tenth."""
