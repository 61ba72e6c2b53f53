import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowalign.prompt_media import image_paths
from flowalign.prompts import Prompt, PromptSet, read_prompts
from flowalign.turns import Turns


def balanced(**sizes: int) -> PromptSet:
    return PromptSet(
        [Prompt(f"{tag} {i}", metadata={"tag": tag}) for tag, n in sizes.items() for i in range(n)], balance="tag"
    )


def plain(number: int) -> PromptSet:
    return PromptSet([Prompt(str(i)) for i in range(number)])


def test_text_files_have_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\n  a “dog”\u2028with a line separator  \n".encode())
    assert [(p.text, p.source) for p in read_prompts(path)] == [
        ("a cat", f"{path}:1"),
        ("a “dog”\u2028with a line separator", f"{path}:3"),
    ]


def test_jsonl_keeps_everything_else_as_metadata(tmp_path):
    path = tmp_path / "prompts.jsonl"
    entry = {
        "tag": "counting",
        "include": [{"class": "bench", "count": 2}],
        "exclude": [{"class": "bench", "count": 3}],
    }
    path.write_text(
        json.dumps({**entry, "prompt": "two benches"})
        + "\n"
        + json.dumps({"prompt": "x", "negative_prompt": "blur"})
        + "\n"
    )
    first, second = read_prompts(path)
    assert (first.text, first.negative, first.metadata) == ("two benches", None, entry)
    assert (second.text, second.negative, second.metadata) == ("x", "blur", {})


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '"a cat"',
        "[1]",
        "{}",
        '{"prompt": ""}',
        '{"prompt": 3}',
        '{"prompt": null}',
        '{"prompt": "a", "negative_prompt": 1}',
        '{"prompt": "a \\ud83d"}',
        '{"prompt": "a", "negative_prompt": "\\udc00"}',
        b"\xff",
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:3: "):
        read_prompts(path)


def test_empty_and_unknown_files_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    for name, reason in (("empty.txt", "no prompt"), ("prompts.parquet", ".jsonl, .json, .csv, .tsv or .txt files")):
        with pytest.raises(ValueError, match=reason):
            read_prompts(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "missing.txt")


def test_an_epoch_depends_on_its_arguments_alone():
    late = balanced(a=9, b=4).epoch(3, 41, 8)
    prompts = balanced(a=9, b=4)
    assert [prompts.epoch(3, e, 8) for e in range(42)][-1] == late
    assert prompts.epoch(3, 40, 8) != late
    assert prompts.epoch(4, 41, 8) != late


@pytest.mark.parametrize(("size", "number"), [(10, 4), (10, 7), (10, 10), (7, 5), (100, 48), (5, 1)])
def test_an_epoch_repeats_no_prompt(size, number):
    for seed in range(3):
        assert all(len(set(plain(size).epoch(seed, e, number))) == number for e in range(60))


@pytest.mark.parametrize(("size", "number"), [(10, 4), (10, 7), (7, 5), (100, 48), (3, 8)])
def test_everything_is_used_before_anything_repeats(size, number):
    prompts, uses = plain(size), Counter(range(size))
    for e in range(40):
        uses.update(prompts.epoch(0, e, number))
        # Within an epoch the order is free, so uses may differ by one at a pass's end.
        assert max(uses.values()) - min(uses.values()) <= 1


def test_passes_are_shuffled():
    prompts = plain(50)
    assert prompts.epoch(0, 0, 25) != prompts.epoch(0, 2, 25)
    assert prompts.epoch(0, 0, 25) != list(range(25))


def test_balanced_classes_get_equal_shares():
    prompts = balanced(a=100, b=3, c=10)
    for chosen in (*(prompts.epoch(0, e, 12) for e in range(10)), prompts.fixed(12)):
        assert Counter(prompts[i].metadata["tag"] for i in chosen) == {"a": 4, "b": 4, "c": 4}
    total = Counter(prompts[i].metadata["tag"] for e in range(9) for i in prompts.epoch(0, e, 10))
    assert set(total.values()) == {30}


def test_the_fixed_choice_begins_with_itself_and_cycles_evenly():
    prompts = balanced(a=5, b=2)
    assert prompts.fixed(20)[:7] == prompts.fixed(7) == [0, 5, 1, 6, 2, 5, 3]
    uses = Counter(prompts.fixed(20))
    assert {uses[i] for i in range(5)} == {2}
    assert {uses[5], uses[6]} == {5}
    assert len(set(plain(6).fixed(6))) == 6


def test_a_prompt_without_the_key_to_balance_by_is_named():
    with pytest.raises(ValueError, match=r"p.jsonl:2: no 'tag'.*include.*balance=null"):
        PromptSet([Prompt("a", metadata={"include": []}, source="p.jsonl:2")], balance="tag")
    with pytest.raises(ValueError, match="at least one"):
        PromptSet([])


# ------------------------------------------------------------ real pictures


def test_pictures_are_read_from_beside_the_prompts(tmp_path):
    from PIL import Image

    for name, colour in (("a.png", (255, 0, 0)), ("b.png", (0, 0, 255))):
        Image.new("RGB", (40, 20), colour).save(tmp_path / name)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "red", "image": "a.png"}\n{"prompt": "blue", "image": "b.png"}\n')
    prompts = PromptSet.read(str(path))
    prompts.require_images()
    images = prompts.images([1, 0], [5, 6], 8, 12)
    assert images.shape == (2, 3, 8, 12)
    assert images[:, :, 4, 6].tolist() == [[0, 0, 1], [1, 0, 0]]
    path.write_text('{"prompt": "green", "image": "c.png"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: there is no image .*c.png"):
        PromptSet.read(str(path)).images([0], [0], 8, 8)
    (tmp_path / "c.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: the image .*c.png cannot be read"):
        PromptSet.read(str(path)).images([0], [0], 8, 8)


def test_the_pictures_beside_a_prompt_are_its_image_or_its_images(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    source = f"{tmp_path / 'p.jsonl'}:1"
    for metadata in ({"image": "a.png"}, {"images": ["a.png"]}):
        assert image_paths(Prompt("x", metadata=metadata, source=source)) == [tmp_path / "a.png"]
    for metadata in ({}, {"images": []}, {"image": 3}, {"images": [None]}):
        with pytest.raises(ValueError, match="p.jsonl:1: this model takes input images"):
            image_paths(Prompt("x", metadata=metadata, source=source))


def test_painted_pictures_are_told_the_metadata_and_the_number():
    def painter(metadata, number, height, width):
        return np.full((height, width, 3), metadata["grey"] / number, dtype=np.float32)

    prompts = PromptSet([Prompt("grey", metadata={"grey": 1.0})], images=painter)
    prompts.require_images()
    assert prompts.images([0, 0], [2, 4], 2, 3)[:, 0, 0, 0].tolist() == [0.5, 0.25]


def test_prompts_without_pictures_are_refused_where_they_are_needed():
    with pytest.raises(ValueError, match=r"here:3: no image to learn from: give every line an `image`"):
        PromptSet([Prompt("a", source="here:3")]).require_images()


def test_a_folder_of_prompt_files_needs_no_suffixes(tmp_path):
    (tmp_path / "train.txt").write_text("a\nb")
    (tmp_path / "test.jsonl").write_text('{"prompt": "c"}')
    assert [p.text for p in PromptSet.read(f"{tmp_path}/train").prompts] == ["a", "b"]
    assert [p.text for p in PromptSet.read(f"{tmp_path}/val", otherwise=f"{tmp_path}/test").prompts] == ["c"]
    (tmp_path / "val.txt").write_text("d")
    assert [p.text for p in PromptSet.read(f"{tmp_path}/val", otherwise=f"{tmp_path}/test").prompts] == ["d"]
    with pytest.raises(
        ValueError,
        match=r"no prompt file .*/dev .\.jsonl, .* or \.txt.; its folder has test.jsonl, train.txt, val.txt; embedded",
    ):
        PromptSet.read(f"{tmp_path}/dev")


def test_a_file_of_another_kind_is_named_where_prompts_are_missing(tmp_path):
    (tmp_path / "train.parquet").write_text("a")
    with pytest.raises(ValueError, match=r"no prompt file .*/train .\.jsonl, .*; its folder has train.parquet;"):
        PromptSet.read(f"{tmp_path}/train")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "a", "tag": 1}', "a.jsonl:1: a line needs a `prompt`; .* are: text, tag"),
        ("a.txt", "a\n\u00fc".encode("latin-1"), r"a.txt:2: this is not UTF-8 \(.*\): save the file as UTF-8"),
    ],
)
def test_an_unreadable_line_says_what_is_missing(tmp_path, name: str, content: bytes, sentence: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "a, \\"b\\"", "tag": "x"}\n{"prompt": "c", "negative_prompt": "d"}'),
        ("a.json", '[{"prompt": "a, \\"b\\"", "tag": "x"}, {"prompt": "c", "negative_prompt": "d"}]'),
        ("a.csv", '\ufeffprompt,tag,negative_prompt\r\n"a, ""b""",x,\r\n\r\nc,,d\r\n'),
        ("a.tsv", 'tag\tprompt\tnegative_prompt\nx\t"a, ""b"""\n\tc\td\n'),
    ],
)
def test_all_kinds_of_files_say_the_same(tmp_path, name: str, content: str):
    (tmp_path / name).write_text(content)
    first, second = read_prompts(tmp_path / name)
    assert (first.text, first.negative, first.metadata) == ('a, "b"', None, {"tag": "x"})
    assert (second.text, second.negative, second.metadata) == ("c", "d", {})
    assert PromptSet.read(str(tmp_path / "a")).prompts == [first, second]


def test_a_list_of_texts_is_a_list_of_prompts(tmp_path):
    (tmp_path / "a.json").write_text('["a cat", "a dog"]')
    assert [(p.text, p.metadata) for p in read_prompts(tmp_path / "a.json")] == [("a cat", {}), ("a dog", {})]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "caption,tag\na,b", r"a.csv:1: the header needs a column `prompt`; got caption, tag"),
        ("a.csv", "prompt,tag\na,b\nc,d,e", r"a.csv:3: 3 cells below a header of 2"),
        ("a.csv", "prompt,tag\na,b\n,d", r"a.csv:3: a line needs a `prompt`"),
        ("a.csv", 'prompt,tag\n"a,b', r"a.csv: cannot be read as a table"),
        ("a.csv", "prompt\n", "no prompt in this file"),
        ("a.tsv", "", "header needs a column `prompt`; got none"),
        ("a.json", '{"prompt": "a"}', "expected a list of prompts, got dict"),
        ("a.json", "[", "a.json: Expecting"),
        ("a.json", '["a", 3]', r"a.json:2: expected a JSON object, got int"),
        ("a.json", '["a", " "]', r"a.json:2: `prompt` must be a non-empty text"),
    ],
)
def test_a_bad_table_or_list_is_named(tmp_path, name: str, content: str, sentence: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_prompts(tmp_path / name)


def test_a_folder_of_flow_grpo_is_read_as_it_is(tmp_path):
    (tmp_path / "train_metadata.jsonl").write_text('{"prompt": "a", "tag": "two_object"}')
    assert PromptSet.read(f"{tmp_path}/train").prompts[0].metadata == {"tag": "two_object"}


# ------------------------------------------------------------ shares


@pytest.mark.parametrize("shares", [[1], [1, 1, 1], [3, 1], [2, 5, 1, 2], [4, 2], [7, 100]])
def test_turns_are_taken_in_proportion_and_spread_evenly(shares: list[int]):
    turns, total = Turns(shares), sum(shares)
    order = [turns.whose(i) for i in range(3 * total + 8)]
    for i in range(3 * total + 1):
        for k, share in enumerate(shares):
            assert turns.taken(k, i) == order[:i].count(k)
            assert abs(order[:i].count(k) - i * share / total) < len(shares)
    for k in range(len(shares)):
        for length in (0, 1, 4, total, total + 3):
            windows = [order[i : i + length].count(k) for i in range(total)]
            assert turns.most(k, length) == max(windows)


def test_equal_shares_are_turns_in_order():
    assert [Turns([5, 5, 5]).whose(i) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_files_are_drawn_by_their_shares(tmp_path: Path):
    for name, size in (("a", 6), ("b", 50)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{i}\n" for i in range(size)))
    prompts = PromptSet.read([str(tmp_path / "a"), str(tmp_path / "b.txt")], shares=[1, 3])
    drawn = [prompts[i].text for e in range(4) for i in prompts.epoch(0, e, 24)]
    assert Counter(text[0] for text in drawn) == {"a": 24, "b": 72}
    for e in range(4):  # six of `a` in every epoch: each of them once
        assert sorted(text for text in drawn[24 * e : 24 * e + 24] if text[0] == "a") == [f"a{i}" for i in range(6)]
    assert Counter(prompts[i].text[0] for i in prompts.fixed(8)) == {"a": 2, "b": 6}
    together = PromptSet.read([str(tmp_path / "a"), str(tmp_path / "b")])
    assert sorted(together.epoch(0, 0, 56)) == list(range(56))


def test_values_of_a_key_are_drawn_by_their_shares():
    lines = [Prompt(f"{tag} {i}", metadata={"tag": tag}) for tag in ("a", "b", "c") for i in range(4)]
    prompts = PromptSet(lines, balance="tag", shares={"b": 2})
    assert Counter(prompts[i].metadata["tag"] for i in prompts.epoch(0, 0, 40)) == {"a": 10, "b": 20, "c": 10}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": [1, 2]}, "shares has 2 numbers, and the prompts come from 1 files"),
        ({"shares": [0]}, r"at least 1 \(got \[0\]\)"),
        ({"shares": [1], "balance": "tag"}, "use one of them"),
        ({"shares": {"a": 2}}, "set balance"),
        ({"shares": {"z": 2}, "balance": "tag"}, 'shares names "z", and the values of tag are "a"'),
    ],
)
def test_shares_without_a_meaning_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        PromptSet([Prompt("a", metadata={"tag": "a"}, source="p.txt:1")], **arguments)
