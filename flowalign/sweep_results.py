"""What the runs of a sweep came to: a table of the optimised metric, and a file with all metrics."""

from __future__ import annotations

import csv
import json
import math
import shlex
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

FILE = "sweep.csv"


@dataclass(frozen=True)
class Result:
    """A run that ended."""

    folder: str
    """Within the sweep's folder."""
    words: list[str]
    """Its own overrides."""
    metric: str
    """Name of the optimised metric."""
    metrics: dict[str, float]
    """Those of the final evaluation; NaN = not measured."""

    @property
    def value(self) -> float:
        """The optimised metric."""
        return self.metrics.get(self.metric, math.nan)


def read_results(sweep: Path, common: Collection[str], failed: Collection[str]) -> list[Result]:
    """The results in a sweep's folder. common: overrides of the whole sweep, in lower case. failed: folders to skip."""
    return list(_read(sweep, common, failed))


def _read(sweep: Path, common: Collection[str], failed: Collection[str]) -> Iterator[Result]:
    for path in sorted(sweep.rglob("summary.json"), key=lambda path: [p.zfill(6) for p in path.parts]):
        folder, hydra = str(path.parent.relative_to(sweep)), path.parent / ".hydra"
        if folder in failed or not hydra.is_dir():
            continue
        summary = json.loads(path.read_text())
        words = [str(word) for word in OmegaConf.load(hydra / "overrides.yaml")]
        metric = OmegaConf.load(hydra / "config.yaml").optimized_metric
        final = summary["final"] or summary["baseline"]  # without a checkpoint, train=false measures the latter only
        own = [word for word in words if word.lower() not in common]
        yield Result(folder, own, metric, {k: math.nan if v is None else v for k, v in final.items()})


def write_results(results: Sequence[Result], path: Path) -> None:
    """Write a row for each run: its folder, the value of each option that was swept, and all metrics."""
    options = [dict(map(_option, result.words)) for result in results]
    swept = list(dict.fromkeys(key for own in options for key in own))
    metrics = sorted({name for result in results for name in result.metrics})
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["run", *swept, *metrics])
        for result, own in zip(results, options, strict=True):
            values = [result.metrics.get(name, math.nan) for name in metrics]
            rows.writerow([result.folder, *(own.get(key, "") for key in swept), *values])


def _option(word: str) -> tuple[str, str]:
    """Key and value of an override, without Hydra's plus and quotes."""
    key, _, value = word.partition("=")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return key.lstrip("+"), value[1:-1] if quoted else value


def table(results: Sequence[Result]) -> list[str]:
    """A line for each setting, best first; runs that differ only in the seed share one, with mean and spread."""
    settings: dict[str, list[Result]] = {}
    for result in results:
        words = [word for word in result.words if not word.startswith("seed=")]
        settings.setdefault(shlex.join(words), []).append(result)
    means = {words: statistics.fmean(result.value for result in same) for words, same in settings.items()}
    best = sorted(settings, key=lambda words: -math.inf if math.isnan(means[words]) else means[words], reverse=True)
    return [_line(words, settings[words], means[words]) for words in best]


def _line(words: str, same: Sequence[Result], mean: float) -> str:
    if len(same) == 1:
        return f"{mean:>7.4f}  {shlex.join(same[0].words)}  in {same[0].folder}"
    values = [result.value for result in same]
    spread = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan  # it fails for such a value
    folders = ", ".join(result.folder for result in same)
    return f"{mean:>7.4f} ± {spread:.4f}  {words}{'  ' * bool(words)}{len(same)} seeds, in {folders}"
