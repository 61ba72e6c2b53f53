"""Prompt files of benchmarks: what is read from them, and what is said of a bad line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flowalign.prompts import Prompt
from flowalign.suites import SUITES, Suite, formats, spread

GOOD = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}


def test_geneval_keeps_its_metadata(tmp_path: Path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    (prompt,) = formats.geneval(path)
    assert prompt.text == "two dogs"
    assert prompt.metadata == {"tag": "counting", "include": [{"class": "dog", "count": 2}]}


def test_drawbench_is_read_from_commas_tabs_and_plain_lines(tmp_path: Path):
    (tmp_path / "drawbench.csv").write_text(
        '\ufeffPrompts,Category\n"A red car, parked.",Colors\n\nTwo dogs,Counting\n"A sign\nwith two lines",Text\n'
    )
    (tmp_path / "drawbench.tsv").write_text("Category\tPrompt\tNote\nColors\tA red car, parked.\tx\n")
    (tmp_path / "drawbench.txt").write_text("A red car, parked.\nTwo dogs\n")
    commas, tabs, plain = (formats.table(tmp_path / f"drawbench.{suffix}") for suffix in ("csv", "tsv", "txt"))
    assert [(p.text, p.metadata["tag"]) for p in commas] == [
        ("A red car, parked.", "Colors"),
        ("Two dogs", "Counting"),
        ("A sign\nwith two lines", "Text"),
    ]
    assert commas[1].source.endswith("drawbench.csv:4")
    assert [(p.text, p.metadata) for p in tabs] == [("A red car, parked.", {"tag": "Colors"})]
    assert [(p.text, p.metadata) for p in plain] == [("A red car, parked.", {}), ("Two dogs", {})]


def test_the_categories_of_t2i_compbench_are_its_files(tmp_path: Path):
    (tmp_path / "color_val.txt").write_text("a green bench and a blue bowl\na red car\n")
    (tmp_path / "3d_spatial_val.txt").write_text("a dog in front of a car\n")
    (tmp_path / "color_val_seen.txt").write_text("not this one\n")
    read = SUITES["t2i_compbench"].prompts("t2i_compbench", str(tmp_path))
    assert [(p.metadata["tag"], p.text) for p in read] == [
        ("3d_spatial", "a dog in front of a car"),
        ("color", "a green bench and a blue bowl"),
        ("color", "a red car"),
    ]


@pytest.mark.parametrize("line", ['A sign that says "Open"', "A sign that says “Open 24/7”"])
def test_the_text_to_be_read_stands_in_quotes(tmp_path: Path, line: str):
    path = tmp_path / "test.txt"
    path.write_text(line + "\n", encoding="utf-8")
    assert [p.text for p in formats.quoted(path)] == [line]


@pytest.mark.parametrize(
    ("read", "name", "text", "reason"),
    [
        (formats.geneval, "a.jsonl", json.dumps(GOOD) + "\n{\n", "a.jsonl:2: "),
        (formats.geneval, "a.jsonl", '{"prompt": "a", "tag": "b"}\n', "a.jsonl:1: geneval needs metadata"),
        (formats.geneval, "a.jsonl", json.dumps({**GOOD, "tag": None}) + "\n", None),
        (formats.geneval, "a.jsonl", json.dumps({k: GOOD[k] for k in ("include", "prompt")}), "a.jsonl:1: no `tag`"),
        (formats.quoted, "a.txt", 'say "yes"\n\nsay yes\n', "a.txt:3: the OCR reward looks for a text"),
        (formats.quoted, "a.txt", 'say ""\n', "a.txt:1: the OCR reward looks for a text"),
        (formats.table, "a.csv", "Text,Kind\n", "a.csv:1: the columns must be Prompts and Category; got text, kind"),
        (formats.table, "a.csv", "Prompts,Category\na,b\nc\n", "a.csv:3: no category for 'c'"),
        (formats.table, "a.csv", "Prompts,Category\n,b\n", "a.csv:2: no prompt"),
        (formats.table, "a.csv", "Prompts,Category\n", "a.csv: no prompt in this file"),
        (formats.table, "a.tsv", "Prompts,Category\n", "a.tsv:1: the columns must be"),
    ],
)
def test_a_bad_line_is_told_by_file_and_number(
    tmp_path: Path, read: Callable[[Path], list[Prompt]], name: str, text: str, reason: str | None
):
    (tmp_path / name).write_text(text)
    if reason is None:
        assert read(tmp_path / name)[0].metadata["tag"] is None
        return
    with pytest.raises(ValueError, match="^" + str(tmp_path / reason).replace("(", r"\(")):
        read(tmp_path / name)


def test_a_table_that_is_not_text_is_refused(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(b"Prompts,Category\n\xff\xfe,b\n")
    with pytest.raises(ValueError, match="cannot be read as a table in UTF-8"):
        formats.table(tmp_path / "a.csv")


@pytest.mark.parametrize(("name", "suite"), [(n, s) for n, s in SUITES.items() if not s.embedded])
def test_missing_prompts_are_asked_for_by_name_and_source(
    name: str, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        suite.prompts(name)
    for said in (f"prompts/{name}/{suite.files[0]}", suite.source, "prompts=FILE"):
        assert said in str(refused.value)


def test_fewer_prompts_are_the_first_of_every_category():
    tags = ["a", "a", "a", "b", "c", "c"]
    prompts = [Prompt(str(i), metadata={"tag": tag}) for i, tag in enumerate(tags)]
    assert spread(prompts, 3) == [0, 3, 4]
    assert spread(prompts, 4) == [0, 1, 3, 4]
    assert spread(prompts, 0) == spread(prompts, 6) == spread(prompts, 99) == list(range(6))
