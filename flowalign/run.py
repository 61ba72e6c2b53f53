"""Run training from a composed config: check, instantiate, baseline, fit, final evaluation, summary."""

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

from flowalign.checks import ConfigError, RunError, as_config_errors, check_signatures
from flowalign.checks.arguments import collapse_rewards
from flowalign.checks.errors import one_line
from flowalign.checks.preflight import preflight, preflight_or_exit
from flowalign.compatibility import check_groups
from flowalign.files import remove_partials
from flowalign.imports import without_gc
from flowalign.launching import check_launch, rank_arguments
from flowalign.lock import is_run_folder, locked
from flowalign.planning import check_plan, instantiate, is_sharded, keeps_best, replicas
from flowalign.process import add_cwd_to_path, begin_process, silence_libraries
from flowalign.resuming import check_unused, find_checkpoint, own_checkpoint
from flowalign.reward_nodes import is_evaluated
from flowalign.rewards.errors import RewardError
from flowalign.stopping import Stopped, stop_requests, wind_down
from flowalign.sweeps import record_failures, report

if TYPE_CHECKING:
    from lightning import Trainer

    from flowalign.module import AlignModule
    from flowalign.prompts import PromptSet
    from flowalign.recipe import Recipe
    from flowalign.scoring import Scorer
    from flowalign.size import Size
    from flowalign.summary import Summary

log = logging.getLogger("flowalign")
CONF = next(p for p in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf") if p.is_dir())


def compose_config(*words: str) -> DictConfig:
    """Compose the config of `train.py` with these overrides; raises ConfigError where `train.py` would."""
    words = tuple(preflight(words, CONF, "train", also=check_groups))
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = hydra.compose("train", list(words))
    check_plan(cfg)
    return cfg


Data = dict[str, "PromptSet"]
"""The prompts of each stage."""


def read_data(cfg: DictConfig) -> Data:
    """Read the prompt files of every stage."""
    return {stage: instantiate(cfg.data[stage]) for stage in ("train", "val", "test")}


def build_recipe(cfg: DictConfig, scorer: Scorer | None = None, data: Data | None = None) -> Recipe:
    """Instantiate every part of a run from its config group, except a scorer and prompts that are passed in."""
    from flowalign.models.loading import without_weights
    from flowalign.recipe import Recipe

    make = instantiate
    run_scorer: Scorer = scorer or make(cfg.reward)
    config = OmegaConf.to_container(cfg, resolve=True)
    # The model comes last, so that errors of the other groups are reported before it is loaded.
    light: dict[str, Any] = dict(
        algorithm=make(cfg.algo),
        dynamics=make(cfg.dynamics),
        steps=make(cfg.steps),
        times=make(cfg.times),
        credit=make(cfg.credit),
        scorer=run_scorer,
        tune=make(cfg.tune),
        data=data or read_data(cfg),
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
        config=config,
    )
    with without_weights(not (reads_weights(cfg) or run_scorer.binds)):
        return Recipe(model=make(cfg.model), **light)


def reads_weights(cfg: DictConfig) -> bool:
    """Whether this process must read the trained networks' files. In a sharded run only rank 0 does and broadcasts
    them; a reward made of the model's own parts (`binds`) needs them on every rank."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return not is_sharded(cfg) or rank_zero_only.rank == 0


def size_of(cfg: DictConfig, part: str) -> Size:
    """The Size of resolution.train or resolution.eval, given as a node, a number or a list of numbers."""
    from flowalign.size import Size

    node = cfg.resolution[part]
    if isinstance(node, DictConfig):
        return instantiate(node)
    try:
        return Size.of(OmegaConf.to_object(node) if OmegaConf.is_list(node) else node)
    except ValueError as error:
        raise ConfigError(f"resolution.{part}: {error}") from error


def build_trainer(cfg: DictConfig, accumulate: int) -> Trainer:
    from flowalign.callbacks.checkpoint_io import AtomicCheckpointIO

    # Intended: training must use the same network as the rollouts, so dropout etc. stay off.
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")
    nodes = {name: node for name, node in cfg.callbacks.items() if node is not None}
    if not is_evaluated(cfg.reward):
        for name in [name for name, node in nodes.items() if keeps_best(node)]:
            log.warning("callbacks.%s keeps nothing: evaluations do not measure this reward; set its monitor.", name)
            del nodes[name]
    # Checkpoints to resume from come last, `last` at the very end: they save the other callbacks' state of this epoch.
    callbacks = sorted(nodes.items(), key=lambda item: (item[0] == "last", item[1].get("save_top_k") == -1))
    trainer: Trainer = instantiate(
        cfg.trainer,
        callbacks=[instantiate(node) for _, node in callbacks],
        logger=[instantiate(node) for node in cfg.logger.values() if node is not None],
        plugins=[AtomicCheckpointIO()],
        accumulate_grad_batches=accumulate,
    )
    # With max_steps, Lightning takes the finished epoch of a checkpoint for an unfinished one and ends it again.
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    return trainer


def run(cfg: DictConfig) -> float | None:
    """Execute one run; returns the optimised metric of the final evaluation (None if it was not measured)."""
    check(cfg)
    check_signatures(cfg)
    from flowalign.summary import Summary, show_config

    begin_process(cfg)
    folder = Path(cfg.paths.output_dir)
    with ExitStack() as cleanup:
        ckpt_path = prepare_folder(folder, cfg, cleanup)
        show_config(cfg, folder)
        module, trainer = assemble(cfg, ckpt_path, cleanup)
        summary = Summary(folder, cfg.seed, module, typed_words(HydraConfig.get()))
        establish_baseline(cfg, trainer, module, summary, ckpt_path)
        if cfg.train:
            fit(trainer, module, summary, ckpt_path, late=ckpt_path is None and postpones_test(cfg))
            summary.final(evaluate(trainer, module, cfg.test))
        elif ckpt_path is not None:
            metrics = evaluate(trainer, module, cfg.test, ckpt_path)
            summary.results["baseline"] = module.baseline
            summary.final(metrics)
        summary.write(trainer)
        return optimised(cfg, summary)


def check(cfg: DictConfig) -> None:
    """Raise ConfigError for choices that contradict each other, and for a batch plan that does not fit."""
    check_groups(cfg)
    check_plan(cfg)


def prepare_folder(folder: Path, cfg: DictConfig, cleanup: ExitStack) -> str | None:
    """Create and lock the output folder until `cleanup`; returns the verified checkpoint to resume from, or None.

    Raises ConfigError for a folder of another run, and for a checkpoint that is missing or damaged.
    """
    from flowalign.strategies.intact import check_intact

    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder, cleanup)
    ckpt_path = find_checkpoint(own_checkpoint(folder) if cfg.ckpt_path == "auto" else cfg.ckpt_path, folder)
    if cfg.train and cfg.ckpt_path is None:
        check_unused(folder)
    if ckpt_path is not None:
        check_intact(ckpt_path)
    return ckpt_path


def assemble(cfg: DictConfig, ckpt_path: str | None, cleanup: ExitStack) -> tuple[AlignModule, Trainer]:
    """Build rewards, module and trainer; `cleanup` closes what they open."""
    import torch

    from flowalign.callbacks.hyperparameters import Hyperparameters
    from flowalign.loggers import closing, continue_logs
    from flowalign.module import AlignModule

    with as_config_errors():
        data = read_data(cfg)  # before the rewards, whose networks may take minutes
        scorer = instantiate(cfg.reward)
        cleanup.callback(scorer.close)
        evaluated = [p for stage in ("val", "test")[: 1 + cfg.test] for p in data[stage].prompts]
        scorer.check_prompts(data["train"].prompts if cfg.train else (), evaluated)
        scorer.check()  # before the model is loaded, so that a broken reward is reported at once
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        recipe = build_recipe(cfg, scorer, data)
        module = AlignModule(recipe)
        trainer = build_trainer(cfg, plan_accumulation(cfg, recipe))
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        shrink(module)
    continue_logs(trainer.loggers, ckpt_path if cfg.train else None)
    cleanup.enter_context(closing(trainer.loggers))
    trainer.callbacks.append(Hyperparameters(recipe.config))  # type: ignore[attr-defined]
    return module, trainer


def establish_baseline(
    cfg: DictConfig, trainer: Trainer, module: AlignModule, summary: Summary, ckpt_path: str | None
) -> None:
    """Evaluate the untrained policy, or take over the baseline of the run that is resumed."""
    if ckpt_path is None:
        summary.baseline(evaluate(trainer, module, cfg.test and not postpones_test(cfg)))
        optimised(cfg, summary)  # raises for an unknown metric before training rather than after it
        return
    log.info("resuming from %s", ckpt_path)
    before = Path(ckpt_path).absolute().parent.parent
    clean_folder(before)
    summary.continue_from(before)


def typed_words(node: Any) -> list[str]:
    """The command-line words that determine the composed config; node: Hydra's own config."""
    found = {source.provider: str(source.path) for source in node.runtime.config_sources}
    flags = {
        "--config-path": "" if found["main"] == str(CONF) else found["main"],
        "--config-dir": found.get("command-line", ""),
        "--config-name": "" if node.job.config_name == "train" else node.job.config_name,
    }
    searched = [word for word in node.overrides.hydra if word.startswith("hydra.searchpath=")]
    return (
        [part for flag in flags.items() if flag[1] for part in flag] + searched + collapse_rewards(node.overrides.task)
    )


def postpones_test(cfg: DictConfig) -> bool:
    """Whether the baseline on the test prompts is measured after the first epoch. A test metric to be optimised is
    measured before training, which verifies its name."""
    return cfg.train and cfg.test and not cfg.optimized_metric.startswith("test/")


def fit(trainer: Trainer, module: AlignModule, summary: Summary, ckpt_path: str | None, late: bool) -> None:
    """Train. late: the baseline on the test prompts is still to be measured."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import LambdaCallback

    from flowalign.callbacks.late_baseline import LateBaseline
    from flowalign.summary import show_plan

    baseline = LateBaseline(summary.extend_baseline)
    # Not earlier: a resumed run evaluates no baseline, and batch.micro=auto is resolved with the loader.
    plan = LambdaCallback(on_train_start=show_plan)
    trainer.callbacks.extend([baseline, plan] if late else [plan])  # type: ignore
    summary.start_training()
    try:
        trainer.fit(module, ckpt_path=ckpt_path)
    except MisconfigurationException as error:  # a checkpoint with more epochs than trainer.max_epochs
        raise ConfigError(one_line(error)) from error
    if module.buffer.epoch < 0:
        log.warning(
            "nothing was left to train: %s epochs are done, of trainer.max_epochs=%s.",
            trainer.current_epoch,
            trainer.max_epochs,
        )
    if (evaluated := module.recipe.evaluation.copy) is not None:
        module.recipe.frozen[evaluated].warn_if_waiting(evaluated, trainer.global_step)
    summary.end_training()
    if late and baseline.waiting:  # there was nothing to train, so these are the initial weights
        summary.extend_baseline(to_floats(trainer.test(module, verbose=False)), 0.0)


def lock_folder(folder: Path, cleanup: ExitStack) -> None:
    """On rank 0, lock the output folder and delete files that a killed run left incomplete there."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    if rank_zero_only.rank == 0:
        cleanup.enter_context(locked(folder))
        remove_partials(folder / "checkpoints")


def clean_folder(folder: Path) -> None:
    """On rank 0, delete incomplete files in the folder resumed from, unless its run is active or it is read-only."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    if rank_zero_only.rank == 0 and is_run_folder(folder):
        with suppress(ConfigError, OSError), locked(folder):
            remove_partials(folder / "checkpoints")


def plan_accumulation(cfg: DictConfig, recipe: Recipe) -> int:
    """Micro-batches per optimiser step, which Lightning needs before the module."""
    from flowalign.recipe import batch_plan

    return batch_plan(recipe, replicas(cfg)).accumulate


def shrink(module: AlignModule) -> None:
    """Reduce the evaluations to 8 prompts for fast_dev_run, in which Lightning runs one batch of everything."""
    for prompts in module.eval_prompts.values():
        del prompts[8:]


def evaluate(trainer: Trainer, module: AlignModule, test: bool, ckpt_path: str | None = None) -> dict[str, float]:
    """Validation and, if wanted, test metrics of the current weights (or of a checkpoint)."""
    metrics = to_floats(trainer.validate(module, ckpt_path=ckpt_path, verbose=False))
    if test:
        metrics |= to_floats(trainer.test(module, ckpt_path=ckpt_path, verbose=False))
    return metrics


def to_floats(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of an evaluation as floats, without the hp/ metrics, which are for TensorBoard only."""
    return {key: float(value) for key, value in results[0].items() if not key.startswith("hp/")}


def optimised(cfg: DictConfig, summary: Summary) -> float | None:
    """The value of optimized_metric; ConfigError if it was not measured, except under fast_dev_run."""
    metrics = summary.results["final"] or summary.results["baseline"]
    if cfg.optimized_metric not in metrics:
        if cfg.trainer.fast_dev_run:
            return None
        raise ConfigError(
            f"optimized_metric={cfg.optimized_metric} was not measured; there are {', '.join(sorted(metrics))}."
        )
    return float(metrics[cfg.optimized_metric])


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
@record_failures
def _main(cfg: DictConfig) -> float | None:
    folder = HydraConfig.get().runtime.output_dir
    try:
        with stop_requests.listening():
            return run(cfg)
    except Stopped as stop:
        wind_down(stop, Path(folder), cfg.ckpt_path, cfg.requeue)
        raise
    except (ConfigError, RewardError) as error:  # user errors are one sentence; all others keep their trace
        exit_with(error, 2)
    except RunError as error:
        exit_with(error, 1)
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        exit_with(error, 1)
    finally:
        log.info("output folder: %s", folder)


def exit_with(error: Exception, code: int) -> NoReturn:
    log.debug("details", exc_info=True)
    log.error("%s", error)
    raise SystemExit(code) from None


def main() -> None:
    """The entry point of `train.py` and `flowalign-train`."""
    silence_libraries()
    add_cwd_to_path()
    multirun = any(word in ("-m", "--multirun") for word in sys.argv[1:])

    def also(cfg: DictConfig) -> None:
        check(cfg)
        check_launch(cfg, multirun)

    with without_gc():
        sys.argv[1:] = rank_arguments(preflight_or_exit(sys.argv[1:], CONF, "train", also))
    _main()
    if code := report():
        raise SystemExit(code)
