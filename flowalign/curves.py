"""Read a run's metric curves from the logs in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf


def curves(folder: Path, prefix: str) -> dict[str, dict[int, float]]:
    """Metrics that start with `prefix`, by name and epoch (0: the baseline), from TensorBoard files or metrics.csv."""
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    updates = config.batch.updates * config.batch.passes
    between = updates * config.trainer.check_val_every_n_epoch

    def epoch(step: int, first: bool) -> int:
        """Epochs completed at an evaluation. Lightning logs one during fit at its last step, counted from 0; others,
        the first of which is the baseline, at the step after that."""
        during = (step > 0 or not first) and (step + 1) % between == 0
        return (step + 1 if during else step) // updates

    found: dict[str, dict[int, float]] = {}
    for rows in (_of_csv(folder / "csv"), _of_tensorboard(folder / "tensorboard")):
        seen: set[str] = set()
        for name, step, value in rows:
            if name.startswith(prefix):
                found.setdefault(name, {})[epoch(step, first=name not in seen)] = value
                seen.add(name)
    return {name: dict(sorted(points.items())) for name, points in found.items()}


def _of_tensorboard(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Name, step and value, over all files of an interrupted run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for file in sorted(folder.glob("events*")):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            yield from ((name, event.step, event.value) for event in events.Scalars(name))


def _of_csv(folder: Path) -> Iterator[tuple[str, int, float]]:
    from flowalign.loggers import read_csv

    for row in read_csv(folder / "metrics.csv"):
        yield from ((name, int(row["step"]), float(value)) for name, value in row.items())
