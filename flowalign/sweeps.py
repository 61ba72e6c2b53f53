"""Sweeps: a run that fails does not end the others, and a table at the end says which did and why."""

from __future__ import annotations

import functools
import json
import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from flowalign.checks.errors import one_line

log = logging.getLogger("flowalign")
RECORD = "failure.json"
_sweeps: dict[Path, set[str]] = {}
"""Folders of the sweeps that this process has started, with the words that all runs of each have in common."""


class Remember(Callback):
    """Hydra's callback: runs may be in other processes, and their records lie in the folder of the sweep."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """See the base class."""
        del kwargs
        folder = Path(config.hydra.sweep.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if config.hydra.sweeper.get("storage"):
            Path("outputs").mkdir(exist_ok=True)  # where hparams_search=optuna keeps its data base
        _sweeps[folder] = {word.lower() for word in config.hydra.overrides.task}


@dataclass(frozen=True)
class Failure:
    """A run of a sweep that came to nothing."""

    words: list[str]
    why: str
    refused: bool
    """Whether its user can set it right."""


def surviving(run: Callable[[DictConfig], float | None]) -> Callable[[DictConfig], float | None]:
    """`run`, which leaves a record in place of its failure where it is one of several, and a trace in the log."""

    @functools.wraps(run)
    def one_of_several(cfg: DictConfig) -> float | None:
        alone = HydraConfig.get().mode != RunMode.MULTIRUN
        try:
            return run(cfg)
        except SystemExit as left:
            if alone or left.code not in (1, 2):  # a signal, whoever obeyed it: the sweep has been asked to stop too
                raise
            return _failed(left.__context__ or left, refused=left.code == 2)
        except Exception as error:
            if alone:
                keep_trace()
                raise
            log.exception("this run failed; the sweep goes on")
            return _failed(error, refused=False)

    return one_of_several


def keep_trace() -> None:
    """The trace of an error into the log files; the terminal gets it from Python."""
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, "the run failed", (), sys.exc_info())
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def _failed(error: BaseException, refused: bool) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    node = HydraConfig.get()
    folder = Path(node.runtime.output_dir)
    if rank_zero_only.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        found = Failure(list(node.overrides.task), one_line(error), refused)
        (folder / RECORD).write_text(json.dumps(asdict(found)))
    if not node.sweeper._target_.endswith(".BasicSweeper"):  # a search has to know that there is no number
        raise RuntimeError(one_line(error)) from error


def failures() -> dict[str, Failure]:
    """By the run's folder within its sweep, of all sweeps of this process; of the words those that were its own."""
    found = {}
    for folder, common in _sweeps.items():
        for path in sorted(folder.rglob(RECORD)):
            held = Failure(**json.loads(path.read_text()))
            own = [word for word in held.words if word.lower() not in common]  # true is handed on as True
            found[str(path.parent.relative_to(folder))] = replace(held, words=own)
    return found


def report() -> int:
    """Print the failures as a table. Returns the exit code: 0 without any, 2 if all are user errors, otherwise 1."""
    failed = failures()
    if not failed:
        return 0
    print(f"{len(failed)} failed:", file=sys.stderr)
    for name, failure in failed.items():
        print(f"  {name:>4}  {shlex.join(failure.words)}  {failure.why}", file=sys.stderr)
    return 2 if all(failure.refused for failure in failed.values()) else 1
