"""`flowalign evaluate` on benchmarks and on the embedded model as it comes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from flowalign.commands.evaluate import _about
from flowalign.commands.figures import figure, finite_or_none, format_table, summarise
from flowalign.commands.record import list_samples
from flowalign.prompts import Prompt
from flowalign.rewards.geneval import Geneval
from flowalign.rewards.geneval_colours import HueColours
from flowalign.shapes.render import picture
from flowalign.shapes.world import specs
from flowalign.size import Size
from flowalign.strategies.folders import META
from flowalign.suites import SUITES
from tests.conftest import ROOT
from tests.suites.toys import Counted, SceneDetector

TINY = ("model=tiny_sd3", "steps=1", "size=32")


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command in this process: exit code, and what it said on whichever channel."""
    from flowalign.cli import main

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["flowalign", "evaluate", *words])
        monkeypatch.chdir(ROOT)
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        written = capsys.readouterr()
        return code, written.out if code == 0 else written.err

    return run


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A reward=… that counts the pictures."""
    for name, value in (("calls", 0), ("stop", 10**9), ("deaf", 0)):
        monkeypatch.setattr(Counted, name, value)
    path = tmp_path / "counted.yaml"
    path.write_text(
        "_target_: flowalign.scoring.Scorer\nobjective: { _target_: tests.suites.toys.Counted }\n"
        "held_out: { jpeg: { _target_: flowalign.rewards.jpeg.Jpeg } }\n"
    )
    return f"reward={path}"


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------ the command


def test_the_shapes_suite_writes_tables_pictures_and_its_figure(
    evaluate: Callable[..., tuple[int, str]], tmp_path: Path
):
    code, said = evaluate("model=tiny_sd3", "suite=shapes", "num=8", "images=2", "steps=2", f"to={tmp_path}")
    assert code == 0
    with (tmp_path / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["category"], row["pictures"]) for row in table] == [
        *((kind, "4") for kind in ("counting", "position", "single", "two")),
        ("all", "16"),
    ]
    read = rows(tmp_path)
    for row in table[:-1]:
        mine = [float(r["reward"]) for r in read if r["tag"] == row["category"]]
        assert float(row["reward"]) == pytest.approx(sum(mine) / 4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    strict = [float(row["strict"]) for row in table[:-1]]
    assert summary["figure"]["value"] == pytest.approx(sum(strict) / 4)
    assert f"score: {summary['figure']['value']:.4f} (strict, mean of the categories' means)" in said
    assert Image.open(tmp_path / "pictures.png").width > 8 * 132
    kept = sorted(path.parent.parent.name for path in tmp_path.glob("pictures/*/samples/0001.png"))
    assert len(kept) == 8
    line = json.loads((tmp_path / "pictures" / kept[0] / "metadata.jsonl").read_text())
    assert {"prompt", "tag", "include"} <= line.keys()


@pytest.mark.slow
def test_a_killed_process_leaves_what_the_next_one_goes_on_from(tmp_path: Path):
    folder = tmp_path / "e"
    words = ("model=tiny_sd3", "suite=shapes", "num=64", "images=4", "steps=4", "batch=8", f"to={folder}")
    command = [sys.executable, "-m", "flowalign.cli", "evaluate", *words]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = [process.stderr.readline() for _ in range(3)]
        process.kill()
    assert said[-1] == "232 pictures to go\n"
    began = len(rows(folder))
    assert 24 <= began < 256
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{256 - began // 8 * 8 - 8} pictures to go" in done.stderr.splitlines()[0]
    assert [int(row["sample"]) for row in rows(folder)] == sorted(int(row["sample"]) for row in rows(folder))
    assert len(rows(folder)) == 256


def test_an_interrupted_evaluation_goes_on_and_ends_like_an_uninterrupted_one(
    evaluate: Callable[..., tuple[int, str]], counted: str, tmp_path: Path
):
    words = (*TINY, "suite=shapes", "num=4", "images=2", "batch=3", counted)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert evaluate(*words, f"to={whole}")[0] == 0
    assert Counted.calls == 8
    Counted.calls, Counted.stop = 0, 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(*words, f"to={torn}")
    assert len(rows(torn)) == 3
    with (torn / "scores.csv").open("a") as file:
        file.write("3,0,half a li")  # what a killed process may leave
    Counted.calls, Counted.stop = 0, 10**9
    assert evaluate(*words, f"to={torn}")[0] == 0
    assert Counted.calls == 5
    for name in ("scores.csv", "table.csv"):
        assert (torn / name).read_bytes() == (whole / name).read_bytes(), name
    assert (torn / "pictures.png").read_bytes() == (whole / "pictures.png").read_bytes()
    assert evaluate(*words, f"to={torn}")[0] == 0
    assert Counted.calls == 5  # nothing was left to do


def test_what_could_not_be_scored_is_told_and_tried_again(
    evaluate: Callable[..., tuple[int, str]], counted: str, tmp_path: Path
):
    words, folder = (*TINY, "suite=shapes", "num=4", "images=1", counted), tmp_path / "e"
    Counted.deaf = 1
    _, said = evaluate(*words, f"to={folder}")
    assert "not_scored" in said
    assert sum(row["reward"] == "nan" for row in rows(folder)) == 1
    assert json.loads((folder / "summary.json").read_text())["scores"]["reward/not_scored"] == 0.25
    Counted.calls = 0
    _, said = evaluate(*words, f"to={folder}")
    assert "not_scored" not in said
    assert Counted.calls == 1
    assert len(rows(folder)) == 4
    assert all(row["reward"] != "nan" for row in rows(folder))


def test_another_evaluation_is_not_written_over_unless_that_is_wanted(
    evaluate: Callable[..., tuple[int, str]], counted: str, tmp_path: Path
):
    words, folder = (*TINY, "suite=shapes", "num=4", "images=1", counted), tmp_path / "e"
    assert evaluate(*words, f"to={folder}", "keep=false")[0] == 0
    before = rows(folder)
    code, said = evaluate(*words, f"to={folder}", "seed=7")
    assert code == 2
    assert "holds another evaluation (seed was 1234, not 7): use another to=…, or again=true" in said
    assert rows(folder) == before
    assert evaluate(*words, f"to={folder}", "seed=7", "again=true")[0] == 0
    assert rows(folder) != before
    assert len(rows(folder)) == 4


def test_more_pictures_and_fewer_prompts_leave_the_others_as_they_were(
    evaluate: Callable[..., tuple[int, str]], counted: str, tmp_path: Path
):
    few, many = tmp_path / "few", tmp_path / "many"
    assert evaluate(*TINY, "suite=shapes", "num=4", "images=1", counted, f"to={few}")[0] == 0
    assert evaluate(*TINY, "suite=shapes", "num=8", "images=2", counted, f"to={many}")[0] == 0
    of_many = {row["sample"]: row for row in rows(many)}
    assert len(of_many) == 16
    for row in rows(few):
        assert float(row["reward"]) == pytest.approx(float(of_many[row["sample"]]["reward"]), abs=1e-5)


def test_geneval_runs_from_its_file_to_its_score_with_another_detector(
    evaluate: Callable[..., tuple[int, str]], tmp_path: Path
):
    lines = [{"prompt": s.captions()[0], **s.metadata()} for s in (*specs("single")[:2], *specs("counting")[:1])]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    node = (
        "{ _target_: flowalign.rewards.geneval.Geneval, measure: %s, detector: "
        "{ _target_: tests.suites.toys.SceneDetector }, "
        "colours: { _target_: flowalign.rewards.geneval_colours.HueColours } }"
    )
    reward = tmp_path / "offline.yaml"
    reward.write_text(
        f"_target_: flowalign.scoring.Scorer\nobjective: {node % 'partial'}\n"
        f"held_out: {{ correct: {node % 'correct'} }}\n"
    )
    words = ("model=tiny_sd3", "steps=8", "suite=geneval", f"prompts={tmp_path}", f"reward={reward}", "seed=1")
    code, said = evaluate(*words, f"to={tmp_path / 'e'}")
    assert code == 0, said
    assert len(rows(tmp_path / "e")) == 3 * 4
    figure = json.loads((tmp_path / "e" / "summary.json").read_text())["figure"]
    assert figure["title"] == "GenEval's overall score"
    correct = {
        tag: [float(r["correct"]) for r in rows(tmp_path / "e") if r["tag"] == tag] for tag in ("single", "counting")
    }
    assert figure["value"] == pytest.approx(sum(sum(c) / len(c) for c in correct.values()) / 2)
    assert all(float(r["correct"]) <= float(r["reward"]) or float(r["reward"]) < 1 for r in rows(tmp_path / "e"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "needs either ckpt=… or model=…"),
        (("ckpt=a.ckpt", "model=tiny_sd3"), "needs either ckpt=… or model=…"),
        (("model=tiny_sd3", "suite=genevl"), "there is no suite=genevl; did you mean geneval?"),
        (("model=tiny_sd4", "reward=jpeg"), "no model called tiny_sd4; did you mean tiny_sd3?"),
        (("model=tiny_sd3", "suite=shapes", "reward=shape"), "no reward called shape; did you mean shapes?"),
        (("model=tiny_sd3", "suite=shapes", "reward=nowhere.yaml"), "reward=nowhere.yaml: there is no such file"),
        (("model=tiny_sd3", "suite=ocr", "reward=jpeg"), "there is no prompts/ocr/test.txt; get the prompts from"),
        (("model=tiny_sd3", "suite=drawbench", "prompts=README.md"), "README.md:1: the columns must be Prompts and"),
    ],
)
def test_a_mistaken_command_ends_with_one_sentence(
    evaluate: Callable[..., tuple[int, str]], words: tuple[str, ...], sentence: str
):
    code, said = evaluate(*words)
    assert code == 2
    assert sentence in said
    assert said.count("\n") == 1


# ------------------------------------------------------------ figures


def some(tags: list[str | None]) -> list[Prompt]:
    return [Prompt(str(i), metadata={} if tag is None else {"tag": tag}) for i, tag in enumerate(tags)]


def test_geneval_weighs_categories_alike_and_drawbench_pictures():
    prompts, values = some(["a", "a", "a", "b"]), torch.tensor([1.0, 1.0, torch.nan, 0.0])
    scores = {"reward": torch.zeros(4), "correct": values}
    geneval = figure(SUITES["geneval"], prompts, scores)
    assert (geneval["value"], geneval["title"]) == (0.5, "GenEval's overall score")
    assert figure(SUITES["drawbench"], prompts, {"reward": values})["value"] == pytest.approx(2 / 3)
    assert figure(SUITES["t2i_compbench"], some([None, None]), {"reward": torch.tensor([1.0, 0.0])})["value"] == 0.5


def test_another_reward_does_not_go_by_the_name_of_the_benchmark():
    other = figure(SUITES["geneval"], some(["a", "b"]), {"reward": torch.tensor([1.0, 0.0])})
    assert (other["title"], other["measure"], other["value"]) == ("score", "reward", 0.5)


def test_a_mean_of_nothing_is_null_and_a_tag_of_null_is_none():
    found = summarise(
        [Prompt("a", None, {"tag": "x"}), Prompt("b", None, {"tag": None})], {"reward": torch.tensor([torch.nan, 1])}
    )
    assert found.keys() == {"reward", "reward/x", "reward/not_scored"}
    assert [finite_or_none(value) for value in found.values()] == [1.0, None, 0.5]


def test_a_folder_that_was_written_anew_is_another_checkpoint(tmp_path: Path):
    (tmp_path / META).touch()
    saved = SimpleNamespace(path=tmp_path, weights="live")
    settings = ("", 0, SimpleNamespace(num_steps=1, guidance=1.0, solver=None), Size(64, 64), OmegaConf.create({}))
    first = _about(saved, [], *settings)  # type: ignore[arg-type]
    assert _about(saved, [], *settings) == first  # type: ignore[arg-type]
    os.utime(tmp_path / META, ns=(1, 1))
    assert _about(saved, [], *settings) != first  # type: ignore[arg-type]


def test_the_table_counts_what_has_no_score():
    scores = {"reward": torch.tensor([1.0, torch.nan, 0.5])}
    assert format_table(some(["a", "a", "b"]), scores) == [
        "category  pictures  reward  not_scored",
        "a                2  1.0000           1",
        "b                1  0.5000           0",
        "all              3  0.7500           1",
    ]


def test_the_numbers_of_samples_do_not_depend_on_how_many_are_asked():
    prompts = some(["a"] * 5)
    few, all_of_them = list_samples(prompts, [1, 3], 2), list_samples(prompts, range(5), 3)
    assert [one.number for one in few] == [1, 3, 6, 8]
    assert [one.number for one in all_of_them] == list(range(15))
    assert all(one in all_of_them for one in few)


@pytest.mark.parametrize("kind", ["single", "counting", "position", "two"])
def test_real_pictures_of_the_scenes_world_pass_the_rules_of_geneval(kind: str):
    scenes = [s for s in specs(kind) if kind in ("single", "counting") or s.things[0][1] != s.things[1][1]]
    scenes = scenes[:: max(len(scenes) // 12, 1)]
    media = torch.stack([torch.from_numpy(picture(s, i, 128)).permute(2, 0, 1) for i, s in enumerate(scenes)])
    reward, metadata = Geneval(SceneDetector(), HueColours(), "exact"), [s.metadata() for s in scenes]
    texts = [s.captions()[0] for s in scenes]
    assert reward(media, texts, metadata).mean() == 1
    assert reward(media, texts, metadata[1:] + metadata[:1]).mean() < 0.5
