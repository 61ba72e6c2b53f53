"""Held-out curves of finished runs (logger=csv): `python bench/curves.py docs/curves.png outputs/train/*/`."""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from omegaconf import OmegaConf

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METRICS = ("val/strict", "val/quality")


def curve(folder: Path, metric: str) -> dict[int, float]:
    """Metric by epoch: step 0 is the baseline, the others are the ends of epochs."""
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    per_epoch = config.batch.updates * config.batch.passes
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = [(int(row["step"]), float(row[metric])) for row in csv.DictReader(file) if row.get(metric)]
    return {0 if step == 0 else -(-step // per_epoch): value for step, value in rows}


def name(folder: Path) -> str:
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    tune = config.tune["_target_"].rsplit(".", 1)[-1].lower()
    return f"{config.algo['_target_'].rsplit('.', 1)[-1]}, {tune}"


def main() -> None:
    target, folders = Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]]
    groups: dict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        groups[name(folder)].append(folder)
    figure, axes = plt.subplots(1, len(METRICS), figsize=(9, 3.2), layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for label, members in sorted(groups.items()):
            curves = [curve(folder, metric) for folder in members]
            epochs = sorted(set.intersection(*(set(c) for c in curves)))
            values = np.array([[c[epoch] for epoch in epochs] for c in curves])
            (line,) = axis.plot(epochs, values.mean(0), marker=".", label=f"{label} (n={len(members)})")
            axis.fill_between(epochs, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
        axis.set(xlabel="epoch", title=metric)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
