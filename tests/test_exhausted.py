import pytest
import torch

from flowalign.exhausted import REMEDIES, NoMemoryError, explain_oom


@pytest.mark.parametrize("phase", REMEDIES)
def test_a_refused_allocation_names_the_phase_and_what_helps(phase: str):
    says = rf"phase '{phase}' \(.*you tried to allocate.*most first: "
    with pytest.raises(NoMemoryError, match=says) as told, explain_oom(phase):
        torch.empty(2**60, dtype=torch.uint8)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError()]
)
def test_accelerators_and_python_run_out_of_memory_too(error: Exception):
    @explain_oom("rollout")
    def roll() -> None:
        raise error

    with pytest.raises(NoMemoryError, match=r"phase 'rollout' .*a smaller rollout\.batch_size"):
        roll()


def test_the_innermost_phase_is_named():
    with pytest.raises(NoMemoryError, match="phase 'encode'"), explain_oom("rollout"), explain_oom("encode"):
        raise MemoryError


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="^a bug$"), explain_oom("rollout"):
        raise RuntimeError("a bug")


def test_the_settings_that_help_exist():
    """A remedy that names a setting that was renamed would be worse than none."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from tests.conftest import ROOT

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train")
    words = {word.strip(",").partition("=")[0] for text in REMEDIES.values() for word in text.split() if "." in word}
    assert words
    assert not [word for word in words if OmegaConf.select(cfg, word, throw_on_missing=True) is None]
