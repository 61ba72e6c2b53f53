"""The measuring programs run and their figures hang together."""

from __future__ import annotations

import gc
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from bench.growth import FACTORS, fit, fits, plot, report, tokens
from bench.measuring import told
from bench.memory import ALLOCATORS, growth, held_points
from bench.rows import Rows, markdown
from bench.time_to_quality import figures, reached, standard_error
from bench.utilisation import flops_a_point, mfu, peak_of
from flowalign.buffer import Buffer
from tests.conftest import ROOT, TINY


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


def call(program: str, *words: str, fails: bool = False) -> None:
    """A measuring program as its own process."""
    done = subprocess.run([sys.executable, f"bench/{program}.py", *words], cwd=ROOT, timeout=900)
    assert (done.returncode != 0) == fails


# ------------------------------------------------------------ rows


def test_rows_of_an_earlier_call_are_kept_and_failed_ones_are_measured_again(tmp_path: Path):
    first = Rows(tmp_path / "some.json", about="this")
    first.add({"model": "a", "failed": None, "s": 1.0})
    first.add({"model": "b", "failed": "no memory", "s": None})
    later = Rows(tmp_path / "some.json")
    assert later.has(model="a")
    assert not later.has(model="b")
    assert not later.has(model="a", s=2.0)
    later.add({"model": "b", "failed": None, "s": 2.0}, "model")
    assert [row["s"] for row in rows_of(tmp_path / "some.json")] == [1.0, 2.0]


def test_a_table_leaves_empty_what_was_not_measured():
    rows = [{"a": 1234, "b": None, "c": True}, {"a": 0.123456, "b": "x", "c": False}]
    assert markdown(rows) == "| a | b | c |\n|---|---|---|\n| 1,234 |  | yes |\n| 0.1235 | x | no |"


# ------------------------------------------------------------ epochs


@pytest.mark.slow
def test_the_bench_measures_floor_and_epoch(tmp_path: Path):
    command = [
        sys.executable,
        "bench/epoch.py",
        "--epochs",
        "1",
        "--only",
        "nft_lora",
        "grpo_full",
        "--to",
        str(tmp_path),
    ]
    ours = ("tune=", "trainer.max_epochs", "trainer.check_val")  # the bench sets these itself
    tiny = [o for o in TINY if not o.startswith(ours)]
    subprocess.run([*command, *tiny], cwd=ROOT, check=True, timeout=600)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["workload"] for row in rows] == ["nft_lora", "grpo_full"]
    for row in rows:
        assert 0 < row["floor_s"] < 2 * row["actual_s"]
        assert row["efficiency"] == pytest.approx(row["floor_s"] / row["actual_s"], rel=0.01)
        assert row["images_per_s"] == pytest.approx(4 / row["actual_s"], rel=0.01)
        assert row["peak_rss_mb"] > 100
        assert row["raw_fwd_units"] > 4  # four steps at the very least


@pytest.mark.slow
def test_an_epoch_is_given_in_bare_forwards(tmp_path: Path):
    """The workload of the other systems, cut short: 8 pictures in 3 steps, 2 of them trained on."""
    few = ("batch.prompts=1", "batch.updates=1", "rollout.num_steps=3")
    command = [sys.executable, "bench/baseline.py", "--epochs", "1", "--only", "nft_lora", "--to", str(tmp_path), *few]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    (row,) = json.loads((tmp_path / "baseline.json").read_text())["rows"]
    assert (row["workload"], row["epochs"], row["compiled"]) == ("nft_lora", 1, False)
    assert row["units"] == pytest.approx(row["rollout_units"] + row["optimise_units"], abs=0.2)
    assert row["rollout_units"] > 2  # three forwards, on a machine that others disturb
    assert row["units"] == pytest.approx(row["epoch_s"] / row["forward_s"], rel=0.05)
    assert row["first_epoch_s"] > 0


# ------------------------------------------------------------ growth


def test_a_power_law_is_recovered():
    amounts = [2, 4, 8, 16]
    exact = fit(amounts, [3 * a**1.5 for a in amounts])
    assert exact.exponent == pytest.approx(1.5)
    assert exact.scale == pytest.approx(3)
    assert exact.error == pytest.approx(0, abs=1e-7)


def test_the_error_of_an_exponent_is_that_of_a_straight_line():
    """log2: y = 0, 1, 1 at x = 0, 1, 2 has slope 1/2 and residuals 1/6 times -1, 2, -1; their square sum is 1/6."""
    line = fit([1, 2, 4], [1, 2, 2])
    assert line.exponent == pytest.approx(0.5)
    assert line.error == pytest.approx(math.sqrt(1 / 6 / 2))
    assert fit([1, 2], [1, 2]).error is None
    with pytest.raises(ValueError, match="two different"):
        fit([4, 4], [1, 2])


def test_every_factor_has_four_values_at_least():
    assert all(len({factor.amount(v) for v in factor.values}) >= 4 for factor in FACTORS.values())
    assert tokens(64) == 128  # 64 of the picture and 32 of each text encoder


def test_growth_is_told_by_factor_and_drawn(tmp_path: Path):
    rows = [
        {"factor": name, "amount": a, "rollout_s": 0.1 * a**power, "optimise_s": a}
        for name, power in (("steps", 1), ("tokens", 2))
        for a in (1, 2, 4)
    ]
    found = fits(rows)
    assert found["tokens"]["rollout"].exponent == pytest.approx(2)
    assert found["steps"]["optimise"].exponent == pytest.approx(1)
    assert report(rows).splitlines()[2].startswith("| tokens | 1, 2, 4 | 0.1, 0.4, 1.6 | 2.00 ± 0.00 |")
    plot(tmp_path / "growth.png", rows)
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_growth_over_the_steps_of_the_walk_is_measured_once(tmp_path: Path):
    words = ("--workload", "nft_lora", "--only", "steps", "--values", "3", "7", "--epochs", "1", "--to", str(tmp_path))
    few = ("batch.prompts=1", "batch.micro=4")
    call("growth", *words, *few)
    found = json.loads((tmp_path / "growth.json").read_text())
    assert [(row["value"], row["amount"]) for row in found["rows"]] == [(3, 3), (7, 7)]
    assert found["rows"][1]["rollout_s"] > found["rows"][0]["rollout_s"] > 0
    assert found["fits"]["steps"]["rollout"]["exponent"] > 0
    assert "steps" in (tmp_path / "growth.md").read_text()
    assert (tmp_path / "growth.png").is_file()
    call("growth", *words, *few)
    assert json.loads((tmp_path / "growth.json").read_text())["rows"] == found["rows"]


# ------------------------------------------------------------ memory


def test_growth_of_memory_compares_the_end_with_what_follows_the_beginning():
    assert growth([9.0] * 20 + [1.0] * 100 + [1.5] * 20) == 1.5
    assert growth([0, 2, 2, 3], window=1) == 1.5
    with pytest.raises(ValueError, match="need 60 epochs"):
        growth([1.0] * 59)


def trained(cfg: Any, *callbacks: Callback) -> Any:
    """The module after its epochs."""
    from flowalign.module import AlignModule
    from flowalign.run import build_recipe, build_trainer, plan_accumulation

    recipe = build_recipe(cfg)
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
    trainer.fit(module)
    return module


@pytest.mark.parametrize("algo", ["grpo", "mixgrpo"])
def test_the_buffer_holds_the_trained_steps_and_nothing_else(tiny: Any, algo: str):
    cfg = tiny(f"algo={algo}", "rollout.num_steps=6", "batch.micro=2", "batch.updates=1", "~reward.held_out")
    module = trained(cfg)
    found = held_points(module)
    assert found["trained_steps"] < found["steps"] == 6
    assert found["points"] == 4 * found["trained_steps"]
    assert found["only_trained_steps"]
    module.buffer.points.x = torch.zeros(100, *module.buffer.points.x.shape[1:])[: found["points"]]
    assert not held_points(module)["only_trained_steps"]  # a view of a hundred rows


class Census(Callback):
    """How many tensors and modules are alive after each epoch but the first, and their elements."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.current_epoch:  # which encodes the prompts
            return
        gc.collect()
        alive = [o for o in gc.get_objects() if issubclass(type(o), (torch.Tensor, Buffer, torch.nn.Module))]
        tensors = [o for o in alive if issubclass(type(o), torch.Tensor)]
        self.counts.append((len(alive), sum(t.numel() for t in tensors)))


@pytest.mark.parametrize("algo", ["grpo", "nft"])
def test_no_epoch_leaves_a_tensor_behind(tiny: Any, algo: str):
    census = Census()
    trained(tiny(f"algo={algo}", "trainer.max_epochs=3", "data.train.limit=2", "batch.micro=2"), census)
    assert len(census.counts) == 2
    assert len(set(census.counts)) == 1, census.counts


@pytest.mark.slow
def test_the_peak_of_memory_is_measured_beside_its_plan(tmp_path: Path):
    words = ("--parts", "plan", "--only", "grpo_full", "--model", "8M", "--to", str(tmp_path))
    call("memory", *words, "batch.prompts=1", "batch.micro=4", "rollout.num_steps=3")
    rows = rows_of(tmp_path / "memory_plan.json")
    assert [(row["workload"], row["allocator"]) for row in rows] == [("grpo_full", name) for name in ALLOCATORS]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["measured_mib"] / row["planned_mib"], rel=0.01)
        assert row["planned_mib"] == pytest.approx(sum(row["plan_mib"].values()), abs=1)
        assert row["measured_mib"] > 4 * 7.7e6 * 4 / 2**20  # weights, gradients and two moments at the least
    assert rows[1]["ratio"] < 1.5  # where memory that is not in use is not resident


@pytest.mark.slow
def test_memory_is_weighed_after_every_epoch(tmp_path: Path):
    # So few epochs may grow: whether they do is not asked.
    words = ("--parts", "growth", "buffer", "--only", "nft_lora", "--epochs", "6", "--to", str(tmp_path))
    subprocess.run([sys.executable, "bench/memory.py", *words], cwd=ROOT, timeout=900)
    (found,) = rows_of(tmp_path / "memory_growth.json")
    assert len(found["mib"]) == 6
    assert min(found["mib"]) > 100
    assert all(row["only_trained_steps"] for row in rows_of(tmp_path / "memory_buffer.json"))


# ------------------------------------------------------------ accelerators


def test_utilisation_is_needed_flops_by_possible_ones():
    assert mfu(2e12, points=50, seconds=10.0, peak=100e12) == pytest.approx(0.1)
    assert mfu(None, 50, 10.0, 100e12) is None
    assert mfu(2e12, 50, 10.0, None) is None


def test_peaks_are_known_by_the_name_of_the_device():
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16-mixed") == 989e12
    assert peak_of("NVIDIA H100 PCIe", "bf16-mixed") == 756e12
    assert peak_of("NVIDIA H100 80GB HBM3", "32-true") is None
    assert peak_of("cpu", "bf16-mixed") is None


def test_a_point_takes_three_forwards_and_checkpointing_adds_none(tiny: Any):
    """Full fine-tuning: a backward of a product is two products. The very first one has no gradient of its input."""
    plain, again = (
        flops_a_point(trained(tiny("tune=full", "~reward.held_out", f"running.gradient_checkpointing={flag}")))
        for flag in ("false", "true")
    )
    assert plain is not None
    assert again is not None
    # What is outside of the blocks is not run again and is yet taken off.
    assert 0.9 * plain < again <= plain


def test_an_exception_of_another_process_can_be_read():
    def breaks() -> None:
        class OwnError(Exception):  # which cannot be pickled, and hides what happened behind a broken process
            pass

        raise OwnError("no such thing")

    with pytest.raises(RuntimeError, match="OwnError: no such thing") as caught:
        told(breaks)
    assert str(pickle.loads(pickle.dumps(caught.value))) == "OwnError: no such thing"


@pytest.mark.slow
def test_the_bench_of_large_models_runs_at_small_sizes(tmp_path: Path):
    words = ("--tiny", "--to", str(tmp_path), "trainer.accelerator=cpu")
    sliced = ("--algorithms", "grpo", "nft", "--tunes", "lora")
    call("gpu", *words, *sliced)
    rows = rows_of(tmp_path / "gpu.json")
    assert [(row["model"], row["algo"]) for row in rows] == [
        (model, algo) for model in ("sd3_5_medium", "flux1_dev", "wan2_1_t2v") for algo in ("grpo", "nft")
    ]
    for row in rows:
        assert row["failed"] is None
        assert row["samples_per_s"] == pytest.approx(row["samples"] / row["epoch_s"])
        assert row["epoch_s"] == pytest.approx(row["rollout_s"] + row["frozen_s"] + row["optimise_s"])
        assert row["step_s"] == pytest.approx(row["optimise_s"] / 2)
        assert row["tflops_a_point"] > 0
        assert row["mfu"] is None
        assert row["planned_gib"] > 0
        if row["algo"] == "grpo":
            assert row["on_policy_gap"] < 1e-5


@pytest.mark.slow
def test_a_row_that_fails_says_so_and_the_others_go_on(tmp_path: Path):
    """A micro-batch of 16 cuts the 16 points of a window of two steps, and not the 24 of three."""
    words = ("--tiny", "--only", "sd3_5_medium", "--algorithms", "flow_grpo_fast", "mixgrpo", "--tunes", "full")
    run = ("trainer.accelerator=cpu", "trainer.precision=bf16-mixed", "batch.micro=16", "batch.updates=1")
    call("gpu", *words, "--peak-tflops", "1", "--to", str(tmp_path), *run, fails=True)
    fast, window = rows_of(tmp_path / "gpu.json")
    assert "batch.micro" in fast["failed"]
    assert fast["epoch_s"] is None
    assert window["failed"] is None
    assert 0 < window["mfu"] < 1


# ------------------------------------------------------------ quality, starting


COURSE = {
    "base": 0.4,
    "pictures": 100,
    "points": [
        {"epoch": 2, "train_s": 60.0, "value": 0.55},
        {"epoch": 4, "train_s": 120.0, "value": 0.6},
        {"epoch": 6, "train_s": 180.0, "value": 0.5},
        {"epoch": 8, "train_s": 240.0, "value": 0.7},
    ],
}


def test_a_gain_is_reached_at_the_first_evaluation_at_or_above_it():
    points = COURSE["points"]
    assert reached(points, 0.4, 0.2) == points[1]  # 0.4 + 0.2 > 0.6 in floating point
    assert reached(points, 0.4, 0.3) == points[3]
    assert reached(points, 0.4, 0.31) is None
    assert reached([], 0.4, 0.2) is None


def test_a_course_becomes_minutes():
    found = figures(COURSE)
    assert (found["minutes_to_20"], found["minutes_to_30"]) == (2.0, 4.0)
    assert (found["base"], found["best"], found["epochs"], found["s_per_epoch"]) == (40.0, 70.0, 8, 30.0)
    assert found["error"] == pytest.approx(100 * math.sqrt(0.7 * 0.3 / 100), abs=0.01)
    assert standard_error(1.0, 10) == 0
    assert figures(COURSE | {"points": []})["minutes_to_20"] is None


@pytest.mark.slow
def test_time_to_quality_is_measured_without_the_evaluations_and_once(tmp_path: Path):
    ours = ("trainer.max_epochs", "trainer.check_val")
    tiny = [word for word in TINY if not word.startswith(ours)]
    words = ("--algorithms", "nft", "--epochs", "4", "--every", "2", "--threads", "1", "--to", str(tmp_path), *tiny)
    call("time_to_quality", *words)
    path = tmp_path / "time_to_quality.json"
    (found,) = rows_of(path)
    course = json.loads((tmp_path / "nft/seed0/course.json").read_text())
    assert [point["epoch"] for point in course["points"]][0] == 2
    whole = json.loads((tmp_path / "nft/seed0/summary.json").read_text())
    assert 0 < course["points"][-1]["train_s"] < whole["train_s"]
    assert found["base"] == pytest.approx(100 * whole["baseline"]["val/strict"], abs=0.01)
    assert found["pictures"] == course["pictures"] == 4
    written = path.stat().st_mtime_ns
    call("time_to_quality", *words)
    assert path.stat().st_mtime_ns == written


def test_a_run_ends_once_it_is_good_enough(tiny: Any, tmp_path: Path):
    from bench.clocks import Course

    course = Course(str(tmp_path / "course.json"), "val/strict", enough=-1.0)

    class Baseline(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.baseline = {"val/strict": 0.5}

    module = trained(tiny("trainer.max_epochs=5"), Baseline(), course)
    assert module.trainer.current_epoch == 1
    assert [point["epoch"] for point in json.loads((tmp_path / "course.json").read_text())["points"]] == [1]


@pytest.mark.slow
def test_the_moments_of_starting_follow_each_other(tmp_path: Path):
    call("startup", "--repeats", "1", "--to", str(tmp_path), *TINY)
    rows = rows_of(tmp_path / "startup.json")
    assert [row["what"] for row in rows][0] == "--help"
    moments = [row["median_s"] for row in rows[1:]]
    assert len(moments) == 4
    assert moments == sorted(moments)
    assert moments[0] > 0
