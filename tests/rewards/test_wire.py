"""What goes over the wire comes back as it was."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.rewards.png import decode, encode, to_uint8
from flowalign.rewards.wire import Query, Sample, WireError, answer, json_copy, read_scores

MEDIA = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
PICTURES = to_uint8(MEDIA)


def test_eight_bits_of_every_value_arrive():
    back = decode(encode(PICTURES), 1000)
    assert torch.equal(back, PICTURES)
    assert (back / 255 - MEDIA).abs().max() <= 1 / 510 + 1e-7
    assert torch.equal(to_uint8(back / 255), back)


def test_the_files_are_what_others_call_png():
    for file, picture in zip(encode(PICTURES), PICTURES, strict=True):
        with Image.open(BytesIO(file)) as opened:
            opened.verify()
        theirs = np.asarray(Image.open(BytesIO(file)))
        assert np.array_equal(theirs, picture.permute(1, 2, 0).numpy())
        packed = BytesIO()
        Image.fromarray(theirs).save(packed, "PNG", optimize=True)
        assert torch.equal(decode([packed.getvalue()], 1000), decode([file], 1000))


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "I;16"])
def test_other_kinds_of_png_are_refused(mode: str):
    file = BytesIO()
    Image.new(mode, (4, 4)).save(file, "PNG")
    with pytest.raises(ValueError, match="RGB with 8 bits"):
        decode([file.getvalue()], 1000)


def test_pictures_of_several_sizes_are_refused():
    with pytest.raises(ValueError, match="have the same size"):
        decode([*encode(PICTURES), *encode(PICTURES[..., :3])], 1000)


def query() -> Query:
    about = ({"a": {"2": 1.5, "10": [None, True]}}, {}, {"text": "ü"})
    samples = [Sample([f], f"prompt {i}", m, i) for i, (f, m) in enumerate(zip(encode(PICTURES), about, strict=True))]
    return Query("a request", "reward", False, samples, 12.5)


def test_a_query_comes_back_as_it_was():
    assert Query.load(query().dump(), 3) == query()


def test_an_id_is_that_of_one_place_and_one_content():
    names = query().ids()
    sample = query().samples[0]
    others = [
        sample.identity(1),
        Sample(query().samples[1].frames, sample.prompt, sample.metadata, sample.group).identity(0),
        Sample(sample.frames, "another", sample.metadata, sample.group).identity(0),
        Sample(sample.frames, sample.prompt, {}, sample.group).identity(0),
        Sample(sample.frames, sample.prompt, sample.metadata, None).identity(0),
        Sample([*sample.frames, *sample.frames], sample.prompt, sample.metadata, sample.group).identity(0),
    ]
    assert len({*names, *others}) == 9


def test_scores_are_paired_by_id_and_not_by_place():
    import json

    node = json.loads(answer(query(), [1.5, float("nan"), -2], "version"))
    node["scores"] = node["scores"][::-1]
    scores, served = read_scores(json.dumps(node).encode(), "a request", query().ids())
    assert (scores[0], scores[2], served) == (1.5, -2, "version")
    assert scores[1] != scores[1]
    with pytest.raises(WireError, match="another request"):
        read_scores(json.dumps(node).encode(), "one more", query().ids())


def test_keys_of_metadata_become_text_before_they_are_signed():
    assert json_copy({2: 1, 10: 2}, "prompt") == {"2": 1, "10": 2}
    with pytest.raises(ValueError, match="metadata of 'prompt' cannot be sent"):
        json_copy({"x": float("nan")}, "prompt")
