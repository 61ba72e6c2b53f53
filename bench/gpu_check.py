"""One epoch of each large model at full size with random weights: `make gpu-check`, or with --tiny on any machine.

Shows that the real sizes run, how fast, whether the first ratio is 1 in bfloat16, and how near the memory plan comes to
the measured peak. Writes gpu.json and prints the rows as a table for docs/performance.md. Every row has a process of
its own. --tiny takes the random pipelines of the tests, on any machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
SIZES = {"sd3_5_medium": (512, 512, None), "flux1_dev": (512, 512, None), "wan2_1_t2v": (480, 832, 33)}
TINY = {"sd3_5_medium": (32, 48, None), "flux1_dev": (32, 48, None), "wan2_1_t2v": (32, 48, 9)}
ALGORITHMS = ("grpo", "nft")


def pipeline(model: str, tiny: bool, device: Any, dtype: Any) -> Any:
    if tiny:
        from importlib import import_module

        name = {"sd3_5_medium": "sd3", "flux1_dev": "flux1", "wan2_1_t2v": "wan2_1"}[model]
        return import_module(f"tests.models.tiny.{name}").build()
    import full_size

    return getattr(full_size, model)(device, dtype)


def recipe(model: str, algo: str, tiny: bool, folder: Path, overrides: list[str]) -> tuple[Any, Any]:
    """Config and recipe of a short run on the random pipeline."""
    import torch
    from hydra import compose, initialize_config_dir

    import flowalign.models.base as base
    from flowalign.run import build_recipe

    cuda = torch.cuda.is_available()
    height, width, frames = (TINY if tiny else SIZES)[model]
    dtype = "float32" if tiny else "bfloat16"
    (folder / "prompts.txt").write_text("two red circles\na blue square above a green triangle")
    words = [
        f"model={model}", f"algo={algo}", "tune=lora", "reward=jpeg", "logger=none", "callbacks=none",
        f"model.dtype={dtype}", f"model.train_dtype={dtype}", "model.max_sequence_length=128",
        "batch.prompts=2", "batch.group_size=4", "batch.micro=4", "batch.updates=2", "rollout.batch_size=8",
        "evaluation.num_val=2", "evaluation.num_test=2", "evaluation.shown=2", "evaluation.sampling.num_steps=2",
        "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=9", f"trainer.accelerator={'gpu' if cuda else 'cpu'}",
        f"trainer.precision={'32-true' if tiny else 'bf16-mixed'}", f"paths.output_dir={folder}",
        f"running.gradient_checkpointing={str(not tiny).lower()}", "encoding.cache=null", *overrides,
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", list({w.partition("=")[0]: w for w in words}.values()))
    for part in ("train", "eval"):
        cfg.resolution[part] = [n for n in (height, width, frames) if n is not None]
    for stage in ("train", "val", "test"):
        cfg.data[stage] = {"_target_": "flowalign.prompts.PromptSet.read", "path": str(folder / "prompts.txt")}
    device = torch.device("cuda" if cuda else "cpu")
    base.load_pipeline = lambda *_: pipeline(model, tiny, device, getattr(torch, dtype))  # nothing to download
    return cfg, build_recipe(cfg)


def measured(model: str, algo: str, tiny: bool, overrides: list[str]) -> dict[str, Any]:
    """The second of two epochs: the first one warms up."""
    import torch
    from lightning import Callback

    from flowalign.module import AlignModule
    from flowalign.run import build_trainer, plan_accumulation

    cuda = torch.cuda.is_available()

    class Clock(Callback):
        times: list[float] = []
        gaps: list[float] = []

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self._stamp()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self._stamp()
            self.gaps.append(float(trainer.callback_metrics.get("train/on_policy_gap", float("nan"))))

        def _stamp(self) -> None:
            if cuda:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        cfg, r = recipe(model, algo, tiny, Path(folder), overrides)
        module, trainer, clock = AlignModule(r), build_trainer(cfg, plan_accumulation(cfg, r)), Clock()
        trainer.callbacks.insert(0, clock)  # before the module's own hook, which makes the rollout  # type: ignore[attr-defined]
        trainer.fit(module)
        lines = module.memory_plan()
    seconds = clock.times[-1] - clock.times[-2]
    return {
        "model": model,
        "algo": algo,
        "size": "×".join(str(n) for n in r.train_size.area if n is not None),
        "parameters": module.live.numbers()["parameters"],
        "samples": module.geometry.samples_local,
        "points": module.geometry.trained_local * module.geometry.points_per_sample,
        "epoch_s": seconds,
        "samples_per_s": module.geometry.samples_local / seconds,
        "planned_gib": sum(line.size for line in lines) / 2**30,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "on_policy_gap": max(clock.gaps) if algo == "grpo" else None,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "precision": str(cfg.trainer.precision),
    }


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(map(_cell, row.values()))} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="the random pipelines of the tests")
    parser.add_argument("--only", nargs="+", default=[*SIZES], choices=[*SIZES])
    parser.add_argument("--algorithms", nargs="+", default=[*ALGORITHMS])
    parser.add_argument("--to", type=Path, default=ROOT / "outputs" / "bench" / time.strftime("%Y-%m-%d_%H-%M-%S"))
    known, overrides = parser.parse_known_args()
    known.to.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in known.only:
        for algo in known.algorithms:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measured, (model, algo, known.tiny, overrides)))
            (known.to / "gpu.json").write_text(json.dumps({"rows": rows}, indent=2))
            print(table(rows[-1:]), flush=True)
    print(table(rows))
    print(known.to / "gpu.json")


if __name__ == "__main__":
    main()
