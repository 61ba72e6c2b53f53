"""Compressibility as a reward."""

from __future__ import annotations

import pytest
import torch

from flowalign.rewards.jpeg import Jpeg

NOISE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
PLAIN = torch.full((3, 32, 32), 0.5)


def score(media: torch.Tensor, **settings: bool) -> list[float]:
    return Jpeg(**settings)(media, [""] * len(media), [{}] * len(media)).tolist()


def test_a_plain_picture_compresses_better_than_noise():
    plain, noise = score(torch.stack([PLAIN, NOISE]))
    assert noise < plain < 0
    assert score(torch.stack([PLAIN, NOISE]), incompressible=True) == [-plain, -noise]


def test_a_video_scores_its_mean_frame():
    plain, noise = score(torch.stack([PLAIN, NOISE]))
    assert score(torch.stack([PLAIN, NOISE])[None])[0] == pytest.approx((plain + noise) / 2)


def test_what_is_not_finite_cannot_be_scored():
    broken = NOISE.clone()
    broken[0, 0, 0] = torch.nan
    assert torch.tensor(score(torch.stack([broken, PLAIN]))).isnan().tolist() == [True, False]


def test_a_quality_that_no_jpeg_has_is_refused():
    with pytest.raises(ValueError, match="1 to 95"):
        Jpeg(quality=100)
