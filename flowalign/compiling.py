"""Options of torch.compile for the denoisers' blocks. Importing this file imports the compiler and takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.utils._triton import has_triton

aten = torch.ops.aten


class SplitBias(CustomGraphPass):
    """Splits addmm(bias, x, w) into mm(x, w) + bias, so that the sum is fused into the kernel that reads it.

    Only for float32 on a CPU, whose addmm first copies the bias to every row. On a GPU the compiler does this itself;
    in bfloat16 the product would be rounded before the sum.
    """

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            if _can_split(node):
                _split(graph, node)

    def uuid(self) -> bytes:
        """Key of this pass in the compiler's cache, which changes with this file."""
        return get_hash_for_files((__file__,))


def _can_split(node: Node) -> bool:
    bias, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return bias.ndim == 1 and not node.kwargs and result.device.type == "cpu" and result.dtype == torch.float32


def _split(graph: Graph, node: Node) -> None:
    bias, x, w = node.args
    with graph.inserting_before(node):
        product = graph.call_function(aten.mm.default, (x, w))
        total = graph.call_function(aten.add.Tensor, (product, bias))
    product.meta, total.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def check_compiler(device: torch.device) -> None:
    """Raise ValueError if blocks cannot be compiled on this device, which PyTorch would report at the first batch."""
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


COMPILE_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp.use_decompose_tanh": True,
    # Before forward and backward are partitioned, so that products are saved rather than sums, and after the compiler's
    # own passes, which fuse the two again.
    "joint_custom_post_pass": SplitBias(),
    "post_grad_custom_post_pass": SplitBias(),
}
"""Options for torch.compile. On a CPU tanh is computed from one exp, with an error of a few ulps of 1: tanh is most of
the cost of GELU, which is a tenth of a pass."""
