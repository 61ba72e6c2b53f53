"""Reports of a run: its config, the batch and memory plans, and the summary at its end, on screen and on disk."""

from __future__ import annotations

import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.tree import Tree

from flowalign.before import load_shown, save_shown
from flowalign.grid import grid
from flowalign.memory import GIB, PlanLine, advice, largest_first
from flowalign.strategies.folders import read_split

if TYPE_CHECKING:
    from flowalign.evaluation import Shown
    from flowalign.module import AlignModule

PACKAGES = ("flowalign", "torch", "lightning", "diffusers", "transformers", "peft", "hydra-core")
BEFORE = "before"
"""Subfolder of a run's output with the images from before training."""
_console = Console(highlight=False)


@rank_zero_only
def show_config(cfg: DictConfig, folder: Path) -> None:
    """Print the composed config as a tree, and write it to config_tree.log."""
    tree = Tree("config")
    for name in sorted(cfg, key=lambda n: isinstance(cfg[n], DictConfig)):
        node = cfg[name]
        text = OmegaConf.to_yaml(node, resolve=True).rstrip() if isinstance(node, DictConfig) else None
        branch = tree.add(str(name) if text else f"{name}: {node}")
        if text:
            branch.add(Syntax(text, "yaml", background_color="default"))
    _console.print(tree)
    with (folder / "config_tree.log").open("w") as file:
        Console(file=file, width=120).print(tree)


def show_plan(trainer: Trainer, module: AlignModule) -> None:
    """Print the batch plan, the sizes and the memory plan before the first epoch."""
    lines = module.memory_plan()  # on every rank, since sharded networks are called by all ranks together
    if trainer.is_global_zero:
        _show_batches(trainer, module)
        _show_memory(module.device, lines)


def _show_batches(trainer: Trainer, module: AlignModule) -> None:
    table = Table(title="batch plan", show_header=False)
    for name, value in module.geometry.table().items():
        table.add_row(name, value)
    if module.recipe.batch.micro == "auto":
        table.add_row("batch.micro=auto", f"{module.geometry.micro} of {module.geometry.micros()}")
    numbers = module.live.parameter_counts()
    table.add_row("parameters", f"{numbers['trained']:,} trained of {numbers['parameters']:,}")
    table.add_row("frozen copies", ", ".join(module.live.copies) or "none")
    table.add_row("epochs", f"{trainer.max_epochs}, evaluated every {trainer.check_val_every_n_epoch}")
    _console.print(table)


def _show_memory(device: torch.device, lines: list[PlanLine]) -> None:
    """Print the memory plan of this rank's device, and what to change if it does not fit."""
    table = Table(title=f"memory plan, {device}", show_header=False)
    for line in largest_first(lines):
        table.add_row(line.name, f"{line.size / GIB:.3f} GiB")
    table.add_row("in all", f"{sum(line.size for line in lines) / GIB:.3f} GiB", style="bold")
    _console.print(table)
    if device.type != "cuda":
        return
    available = torch.cuda.get_device_properties(device).total_memory
    if words := advice(lines, available):
        _console.print(f"[bold]This will hardly fit into {available / GIB:.1f} GiB.[/bold] What helps, most first:")
        for word in words:
            _console.print(f"  {word}")


class Summary:
    """Collects the results of a run and writes summary.json, before_after.png and the closing table."""

    def __init__(self, folder: Path, seed: int, module: AlignModule, overrides: Sequence[str] = ()) -> None:
        self.folder, self.seed, self.module, self.overrides = folder, seed, module, overrides
        self.results: dict[str, dict[str, float]] = {"baseline": {}, "final": {}}
        self.before: Shown | None = None
        self.after: Shown | None = None
        self.began = self.began_training = time.perf_counter()
        self.train_s = 0.0

    def baseline(self, metrics: dict[str, float]) -> None:
        """Record the metrics of the untrained policy. Checkpoints hold them too, for runs that resume."""
        self.results["baseline"] = self.module.baseline = metrics
        self._save_before()

    def extend_baseline(self, metrics: dict[str, float], seconds: float) -> None:
        """Add baseline metrics measured during training; their seconds do not count as training time."""
        self.module.baseline |= metrics
        self._save_before()
        self.began_training += seconds

    def continue_from(self, folder: Path) -> None:
        """Take over the images from before training of the run in this folder, which is resumed."""
        self.before = load_shown(folder / BEFORE)
        if self.before is not None and folder.resolve() != self.folder.resolve():
            self._write_before(self.before)

    def _save_before(self) -> None:
        self.before = self._shown()
        if self.before is not None:
            self._write_before(self.before)

    @rank_zero_only
    def _write_before(self, shown: Shown) -> None:
        save_shown(shown, self.folder / BEFORE)

    def start_training(self) -> None:
        self.began_training = time.perf_counter()

    def end_training(self) -> None:
        self.train_s = time.perf_counter() - self.began_training
        self.results["baseline"] = self.module.baseline

    def final(self, metrics: dict[str, float]) -> None:
        self.results["final"] = metrics
        self.after = self._shown()

    def _shown(self) -> Shown | None:
        return self.module.shown.get("test") or self.module.shown.get("val")

    @rank_zero_only
    def write(self, trainer: Trainer) -> None:
        calls = {name: count for name, count in self.module.counts.items() if name != "samples"}
        document = {
            **{phase: {k: _number(v) for k, v in sorted(m.items())} for phase, m in self.results.items()},
            "epochs": self._done(trainer)[0],
            "optimiser_steps": self._done(trainer)[1],
            "samples": self.module.counts["samples"],
            "network_calls": {**calls, "total": sum(calls.values())},
            "wall_s": round(time.perf_counter() - self.began, 2),
            "train_s": round(self.train_s, 2),
            "seed": self.seed,
            "versions": {"python": platform.python_version(), **_versions()},
            "git_commit": _commit(),
        }
        (self.folder / "summary.json").write_text(json.dumps(document, indent=2) + "\n")
        self._write_pictures(self.folder / "before_after.png")
        self._table(trainer)

    def _done(self, trainer: Trainer) -> tuple[int, int]:
        """Epochs and optimiser steps, including those of the checkpoint, which an evaluation alone does not count."""
        return (trainer.current_epoch, trainer.global_step) if trainer.global_step else self.module.done

    def _write_pictures(self, file: Path) -> None:
        """Write the comparison if the same prompts are shown before and after; remove that of an earlier part."""
        file.unlink(missing_ok=True)
        if self.before and self.after and self.before.prompts == self.after.prompts:
            Image.fromarray(grid(self.before, self.after, titles=("before", "after"))).save(file)

    def _resume_command(self, last: Path, trainer: Trainer) -> str:
        """The command that resumes from `last` and doubles the length: this run's words with those options replaced."""
        ends = {"trainer.max_epochs": trainer.max_epochs or -1, "trainer.max_steps": trainer.max_steps}
        replaced = {"ckpt_path": str(last)} | {key: str(2 * end) for key, end in ends.items() if end > 0}
        words = [*_without(self.overrides, replaced), *("=".join(item) for item in replaced.items())]
        script = Path(sys.argv[0])
        programs = {"flowalign-train": "flowalign-train", "train.py": f"python {shlex.quote(str(script))}"}
        program = programs.get(script.name, "python train.py")
        return f"{program} {shlex.join(words)}"

    def _table(self, trainer: Trainer) -> None:
        before, after = self.results["baseline"], self.results["final"]
        epochs, steps = self._done(trainer)
        table = Table(title=f"{epochs} epochs, {steps} optimiser steps, {self.train_s / 60:.1f} min of training")
        for column in ("metric", "baseline", "final", "change"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        for key in sorted(before.keys() | after.keys(), key=_rank):
            cells = [f"{m[key]:.3f}" if key in m else "" for m in (before, after)]
            change = f"{after[key] - before[key]:+.3f}" if key in before and key in after else ""
            table.add_row(key, *cells, change)
        _console.print(table)
        last = self.folder / "checkpoints" / "last.ckpt"
        lines = [f"folder    {self.folder}"]
        if last.exists():
            asked = "prompts=FILE" if self.module.recipe.model.sees_images else "prompt='two red circles'"
            lines += [
                f"sample    flowalign sample ckpt={last} {asked}",
                f"export    flowalign export ckpt={last} to={self.folder / 'export'}",
                f"resume    {self._resume_command(last, trainer)}",
            ]
        lines += [f"best      {line}" for line in _best(trainer)]
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            # Show all runs side by side if this one is below outputs/.
            inside = (Path.cwd() / "outputs").resolve() in self.folder.resolve().parents
            lines.append(f"watch     tensorboard --logdir {'outputs' if inside else self.folder}")
        for line in lines:
            _console.print(line, soft_wrap=True, markup=False)  # commands may contain brackets


def _without(words: Sequence[str], options: Collection[str]) -> list[str]:
    """Command-line words without those that set `options`, and only the last of several for the same option."""
    kept: dict[str, str] = {}
    for word in words:
        option = word.partition("=")[0].lstrip("+")
        earlier = kept.pop(option, "")
        # One that an earlier word adds, as reward=[a,b] does with weights, still needs its plus.
        pluses = "" if word.startswith("+") else earlier[: len(earlier) - len(earlier.lstrip("+"))]
        kept[option] = pluses + word
    return [word for option, word in kept.items() if option not in options]


def _best(trainer: Trainer) -> list[str]:
    """For each monitored metric, the command that evaluates the best checkpoint, with the metric's value."""
    found = []
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
            continue
        path = callback.best_model_path
        if path and Path(path).exists():
            saved = read_split(Path(path))[0]
            # The file's own: Lightning does not restore the score of one in another folder, as with train=false.
            score = saved.get("callbacks", {}).get(callback.state_key, {}).get("best_model_score")
            value = "" if score is None else f" {float(score):.3f}"
            found.append(
                f"flowalign evaluate ckpt={path}  # {callback.monitor}{value} after epoch {saved['epoch'] + 1}"
            )
    return found


def _rank(key: str) -> tuple[bool, bool, str]:
    """Sort key: test before validation, totals before their parts."""
    return not key.startswith("test/"), key.count("/") > 1, key


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None  # JSON has no NaN


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "from source"
    return found


def _commit() -> str | None:
    """Git commit of the running source, with a plus if it has local changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    return f"{commit}{'+' if git('status', '--porcelain', '--untracked-files=no') else ''}" if commit else None
