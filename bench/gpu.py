"""Large models at full size with random weights: `make bench-gpu`, or on any machine with --tiny.

One warm epoch of every model, algorithm and tune: throughput, time per phase, model FLOP utilisation of the
optimisation, deviation of the first ratio from 1 in bfloat16, and planned against measured peak memory. Every row is
measured in its own process and written to gpu.json at once; a configuration that fails or does not fit is a row that
says why. With --to the folder of an earlier call, its finished rows with the same overrides are not measured again.
Overrides: running.compile=true, batch.micro=8, rollout.guidance=4.5, and all others of train.py. --trace adds a third
epoch that torch.profiler records.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.measuring import QUIET, TEN_STEPS, alone, built, composed  # noqa: E402
from bench.rows import Rows, markdown, place  # noqa: E402
from bench.utilisation import flops_a_point, mfu, peak_of  # noqa: E402

GIB = 2**30
WARM = 1
"""Warm-up epochs before the measured one."""
SIZES = {"sd3_5_medium": (512, 512, None), "flux1_dev": (512, 512, None), "wan2_1_t2v": (480, 832, 33)}
TINY = {"sd3_5_medium": (32, 48, None), "flux1_dev": (32, 48, None), "wan2_1_t2v": (32, 48, 9)}
ALGORITHMS = {
    "grpo": ("algo=grpo", "steps=all"),
    "flow_grpo_fast": ("algo=flow_grpo_fast",),
    "mixgrpo": ("algo=mixgrpo",),
    "nft": ("algo=nft", *TEN_STEPS),
    "flowawr": ("algo=flowawr",),
}
"""Each with the steps that the method trains on: all of them, or a window."""
TUNES = ("lora", "full")
WEIGHTS = {"lora": "bfloat16", "full": "float32"}
"""Dtype of the denoiser. Full fine-tuning needs float32: an AdamW step is below the resolution of bfloat16."""


@dataclass
class Row:
    """One model, algorithm and tune. Seconds are those of the second epoch; None: not measured."""

    model: str
    algo: str
    tune: str
    overrides: str
    failed: str | None = None
    """Why there are no figures."""
    size: str | None = None
    parameters: int | None = None
    trained: int | None = None
    samples: int | None = None
    points: int | None = None
    """Training points of an epoch: images × trained steps."""
    micro: int | None = None
    guidance: float | None = None
    compiled: bool | None = None
    epoch_s: float | None = None
    rollout_s: float | None = None
    frozen_s: float | None = None
    optimise_s: float | None = None
    step_s: float | None = None
    """Seconds of the optimisation phase per optimiser step."""
    samples_per_s: float | None = None
    tflops_a_point: float | None = None
    mfu: float | None = None
    """Model FLOP utilisation of the optimisation phase."""
    planned_gib: float | None = None
    peak_gib: float | None = None
    on_policy_gap: float | None = None
    device: str | None = None
    precision: str | None = None
    weights: str | None = None
    """Dtype of the denoiser's weights."""


class DoesNotFitError(Exception):
    """The plan is larger than the device."""


def pipeline(model: str, tiny: bool, device: Any, dtype: Any) -> Any:
    if tiny:
        from importlib import import_module

        name = {"sd3_5_medium": "sd3", "flux1_dev": "flux1", "wan2_1_t2v": "wan2_1"}[model]
        return import_module(f"tests.models.tiny.{name}").build()
    from bench import full_size

    return getattr(full_size, model)(device, dtype)


def prepared(row: Row, tiny: bool, folder: Path) -> tuple[Any, Any]:
    """Module and trainer of a short run on the random pipeline."""
    import torch

    import flowalign.models.base as base
    from flowalign.dtypes import torch_dtype

    cuda = torch.cuda.is_available()
    dtype, weights = ("float32", "float32") if tiny else ("bfloat16", WEIGHTS[row.tune])
    (folder / "prompts.txt").write_text("two red circles\na blue square above a green triangle")
    cfg = composed([
        f"model={row.model}", *ALGORITHMS[row.algo], f"tune={row.tune}", "reward=jpeg", *QUIET,
        f"model.dtype={dtype}", f"model.train_dtype={weights}", "model.max_sequence_length=128",
        "batch.prompts=2", "batch.group_size=4", "batch.micro=4", "batch.updates=2", "rollout.batch_size=8",
        "evaluation.num_val=2", "evaluation.num_test=2", "evaluation.shown=2", "evaluation.sampling.num_steps=2",
        f"trainer.max_epochs={WARM + 1}", f"trainer.accelerator={'gpu' if cuda else 'cpu'}",
        f"trainer.precision={'32-true' if tiny else 'bf16-mixed'}", f"paths.output_dir={folder}",
        f"running.gradient_checkpointing={str(not tiny).lower()}", "encoding.cache=null", *row.overrides.split(),
    ])  # fmt: skip
    size = [n for n in (TINY if tiny else SIZES)[row.model] if n is not None]
    for part in ("train", "eval"):
        cfg.resolution[part] = size
    for stage in ("train", "val", "test"):
        cfg.data[stage] = {"_target_": "flowalign.prompts.PromptSet.read", "path": str(folder / "prompts.txt")}
    device = torch.device("cuda" if cuda else "cpu")
    row.weights = cfg.model.train_dtype
    base.load_pipeline = lambda *_: pipeline(row.model, tiny, device, torch_dtype(dtype))  # nothing to download
    return built(cfg)


def synchronised() -> float:
    """The clock in seconds, read after synchronising the accelerator."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def weigh(module: Any, keep: Callable[[int], None]) -> None:
    """Report the planned bytes to `keep`. Raises DoesNotFitError if the device has less memory."""
    import torch

    module.recipe.model.to(module.device)  # as the module itself does a little later
    planned = sum(share.size for share in module.memory_plan())
    keep(planned)
    if module.device.type != "cuda":
        return
    available = torch.cuda.get_device_properties(module.device).total_memory
    if planned > available:
        raise DoesNotFitError(f"planned {planned / GIB:.1f} GiB of {available / GIB:.1f} GiB")
    torch.cuda.reset_peak_memory_stats()


def measured(row: Row, tiny: bool, peak: float | None, trace: Path | None) -> Row:
    """Fill in the row; peak in FLOP/s, None to look it up; trace: a folder for the profiler's files."""
    import torch
    from lightning.pytorch.callbacks import LambdaCallback

    from bench.clocks import Phases
    from flowalign.callbacks.profiler import Profiler

    planned: list[int] = []
    gaps: list[float] = []
    flops: list[float | None] = []
    peaks: list[float | None] = []
    with tempfile.TemporaryDirectory() as folder:
        module, trainer = prepared(row, tiny, Path(folder))

        def remember() -> None:
            gaps.append(float(trainer.callback_metrics.get("train/on_policy_gap", float("nan"))))
            if len(gaps) == WARM + 1:  # while the network is on the device; counting allocates gradients
                peaks.append(torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None)
                flops.append(flops_a_point(module))

        seen = Phases(synchronised, after=remember)
        weighing = LambdaCallback(on_fit_start=lambda *_: weigh(module, planned.append))
        trainer.callbacks += [weighing, seen]  # type: ignore
        if trace is not None:
            trainer.callbacks += [Profiler(str(trace), epochs=[WARM + 1], micro_batches=2)]  # type: ignore
            trainer.fit_loop.max_epochs = WARM + 2
        trainer.fit(module)
    described(row, module, str(trainer.precision))
    timed(row, seen, module.geometry.steps_per_epoch)
    row.planned_gib = planned[0] / GIB
    row.on_policy_gap = max(gaps) if max(gaps) == max(gaps) else None  # NaN: the algorithm has no ratio
    row.peak_gib = peaks[0]
    utilised(row, module, flops[0], peak)
    return row


def described(row: Row, module: Any, precision: str) -> None:
    """Fill in what was run."""
    import torch

    r, numbers = module.recipe, module.live.parameter_counts()
    row.size = "×".join(str(n) for n in r.train_size.area if n is not None)
    row.parameters, row.trained = numbers["parameters"], numbers["trained"]
    row.samples = module.geometry.samples_local
    row.points = module.geometry.trained_local * module.geometry.points_per_sample
    row.micro, row.guidance, row.compiled = module.geometry.micro, r.optimisation.guidance, r.running.compile
    row.device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    row.precision = precision


def timed(row: Row, seen: Any, steps: int) -> None:
    """Fill in the times of the measured epoch."""
    row.epoch_s = seen.epochs[WARM]
    row.rollout_s, row.frozen_s, optimise_s = (seconds[WARM] for seconds in seen.seconds.values())
    row.optimise_s, row.step_s = optimise_s, optimise_s / steps
    row.samples_per_s = row.samples / row.epoch_s  # type: ignore[operator]


def utilised(row: Row, module: Any, flops: float | None, peak: float | None) -> None:
    """Fill in FLOPs and utilisation."""
    row.tflops_a_point = None if flops is None else flops / 1e12
    known = peak or peak_of(str(row.device), str(row.precision))
    asked = module.counts["train"] * module.geometry.samples // module.counts["samples"]  # of one epoch
    row.mfu = mfu(flops, asked, row.optimise_s, known)  # type: ignore[arg-type]


def attempted(row: Row, given: argparse.Namespace) -> Row:
    """The measured row, or the row with the reason why it failed."""
    try:
        peak = given.peak_tflops and given.peak_tflops * 1e12
        trace = given.to / "trace" / f"{row.model}_{row.algo}_{row.tune}" if given.trace else None
        return alone(measured, row, given.tiny, peak, trace)
    except Exception as error:  # go on with the other rows
        row.failed = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        print(f"{row.model}, {row.algo}, {row.tune}: {row.failed}", flush=True)
        return row


def shown(rows: list[dict[str, Any]]) -> str:
    """A table of the columns that have values."""
    told = [key for key in (rows[0] if rows else {}) if any(row[key] not in (None, "") for row in rows)]
    return markdown([{key: row[key] for key in told} for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    parser.add_argument("--tiny", action="store_true", help="the random pipelines of the tests")
    parser.add_argument("--only", nargs="+", default=[*SIZES], choices=[*SIZES], metavar="MODEL")
    parser.add_argument("--algorithms", nargs="+", default=[*ALGORITHMS], choices=[*ALGORITHMS], metavar="ALGORITHM")
    parser.add_argument("--tunes", nargs="+", default=[*TUNES], choices=TUNES)
    parser.add_argument("--peak-tflops", type=float, help="of the device in 16 bits, if it is not in the table")
    parser.add_argument("--trace", action="store_true", help="profile one more epoch, into the folder trace")
    parser.add_argument("--to", type=Path, default=place())
    given = parser.parse_intermixed_args()
    rows, overrides = Rows(given.to / "gpu.json"), " ".join(given.overrides)
    for model, algo, tune in product(given.only, given.algorithms, given.tunes):
        if not rows.has(model=model, algo=algo, tune=tune, overrides=overrides):
            row = attempted(Row(model, algo, tune, overrides), given)
            rows.add(asdict(row), "model", "algo", "tune", "overrides")
            print(shown(rows.rows[-1:]), flush=True)
    print(shown(rows.rows))
    print(rows.path)
    return 1 if any(row["failed"] for row in rows.rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
