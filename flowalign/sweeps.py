"""Sweeps: a run that fails does not end the others, and a table at the end says which did and why."""

from __future__ import annotations

import functools
import json
import logging
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from flowalign.checks.errors import one_line

log = logging.getLogger("flowalign")
RECORD = "failure.json"
_folders: list[Path] = []
"""Of the sweeps that this process has started."""


class Remember(Callback):
    """Hydra's callback: runs may be in other processes, and their records lie in the folder of the sweep."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """See the base class."""
        del kwargs
        _folders.append(Path(config.hydra.sweep.dir).absolute())


@dataclass(frozen=True)
class Failure:
    """A run of a sweep that came to nothing."""

    words: list[str]
    why: str
    refused: bool
    """Whether its user can set it right."""


def surviving(run: Callable[[DictConfig], float | None]) -> Callable[[DictConfig], float | None]:
    """`run`, which leaves a record in place of its failure where it is one of several."""

    @functools.wraps(run)
    def one_of_several(cfg: DictConfig) -> float | None:
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            return run(cfg)
        try:
            return run(cfg)
        except SystemExit as left:
            if not left.code:
                raise
            return _failed(left.__context__ or left, refused=left.code == 2)
        except Exception as error:
            log.exception("this run failed; the sweep goes on")
            return _failed(error, refused=False)

    return one_of_several


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
    """By the run's folder within its sweep, of all sweeps of this process."""
    found = [(path, folder) for folder in _folders for path in sorted(folder.rglob(RECORD))]
    return {str(path.parent.relative_to(folder)): Failure(**json.loads(path.read_text())) for path, folder in found}


def report() -> int:
    """Shows the table of failures. The exit code: 0 without any, 2 if all were refusals, otherwise 1."""
    from rich.console import Console
    from rich.table import Table

    failed = failures()
    if not failed:
        return 0
    table = Table("run", "options", "why", title=f"{len(failed)} failed", show_lines=True)
    for name, failure in failed.items():
        table.add_row(name, shlex.join(failure.words), failure.why)
    Console(stderr=True, highlight=False).print(table)
    return 2 if all(failure.refused for failure in failed.values()) else 1
