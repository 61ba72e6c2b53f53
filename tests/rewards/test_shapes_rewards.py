import numpy as np
import pytest
import torch

from flowalign.rewards.base import Reward, RewardError
from flowalign.rewards.shapes import Quality, Shapes, Strict
from flowalign.shapes.quality import quality
from flowalign.shapes.render import picture
from flowalign.shapes.verify import verify
from flowalign.shapes.world import specs

SCENES = [specs("two")[100], specs("two")[200], specs("position")[300]]
PROMPTS = [spec.captions()[0] for spec in SCENES]
METADATA = [spec.metadata() for spec in SCENES]
REWARDS: list[Reward] = [Shapes(), Strict(), Quality()]


@pytest.fixture
def media() -> torch.Tensor:
    return torch.from_numpy(np.stack([picture(spec, i) for i, spec in enumerate(SCENES)])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("reward", REWARDS)
def test_one_float32_per_sample(reward, media):
    scores = reward(media, PROMPTS, METADATA)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert ((scores >= 0) & (scores <= 1)).all()


def test_true_pictures_earn_everything_and_exchanged_ones_do_not(media):
    assert Shapes()(media, PROMPTS, METADATA).tolist() == [1, 1, 1]
    assert Strict()(media.roll(1, 0), PROMPTS, METADATA).tolist() == [0, 0, 0]


def test_scores_are_those_of_the_plain_functions(media):
    image = media[1].permute(1, 2, 0).numpy()
    strict, partial = verify(image, SCENES[0])
    assert torch.isclose(
        Shapes(0.25)(media[1:2], PROMPTS[:1], METADATA[:1]), torch.tensor(0.25 * strict + 0.75 * partial)
    )
    assert torch.isclose(Quality()(media[1:2], PROMPTS[:1], METADATA[:1]), torch.tensor(quality(image, "two")))


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_picture_is_nan_and_leaves_the_others_alone(reward, bad, media):
    expected = reward(media, PROMPTS, METADATA)
    media[1, 0, 3, 5] = bad
    scores = reward(media, PROMPTS, METADATA)
    assert scores[1].isnan()
    assert scores[[0, 2]].equal(expected[[0, 2]])


def test_a_video_scores_the_mean_of_its_frames(media):
    video = torch.stack([media[0], media[1]])[None]
    assert Strict()(video, PROMPTS[:1], METADATA[:1]).tolist() == [0.5]


def test_half_precision_and_rounding_are_accepted(media):
    assert Strict()(media.bfloat16(), PROMPTS, METADATA).tolist() == [1, 1, 1]
    assert Strict()(media * 1.0005, PROMPTS, METADATA).tolist() == [1, 1, 1]


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 64, 64, 3), (2, 1, 64, 64), (1, 2, 4, 3, 64, 64)])
def test_media_of_another_layout_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        Strict()(torch.zeros(shape), PROMPTS[: shape[0]], METADATA[: shape[0]])


def test_media_of_another_range_are_refused(media):
    for wrong in (2 * media - 1, 255 * media):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            Strict()(wrong, PROMPTS, METADATA)


def test_a_different_number_of_prompts_or_metadata_is_refused(media):
    for prompts, metadata in ((PROMPTS[:2], METADATA), (PROMPTS, METADATA[:2])):
        with pytest.raises(ValueError, match="one each"):
            Strict()(media, prompts, metadata)


def test_prompts_of_ones_own_are_told_to_want_another_reward(media):
    with pytest.raises(RewardError, match=r"shapes reward needs .* got \{\}; prompts of your own need another reward"):
        Shapes()(media, PROMPTS, [{}, *METADATA[1:]])
    with pytest.raises(RewardError, match=r"prompts of your own need another reward"):
        Shapes().check_prompt(PROMPTS[0], {})
    Shapes().check_prompt(PROMPTS[0], METADATA[0])


def test_a_weight_outside_zero_and_one_is_refused():
    with pytest.raises(ValueError, match="strict_weight"):
        Shapes(1.5)
