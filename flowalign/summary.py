"""What a run tells: the config at its start, the batch plan, and at its end what changed, on screen and on disk."""

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

from flowalign.before import keep, kept
from flowalign.grid import grid
from flowalign.memory import GIB, PlanLine, advice, largest_first
from flowalign.strategies.folders import opened

if TYPE_CHECKING:
    from flowalign.evaluation import Shown
    from flowalign.module import AlignModule

PACKAGES = ("flowalign", "torch", "lightning", "diffusers", "transformers", "peft", "hydra-core")
BEFORE = "before"
"""The folder of the pictures from before the training, in a run's own."""
_console = Console(highlight=False)


@rank_zero_only
def show_config(cfg: DictConfig, folder: Path) -> None:
    """The composed config as a tree, on screen and in config_tree.log."""
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
    """The batch plan, the sizes and the memory plan, before the first epoch."""
    lines = module.memory_plan()  # on every rank: a sharded network is asked by all together
    if trainer.is_global_zero:
        _show_batches(trainer, module)
        _show_memory(module.device, lines)


def _show_batches(trainer: Trainer, module: AlignModule) -> None:
    table = Table(title="batch plan", show_header=False)
    for name, value in module.geometry.table().items():
        table.add_row(name, value)
    if module.recipe.batch.micro == "auto":
        table.add_row("batch.micro=auto", f"{module.geometry.micro} of {module.geometry.micros()}")
    numbers = module.live.numbers()
    table.add_row("parameters", f"{numbers['trained']:,} trained of {numbers['parameters']:,}")
    table.add_row("frozen copies", ", ".join(module.live.copies) or "none")
    table.add_row("epochs", f"{trainer.max_epochs}, evaluated every {trainer.check_val_every_n_epoch}")
    _console.print(table)


def _show_memory(device: torch.device, lines: list[PlanLine]) -> None:
    """The memory plan of this rank's device, and what to change if it does not fit."""
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
        """The untouched policy. Its results travel in the checkpoints, so that a resumed run still has them."""
        self.results["baseline"] = self.module.baseline = metrics
        self._keep_before()

    def completed(self, metrics: dict[str, float], seconds: float) -> None:
        """More of the untouched policy, which took so many seconds in the midst of training and was none."""
        self.module.baseline |= metrics
        self._keep_before()
        self.began_training += seconds

    def continued(self, folder: Path) -> None:
        """Of the run in this folder, whose pictures from before the training are this one's too."""
        self.before = kept(folder / BEFORE)
        if self.before is not None and folder.resolve() != self.folder.resolve():
            self._write_before(self.before)

    def _keep_before(self) -> None:
        self.before = self._shown()
        if self.before is not None:
            self._write_before(self.before)

    @rank_zero_only
    def _write_before(self, shown: Shown) -> None:
        keep(shown, self.folder / BEFORE)

    def begins(self) -> None:
        """The training."""
        self.began_training = time.perf_counter()

    def trained(self) -> None:
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
            "epochs": trainer.current_epoch,
            "optimiser_steps": trainer.global_step,
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

    def _write_pictures(self, file: Path) -> None:
        """None where other prompts are shown than before the training, and none that an earlier part of it has left."""
        file.unlink(missing_ok=True)
        if self.before and self.after and self.before.prompts == self.after.prompts:
            Image.fromarray(grid(self.before, self.after, titles=("before", "after"))).save(file)

    def _again(self, last: Path, trainer: Trainer) -> str:
        """The command that goes on from `last` to twice the length: its own words, but for those that are set anew."""
        ends = {"trainer.max_epochs": trainer.max_epochs or -1, "trainer.max_steps": trainer.max_steps}
        anew = {"ckpt_path": str(last)} | {key: str(2 * end) for key, end in ends.items() if end > 0}
        words = [*_without(self.overrides, anew), *("=".join(item) for item in anew.items())]
        program = "flowalign-train" if Path(sys.argv[0]).name == "flowalign-train" else "python train.py"
        return f"{program} {shlex.join(words)}"

    def _table(self, trainer: Trainer) -> None:
        before, after = self.results["baseline"], self.results["final"]
        table = Table(
            title=f"{trainer.current_epoch} epochs, {trainer.global_step} optimiser steps, "
            f"{self.train_s / 60:.1f} min of training"
        )
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
            lines += [
                f"sample    flowalign sample ckpt={last} prompt='two red circles'",
                f"export    flowalign export ckpt={last} to={self.folder / 'export'}",
                f"resume    {self._again(last, trainer)}",
            ]
        lines += [f"best      {line}" for line in _best(trainer)]
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            # All runs side by side, where this one is among them.
            among = (Path.cwd() / "outputs").resolve() in self.folder.resolve().parents
            lines.append(f"watch     tensorboard --logdir {'outputs' if among else self.folder}")
        for line in lines:
            _console.print(line, soft_wrap=True, markup=False)  # a command has brackets of its own


def _without(words: Sequence[str], options: Collection[str]) -> list[str]:
    """Words of a command line, of several for one option the last, and none for these options."""

    def option(word: str) -> str:
        return word.partition("=")[0].lstrip("+")

    last = {option(word): i for i, word in enumerate(words)}
    return [word for i, word in enumerate(words) if last[option(word)] == i and option(word) not in options]


def _best(trainer: Trainer) -> list[str]:
    """For each metric by which the best checkpoint was kept, the command that looks at it, with what it was."""
    found = []
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
            continue
        path, score = callback.best_model_path, callback.best_model_score
        if path and Path(path).exists():
            epochs = opened(Path(path))[0]["epoch"] + 1
            value = "" if score is None else f" {float(score):.3f}"  # that of another folder's file is not restored
            found.append(f"flowalign evaluate ckpt={path}  # {callback.monitor}{value} after epoch {epochs}")
    return found


def _rank(key: str) -> tuple[bool, bool, str]:
    """Test before validation, totals before their parts."""
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
    """Of the source that runs, with a plus where it was changed; None outside a git checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    return f"{commit}{'+' if git('status', '--porcelain', '--untracked-files=no') else ''}" if commit else None
