"""What only the video families do; that they are their pipelines is in test_families.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from flowalign.models.wan import Wan
from tests.models.tiny import wan2_1


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan2_1")
    wan2_1.build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wan(wan_folder: Path) -> Wan:
    return Wan(str(wan_folder), max_sequence_length=16)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((32, 48, None), "set resolution.*.frames"),
        ((32, 48, 8), "the nearest is 9"),
        ((32, 48, 0), "the nearest is 1"),
        ((32, 40, 9), "the nearest is 32×32"),
    ],
)
def test_impossible_sizes_are_refused_with_the_nearest(wan: Wan, size: tuple[int, int, int | None], words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        wan.check_size(*size)


def test_possible_sizes_pass(wan: Wan):
    for frames in (1, 5, 33, 81):
        wan.check_size(480, 832, frames)


def test_a_multistep_scheduler_gives_its_noise_levels(wan_folder: Path):
    from diffusers import UniPCMultistepScheduler

    wan = Wan(str(wan_folder))
    shipped = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    wan.pipe.scheduler = shipped
    shipped.set_timesteps(10)
    # UniPC spaces from 1 towards 0.001 instead of 0.
    torch.testing.assert_close(wan.sigmas(10, 32, 48, 9), shipped.sigmas, atol=3e-3, rtol=0)
    assert wan.shift(32, 48, 9) == 3.0


def test_latents_of_a_video_have_the_shape_and_scale_of_noise(wan: Wan):
    video = torch.rand(2, 9, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    z = wan.encode_images(video)
    assert z.shape == (2, *wan.latent_shape(32, 48, 9))
    torch.testing.assert_close(wan.normalised(wan.denormalised(z)), z)
    assert wan.decode(z).shape == video.shape
