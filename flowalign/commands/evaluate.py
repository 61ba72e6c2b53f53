"""`flowalign evaluate`: score a checkpoint or an untrained model on fixed prompts or a benchmark."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from flowalign.checks import check_signatures
from flowalign.checks.preflight import section
from flowalign.checks.suggest import suggest
from flowalign.commands.figures import figure, finite_or_none, format_table, summarise, write_table
from flowalign.commands.record import Record, Sample, list_samples
from flowalign.commands.sample import Batch, batches
from flowalign.commands.saved import SavedRun, load_run, load_untrained
from flowalign.evaluation import Shown, stills
from flowalign.grid import grid
from flowalign.prompts import Prompt, PromptSet
from flowalign.rewards.base import RewardError
from flowalign.run import CONF, instantiate
from flowalign.sampler import Sampling
from flowalign.scoring import Scorer
from flowalign.size import Size
from flowalign.strategies import folders
from flowalign.suites import SUITES, Suite, spread


def evaluate(
    ckpt: str = "",
    model: str = "",
    suite: str = "",
    reward: str = "",
    prompts: str = "",
    split: str = "test",
    to: str = "evaluation",
    num: int = 0,
    images: int = 0,
    seed: int = -1,
    steps: int = 0,
    guidance: float = -1.0,
    size: int = 0,
    batch: int = 0,
    weights: str = "",
    keep: bool = True,
    again: bool = False,
    config_dir: str = "",
) -> None:
    """Scores fixed prompts with fixed noise; writes scores.csv, table.csv, summary.json, pictures.png and the images.

    ckpt=… alone uses prompts, noise, rewards and weights of the run's final evaluation and reproduces its figures;
    weights=base evaluates the weights before training. model=… is an untrained model of conf/model. suite=… uses the
    prompts of a benchmark and a reward for it. num=… is the number of prompts, images=… of images per prompt, batch=…
    of images generated at once; config_dir=… is a folder with your own configs. The same command resumes an
    interrupted evaluation; again=true starts over.
    """
    _check(ckpt, model, suite, split)
    for name, number in {"num": num, "images": images, "steps": steps, "size": size, "batch": batch}.items():
        if number < 0:
            raise ValueError(f"{name}={number} is less than 0, which stands for the run's own.")
    benchmark = SUITES.get(suite)
    texts = benchmark.prompts(suite, prompts) if benchmark else []  # cheap checks come before loading the model
    node = _reward(reward or (benchmark.reward if benchmark else ""), config_dir)

    def rewards(config: DictConfig) -> Scorer:
        return instantiate(config.reward if node is None else node)

    saved = load_run(ckpt, weights, rewards=rewards) if ckpt else load_untrained(model, rewards=rewards)
    texts = texts or _prompts(saved, prompts, split, num)
    chosen = spread(texts, num) if benchmark else range(len(texts))
    samples = list_samples(texts, chosen, images or (benchmark.pictures if benchmark else 1))
    evaluation, node = saved.config.evaluation, saved.config.reward if node is None else node
    seed = evaluation.seed if seed < 0 else seed
    sampling, area, scorer = saved.sampling(steps, guidance, batch), saved.size(size), saved.required_scorer
    scorer.check_prompts((), [texts[i] for i in chosen])
    about = _about(saved, samples, suite, seed, sampling, area, node)
    record = Record.open(Path(to).expanduser(), about, scorer.measures, again)
    shown = [samples[i] for i in instantiate(evaluation).shown_indices(len(samples))]
    missing = record.missing(samples)
    if missing:
        generated = batches(saved, [(one.number, one.prompt) for one in missing], seed, sampling, area, saved.weights)
        _score(record, missing, generated, scorer, samples if keep else shown)
    _finish(record, samples, shown, benchmark)


def _check(ckpt: str, model: str, suite: str, split: str) -> None:
    if bool(ckpt) == bool(model):
        raise ValueError("flowalign evaluate needs either ckpt=… or model=….")
    if split not in ("val", "test"):
        raise ValueError(f"split is val or test (got {split!r}).")
    if suite and suite not in SUITES:
        raise ValueError(f"there is no suite={suite}; {suggest(suite, SUITES)}")


def _reward(name: str, config_dir: str) -> DictConfig | None:
    """The node of an option of the group `reward` (config_dir included) or of a YAML file, or None without a name."""
    if not name.endswith((".yaml", ".yml")):
        return section("reward", [f"reward={name}"], CONF, config_dir or None, "train") if name else None
    if not Path(name).is_file():
        raise ValueError(f"reward={name}: there is no such file.")
    node = OmegaConf.load(name)
    check_signatures({"reward": node})
    return DictConfig(node)


def _prompts(saved: SavedRun, prompts: str, split: str, num: int) -> list[Prompt]:
    """The prompts of a file, in order, or those of the run's evaluation."""
    if prompts:
        read = PromptSet.read(prompts).prompts
        return read[: num or len(read)]
    data = instantiate(saved.config.data[split])
    return [data.prompts[i] for i in data.fixed(num or saved.config.evaluation[f"num_{split}"])]


def _about(
    saved: SavedRun,
    samples: Sequence[Sample],
    suite: str,
    seed: int,
    sampling: Sampling,
    area: Size,
    reward: DictConfig,
) -> dict[str, Any]:
    """Everything that the scores depend on."""
    mark = saved.path / folders.META if folders.is_folder(saved.path) else saved.path
    lines = [[one.number, one.prompt.text, one.prompt.negative, one.prompt.metadata] for one in samples]
    return {
        "suite": suite or None,
        "ckpt": str(saved.path),
        "written": mark.stat().st_mtime_ns if mark.exists() else None,
        "weights": saved.weights,
        "seed": seed,
        "samples": len(samples),
        "prompts": hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16],
        "num_steps": sampling.num_steps,
        "guidance": sampling.guidance,
        "solver": type(sampling.solver).__name__,
        "size": asdict(area),
        "reward": OmegaConf.to_container(reward, resolve=True),
    }


def _score(
    record: Record, missing: list[Sample], generated: Iterable[Batch], scorer: Scorer, keep: Sequence[Sample]
) -> None:
    """Write batch by batch, images before scores, so that every scored sample has its image."""
    kept, done = {one.number for one in keep}, 0
    try:
        scorer.check()
        for part in generated:
            batch = missing[done : done + len(part.numbers)]
            for one, image in zip(batch, stills(part.media), strict=True):
                if one.number in kept:
                    record.save_image(one, image)
            record.add(batch, scorer.all(part.media, [one.prompt for one in batch], part.latents))
            done += len(batch)
            print(f"{len(missing) - done} pictures to go", file=sys.stderr, flush=True)
    except RewardError as error:  # earlier batches are on disk
        raise ValueError(str(error)) from error
    finally:
        scorer.close()


def _finish(record: Record, samples: list[Sample], shown: list[Sample], benchmark: Suite | None) -> None:
    scores, prompts = record.finish(samples), [one.prompt for one in samples]
    means = {name: finite_or_none(mean) for name, mean in summarise(prompts, scores).items()}
    summary = record.about | {"scores": means}
    write_table(record.folder / "table.csv", prompts, scores)
    lines = format_table(prompts, scores)
    if benchmark is not None:
        found = figure(benchmark, prompts, scores)
        lines.append("{title}: {value:.4f} ({measure}, {mean})".format(**found))
        summary["figure"] = found | {"value": finite_or_none(found["value"])}
    (record.folder / "summary.json").write_text(json.dumps(summary, indent=2))
    indices = [samples.index(one) for one in shown]
    images = torch.stack([record.load_image(one) for one in shown])
    captioned = Shown(images, [one.prompt.text for one in shown], {name: s[indices] for name, s in scores.items()})
    Image.fromarray(grid(captioned)).save(record.folder / "pictures.png")
    print(*lines, record.folder, sep="\n")
