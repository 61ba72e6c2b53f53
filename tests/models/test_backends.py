"""An attention backend that is not there, does nothing or cannot train is refused."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowalign.checks import ConfigError
from flowalign.models.backends import check_gradient
from flowalign.module import AlignModule
from flowalign.run import build_recipe, build_trainer, compose_config, plan_accumulation
from flowalign.running import Running

CPU = torch.device("cpu")


def test_a_backend_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"attention=flsh is no attention backend of diffusers; did you mean flash"):
        compose_config("running.attention=flsh")


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="the package is there")
def test_a_backend_whose_package_is_missing_is_refused_before_the_model_is_loaded():
    with pytest.raises(ConfigError, match=r"attention=flash cannot be used: .*flash-attn"):
        compose_config("model=flux1_dev", "tune=lora", "running.attention=flash")


def test_a_backend_that_the_layers_would_ignore_is_refused():
    with pytest.raises(ConfigError, match=r"attention=flex: in diffusers the layers of SD3 call .*_native_flash"):
        compose_config("model=sd3_5_medium", "tune=lora", "running.attention=flex")


@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_backends_for_training_pass(name: str):
    check_gradient(name, CPU, torch.float32, "running.attention")


def test_a_backend_without_a_backward_pass_is_refused(monkeypatch: pytest.MonkeyPatch):
    def for_inference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query.detach(), key.detach(), value.detach())

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.FLEX, for_inference)
    monkeypatch.setitem(
        _AttentionBackendRegistry._supported_arg_names, AttentionBackendName.FLEX, {"query", "key", "value"}
    )
    with pytest.raises(ValueError, match=r"running.attention=flex has no backward pass"):
        Running(attention="flex").check(CPU, torch.float32)
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "flex")
    with pytest.raises(ValueError, match=r"DIFFUSERS_ATTN_BACKEND=flex has no backward pass"):
        Running().check(CPU, torch.float32)


def test_a_backend_that_does_not_run_on_this_device_is_refused():
    with pytest.raises(ValueError, match=r"attention=_native_cudnn does not work in torch.float32 on cpu: .*"):
        check_gradient("_native_cudnn", CPU, torch.float32, "running.attention")


def test_a_run_with_another_kernel_trains_and_leaves_the_default_of_the_process(tiny: Callable[..., DictConfig]):
    before = _AttentionBackendRegistry.get_active_backend()
    cfg = tiny("running.attention=_native_math")
    recipe = build_recipe(cfg)
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.fit(module)
    assert trainer.logged_metrics["train/grad_norm"] > 0
    assert _AttentionBackendRegistry.get_active_backend() == before
