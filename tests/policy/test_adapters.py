"""Trained adapters that do not match the settings are refused, naming what to set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from flowalign.models.sd3 import SD3
from flowalign.policy import Lora


@pytest.fixture
def saved(sd3_folder: Path, tmp_path: Path) -> Path:
    """Adapters of rank 4 and alpha 8 on to_q."""
    model = SD3(str(sd3_folder))
    Lora(rank=4, alpha=8, targets=["attn.to_q"])(model.pipe.transformer, (), "transformer")
    model.save_lora(tmp_path / "lora")
    return tmp_path / "lora"


def start(sd3_folder: Path, start: Path | str, **settings: Any) -> None:
    own = {"rank": 4, "alpha": 8, "targets": ["attn.to_q"]} | settings
    Lora(start=str(start), **own)(SD3(str(sd3_folder)).pipe.transformer, (), "transformer")


def test_a_folder_or_its_file_will_do(sd3_folder: Path, saved: Path):
    start(sd3_folder, saved)
    start(sd3_folder, next(saved.glob("*.safetensors")))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 8}, "have rank 4 and alpha 8: set tune.rank and tune.alpha to that"),
        ({"alpha": 4}, "have rank 4 and alpha 8: set tune.rank and tune.alpha to that"),
        ({"targets": ["attn.to_q", "attn.to_k"]}, r"has none at .*attn.to_k: set tune.targets"),
        ({"targets": ["attn.to_k"]}, r"set tune.targets to the modules that it adapts"),
    ],
)
def test_other_adapters_are_refused(sd3_folder: Path, saved: Path, settings: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        start(sd3_folder, saved, **settings)


def test_without_a_header_alpha_is_the_rank(sd3_folder: Path, saved: Path):
    file = next(saved.glob("*.safetensors"))
    save_file(load_file(file), file)
    start(sd3_folder, saved, alpha=4)
    with pytest.raises(ValueError, match="have rank 4 and alpha 4"):
        start(sd3_folder, saved)


def test_what_is_not_there_is_told(sd3_folder: Path, tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for where, sentence in (
        ("nowhere", "neither a file, nor a folder, nor a hub id"),
        ("nobody/nothing", "tune.start=nobody/nothing is not in the local cache, and the hub did not give it"),
        (str(tmp_path), "holds 0 safetensors files instead of one"),
    ):
        with pytest.raises(ValueError, match=sentence):
            start(sd3_folder, where)
