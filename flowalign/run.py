"""From a composed config to a finished run: check, instantiate, baseline, fit, final, summary."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from flowalign.checks import ConfigError, RunError, check_signatures, refusals
from flowalign.checks.errors import one_line
from flowalign.checks.preflight import preflight, preflight_or_exit
from flowalign.compatibility import check_groups
from flowalign.files import sweep
from flowalign.imports import uncollected
from flowalign.launching import agree, check_launch
from flowalign.lock import held, is_of_a_run
from flowalign.planning import check_plan, instantiate, is_sharded, replicas
from flowalign.process import begin_process, find_own_modules, quieten
from flowalign.resuming import check_unused, find_checkpoint, own_checkpoint
from flowalign.rewards.errors import RewardError
from flowalign.stopping import Stopped, asked, farewell
from flowalign.sweeps import report, surviving

if TYPE_CHECKING:
    from lightning import Trainer

    from flowalign.collect import Size
    from flowalign.module import AlignModule
    from flowalign.recipe import Recipe
    from flowalign.scoring import Scorer
    from flowalign.summary import Summary

log = logging.getLogger("flowalign")
CONF = next(p for p in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf") if p.is_dir())


def composed(*words: str) -> DictConfig:
    """The config of `train.py` with these overrides, refused in a sentence where that would refuse them."""
    words = tuple(preflight(words, CONF, "train", also=check_groups))
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return hydra.compose("train", list(words))


def build_recipe(cfg: DictConfig, scorer: Scorer | None = None) -> Recipe:
    """Every part of a run, instantiated from its group, but for a scorer that is there already."""
    from flowalign.models.loading import without_weights
    from flowalign.recipe import Recipe

    make = instantiate
    chosen: Scorer = scorer or make(cfg.reward)
    plain = OmegaConf.to_container(cfg, resolve=True)
    # The model last: what the others refuse is said before it is loaded.
    light: dict[str, Any] = dict(
        algorithm=make(cfg.algo),
        dynamics=make(cfg.dynamics),
        steps=make(cfg.steps),
        times=make(cfg.times),
        credit=make(cfg.credit),
        scorer=chosen,
        tune=make(cfg.tune),
        data={stage: make(cfg.data[stage]) for stage in ("train", "val", "test")},
        batch=make(cfg.batch),
        rollout=make(cfg.rollout),
        evaluation=make(cfg.evaluation),
        optimisation=make(cfg.optimisation),
        train_size=size_of(cfg, "train"),
        eval_size=size_of(cfg, "eval"),
        frozen={name: make(node) for name, node in cfg.frozen.items() if node is not None},
        optimizer=make(cfg.optimizer),
        schedule=make(cfg.schedule),
        device_of_frozen=cfg.policy.device_of_frozen,
        encoding=make(cfg.encoding),
        running=make(cfg.running),
        seed=cfg.seed,
        config=plain,
    )
    with without_weights(not (reads_weights(cfg) or chosen.binds)):
        return Recipe(model=make(cfg.model), **light)


def reads_weights(cfg: DictConfig) -> bool:
    """Whether this process has to read the trained networks' files: of a sharded run only rank 0, which sends them
    round. A reward that is made of the model's own parts needs them on every rank."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return not is_sharded(cfg) or rank_zero_only.rank == 0


def size_of(cfg: DictConfig, part: str) -> Size:
    """resolution.train or resolution.eval: a node, or in short a number or a list of them."""
    from flowalign.collect import Size

    node = cfg.resolution[part]
    if isinstance(node, DictConfig):
        return instantiate(node)
    try:
        return Size.of(OmegaConf.to_object(node) if OmegaConf.is_list(node) else node)
    except ValueError as error:
        raise ConfigError(f"resolution.{part}: {error}") from error


def build_trainer(cfg: DictConfig, accumulate: int) -> Trainer:
    from flowalign.callbacks.checkpoint_io import AtomicCheckpointIO

    # On purpose: what is trained has to be what made the rollouts, so nothing may behave differently.
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")
    # The checkpoint of resumption last: it holds what the others know, and they must have judged this epoch by then.
    callbacks = sorted(cfg.callbacks.items(), key=lambda item: item[0] == "last")
    trainer: Trainer = instantiate(
        cfg.trainer,
        callbacks=[instantiate(node) for _, node in callbacks if node is not None],
        logger=[instantiate(node) for node in cfg.logger.values() if node is not None],
        plugins=[AtomicCheckpointIO()],
        accumulate_grad_batches=accumulate,
    )
    # With max_steps it takes the finished epoch of a checkpoint for an unfinished one, and ends it a second time.
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    return trainer


def run(cfg: DictConfig) -> float | None:
    """One run; returns the optimised metric of the final evaluation (None if it was not measured)."""
    check(cfg)
    check_signatures(cfg)
    from flowalign.summary import Summary, show_config

    begin_process(cfg)
    folder = Path(cfg.paths.output_dir)
    with ExitStack() as cleanup:
        ckpt_path = claim(folder, cfg, cleanup)
        show_config(cfg, folder)
        module, trainer = assembled(cfg, ckpt_path, cleanup)
        summary = Summary(folder, cfg.seed, module, typed(HydraConfig.get()))
        look_back(cfg, trainer, module, summary, ckpt_path)
        if cfg.train:
            fit(trainer, module, summary, ckpt_path, late=ckpt_path is None and postpones(cfg))
            summary.final(evaluate(trainer, module, cfg.test))
        elif ckpt_path is not None:
            metrics = evaluate(trainer, module, cfg.test, ckpt_path)
            summary.results["baseline"] = module.baseline
            summary.final(metrics)
        summary.write(trainer)
        return optimised(cfg, summary)


def check(cfg: DictConfig) -> None:
    """ConfigError for choices that do not go together, and for a batch plan that does not fit."""
    check_groups(cfg)
    check_plan(cfg)


def claim(folder: Path, cfg: DictConfig, cleanup: ExitStack) -> str | None:
    """Makes the output folder this run's until `cleanup`; the checkpoint to resume from, if there is one, is whole.

    Raises ConfigError for a folder that is another run's, and for a checkpoint that is absent or damaged.
    """
    from flowalign.strategies.intact import check_intact

    folder.mkdir(parents=True, exist_ok=True)
    take(folder, cleanup)
    ckpt_path = find_checkpoint(own_checkpoint(folder) if cfg.ckpt_path == "auto" else cfg.ckpt_path, folder)
    if cfg.train and cfg.ckpt_path is None:
        check_unused(folder)
    if ckpt_path is not None:
        check_intact(ckpt_path)
    return ckpt_path


def assembled(cfg: DictConfig, ckpt_path: str | None, cleanup: ExitStack) -> tuple[AlignModule, Trainer]:
    """Rewards, model and trainer; what they have opened is closed by `cleanup`."""
    import torch

    from flowalign.callbacks.hyperparameters import Hyperparameters
    from flowalign.loggers import closed, continue_logs
    from flowalign.module import AlignModule

    with refusals():
        scorer = instantiate(cfg.reward)
        cleanup.callback(scorer.close)
        scorer.check()  # before the model is loaded: a broken reward is said at once
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        recipe = build_recipe(cfg, scorer)
        module = AlignModule(recipe)
        trainer = build_trainer(cfg, plan_accumulation(cfg, recipe))
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        shrink(module)
    continue_logs(trainer.loggers, ckpt_path if cfg.train else None)
    cleanup.enter_context(closed(trainer.loggers))
    trainer.callbacks.append(Hyperparameters(recipe.config))  # type: ignore[attr-defined]
    return module, trainer


def look_back(cfg: DictConfig, trainer: Trainer, module: AlignModule, summary: Summary, ckpt_path: str | None) -> None:
    """The baseline: of the untouched policy, or that of the run that is resumed."""
    if ckpt_path is None:
        summary.baseline(evaluate(trainer, module, cfg.test and not postpones(cfg)))
        optimised(cfg, summary)  # a metric that nobody measures is refused before the training, not after it
        return
    log.info("resuming from %s", ckpt_path)
    before = Path(ckpt_path).absolute().parent.parent
    tidy(before)
    summary.continued(before)


def typed(node: Any) -> list[str]:
    """The words of the command line that decide what is composed; node: Hydra's own config."""
    found = {source.provider: str(source.path) for source in node.runtime.config_sources}
    flags = {
        "--config-path": "" if found["main"] == str(CONF) else found["main"],
        "--config-dir": found.get("command-line", ""),
        "--config-name": "" if node.job.config_name == "train" else node.job.config_name,
    }
    searched = [word for word in node.overrides.hydra if word.startswith("hydra.searchpath=")]
    return [part for flag in flags.items() if flag[1] for part in flag] + searched + list(node.overrides.task)


def postpones(cfg: DictConfig) -> bool:
    """Whether the test prompts' baseline waits for the end of the first epoch; a metric that is to be optimised is
    measured before, so that its name is known to be right."""
    return cfg.train and cfg.test and not cfg.optimized_metric.startswith("test/")


def fit(trainer: Trainer, module: AlignModule, summary: Summary, ckpt_path: str | None, late: bool) -> None:
    """Trains; late: the test prompts' baseline is still to come."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import LambdaCallback

    from flowalign.callbacks.late_baseline import LateBaseline
    from flowalign.summary import show_plan

    baseline = LateBaseline(summary.completed)
    # Not before: a resumed run has no baseline, and batch.micro=auto is settled with the loader.
    plan = LambdaCallback(on_train_start=show_plan)
    trainer.callbacks.extend([baseline, plan] if late else [plan])  # type: ignore
    summary.begins()
    try:
        trainer.fit(module, ckpt_path=ckpt_path)
    except MisconfigurationException as error:  # a checkpoint of more epochs than there are to be
        raise ConfigError(one_line(error)) from error
    if module.buffer.epoch < 0:
        log.warning(
            "nothing was left to train: %s epochs are done, of trainer.max_epochs=%s.",
            trainer.current_epoch,
            trainer.max_epochs,
        )
    summary.trained()
    if late and baseline.waiting:  # there was nothing to train, and the weights are those of the beginning
        summary.completed(plain(trainer.test(module, verbose=False)), 0.0)


def take(folder: Path, cleanup: ExitStack) -> None:
    """The first rank locks the output folder, and removes what a killed run has left half written there."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    if rank_zero_only.rank == 0:
        cleanup.enter_context(held(folder))
        sweep(folder / "checkpoints")


def tidy(folder: Path) -> None:
    """The same of the run's folder that is resumed from, unless its run is still going or it cannot be written to."""
    if is_of_a_run(folder):
        with suppress(ConfigError, OSError), held(folder):
            sweep(folder / "checkpoints")


def plan_accumulation(cfg: DictConfig, recipe: Recipe) -> int:
    """Micro-batches per optimiser step; Lightning wants to know it before it knows the module."""
    from flowalign.recipe import batch_plan

    return batch_plan(recipe, replicas(cfg)).accumulate


def shrink(module: AlignModule) -> None:
    """fast_dev_run: Lightning runs one batch of everything, so the evaluations need only a handful of pictures."""
    for prompts in module.eval_prompts.values():
        del prompts[8:]


def evaluate(trainer: Trainer, module: AlignModule, test: bool, ckpt_path: str | None = None) -> dict[str, float]:
    """Validation and, if wanted, test metrics of the current weights (or of a checkpoint)."""
    found = plain(trainer.validate(module, ckpt_path=ckpt_path, verbose=False))
    if test:
        found |= plain(trainer.test(module, ckpt_path=ckpt_path, verbose=False))
    return found


def plain(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of an evaluation, without what is for TensorBoard alone."""
    return {key: float(value) for key, value in found[0].items() if not key.startswith("hp/")}


def optimised(cfg: DictConfig, summary: Summary) -> float | None:
    metrics = summary.results["final"] or summary.results["baseline"]
    if cfg.optimized_metric not in metrics:
        if cfg.trainer.fast_dev_run:
            return None
        raise ConfigError(
            f"optimized_metric={cfg.optimized_metric} was not measured; there are {', '.join(sorted(metrics))}."
        )
    return float(metrics[cfg.optimized_metric])


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
@surviving
def _main(cfg: DictConfig) -> float | None:
    folder = HydraConfig.get().runtime.output_dir
    try:
        with asked.listening():
            return run(cfg)
    except Stopped as stop:
        farewell(stop, Path(folder), cfg.ckpt_path, cfg.requeue)
        raise
    except (ConfigError, RewardError) as error:  # what a user can set right is one sentence; the rest keeps its trace
        refuse(error, 2)
    except RunError as error:
        refuse(error, 1)
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        refuse(error, 1)
    finally:
        log.info("output folder: %s", folder)


def refuse(error: Exception, code: int) -> NoReturn:
    log.debug("details", exc_info=True)
    log.error("%s", error)
    raise SystemExit(code) from None


def main() -> None:
    """The entry point of `train.py` and `flowalign-train`."""
    quieten()
    find_own_modules()
    sweeps = any(word in ("-m", "--multirun") for word in sys.argv[1:])

    def also(cfg: DictConfig) -> None:
        check(cfg)
        check_launch(cfg, sweeps)

    with uncollected():
        sys.argv[1:] = agree(preflight_or_exit(sys.argv[1:], CONF, "train", also))
    _main()
    if code := report():
        raise SystemExit(code)
