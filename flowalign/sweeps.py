"""Sweeps: a failed run does not end the others, and the end lists the results, and the failures with their causes."""

from __future__ import annotations

import functools
import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from flowalign.checks.errors import one_line
from flowalign.sweep_results import FILE, Result, read_results, table, write_results

log = logging.getLogger("flowalign")
RECORD = "failure.json"
_sweeps: dict[Path, set[str]] = {}
"""Folders of the sweeps that this process has started, with the overrides that all runs of each share."""


class Remember(Callback):
    """Hydra callback that remembers the sweep's folder, where runs, possibly in other processes, record failures."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """See the base class."""
        del kwargs
        folder = Path(config.hydra.sweep.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if config.hydra.sweeper.get("storage"):
            Path("outputs").mkdir(exist_ok=True)  # where hparams_search=optuna keeps its database
        _sweeps[folder] = {word.lower() for word in config.hydra.overrides.task}


@dataclass(frozen=True)
class Failure:
    """A failed run of a sweep."""

    words: list[str]
    why: str
    refused: bool
    """Whether the config was refused, which the user can fix."""


def record_failures(run: Callable[[DictConfig], float | None]) -> Callable[[DictConfig], float | None]:
    """Wrap `run` to log the trace of an error and, in a sweep, to record it in a file instead of raising it."""

    @functools.wraps(run)
    def wrapper(cfg: DictConfig) -> float | None:
        alone = HydraConfig.get().mode != RunMode.MULTIRUN
        if not alone and _is_first_rank():  # the record of an earlier attempt in the same folder
            _record_file().unlink(missing_ok=True)
        try:
            return run(cfg)
        except SystemExit as end:
            if alone or end.code not in (1, 2):  # any other code is a signal, which asks the whole sweep to stop
                raise
            return _record(end.__context__ or end, refused=end.code == 2)
        except Exception as error:
            if alone:
                log_trace()
                raise
            log.exception("this run failed; the sweep goes on")
            return _record(error, refused=False)

    return wrapper


def log_trace() -> None:
    """Write the trace of the current error to the log files; Python prints it on the terminal."""
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, "the run failed", (), sys.exc_info())
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def _record(error: BaseException, refused: bool) -> None:
    node, file = HydraConfig.get(), _record_file()
    if _is_first_rank():
        file.parent.mkdir(parents=True, exist_ok=True)
        failure = Failure(list(node.overrides.task), one_line(error), refused)
        file.write_text(json.dumps(asdict(failure)))
    if not node.sweeper._target_.endswith(".BasicSweeper"):  # a search must know that there is no result
        raise RuntimeError(one_line(error)) from error


def _record_file() -> Path:
    """Where the failure of this run is recorded."""
    return Path(HydraConfig.get().runtime.output_dir) / RECORD


def _is_first_rank() -> bool:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return rank_zero_only.rank == 0


def failures() -> dict[str, Failure]:
    """Failures of all sweeps of this process, by the run's folder within its sweep, with the words of that run only."""
    found = {}
    for folder, common in _sweeps.items():
        for path in sorted(folder.rglob(RECORD)):
            failure = Failure(**json.loads(path.read_text()))
            own = [word for word in failure.words if word.lower() not in common]  # Hydra passes true on as True
            found[str(path.parent.relative_to(folder))] = replace(failure, words=own)
    return found


def report() -> int:
    """Print what the runs of a sweep came to, and which failed. Returns the exit code: 0 without a failure, 2 if all
    failures are user errors, otherwise 1."""
    failed = failures()
    if _sweeps and _is_first_rank():
        for folder, common in _sweeps.items():
            _report_results(read_results(folder, common, failed), folder)
    if not failed:
        return 0
    print(f"{len(failed)} failed:", file=sys.stderr)
    for name, failure in failed.items():
        print(f"  {name:>4}  {shlex.join(failure.words)}  {failure.why}", file=sys.stderr)
    return 2 if all(failure.refused for failure in failed.values()) else 1


def _report_results(results: Sequence[Result], folder: Path) -> None:
    if results:
        write_results(results, folder / FILE)
        print("\n".join([f"{results[0].metric}, best first (all metrics: {folder / FILE}):", *table(results)]))
