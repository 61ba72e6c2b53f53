"""A run's curves, read back from its TensorBoard files."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf


def curves(folder: Path, prefix: str) -> dict[str, dict[int, float]]:
    """Metrics that start with `prefix`, by name and epoch (0: the baseline); files of an interrupted run are one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    updates = config.batch.updates * config.batch.passes
    between = updates * config.trainer.check_val_every_n_epoch

    def epoch(step: int) -> int:
        """Lightning files an evaluation during the fit under its last step, counted from 0; others after it."""
        return (step + 1 if step and (step + 1) % between == 0 else step) // updates

    found: dict[str, dict[int, float]] = {}
    for file in sorted((folder / "tensorboard").glob("events*")):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            if name.startswith(prefix):
                found.setdefault(name, {}).update({epoch(e.step): e.value for e in events.Scalars(name)})
    return {name: dict(sorted(points.items())) for name, points in found.items()}
