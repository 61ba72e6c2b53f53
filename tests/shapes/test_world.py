import pytest

from flowalign.shapes.world import COLOURS, KINDS, RELATIONS, SHAPES, SPLITS, TEST_THINGS, Spec, specs

EVERY = [spec for kind in KINDS for spec in specs(kind)]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def meaning(spec: Spec) -> tuple:
    """What a picture of the specification shows, however it is said."""
    if spec.relation in ("right of", "below"):
        return tuple(reversed(spec.things)), OPPOSITE[spec.relation]
    return (spec.things if spec.relation else tuple(sorted(spec.things))), spec.relation


def test_metadata_describes_every_specification_completely():
    assert all(Spec.from_metadata(spec.metadata()) == spec for spec in EVERY)


def test_metadata_survives_the_prompt_file_s_extra_keys():
    spec = EVERY[-1]
    assert Spec.from_metadata({"prompt": "as written", **spec.metadata()}) == spec


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"tag": "single"},
        {"include": []},
        {"include": "a red circle"},
        {"include": ["red circle"]},
        {"include": [{"class": "bench", "count": 1, "color": "red"}]},
        {"include": [{"class": "circle", "count": 1}]},
        {
            "include": [
                {"class": "circle", "color": "red"},
                {"class": "cross", "color": "red", "position": ["beside", 0]},
            ]
        },
        {
            "include": [
                {"class": "circle", "color": "red"},
                {"class": "cross", "color": "red", "position": ["above", 7]},
            ]
        },
        {
            "include": [
                {"class": "circle", "color": "red", "count": 2},
                {"class": "cross", "color": "red", "position": ["above", 0]},
            ]
        },
    ],
)
def test_metadata_of_another_world_is_refused(metadata):
    with pytest.raises(ValueError, match="scenes world|metadata|relation|things|position"):
        Spec.from_metadata(metadata)


def test_every_kind_is_in_every_split():
    assert {(s.kind, s.split) for s in EVERY} == {(kind, split) for kind in KINDS for split in SPLITS}


def test_exactly_the_test_prompts_name_a_test_thing():
    names = [" ".join(thing) for thing in TEST_THINGS]
    for spec in EVERY:
        assert all(any(name in text for name in names) == (spec.split == "test") for text in spec.captions())


def test_splits_share_no_caption_and_no_meaning():
    for of in (lambda s: s.captions(), lambda s: [meaning(s)]):
        train, val, test = ({item for s in EVERY if s.split == split for item in of(s)} for split in SPLITS)
        assert not (train & val)
        assert not (train & test)
        assert not (val & test)


def test_no_caption_has_two_meanings():
    meanings: dict[str, set] = {}
    for spec in EVERY:
        for text in spec.captions():
            meanings.setdefault(text, set()).add(meaning(spec))
    assert all(len(m) == 1 for m in meanings.values())
    assert len(meanings) == sum(len(s.captions()) for s in EVERY)


def test_every_thing_relation_and_number_is_seen_in_training():
    train = [s for s in EVERY if s.split == "train"]
    assert {s.relation for s in train} == {None, *RELATIONS}
    assert {s.count for s in train} == {1, 2, 3, 4}
    assert {part for s in train for thing in s.things for part in thing} == {*COLOURS, *SHAPES}


def test_an_unknown_kind_is_named_in_the_error():
    with pytest.raises(ValueError, match=r"'colour'.*single, two, counting, position"):
        specs("colour")
