"""The commands as people type them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.checks import ConfigError
from flowalign.planning import instantiate
from flowalign.resuming import find_checkpoint
from flowalign.reward_nodes import final_weights
from tests.conftest import ROOT, TINY, settled

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from flowalign.commands.saved import SavedRun

WORDS = ("algo=nft", "algo.kl_beta=0.01", "dynamics=cps", "optimizer.lr=0.01", "seed=3")
CATEGORIES = ("counting", "position", "single", "two")


def command(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python train.py …`, or a module with -m, in a process of its own."""
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=280)


def train(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return command("train.py", *settled(*TINY, f"hydra.run.dir={folder}", *words))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one real command."""
    folder = tmp_path_factory.mktemp("trained")
    done = train(folder, *WORDS, "logger=[csv,tensorboard]")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (folder / "said.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def of_ones_own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another one, in mixed precision and judged by its average, with an option in a folder beside it: my_conf."""
    folder = tmp_path_factory.mktemp("of_ones_own") / "run"
    own = folder.parent / "my_conf"
    (own / "credit").mkdir(parents=True)
    (own / "credit" / "mine.yaml").write_text((ROOT / "conf" / "credit" / "rank.yaml").read_text())
    words = ("trainer.precision=bf16-mixed", "tune=lora", "evaluation.weights=ema", "optimizer.lr=1e-2", "credit=mine")
    settings = settled(*TINY, f"hydra.run.dir={folder}", *WORDS, *words)
    done = command("train.py", "--config-dir", str(own), *settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (folder / "said.txt").write_text(done.stdout)
    return folder


# ------------------------------------------------------------ what a run leaves


def test_a_run_leaves_its_config_its_checkpoints_and_its_pictures(trained: Path):
    for name in ("config_tree.log", "summary.json", "before_after.png", ".hydra/config.yaml", "checkpoints/last.ckpt"):
        assert (trained / name).is_file(), name
    assert list((trained / "checkpoints").glob("best_epoch*.ckpt"))
    assert not list((trained / "checkpoints").glob(".*"))  # nothing half written
    assert (trained / "csv" / "metrics.csv").read_text().count("\n") > 1


def test_a_run_does_not_replace_another_ones_checkpoints(trained: Path):
    before = (trained / "checkpoints" / "last.ckpt").read_bytes()
    done = train(trained, *WORDS)
    assert done.returncode == 2
    assert "holds a run already" in done.stdout
    assert "ckpt_path=auto goes on with that run" in done.stdout
    assert (trained / "checkpoints" / "last.ckpt").read_bytes() == before


def test_the_last_checkpoint_is_that_of_ones_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And of all folders, the newest, where there is none."""
    monkeypatch.chdir(tmp_path)
    older, newer = (tmp_path / "outputs" / "train" / name / "checkpoints" / "last.ckpt" for name in ("a", "b"))
    for i, file in enumerate((older, newer)):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"1")
        os.utime(file, (i + 1, i + 1))
    assert find_checkpoint("last", older.parents[1]) == str(older)
    assert Path(find_checkpoint("last", tmp_path / "elsewhere") or "").resolve() == newer
    assert find_checkpoint(str(older.parents[1])) == str(older)
    monkeypatch.setenv("HOME", str(tmp_path))
    # Not every shell replaces the tilde behind an equals sign.
    assert find_checkpoint("~/outputs/train/a") == str(older)
    with pytest.raises(ConfigError, match="train holds no checkpoint"):  # as a run that ended in its first epoch
        find_checkpoint(str(older.parents[2]))


def test_a_continued_run_tells_what_it_does_otherwise(trained: Path, tmp_path: Path):
    last = f"ckpt_path={trained}/checkpoints/last.ckpt"
    done = train(tmp_path, *WORDS, last, "trainer.max_epochs=1", "optimizer.lr=0.5", "test=false")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "other settings: optimizer.lr=0.5 instead of 0.01." in done.stdout
    assert "nothing was left to train: 1 epochs are done" in done.stdout


def test_the_command_to_go_on_with_is_whole(trained: Path):
    said = (trained / "said.txt").read_text().splitlines()
    assert f"watch     tensorboard --logdir {trained}" in said  # it is not below outputs/ here
    line = next(line for line in said if line.startswith("resume "))
    assert {"'logger=[csv,tensorboard]'", f"ckpt_path={trained}/checkpoints/last.ckpt"} <= set(line.split())


def test_the_command_to_go_on_with_keeps_ones_own_folder_of_configs(of_ones_own: Path):
    said = (of_ones_own / "said.txt").read_text().splitlines()
    line = next(line for line in said if line.startswith("resume "))
    assert f" --config-dir {of_ones_own.parent / 'my_conf'} " in line
    assert " credit=mine " in line


def test_the_summary_says_what_was_promised(trained: Path):
    summary = json.loads((trained / "summary.json").read_text())
    for phase in ("baseline", "final"):
        for key in ("val/reward", "val/strict", "val/quality", "test/strict", "test/quality"):
            assert 0 <= summary[phase][key] <= 1
        for category in CATEGORIES:
            assert f"test/strict/{category}" in summary[phase]
    assert summary["epochs"] == 1
    assert summary["samples"] == 4
    assert summary["seed"] == 3
    assert summary["wall_s"] >= summary["train_s"] > 0
    calls = summary["network_calls"]
    assert calls["rollout"] == 16
    assert calls["frozen"] == 2 * 12  # old and reference
    assert calls["train"] == 12
    assert calls["total"] == sum(calls[name] for name in ("rollout", "frozen", "train", "evaluation"))
    assert {"python", "torch", "lightning", "diffusers"} <= summary["versions"].keys()
    commit = summary["git_commit"]
    assert commit is None or len(commit.rstrip("+")) == 40


def test_tensorboard_holds_the_fixed_names_and_pictures_of_start_and_end(trained: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    expected = {"train/loss", "train/r", "train/v_drift", "rollout/reward_mean", "rollout/reward_within_std"}
    expected |= {"rollout/zero_std_fraction", "rollout/reward_nan_fraction", "rollout/images_per_s"}
    expected |= {"val/reward", "val/strict", "val/quality", "test/strict", *(f"val/strict/{c}" for c in CATEGORIES)}
    missing = expected - set(tags["scalars"])
    assert not missing
    assert {event.step for event in events.Images("val/pictures")} == {0, 2}
    assert "rollout/pictures" in tags["images"]


# ------------------------------------------------------------ sample and export


def test_sample_writes_a_picture_of_the_asked_size(
    trained: Path, tmp_path: Path, say: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    from flowalign.cli import main

    last, target = trained / "checkpoints" / "last.ckpt", tmp_path / "deep" / "picture.png"
    words = (f"ckpt={last}", "prompt=two red circles = many", "steps=2", "num=2", f"to={target}")
    code, out, _ = say(main, "sample", *words, "size=32")
    assert code == 0
    written = [Path(line) for line in out.split()]
    assert [path.name for path in written] == ["picture_0.png", "picture_1.png"]
    one, two = (np.asarray(Image.open(path)) for path in written)
    assert one.shape == two.shape == (32, 32, 3)
    assert (one != two).any()
    say(main, "sample", *words, "size=32")
    assert (np.asarray(Image.open(written[0])) == one).all()
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, _ = say(main, "sample", f"ckpt={last}", "prompt=a", "steps=1", "to=~/a.png", "weights=old")
    assert out.strip() == str(tmp_path / "a.png")
    assert Image.open(out.strip()).size == (64, 64)


def test_a_model_that_takes_images_is_given_a_file_that_names_them(
    trained: Path, say: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    from flowalign.cli import main
    from flowalign.models.sd3 import SD3

    monkeypatch.setattr(SD3, "sees_images", True)
    code, _, err = say(main, "sample", f"ckpt={trained / 'checkpoints/last.ckpt'}", "prompt=make it red")
    assert (code, "use prompts=FILE" in err) == (2, True)


def test_guidance_of_zero_is_not_that_of_the_run(trained: Path):
    from flowalign.commands.saved import load_run

    saved = load_run(str(trained / "checkpoints" / "last.ckpt"), "live")
    assert saved.sampling(guidance=0.0).guidance == 0.0  # off for families that are guided from 0 on
    assert saved.sampling().guidance == saved.config.evaluation.sampling.guidance != 0


def picture(pipe: Any, steps: int = 3) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    arguments = {"guidance_scale": 1.0, "height": 64, "width": 64, "max_sequence_length": 1, "output_type": "pt"}
    return pipe("two red circles", num_inference_steps=steps, generator=generator, **arguments).images


def plain_pipeline() -> Any:
    from diffusers import StableDiffusion3Pipeline

    folder = ROOT / "flowalign" / "assets" / "tiny_sd3"
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)


def test_exported_adapters_are_the_trained_model_in_plain_diffusers(
    trained: Path, tmp_path: Path, say: Callable[..., Any]
):
    from flowalign.cli import main
    from flowalign.commands.saved import load_run

    last = str(trained / "checkpoints" / "last.ckpt")
    code, _, _ = say(main, "export", f"ckpt={last}", f"to={tmp_path}")
    assert code == 0
    saved = load_run(last, "live")
    config, model = saved.config, saved.model
    assert config["tune"]["alpha"] != config["tune"]["rank"]  # equal ones would hide a lost alpha
    pipe = plain_pipeline()
    base = picture(pipe)
    pipe.load_lora_weights(tmp_path)
    aligned = picture(pipe)
    assert (aligned - picture(model.pipe)).abs().max() < 1e-5
    assert (aligned - base).abs().max() > 1e-3
    assert "load_lora_weights" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "flowalign.json").read_text())["weights"] == "live"


def test_an_exported_transformer_is_the_trained_one(tiny: Callable[..., Any], tmp_path: Path, say: Callable[..., Any]):
    from diffusers import SD3Transformer2DModel

    from flowalign.cli import main
    from flowalign.commands.saved import load_run
    from flowalign.module import AlignModule
    from flowalign.run import build_recipe, build_trainer, plan_accumulation

    cfg = tiny("tune=full", "callbacks=checkpoint", "optimizer.lr=0.01")
    recipe = build_recipe(cfg)
    trainer = build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.fit(AlignModule(recipe))
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    code, _, _ = say(main, "export", f"ckpt={last}", f"to={tmp_path / 'export'}")
    assert code == 0
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "export" / "transformer").state_dict()
    model = load_run(last, "live").model
    live = recipe.model.pipe.transformer.state_dict()
    for name, tensor in model.pipe.transformer.state_dict().items():
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(live[name], tensor)


def test_a_checkpoint_does_not_need_the_adapters_that_it_began_with(
    trained: Path, tmp_path: Path, say: Callable[..., Any]
):
    from flowalign.cli import main

    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    state["flowalign"]["config"]["tune"]["start"] = str(tmp_path / "long_gone")
    torch.save(state, tmp_path / "moved.ckpt")
    assert say(main, "export", f"ckpt={tmp_path / 'moved.ckpt'}", f"to={tmp_path / 'export'}")[0] == 0
    code, _, err = say(main, "sample", f"ckpt={tmp_path / 'moved.ckpt'}", "prompt=a", "weights=base")
    assert code == 2
    assert "long_gone is neither a file" in err


def test_merged_adapters_are_the_adapted_model(trained: Path, tmp_path: Path, say: Callable[..., Any]):
    from diffusers import SD3Transformer2DModel

    from flowalign.cli import main
    from flowalign.commands.saved import load_run

    last = str(trained / "checkpoints" / "last.ckpt")
    assert say(main, "export", f"ckpt={last}", f"to={tmp_path}", "merge=true")[0] == 0
    pipe = plain_pipeline()
    base = picture(pipe)
    pipe.transformer = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    assert not any("lora" in name for name, _ in pipe.transformer.named_parameters())
    assert (picture(pipe) - picture(load_run(last, "live").model.pipe)).abs().max() < 1e-4
    assert (picture(pipe) - base).abs().max() > 1e-3


@pytest.mark.parametrize("interval", [1, 8])
def test_an_average_that_has_not_moved_yet_is_told_of(
    of_ones_own: Path, tmp_path: Path, say: Callable[..., Any], caplog: pytest.LogCaptureFixture, interval: int
):
    from flowalign.cli import main

    state = torch.load(of_ones_own / "checkpoints" / "last.ckpt", weights_only=True)
    state["flowalign"]["config"]["frozen"]["ema"]["interval"] = interval
    torch.save(state, tmp_path / "last.ckpt")
    assert say(main, "export", f"ckpt={tmp_path / 'last.ckpt'}", f"to={tmp_path / 'export'}")[0] == 0
    told = (
        "frozen.ema follows every 8 optimiser steps, and there were 2: it still holds the weights from before training"
    )
    assert (told in caplog.text) == (interval == 8)


def test_a_card_tells_base_recipe_curve_and_rewards(trained: Path, tmp_path: Path, say: Callable[..., Any]):
    from flowalign.cli import main

    last = trained / "checkpoints" / "last.ckpt"
    assert say(main, "export", f"ckpt={last}", f"to={tmp_path}")[0] == 0
    card = (tmp_path / "README.md").read_text()
    for said in ("`tiny_sd3`", "NFT with CPS, 1 epochs", "| reward | Shapes; watched beside it: strict, quality |"):
        assert said in card
    summary = json.loads((trained / "summary.json").read_text())
    curve = next(line for line in card.splitlines() if line.startswith("| reward | 0"))
    assert curve == f"| reward | {summary['baseline']['val/reward']:.3f} | {summary['final']['val/reward']:.3f} |"


def test_a_card_needs_no_held_out_rewards(trained: Path, tmp_path: Path, say: Callable[..., Any]):
    """Most options of the group have none; and a Measure stands for the reward inside it."""
    from flowalign.cli import main

    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    del state["flowalign"]["config"]["reward"]["held_out"]
    jpeg = {"_target_": "flowalign.rewards.jpeg.Jpeg"}
    state["flowalign"]["config"]["reward"]["objective"] = {
        "size": {"_target_": "flowalign.scoring.Measure", "reward": jpeg, "weight": 2.0},
    }
    torch.save(state, tmp_path / "bare.ckpt")
    assert say(main, "export", f"ckpt={tmp_path / 'bare.ckpt'}", f"to={tmp_path / 'export'}")[0] == 0
    assert "| reward | Jpeg; watched beside it: nothing |" in (tmp_path / "export" / "README.md").read_text()


@pytest.fixture(scope="module")
def saved(trained: Path) -> SavedRun:
    """The trained run, whose config a test may replace."""
    from flowalign.commands.saved import load_run

    return load_run(str(trained / "checkpoints/last.ckpt"), "live")


CARDS = sorted(
    f"{group}={path.stem}"
    for group in ("algo", "experiment", "reward")
    for path in (ROOT / "conf" / group).glob("*.yaml")
)


def test_a_card_names_the_reward_that_another_one_wraps(saved: SavedRun, compose: Callable[..., DictConfig]):
    from flowalign.commands.export import card

    config = compose("reward=pickscore_video", "resolution.eval.height=64", "resolution.eval.width=64")
    said = "| reward | Frames(PickScore); watched beside it: motion, smoothness |"
    assert said in card(replace(saved, config=config), lora=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("reward=shapes_light", "reward.weights.light=0.25"), "1 × Shapes, 0.25 × Brightness"),
        (
            (
                *("reward=several", "+reward@reward.parts.light=shapes_light", "+reward@reward.parts.jpeg=jpeg"),
                *("+reward.weights.light=4", "reward.parts.light.weights.shapes=0.5"),
                "reward.parts.light.weights.light={_target_:flowalign.scoring.Ramp,epochs:[0,9],values:[0,0.25]}",
            ),
            "2 × Shapes, 1 × Brightness, 1 × Jpeg",
        ),
    ],
)
def test_a_card_names_the_weights_of_several_rewards(
    saved: SavedRun, compose: Callable[..., DictConfig], words: tuple[str, ...], said: str
):
    from flowalign.commands.export import card

    config = compose(*words)
    assert f"| reward | {said}; watched" in card(replace(saved, config=config), lora=True)
    assert list(final_weights(config.reward).values()) == instantiate(config.reward).weights().tolist()


def test_a_card_names_the_recipe_of_the_run(saved: SavedRun, tmp_path: Path):
    from flowalign.commands.export import card

    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "hydra.yaml").write_text("hydra: {runtime: {choices: {experiment: published_nft}}}\n")
    text = card(replace(saved, path=tmp_path / "checkpoints" / "last.ckpt"), lora=True)
    assert "| recipe | `experiment=published_nft`: NFT with CPS" in text
    assert "experiment=" not in card(saved, lora=True)


@pytest.mark.parametrize("word", CARDS)
def test_a_run_of_every_option_has_a_card(saved: SavedRun, compose: Callable[..., DictConfig], word: str):
    from flowalign.commands.export import card

    size = ("resolution.eval.height=64", "resolution.eval.width=64")  # the run's model is small
    text = card(replace(saved, config=compose(word, *size)), lora=True)
    assert all(f"\n| {fact} | " in text for fact in ("base", "recipe", "weights", "reward", "judged with"))


def test_the_code_of_a_card_finds_its_base_from_anywhere(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A base in a folder that the run named from where it started; and the commit of one on the hub."""
    from flowalign.commands.export import card, export
    from flowalign.commands.saved import load_run

    (tmp_path / "bases").mkdir()
    (tmp_path / "bases/mine").symlink_to(ROOT / "flowalign/assets/tiny_sd3")
    state = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)
    state["flowalign"]["config"]["model"]["pretrained"] = "bases/mine"
    torch.save(state, tmp_path / "local.ckpt")
    monkeypatch.chdir(tmp_path)
    export("local.ckpt", "export")
    text = (tmp_path / "export/README.md").read_text()
    assert "base_model" not in text  # the hub refuses a README.md whose base is a folder
    monkeypatch.chdir(tmp_path / "export")
    space: dict[str, Any] = {}
    exec(text.split("```python")[1].split("```")[0], space)
    assert "default_0" in space["pipe"].transformer.peft_config
    saved = load_run(str(trained / "checkpoints/last.ckpt"), "live")
    saved.model.pretrained = "org/base"
    saved.config.model.revision, saved.config.model.variant = "0a1b2c", None
    hub = card(saved, lora=True)
    assert "base_model: org/base\n" in hub
    assert 'from_pretrained("org/base", revision="0a1b2c", text_encoder_3=None, tokenizer_3=None)' in hub


def test_evaluate_gives_the_figures_of_the_run_again(trained: Path, tmp_path: Path, say: Callable[..., Any]):
    from flowalign.cli import main

    last = trained / "checkpoints" / "last.ckpt"
    summary = json.loads((trained / "summary.json").read_text())
    for weights, phase in (("live", "final"), ("base", "baseline")):
        folder = tmp_path / weights
        assert say(main, "evaluate", f"ckpt={last}", f"weights={weights}", f"to={folder}")[0] == 0
        scores = json.loads((folder / "summary.json").read_text())["scores"]
        for name in ("reward", "strict", "quality", "quality/two"):
            assert scores[name] == pytest.approx(summary[phase][f"test/{name}"], abs=1e-5), (weights, name)
        rows = (folder / "scores.csv").read_text().splitlines()
        assert set(rows[0].split(",")) == {"sample", "picture", "prompt", "tag", "reward", "strict", "quality"}
        assert len(rows) == 1 + 4
        assert Image.open(folder / "pictures.png").width > 64


def test_evaluate_has_the_precision_and_the_weights_of_the_run(
    of_ones_own: Path, tmp_path: Path, say: Callable[..., Any]
):
    from flowalign.cli import main

    figures = json.loads((of_ones_own / "summary.json").read_text())["final"]
    words = (f"ckpt={of_ones_own / 'checkpoints' / 'last.ckpt'}", f"to={tmp_path / 'judged'}")
    assert say(main, "evaluate", *words)[0] == 0
    scores = json.loads((tmp_path / "judged" / "summary.json").read_text())["scores"]
    assert [scores[name] for name in ("reward", "quality")] == [
        pytest.approx(figures[f"test/{name}"], abs=1e-6) for name in ("reward", "quality")
    ]
    assert say(main, "evaluate", words[0], "weights=live", f"to={tmp_path / 'live'}")[0] == 0
    live = json.loads((tmp_path / "live" / "summary.json").read_text())["scores"]
    assert abs(live["quality"] - scores["quality"]) > 1e-3


def test_evaluate_refuses_a_prompt_that_cannot_be_scored_before_it_samples(
    trained: Path, tmp_path: Path, say: Callable[..., Any]
):
    from flowalign.cli import main

    (tmp_path / "asked.txt").write_text('the word "red"\ntwo red circles\n')
    words = (f"prompts={tmp_path / 'asked.txt'}", "reward=ocr", f"to={tmp_path / 'judged'}")
    code, out, err = say(main, "evaluate", f"ckpt={trained}", *words)
    assert (code, out) == (2, "")
    assert "asked.txt:2: reward `reward` (OCR): the OCR reward looks for a text" in err
    assert not (tmp_path / "judged").exists()


def test_sample_reads_a_file_of_prompts_and_compares_with_the_base(
    trained: Path, tmp_path: Path, say: Callable[..., Any]
):
    from flowalign.cli import main

    (tmp_path / "asked.txt").write_text("two red circles\n\na blue square\n")
    words = (f"ckpt={trained / 'checkpoints' / 'last.ckpt'}", f"prompts={tmp_path / 'asked.txt'}", "steps=1")
    words = (f"ckpt={trained}", *words[1:])  # a run's folder stands for its last checkpoint
    code, out, _ = say(main, "sample", *words, f"to={tmp_path / 'p.png'}", "compare=true")
    assert code == 0
    assert [Path(line).name for line in out.split()] == ["p_0.png", "p_1.png", "p_compare.png"]
    assert Image.open(tmp_path / "p_compare.png").height > 2 * 132


def test_help_is_of_one_command_where_one_is_named(say: Callable[..., Any]):
    from flowalign.cli import main

    code, out, _ = say(main, "sample", "--help")
    assert code == 0
    assert out.startswith("flowalign sample ckpt=…")
    assert "flowalign export" not in out
    assert "flowalign export" in say(main, "--help")[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("sample", "prompt=a"), "flowalign sample needs ckpt=…"),
        (("sample", "ckpt={last}"), "needs either prompt=… or prompts=FILE"),
        (("sample", "ckpt={last}", "prompts=nowhere.txt"), "there is no prompt file nowhere.txt"),
        (("sample", "ckpt={last}", "prompt=a", "to=a.mp4"), "a.mp4 cannot hold a picture"),
        (("sample", "ckpt={last}", "prompt=a", "compare=perhaps"), "compare takes true or false, and not 'perhaps'"),
        (("sample", "ckpt={last}", "prompt=a", "num=-1"), "makes num=1 or more pictures"),
        (("sample", "ckpt={last}", "prompt=a", "to=/proc/x/a.png"), "to=/proc/x/… cannot be written"),
        (("evaluate", "ckpt={last}", "split=train"), "split is val or test"),
        (("evaluate", "ckpt={last}", "num=-1"), "num=-1 is less than 0"),
        (("evaluate", "ckpt={last}", "prompts=nowhere.txt"), "there is no prompt file nowhere.txt"),
        (("export", "ckpt={last}", "to=x", "weights=base"), "there is nothing to export"),
        (("export", "ckpt=README.md", "to=x"), "ckpt=README.md cannot be read as a checkpoint"),
        (("sample", "ckpt=nowhere.ckpt", "prompt=a"), "ckpt=nowhere.ckpt does not exist"),
        (("sample", "ckpt={last}", "prompt=a", "stepz=3"), "did you mean steps=…?"),
        (("sample", "ckpt={last}", "prompt=a", "steps=few"), "steps takes a int, and not 'few'"),
        (("sample", "ckpt={last}", "prompt=a", "size=70"), "the nearest is 72×72"),
        (("export", "ckpt={last}", "to=x", "weights=ema"), "the checkpoint holds live, old, reference, base"),
        (("exports",), "there is no command 'exports'; did you mean export? There are sample, evaluate"),
    ],
)
def test_a_mistaken_command_ends_with_one_sentence(
    trained: Path, say: Callable[..., Any], words: tuple[str, ...], sentence: str
):
    from flowalign.cli import main

    last = str(trained / "checkpoints" / "last.ckpt")
    code, _, err = say(main, *(word.replace("{last}", last) for word in words))
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1


# ------------------------------------------------------------ wrong input of train.py

WRONG = [
    (("algo=ntf",), "nft"),
    (("algo.kl_bta=0.1",), "kl_beta"),
    (("algo.kl_beta=abc",), "expected a float"),
    (("algo=grpo", "dynamics=ode"), "use dynamics=flow_sde, or algo=nft"),
    (("batch.group_size=1",), "use at least 2"),
    (("batch.micro=7",), "use batch.micro=8"),
    (
        ("batch.prompts=5", "trainer.devices=8", "batch.micro=4", "algo=grpo"),
        "batch.prompts=8 and batch.micro=3 together",
    ),
    (("rolout.num_steps=3",), "rollout"),
    (("dynamics.eta=0.3,0.7", "dynamics=cps"), "add -m"),
    (("algo=grpo", "optimisation.guidance=4"), "rollout.guidance"),
    (("algo.adv_mode=some",), "adv_mode"),
    (("reward=[pickscore,hpsv3x]",), "no reward called hpsv3x; did you mean hpsv3?"),
    (("reward=[jpeg,jpeg]",), "reward=[jpeg,jpeg] names jpeg twice: name it once, with reward.weights.jpeg=2"),
    (("reward=[jpeg,brightness]", "reward.weights.light=2"), "unknown option reward.weights.light"),
    (("reward=[jpeg,brightness],[jpeg,shapes]", "-m"), "reward=[jpeg,brightness] cannot be one value of a sweep"),
    (("reward=several",), "reward.parts needs a value"),
    (("model=[tiny_sd3,sana]",), "would mix options that exclude each other"),
    (("data=folder,shapes",), "data=folder,shapes gives several values: add -m"),
    (("trainer.accumulate_grad_batches=4",), "it follows from the batch plan, so choose batch.updates"),
    (("+trainer.accumulate_grad_batches=4",), "it follows from the batch plan, so choose batch.updates"),
    (("+trainer.logger=false",), "use the group logger=…"),
    (("tune.rank=8",), "tune=full has no rank, but tune=lora has one"),
    (("algo.clip=1e-5",), "algo=nft has no clip, but algo="),
    (("seed=-1",), "seed is a whole number from 0 to 4294967295"),
    (("seed=1.5",), "seed is a whole number from 0 to 4294967295 (got 1.5)"),
    (("seed=4294967296",), "seed is a whole number from 0 to 4294967295"),
    (("optimizer.lr=abc",), "optimizer.lr is a number"),
    (("evaluation.num_val=0",), "num_val is a number of images"),
    (("frozen.old.decay=2",), "decay.kind=0, 1 or 2"),
    (("rollout.guidance=nan",), "guidance must be 0 or more"),
    (("trainer.max_epochs=-1",), "use schedule.kind=constant, or set trainer.max_steps"),
    (("trainer.check_val_every_n_epoch=0",), "counts epochs"),
    (("schedule.floor=2",), "in [0, 1]"),
    (("trainer.max_epochs=abc",), "trainer.max_epochs"),
    (("trainer.check_val_every_n_epoch=abc",), "trainer.check_val_every_n_epoch"),
    (("encoding.keep_gib=-1",), "keep_gib at least 0"),
    (("optimisation.max_skipped=-1",), "bounds are 0 or more"),
    (("tune=lora", "tune.alpha=-3"), "must be positive"),
    (("trainer.precision=16-true",), "use trainer.precision=16-mixed"),
    (("model=sd3_5_medium",), "model=sd3_5_medium loads them in bfloat16: use model.train_dtype=float32"),
    (
        ("model=wan2_2_t2v", "tune=lora", "trainer.devices=2", "batch.updates=1", "resolution=64"),
        "has several denoisers, and not every batch uses each of them: use trainer.strategy=ddp_find_unused",
    ),
]
"""Mistakes that the config alone shows."""
LATE = [
    (("ckpt_path=nowhere.ckpt",), "ckpt_path=nowhere.ckpt does not exist"),
    (("dynamics=cps", "dynamics.eta=2.5"), "dynamics: CPS needs eta in [0, 2)"),
    (("model.pretrained=tiny_sd4",), "tiny_sd4 is neither a folder"),
    (("optimized_metric=val/rewad", "test=false"), "optimized_metric=val/rewad was not measured"),
    (("data.val.path=nowhere.jsonl",), "there is no prompt file nowhere.jsonl; embedded ones are shapes/test.jsonl"),
    (("resolution.eval.height=70",), "the nearest is 72×64"),
    (("model.dtyp=float16",), "dtyp"),
]
"""Mistakes that a class sees when it is made."""


@pytest.mark.parametrize(("words", "hint"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_a_mistake_in_the_config_ends_with_one_sentence_and_code_2(
    say: Callable[..., Any], words: tuple[str, ...], hint: str
):
    from flowalign.run import main

    code, _, err = say(main, *words)
    assert code == 2
    assert hint in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("words", "hint"), WRONG + LATE, ids=[" ".join(words) for words, _ in WRONG + LATE])
def test_a_mistake_ends_the_real_command_with_code_2_and_no_trace(tmp_path: Path, words: tuple[str, ...], hint: str):
    # Hints name numbers of the default batches; what the config alone shows is refused before anything of their size.
    as_it_is = (words, hint) in WRONG
    done = command("train.py", f"hydra.run.dir={tmp_path}", *words) if as_it_is else train(tmp_path, *words)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said[-2000:]
    assert hint in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_mistake_that_a_class_sees_is_told_in_its_words(tiny: Callable[..., Any]):
    from flowalign.run import instantiate

    with pytest.raises(ConfigError, match=r"^dynamics: CPS needs eta in \[0, 2\)"):
        instantiate(tiny("dynamics=cps", "dynamics.eta=2.5").dynamics)
    with pytest.raises(ConfigError, match="^model: .*dtyp"):
        instantiate(tiny("+model.dtyp=float16").model)


# ------------------------------------------------------------ more real commands


@pytest.mark.slow
def test_a_sweep_runs_every_combination_in_its_own_folder(tmp_path: Path):
    sweep = ("algo=grpo", "dynamics.eta=0.3,0.7", "algo.kl_beta=0,0.04", "trainer.fast_dev_run=true")
    done = command("train.py", "-m", *settled(*TINY, *sweep, f"hydra.sweep.dir={tmp_path}"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["0", "1", "2", "3"]
    assert len(list(tmp_path.glob("*/summary.json"))) == 4
    assert f"val/reward, best first (all metrics: {tmp_path}/sweep.csv):" in done.stdout
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 5


@pytest.mark.slow
@pytest.mark.parametrize("words", [("tune=full",), ("debug=fdr",), ("debug=limit",), ("algo=grpo", "steps=random")])
def test_other_commands_of_the_readme_finish(tmp_path: Path, words: tuple[str, ...]):
    done = train(tmp_path, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "summary.json").is_file()


def test_a_resumed_command_goes_on_and_still_knows_what_was_before(trained: Path, tmp_path: Path):
    """Figures and pictures; the checkpoint is named as one does inside its folder."""
    words = settled(*TINY, f"hydra.run.dir={tmp_path}", *WORDS, "trainer.max_epochs=2", "ckpt_path=last.ckpt")
    done = command(str(ROOT / "train.py"), *words, cwd=trained / "checkpoints")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (trained, tmp_path))
    assert after["epochs"] == 2
    assert after["samples"] == 8
    assert after["baseline"] == before["baseline"]
    one, other = (np.asarray(Image.open(folder / "before_after.png")) for folder in (trained, tmp_path))
    half = len(one) // 2  # pictures of before lie above those of after
    assert np.array_equal(one[:half], other[:half])
    assert not np.array_equal(one[half:], other[half:])


@pytest.mark.slow
def test_a_checkpoint_is_judged_without_training(trained: Path, tmp_path: Path):
    last = trained / "checkpoints" / "last.ckpt"
    done = train(tmp_path, *WORDS, "train=false", f"ckpt_path={last}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (trained, tmp_path))
    assert after["final"] == pytest.approx(before["final"], abs=1e-5)
    assert [after[key] for key in ("epochs", "optimiser_steps", "samples")] == [1, 2, before["samples"]]


@pytest.mark.slow
def test_the_installed_commands_sample_and_export(trained: Path, tmp_path: Path):
    last = trained / "checkpoints" / "last.ckpt"
    done = command(
        "-m", "flowalign.cli", "sample", f"ckpt={last}", "prompt=two red circles", f"to={tmp_path / 'a.png'}"
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "a.png").size == (64, 64)
    done = command("-m", "flowalign.cli", "export", f"ckpt={last}", f"to={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").glob("*.safetensors"))
