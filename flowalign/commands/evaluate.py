"""`flowalign evaluate`: a checkpoint, or a model as it comes, scored on fixed prompts or a benchmark."""

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
from flowalign.commands.figures import figure, plain, shown_table, summarised, written_table
from flowalign.commands.record import Asked, Record, asked
from flowalign.commands.sample import Made, batches
from flowalign.commands.saved import Saved, opened, untrained
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
    """Scores fixed prompts with fixed noise: scores.csv, table.csv, summary.json, pictures.png and the pictures.

    ckpt=… alone takes prompts, noise, rewards and weights of the run's final evaluation, and gives its figures again;
    weights=base those before training. model=… is a model of conf/model that was never trained. suite=… takes the
    prompts of a benchmark and a reward for it. num=… is of prompts, images=… of pictures a prompt, batch=… of pictures
    made at once; config_dir=… is a folder of configs of your own. Given once more, the command goes on where an
    interrupted one stopped; again=true begins anew.
    """
    _check(ckpt, model, suite, split)
    for name, number in {"num": num, "images": images, "steps": steps, "size": size, "batch": batch}.items():
        if number < 0:
            raise ValueError(f"{name}={number} is less than 0, which stands for the run's own.")
    benchmark = SUITES.get(suite)
    texts = benchmark.prompts(suite, prompts) if benchmark else []  # what is cheap to refuse comes first
    node = _reward(reward or (benchmark.reward if benchmark else ""), config_dir)

    def rewards(config: DictConfig) -> Scorer:
        return instantiate(config.reward if node is None else node)

    saved = opened(ckpt, weights, rewards=rewards) if ckpt else untrained(model, rewards=rewards)
    texts = texts or _own(saved, prompts, split, num)
    chosen = spread(texts, num) if benchmark else range(len(texts))
    wanted = asked(texts, chosen, images or (benchmark.pictures if benchmark else 1))
    evaluation, node = saved.config.evaluation, saved.config.reward if node is None else node
    seed = evaluation.seed if seed < 0 else seed
    sampling, area, scorer = saved.sampling(steps, guidance, batch), saved.size(size), saved.judged_by
    about = _about(saved, wanted, suite, seed, sampling, area, node)
    record = Record.opened(Path(to), about, scorer.measures, again)
    shown = [wanted[i] for i in instantiate(evaluation).shown_indices(len(wanted))]
    missing = record.missing(wanted)
    if missing:
        made = batches(saved, [(one.number, one.prompt) for one in missing], seed, sampling, area, saved.weights)
        _score(record, missing, made, scorer, wanted if keep else shown)
    _finish(record, wanted, shown, benchmark)


def _check(ckpt: str, model: str, suite: str, split: str) -> None:
    if bool(ckpt) == bool(model):
        raise ValueError("flowalign evaluate needs either ckpt=… or model=….")
    if split not in ("val", "test"):
        raise ValueError(f"split is val or test (got {split!r}).")
    if suite and suite not in SUITES:
        raise ValueError(f"there is no suite={suite}; {suggest(suite, SUITES)}")


def _reward(name: str, config_dir: str) -> DictConfig | None:
    """An option of the group `reward`, of one's own folder too, or a YAML file of that form."""
    if not name.endswith((".yaml", ".yml")):
        return section("reward", [f"reward={name}"], CONF, config_dir or None, "train") if name else None
    if not Path(name).is_file():
        raise ValueError(f"reward={name}: there is no such file.")
    node = OmegaConf.load(name)
    check_signatures({"reward": node})
    return DictConfig(node)


def _own(saved: Saved, prompts: str, split: str, num: int) -> list[Prompt]:
    """The prompts of the run's evaluation, or those of a file in their order."""
    if prompts:
        read = PromptSet.read(prompts).prompts
        return read[: num or len(read)]
    data = instantiate(saved.config.data[split])
    return [data.prompts[i] for i in data.fixed(num or saved.config.evaluation[f"num_{split}"])]


def _about(
    saved: Saved,
    wanted: Sequence[Asked],
    suite: str,
    seed: int,
    sampling: Sampling,
    area: Size,
    reward: DictConfig,
) -> dict[str, Any]:
    """Whatever the scores depend on."""
    mark = saved.path / folders.META if folders.is_folder(saved.path) else saved.path
    lines = [[one.number, one.prompt.text, one.prompt.negative, one.prompt.metadata] for one in wanted]
    return {
        "suite": suite or None,
        "ckpt": str(saved.path),
        "written": mark.stat().st_mtime_ns if mark.exists() else None,
        "weights": saved.weights,
        "seed": seed,
        "samples": len(wanted),
        "prompts": hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16],
        "num_steps": sampling.num_steps,
        "guidance": sampling.guidance,
        "solver": type(sampling.solver).__name__,
        "size": asdict(area),
        "reward": OmegaConf.to_container(reward, resolve=True),
    }


def _score(record: Record, missing: list[Asked], made: Iterable[Made], scorer: Scorer, keep: Sequence[Asked]) -> None:
    """Onto the disk batch by batch, pictures before scores: what has a score has its picture."""
    kept, done = {one.number for one in keep}, 0
    try:
        scorer.check()
        for part in made:
            batch = missing[done : done + len(part.numbers)]
            for one, picture in zip(batch, stills(part.media), strict=True):
                if one.number in kept:
                    record.keep(one, picture)
            record.add(batch, scorer.all(part.media, [one.prompt for one in batch], part.latents))
            done += len(batch)
            print(f"{len(missing) - done} pictures to go", file=sys.stderr, flush=True)
    except RewardError as error:  # what came before it is on the disk
        raise ValueError(str(error)) from error
    finally:
        scorer.close()


def _finish(record: Record, wanted: list[Asked], shown: list[Asked], benchmark: Suite | None) -> None:
    scores, prompts = record.finish(wanted), [one.prompt for one in wanted]
    summary = record.about | {"scores": {name: plain(mean) for name, mean in summarised(prompts, scores).items()}}
    written_table(record.folder / "table.csv", prompts, scores)
    lines = shown_table(prompts, scores)
    if benchmark is not None:
        found = figure(benchmark, prompts, scores)
        lines.append("{title}: {value:.4f} ({measure}, {mean})".format(**found))
        summary["figure"] = found | {"value": plain(found["value"])}
    (record.folder / "summary.json").write_text(json.dumps(summary, indent=2))
    places = [wanted.index(one) for one in shown]
    pictures = torch.stack([record.kept(one) for one in shown])
    below = Shown(pictures, [one.prompt.text for one in shown], {name: s[places] for name, s in scores.items()})
    Image.fromarray(grid(below)).save(record.folder / "pictures.png")
    print(*lines, record.folder, sep="\n")
