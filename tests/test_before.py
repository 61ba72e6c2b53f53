"""The images from before training, which a resumed run takes over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowalign.before import INDEX, load_shown, save_shown
from flowalign.evaluation import Shown


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_shown(Shown(torch.full((2, 3, 8, 8), 0.2), ["a", "b"], {"reward": torch.tensor([1.0, 2.0])}), tmp_path)
    return tmp_path


def test_what_is_saved_is_loaded(saved: Path):
    shown = load_shown(saved)
    assert shown is not None
    assert shown.prompts == ["a", "b"]
    assert torch.allclose(shown.images, torch.tensor(0.2))
    assert shown.scores["reward"].tolist() == [1, 2]


@pytest.mark.parametrize("file", [INDEX, "01.png"])
@pytest.mark.parametrize("content", ["", "{}"])
def test_damaged_pictures_keep_no_run_from_resuming(
    saved: Path, file: str, content: str, caplog: pytest.LogCaptureFixture
):
    """A full disk leaves empty files."""
    (saved / file).write_text(content)
    assert load_shown(saved) is None
    assert "cannot be read" in caplog.text
    (saved / INDEX).unlink()
    assert load_shown(saved) is None
