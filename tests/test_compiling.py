"""What the compiler is asked for: biases apart from products on a CPU, without another result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from flowalign.checks import ConfigError
from flowalign.compiling import COMPILE_OPTIONS, SplitBias
from flowalign.module import AlignModule
from flowalign.run import build_recipe, build_trainer, plan_accumulation
from flowalign.running import Running

if TYPE_CHECKING:
    from omegaconf import DictConfig

ADDMM = torch.ops.aten.addmm.default


def linear(bias: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(torch.addmm(bias, x, w)) + torch.addmm(bias, x + 1, w)


def twice(bias: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.addmm(bias, x, w, beta=2)


def operands(*bias: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in (bias, (4, 5), (5, 3)))  # type: ignore


def test_biases_are_added_apart_and_the_result_is_the_same():
    traced = make_fx(linear, tracing_mode="fake")(*operands(3))
    assert len(traced.graph.find_nodes(op="call_function", target=ADDMM)) == 2
    SplitBias()(traced.graph)
    traced.recompile()
    assert not traced.graph.find_nodes(op="call_function", target=ADDMM)
    assert all("val" in node.meta for node in traced.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(traced(*operands(3)), linear(*operands(3)))


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (torch.addmm, operands(3, dtype=torch.bfloat16)),  # the product would be rounded
        (torch.addmm, operands(4, 3)),  # a sum of two results, which a library does in place
        (twice, operands(3)),
        (torch.addmm, tuple(t.to("meta") for t in operands(3))),  # another device
    ],
    ids=["bfloat16", "matrix", "scaled", "device"],
)
def test_what_is_no_bias_in_float32_on_a_cpu_stays(function, given: tuple[Tensor, ...]):
    traced = make_fx(function, tracing_mode="fake")(*given)
    before = str(traced.graph)
    SplitBias()(traced.graph)
    assert str(traced.graph) == before


def test_without_a_compiler_a_run_is_refused_before_its_first_batch(tiny: Callable[..., DictConfig]):
    from torch._inductor import config

    cfg = tiny("running.compile=true")
    recipe = build_recipe(cfg)
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match="install g.. or clang, .* or use running.compile=false"),
    ):
        trainer.fit(module)


def test_a_device_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowalign.compiling.has_triton", lambda: False)
    Running().check(torch.device("cuda"), torch.float32)
    with pytest.raises(ValueError, match="needs Triton on a GPU"):
        Running(compile=True).check(torch.device("cuda"), torch.float32)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_compiled_product_begins_with_a_copy_of_a_bias():
    """In the code that is made of forward and backward, which give what the layers give by themselves."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 64), nn.GELU("tanh"), nn.Linear(64, 16), nn.LayerNorm(16))
    x = torch.randn(32, 16)

    def step(call) -> list[Tensor]:
        result = call(x)
        return [result, *torch.autograd.grad(result.square().sum(), list(layers.parameters()))]

    torch._dynamo.reset()
    with config.patch(force_disable_caches=True):
        found, code = run_and_get_code(step, torch.compile(layers, options=COMPILE_OPTIONS))
    assert "extern_kernels.mm(" in code[0]
    assert not any("addmm(" in text for text in code)
    torch.testing.assert_close(found, step(layers), rtol=1e-4, atol=1e-4)
