"""How the cost of an epoch grows with the work, one factor at a time: `make growth`, or `python bench/growth.py`.

A random SD3 in one thread: CPU seconds of both phases of an epoch against tokens, steps, group size, prompts, LoRA
rank, width and depth. All else is as in `bench/baseline.py`, except for 4 prompts × 4 images in one optimiser step. An
exponent is the slope of a line fitted to the logarithms of the medians, with its standard error. Writes growth.json,
growth.md and growth.png; measurements already in growth.json are not repeated.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.baseline import WORKLOADS, words  # noqa: E402
from bench.measuring import alone, built, composed, cpu  # noqa: E402
from bench.random_sd3 import SIZES, TOKENS, random_sd3  # noqa: E402
from bench.rows import Rows, markdown, place  # noqa: E402

Size = tuple[int, int]
LAYERS, HEADS = SIZES["8M"]
PHASES = ("rollout", "optimise")
BASE = ("batch.prompts=4", "batch.group_size=4", "batch.updates=1", "seed=0")


@dataclass(frozen=True)
class Factor:
    """A factor and the values that it takes."""

    values: tuple[int, ...]
    words: Callable[[int], tuple[str, ...]] = lambda value: ()
    size: Callable[[int], Size] = lambda value: (LAYERS, HEADS)
    """Layers and heads of the network."""
    amount: Callable[[int], int] = lambda value: value
    """The quantity that the cost is fitted against."""


def tokens(side: int) -> int:
    """Tokens of a square image and its text: one per 8 × 8 pixels."""
    return (side // 8) ** 2 + 2 * TOKENS


FACTORS = {
    "tokens": Factor((64, 96, 128, 192, 256), lambda side: (f"resolution.train={side}",), amount=tokens),
    "steps": Factor((5, 10, 20, 40), lambda n: (f"rollout.num_steps={n}",)),
    "group": Factor((2, 4, 8, 16), lambda n: (f"batch.group_size={n}",)),
    "prompts": Factor((2, 4, 8, 16), lambda n: (f"batch.prompts={n}", f"data.train.limit={n}")),
    "rank": Factor((4, 8, 16, 32, 64, 128), lambda n: (f"tune.rank={n}", f"tune.alpha={2 * n}")),
    "width": Factor((3, 6, 9, 12), size=lambda heads: (LAYERS, heads), amount=lambda heads: 32 * heads),
    "depth": Factor((3, 6, 12, 24), size=lambda layers: (layers, HEADS)),
}


@dataclass(frozen=True)
class Fit:
    """seconds = scale · amount ** exponent."""

    exponent: float
    error: float | None
    """Standard error of the exponent; None for two values, which a line fits exactly."""
    scale: float


def fit(amounts: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Least squares on logarithms. Raises ValueError for fewer than two distinct amounts."""
    if len(set(amounts)) < 2:
        raise ValueError(f"a slope needs two different amounts (got {list(amounts)}).")
    x, y = [[math.log(value) for value in values] for values in (amounts, seconds)]
    mean_x, mean_y = fmean(x), fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    left = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(left / (len(x) - 2) / spread) if len(x) > 2 else None
    return Fit(slope, error, math.exp(mean_y - slope * mean_x))


def measure(workload: str, changed: list[str], folder: str, epochs: int) -> dict[str, Any]:
    """Medians over `epochs` epochs after one warm-up epoch."""
    import torch

    from bench.clocks import Phases

    torch.set_num_threads(1)
    ours = (f"paths.output_dir={folder}", f"trainer.max_epochs={epochs + 1}")
    module, trainer = built(composed([*words(workload), *BASE, *ours, *changed]))
    seen = Phases(cpu)
    trainer.callbacks.append(seen)  # type: ignore
    trainer.fit(module)
    return {f"{phase}_s": median(seconds[1:]) for phase, seconds in seen.seconds.items()}


def measure_all(given: argparse.Namespace, rows: Rows) -> None:
    """Measure every value of every factor that is not in the rows yet."""
    for name in given.only:
        for value in given.values or FACTORS[name].values:
            key = {"workload": given.workload, "factor": name, "value": value, "epochs": given.epochs}
            if not rows.has(**key, overrides=given.overrides):
                rows.add(key | {"overrides": given.overrides} | one(given, name, value))
                print(markdown(rows.rows[-1:]), flush=True)


def one(given: argparse.Namespace, name: str, value: int) -> dict[str, Any]:
    """Measure one value, on a newly made network."""
    factor = FACTORS[name]
    with tempfile.TemporaryDirectory() as folder:
        model = random_sd3(factor.size(value), Path(folder))
        changed = [*model, *given.overrides, *factor.words(value)]
        return {"amount": factor.amount(value)} | alone(measure, given.workload, changed, folder, given.epochs)


def by_factor(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each factor, sorted by amount."""
    found = {name: sorted((r for r in rows if r["factor"] == name), key=lambda r: r["amount"]) for name in FACTORS}
    return {name: members for name, members in found.items() if len({r["amount"] for r in members}) > 1}


def fits(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Fit]]:
    """The fits by factor and phase."""
    return {
        name: {phase: fit([r["amount"] for r in members], [r[f"{phase}_s"] for r in members]) for phase in PHASES}
        for name, members in by_factor(rows).items()
    }


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table with one row per factor: amounts, seconds and exponents."""
    lines = []
    for name, found in fits(rows).items():
        members = by_factor(rows)[name]
        line: dict[str, Any] = {"factor": name, "amounts": ", ".join(str(r["amount"]) for r in members)}
        for phase, fitted in found.items():
            line[f"{phase}, CPU s"] = ", ".join(f"{r[f'{phase}_s']:.3g}" for r in members)
            line[f"{phase}, exponent"] = f"{fitted.exponent:.2f}" + (
                f" ± {fitted.error:.2f}" if fitted.error is not None else ""
            )
        lines.append(line)
    return markdown(lines)


def plot(target: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw one log-log panel per factor, with the fitted lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grouped = by_factor(rows)
    columns = min(len(grouped), 4)
    height = -(-len(grouped) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(3.2 * columns, 2.9 * height), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(grouped) :]:
        axis.set_axis_off()
    for axis, (name, members) in zip(axes.flat, grouped.items(), strict=False):
        panel(axis, name, members)
    figure.savefig(target, dpi=130)


def panel(axis: Any, name: str, members: Sequence[dict[str, Any]]) -> None:
    """Draw one factor."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    amounts = [row["amount"] for row in members]
    for phase, colour in zip(PHASES, ("tab:blue", "tab:orange"), strict=True):
        seconds = [row[f"{phase}_s"] for row in members]
        line = fit(amounts, seconds)
        axis.plot(amounts, [line.scale * a**line.exponent for a in amounts], color=colour, linewidth=1)
        axis.plot(amounts, seconds, "o", color=colour, markersize=4, label=f"{phase} {line.exponent:.2f}")
    axis.set(xscale="log", yscale="log", title=name)
    axis.set_xticks(amounts)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("CPU seconds")
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8, title="exponent", title_fontsize=8)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of everything but the factor")
    workloads = [name for name in WORKLOADS if not name.startswith("awm")]  # awm's micro-batches only fit 10 steps
    parser.add_argument("--workload", choices=workloads, default="grpo_lora")
    parser.add_argument("--only", nargs="+", choices=FACTORS, metavar="FACTOR", help=", ".join(FACTORS))
    parser.add_argument("--values", nargs="+", type=int, help="instead of the default ones; needs a single factor")
    parser.add_argument("--epochs", type=int, default=5, help="measured epochs, after one warm-up epoch")
    parser.add_argument("--to", type=Path, default=place())
    given = parser.parse_intermixed_args()
    full = "full" in given.workload
    given.only = given.only or [name for name in FACTORS if not (full and name == "rank")]
    if full and "rank" in given.only:
        parser.error("full fine-tuning has no rank: use --workload grpo_lora.")
    if given.values and len(given.only) > 1:
        parser.error("values belong to one factor: name it with --only.")
    return given


def main() -> None:
    given = arguments()
    rows = Rows(given.to / "growth.json", base=[*words(given.workload), *BASE], threads=1)
    measure_all(given, rows)
    mine = [row for row in rows.rows if row["workload"] == given.workload and row["overrides"] == given.overrides]
    rows.about["fits"] = {n: {p: asdict(f) for p, f in found.items()} for n, found in fits(mine).items()}
    rows.write()
    (given.to / "growth.md").write_text(report(mine) + "\n")
    plot(given.to / "growth.png", mine)
    print(report(mine))
    print(given.to / "growth.json")


if __name__ == "__main__":
    main()
