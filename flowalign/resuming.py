"""Find the checkpoint to resume from, and protect the checkpoints of other runs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from flowalign.checks import ConfigError
from flowalign.files import WAITING, restore
from flowalign.lock import is_run_folder, locked


def last_checkpoint(run: Path, own: Path | None = None) -> str | None:
    """The last checkpoint of the run in this folder, or None. own: this run's folder."""
    _restore_if_idle(run / "checkpoints", own)
    return _last(run)


def own_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in this run's own, locked folder, or None: the meaning of ckpt_path=auto."""
    restore(folder / "checkpoints")
    return _last(folder)


def check_unused(folder: Path) -> None:
    """Raise ConfigError if a new run would replace the checkpoints of another one."""
    if (last := own_checkpoint(folder)) is not None:
        raise ConfigError(
            f"{folder} holds a run already ({last}), and this one would replace it: ckpt_path=auto goes on with that "
            "run, and another hydra.run.dir=… begins a new one."
        )


def find_checkpoint(given: str | None, folder: Path | None = None) -> str | None:
    """The checkpoint to resume from; ConfigError if there is none.

    given: a file, a run's folder (its last checkpoint), or `last`: the last checkpoint of `folder`, this run's own, or
    else the newest last.ckpt under outputs/.
    """
    from flowalign.strategies.folders import is_folder

    if given is None:
        return None
    own = None if folder is None else own_checkpoint(folder)
    if given == "last":
        return own or _newest()
    path = Path(given).expanduser()
    _restore_if_idle(path.parent, folder)
    if (last := last_checkpoint(path, folder)) is not None:
        return last
    if not path.is_file() and not is_folder(path):
        beside = path.parent.glob("*.ckpt") if path.parent.is_dir() else []
        nearby = sorted(str(other) for other in beside if other != path)
        wrong = "holds no checkpoint" if path.is_dir() else "does not exist"
        raise ConfigError(f"ckpt_path={given} {wrong}" + (f"; there is {', '.join(nearby)}." if nearby else "."))
    return str(path)


def _last(run: Path) -> str | None:
    last = run / "checkpoints" / "last.ckpt"
    return str(last) if last.exists() else None


def _restore_if_idle(checkpoints: Path, own: Path | None = None) -> None:
    """Restore what a killed run left half replaced, unless its run is still going: it may be in the middle of it.

    Nothing is to be done in this run's `own` folder: see own_checkpoint. Rank 0 locks it, at the same time as other
    ranks get here, and would be refused if one of them held the lock for a moment.
    """
    if own is not None and checkpoints.parent.resolve() == own.resolve():
        return
    if not is_run_folder(checkpoints.parent):
        restore(checkpoints)
        return
    with suppress(ConfigError, OSError), locked(checkpoints.parent):
        restore(checkpoints)


def _newest() -> str:
    for waiting in Path("outputs").glob(f"**/{WAITING}"):
        _restore_if_idle(waiting.parent)
    found = sorted(Path("outputs").glob("**/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ConfigError("ckpt_path=last: there is no checkpoints/last.ckpt below outputs/ here.")
    return str(found[-1])
