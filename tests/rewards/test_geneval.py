"""The whole reward on drawn pictures, with a detector that finds plain rectangles; and how networks are opened."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from flowalign.rewards.base import RewardError
from flowalign.rewards.geneval import Geneval
from flowalign.rewards.geneval_colours import ClipColours, HueColours, crop
from flowalign.rewards.geneval_detectors import BoxDetector, Segmenter, WordDetector
from flowalign.rewards.geneval_rules import COLOURS, Thing
from flowalign.run import instantiate

if TYPE_CHECKING:
    from omegaconf import DictConfig

INK = {
    "red": (0.9, 0.1, 0.1),
    "orange": (1.0, 0.55, 0.0),
    "yellow": (1.0, 0.9, 0.1),
    "green": (0.1, 0.6, 0.1),
    "blue": (0.1, 0.2, 0.9),
    "purple": (0.5, 0.1, 0.7),
    "pink": (1.0, 0.7, 0.8),
    "brown": (0.45, 0.25, 0.1),
    "black": (0.02, 0.02, 0.02),
    "white": (1.0, 1.0, 1.0),
}


class Rectangles:
    """What is not the grey ground is a thing: a bench if it is wide, a clock if it is not."""

    vocabulary = frozenset({"bench", "clock"})

    def __init__(self, masks: bool = True, fails: Callable[[Tensor], bool] = lambda pictures: False) -> None:
        self.masks, self.fails = masks, fails

    def detect(self, pictures: Tensor, names: Sequence[Sequence[str]]) -> list[list[Thing]]:
        assert len(pictures) == len(names)
        if self.fails(pictures):
            raise RuntimeError("the driver has gone")
        return [self._things(picture) for picture in pictures]

    def _things(self, picture: Tensor) -> list[Thing]:
        drawn = ((picture - 0.5).abs().amax(dim=0) > 0.05).numpy()
        labels, _ = ndimage.label(drawn)
        things = []
        for i, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            box = (columns.start, rows.start, columns.stop, rows.stop)
            name = "bench" if box[2] - box[0] > 1.5 * (box[3] - box[1]) else "clock"
            mask = torch.from_numpy(labels == i) if self.masks else None
            things.append(Thing(name, tuple(map(float, box)), 0.95, mask))  # type: ignore[arg-type]
        return things


def drawn(*things: tuple[str, str, int, int], size: int = 64) -> Tensor:
    """Things (class, colour, left, top) on grey: a bench is 16 × 8, a clock 8 × 8."""
    picture = torch.full((3, size, size), 0.5)
    for name, colour, left, top in things:
        picture[:, top : top + 8, left : left + (16 if name == "bench" else 8)] = torch.tensor(INK[colour])[
            :, None, None
        ]
    return picture


def entry(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def scored(reward: Geneval, pictures: Sequence[Tensor], metadata: dict[str, Any]) -> list[float]:
    number = len(pictures)
    return reward(torch.stack(list(pictures)), ["a photo"] * number, [metadata] * number).tolist()


@pytest.mark.parametrize("masks", [True, False])
def test_pictures_are_judged_from_pixels_to_score(masks: bool):
    red_bench, blue_clock, green_clock = ("bench", "red", 4, 4), ("clock", "blue", 40, 40), ("clock", "green", 40, 4)
    pair = {
        "tag": "color_attr",
        "include": [entry("bench", color="red"), entry("clock", color="blue")],
    }
    pictures = [drawn(red_bench, blue_clock), drawn(red_bench, green_clock), drawn(red_bench), drawn()]
    for measure, expected in (("partial", [1, 0.75, 0.5, 0]), ("correct", [1, 0, 0, 0]), ("exact", [1, 0, 0, 0])):
        assert scored(Geneval(Rectangles(masks), HueColours(), measure), pictures, pair) == expected  # type: ignore[arg-type]
    right = {"tag": "position", "include": [entry("clock"), entry("bench", position=["left of", 0])]}
    moved = drawn(("bench", "red", 44, 4), ("clock", "blue", 4, 4))
    assert scored(Geneval(Rectangles(masks), HueColours()), [drawn(red_bench, green_clock), moved], right) == [
        1,
        pytest.approx(2 / 3),
    ]


def test_counting_asks_for_more_confidence_than_the_detector_may_have():
    three = {"tag": "counting", "include": [entry("clock", 3)], "exclude": [entry("clock", 4)]}
    picture = drawn(*(("clock", "red", 14 * i, 4) for i in range(3)))
    assert scored(Geneval(Rectangles(), HueColours(), "correct"), [picture], three) == [1]
    assert scored(Geneval(Rectangles(), HueColours(), "correct", counting_threshold=0.96), [picture], three) == [0]


def test_a_picture_that_the_detector_fails_on_is_nan_and_its_neighbours_are_not(caplog: pytest.LogCaptureFixture):
    fails = Rectangles(fails=lambda pictures: bool((pictures[:, :, 0, 0] > 0.9).any()))
    broken = drawn(("clock", "white", 0, 0))
    with caplog.at_level(logging.WARNING):
        scores = scored(
            Geneval(fails, HueColours()), [drawn(("clock", "red", 20, 20)), broken], {"include": [entry("clock")]}
        )
    assert scores[0] == 1
    assert scores[1] != scores[1]
    assert "the driver has gone" in caplog.text


def test_colours_that_cannot_be_named_are_nan_not_wrong():
    def broken(picture: Tensor, things: Sequence[Thing]) -> list[str | None]:
        raise RuntimeError("out of memory")

    asked = {"include": [entry("clock", color="red")]}
    scores = scored(Geneval(Rectangles(), broken), [drawn(("clock", "red", 0, 0)), drawn()], asked)
    assert scores[0] != scores[0]
    assert scores[1] == 0  # no clock, no colour to name


def test_a_class_that_the_detector_has_never_learnt_is_refused_by_name():
    with pytest.raises(ValueError, match="does not know 'clocks'; did you mean clock"):
        scored(Geneval(Rectangles(), HueColours()), [drawn()], {"include": [entry("clocks")]})


def test_the_self_check_sees_a_broken_detector_and_colours_that_are_mixed_up():
    Geneval(Rectangles(), HueColours()).self_check()
    with pytest.raises(RewardError, match="the driver has gone"):
        Geneval(Rectangles(fails=lambda pictures: True), HueColours()).self_check()
    with pytest.raises(RewardError, match="patch is called pink"):
        Geneval(Rectangles(), lambda picture, things: ["pink"]).self_check()  # type: ignore[arg-type]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("masks", [True, False])
def test_hue_names_all_ten_colours_and_grey_is_none(colour: str, masks: bool):
    picture = drawn(("bench", colour, 10, 10))
    things = Rectangles(masks).detect(picture[None], [[]])[0]
    assert HueColours()(picture, things) == [colour]
    assert HueColours()(picture, [Thing("x", (40, 40, 50, 50), 1)]) == [None]


def test_a_crop_stays_inside_the_picture_and_greys_what_the_mask_leaves_out():
    picture = drawn(("clock", "red", 0, 0))
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:4, :4] = True
    part = crop(picture, Thing("clock", (-3, -3, 8, 8), 1, mask))
    assert part.shape == (3, 8, 8)
    assert (part[:, 4:, 4:] == 0.6).all()
    assert (part[0, :4, :4] == 0.9).all()
    assert crop(picture, Thing("clock", (63.9, 70, 90, 90), 1)).numel() > 0


# ------------------------------------------------------------ networks, tiny and random


def closed(folder: Path, kind: str) -> Path:
    import transformers

    labels: Any = {"id2label": {0: "dog", 1: "mouse", 2: "tv"}, "label2id": {"dog": 0, "mouse": 1, "tv": 2}}
    if kind == "mask2former":
        swin = transformers.SwinConfig(
            patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        config = transformers.Mask2FormerConfig(
            backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
            encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6, **labels,
        )  # fmt: skip
        model, processor = transformers.Mask2FormerForUniversalSegmentation(config), "Mask2FormerImageProcessorPil"
    else:
        resnet = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage4"]
        )
        config = transformers.DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=resnet, d_model=16,
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=7, **labels,
        )  # fmt: skip
        model, processor = transformers.DetrForObjectDetection(config), "DetrImageProcessorPil"
    model.save_pretrained(folder)
    getattr(transformers, processor)().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "detector"), [("mask2former", Segmenter), ("detr", BoxDetector)])
def test_a_closed_network_is_opened_and_gives_boxes_in_pixels_of_its_own_words(
    tmp_path: Path, kind: str, detector: type[Segmenter | BoxDetector]
):
    torch.manual_seed(0)
    made = detector(str(closed(tmp_path, kind)), side=64, batch_size=2)
    assert made.vocabulary == {"dog", "computer mouse", "tv"}
    media = torch.rand(3, 3, 48, 80)
    found = made.detect(media, [["dog", "computer mouse", "tv"]] * 3)
    assert len(found) == 3
    assert any(found)
    named = {thing.name for things in found for thing in things}
    assert made.detect(media, [[]] * 3) == [[], [], []]
    assert {t.name for things in made.detect(media, [[min(named)]] * 3) for t in things} == {min(named)}
    for thing in (thing for things in found for thing in things):
        left, top, right, bottom = thing.box
        assert -80 <= left < right <= 160
        assert -48 <= top < bottom <= 96
        assert 0 < thing.score <= 1
        if kind == "mask2former":
            assert thing.mask is not None
            assert thing.mask.shape == (48, 80)
            rows, columns = thing.mask.nonzero().T
            assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_a_mask_from_the_network_becomes_a_thing_with_its_confidence(tmp_path: Path):
    made = Segmenter(str(closed(tmp_path, "mask2former")), side=64)
    logits = torch.full((2, 4, 4), -20.0)
    logits[1, :2, 2:] = 20.0  # the upper right quarter
    share = torch.tensor([[0.01, 0.01, 0.01], [0.01, 0.9, 0.03]])
    things = made._things(logits, share, (64, 64), ["computer mouse", "tv"])
    assert [(t.name, t.score) for t in things] == [("computer mouse", pytest.approx(0.9, abs=0.02))]  # soft edges
    left, top, right, bottom = things[0].box
    assert (left, top, right, bottom) == pytest.approx((32, 0, 64, 32), abs=1)


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    from flowalign.run import CONF

    return CLIPTokenizer.from_pretrained(CONF.parent / "flowalign" / "assets" / "tiny_sd3" / "tokenizer")


def test_an_open_network_finds_each_class_under_its_own_name(tmp_path: Path):
    import transformers

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = text | {"image_size": 32, "patch_size": 8}
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    config = transformers.Owlv2Config(text_config=text | words, vision_config=vision, projection_dim=16)
    transformers.Owlv2ForObjectDetection(config).save_pretrained(tmp_path)
    images = transformers.models.owlv2.image_processing_pil_owlv2.Owlv2ImageProcessorPil(
        size={"height": 32, "width": 32}
    )
    transformers.Owlv2Processor(images, tokenizer).save_pretrained(tmp_path)
    found = WordDetector(str(tmp_path), batch_size=2).detect(torch.rand(2, 3, 40, 40), [["red", "blue"], ["circle"]])
    assert [{t.name for t in things} for things in found] == [{"red", "blue"}, {"circle"}]


def test_clip_colours_are_the_nearest_sentence_whatever_the_class(tmp_path: Path):
    import transformers

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPConfig(
        text_config=text | words, vision_config=text | {"image_size": 32, "patch_size": 8}, projection_dim=16
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    images = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    images.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    colours, picture = ClipColours(str(tmp_path)), drawn(("bench", "red", 4, 4))
    things = [Thing("bench", (4, 4, 20, 12), 1), Thing("clock", (40, 40, 41, 41), 1)]
    named = colours(picture, things)
    assert set(named) <= set(COLOURS)
    assert named == [colours(picture, [thing])[0] for thing in things]
    assert colours(picture, []) == []
    sentences = colours._texts["bench"]
    assert sentences.norm(dim=-1) == pytest.approx(torch.ones(10), abs=1e-5)
    assert sentences.shape == (10, 16)


@pytest.mark.parametrize("pretrained", ["nowhere", "./nowhere/here", "a/b/c"])
def test_weights_that_are_not_there_are_refused_in_a_sentence(pretrained: str):
    reward = Geneval(BoxDetector(pretrained), HueColours())
    for use in (reward.self_check, lambda: scored(reward, [drawn()], {"include": [entry("dog")]})):
        with pytest.raises(RewardError, match="neither a folder nor a hub id"):
            use()


def test_missing_weights_of_the_colours_are_told_and_not_nan():
    reward = Geneval(Rectangles(), ClipColours("./nowhere/here"))
    with pytest.raises(RewardError, match="neither a folder nor a hub id"):
        scored(reward, [drawn(("clock", "red", 0, 0))], {"include": [entry("clock", color="red")]})


def test_the_yaml_shares_one_network_between_training_and_reporting(tiny: Callable[..., DictConfig], tmp_path: Path):
    folder = closed(tmp_path / "m2f", "mask2former")
    cfg = tiny("reward=geneval", f"reward.objective.detector.pretrained={folder}")
    cfg.reward.objective.colours = {"_target_": "flowalign.rewards.geneval_colours.HueColours"}
    scorer = instantiate(cfg.reward)
    trained, reported = scorer.objective["reward"].reward, scorer.held_out["correct"].reward
    assert (trained.measure, reported.measure) == ("partial", "correct")
    assert trained.detector.model is reported.detector.model
    assert trained.rules == reported.rules


def test_a_prompt_of_another_layout_is_refused_before_anything_is_detected():
    reward = Geneval(Mock(), Mock())
    reward.check_prompt("a cat", {"tag": "single_object", "include": [{"class": "cat", "count": 1}]})
    with pytest.raises(ValueError, match="geneval needs metadata in GenEval's layout"):
        reward.check_prompt("a cat", {"tag": "single_object"})
