"""Which checkpoint a run goes on from, and whose it must not replace."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from flowalign.checks import ConfigError
from flowalign.files import restore
from flowalign.lock import held, is_of_a_run


def last_checkpoint(run: Path) -> str | None:
    """The last one of the run in this folder, if there is one."""
    _mend(run / "checkpoints")
    return _last(run)


def own_checkpoint(folder: Path) -> str | None:
    """The same of the folder that is this run's: what `auto` means."""
    restore(folder / "checkpoints")
    return _last(folder)


def check_unused(folder: Path) -> None:
    """ConfigError where a run that begins would replace the checkpoints of another one."""
    if (last := own_checkpoint(folder)) is not None:
        raise ConfigError(
            f"{folder} holds a run already ({last}), and this one would replace it: ckpt_path=auto goes on with that "
            "run, and another hydra.run.dir=… begins a new one."
        )


def find_checkpoint(given: str | None, folder: Path | None = None) -> str | None:
    """The file to resume from, or a sentence; `last` is that of this output folder, or else the newest last.ckpt under
    outputs/. The folder of a run stands for its last one."""
    from flowalign.strategies.folders import is_folder

    if given is None:
        return None
    own = None if folder is None else own_checkpoint(folder)
    if given == "last":
        return own or _newest()
    path = Path(given)
    _mend(path.parent)
    if (last := last_checkpoint(path)) is not None:
        return last
    if not path.is_file() and not is_folder(path):
        nearby = sorted(str(p) for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        raise ConfigError(f"ckpt_path={given} does not exist" + (f"; there is {', '.join(nearby)}." if nearby else "."))
    return given


def _last(run: Path) -> str | None:
    last = run / "checkpoints" / "last.ckpt"
    return str(last) if last.exists() else None


def _mend(checkpoints: Path) -> None:
    """Puts back what a kill has left waiting. A run that is still going is let be: it may be about to do so itself."""
    if not is_of_a_run(checkpoints.parent):
        restore(checkpoints)
        return
    with suppress(ConfigError, OSError), held(checkpoints.parent):
        restore(checkpoints)


def _newest() -> str:
    for waiting in Path("outputs").glob("**/.*.old"):
        _mend(waiting.parent)
    found = sorted(Path("outputs").glob("**/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ConfigError("ckpt_path=last: there is no checkpoints/last.ckpt below outputs/ here.")
    return str(found[-1])
