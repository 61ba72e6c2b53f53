"""Held-out curves of runs: `python bench/curves.py docs/curves.png outputs/train/*/`."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from omegaconf import OmegaConf

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from runs import curve

METRICS = ("val/strict", "val/quality")


def name(folder: Path) -> str:
    """Algorithm and tune, and the evaluation height if it differs from that of training."""
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    tune = config.tune["_target_"].rsplit(".", 1)[-1].lower()
    trained, judged = config.resolution.train.height, config.resolution.eval.height
    at = "" if trained == judged else f", judged at {judged}"
    return f"{config.algo['_target_'].rsplit('.', 1)[-1]}, {tune}{at}"


def plot(target: Path, groups: dict[str, list[Path]], metrics: tuple[str, ...] = METRICS) -> None:
    """Draw one panel per metric, with one line per group of runs and a band over its seeds."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(10, 4), layout="constrained")
    for axis, metric in zip(axes, metrics, strict=True):
        colours = matplotlib.color_sequences["tab20" if len(groups) > 10 else "tab10"]
        axis.set_prop_cycle(color=colours)
        for label, members in sorted(groups.items()):
            curves = [curve(folder, metric) for folder in members]
            epochs = sorted(set.intersection(*(set(c) for c in curves)))
            values = np.array([[c[epoch] for epoch in epochs] for c in curves])
            (line,) = axis.plot(epochs, values.mean(0), marker=".", label=f"{label} (n={len(members)})")
            axis.fill_between(epochs, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
        axis.set(xlabel="epoch", title=metric)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(target, dpi=110)


def main() -> None:
    groups: dict[str, list[Path]] = defaultdict(list)
    for folder in map(Path, sys.argv[2:]):
        groups[name(folder)].append(folder)
    plot(Path(sys.argv[1]), groups)


if __name__ == "__main__":
    main()
