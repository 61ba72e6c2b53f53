"""Load a run's checkpoint, or an untrained model, for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from flowalign.models.base import FlowModel
from flowalign.policy import Policy
from flowalign.policy.fingerprint import weights_fingerprint
from flowalign.resuming import last_checkpoint
from flowalign.run import compose_config, instantiate, size_of
from flowalign.sampler import Sampling
from flowalign.scoring import Scorer
from flowalign.size import Size
from flowalign.strategies import folders


@dataclass
class SavedRun:
    """The config of a checkpoint's run, with the pipeline, the policy and its weights loaded."""

    path: Path
    weights: str
    config: DictConfig
    model: FlowModel
    policy: Policy
    epoch: int
    scorer: Scorer | None = None

    @property
    def required_scorer(self) -> Scorer:
        """The scorer; RuntimeError if the checkpoint was loaded without rewards."""
        if self.scorer is None:
            raise RuntimeError("this checkpoint was loaded without rewards.")
        return self.scorer

    @contextmanager
    def use(self, weights: str) -> Iterator[None]:
        """Use the live weights, a frozen copy (`ema`) or those before training (`base`), in the run's precision."""
        with self.policy.use(None if weights == "live" else weights), self._precision():
            yield

    def _precision(self) -> AbstractContextManager[None]:
        """The Trainer's forward context. 64-true runs in float32, which differs only by rounding."""
        from lightning.pytorch.plugins import MixedPrecision

        mixed = str(self.config.trainer.precision).removesuffix("-mixed")
        if mixed not in ("16", "bf16"):
            return nullcontext()
        device = self.model.device.type
        kind = "bf16-mixed" if device == "cpu" else f"{mixed}-mixed"  # like the Trainer, no float16 on CPUs
        return MixedPrecision(kind, device).forward_context()  # type: ignore[arg-type]

    def sampling(self, steps: int = 0, guidance: float = -1.0, batch: int = 0) -> Sampling:
        """The sampling of the run's evaluation, with the given settings replaced."""
        node = self.config.evaluation.sampling.copy()
        node.num_steps, node.guidance = steps or node.num_steps, node.guidance if guidance < 0 else guidance
        node.batch_size = batch or node.batch_size
        return instantiate(node)

    def size(self, size: int = 0) -> Size:
        """The size of the run's evaluation, or a square of `size` pixels a side."""
        resolution = size_of(self.config, "eval")
        if size:
            resolution = replace(resolution, height=size, width=size)
        self.model.check_size(*resolution.area)
        return resolution


Rewards = Callable[[DictConfig], Scorer]
"""Builds the rewards of a config."""


def load_run(
    ckpt: str, weights: str, base: bool = False, device: str = "auto", rewards: Rewards | None = None
) -> SavedRun:
    """Load a checkpoint with the named weights, or those that its run evaluates if `weights` is "".

    base=True also keeps the weights before training. Raises ValueError if `ckpt` is no such checkpoint.
    """
    path = Path(ckpt).expanduser()
    path = Path(last_checkpoint(path) or path)
    if not path.exists():
        raise ValueError(f"ckpt={ckpt} does not exist.")
    try:
        state = folders.read(path)
    except Exception as error:  # torch names neither the file nor a cause that a user would understand
        raise ValueError(f"ckpt={ckpt} cannot be read as a checkpoint ({type(error).__name__}).") from error
    if not isinstance(state, dict) or "flowalign" not in state:
        raise ValueError(f"ckpt={ckpt} was not written by flowalign.")
    config = DictConfig(state["flowalign"]["config"])
    held = {key.removeprefix("policy."): value for key, value in state["state_dict"].items()}
    copies = sorted({key.split(".")[1] for key in held if key.startswith("copies.")})
    weights = weights or config.evaluation.weights
    if weights not in (known := ["live", *copies, "base"]):
        raise ValueError(f"weights={weights}: the checkpoint holds {', '.join(known)}.")
    if (node := config.frozen.get(weights)) is not None:
        instantiate(node).warn_if_waiting(weights, state["global_step"])
    model = instantiate(config.model)
    if state["flowalign"].get("base") not in (None, weights_fingerprint(model.denoisers())):
        raise ValueError(f"ckpt={ckpt} was trained on another base than {config.model.pretrained} is now.")
    scorer = _bound_scorer(rewards, config, model)
    # The copy "base" is made before the trained weights are loaded, so it holds the pipeline's weights.
    before = ["base"] if base or weights == "base" else []
    tune = config.tune.copy()
    if not before and "start" in tune:
        tune.start = None  # the checkpoint supersedes it, and the file may be gone
    policy = Policy(model.denoisers(), instantiate(tune), model.lora_targets, [*copies, *before])
    differing = sorted({key for key in policy.checkpoint_keys() if not key.startswith("copies.base.")} ^ held.keys())
    if differing:
        raise ValueError(f"ckpt={ckpt} does not fit its own config ({len(differing)} entries, first {differing[0]}).")
    policy.load_state_dict(held, strict=False)
    return _prepare(SavedRun(path, weights, config, model, policy, int(state.get("epoch", 0)) + 1, scorer), device)


def load_untrained(model: str, device: str = "auto", rewards: Rewards | None = None) -> SavedRun:
    """Load an untrained model of conf/model, to be evaluated as a run with it would be; it has only live weights."""
    config = compose_config(f"model={model}", "tune=lora")  # adapters start at zero and keep the network's own type
    pipeline = instantiate(config.model)
    scorer = _bound_scorer(rewards, config, pipeline)
    policy = Policy(pipeline.denoisers(), instantiate(config.tune), pipeline.lora_targets)
    return _prepare(SavedRun(Path(model), "live", config, pipeline, policy, 0, scorer), device)


def _bound_scorer(rewards: Rewards | None, config: DictConfig, model: FlowModel) -> Scorer | None:
    """Build the scorer and bind it to the pipeline before that changes, since rewards may use its parts."""
    if rewards is None:
        return None
    scorer = rewards(config)
    scorer.bind(model)
    return scorer


def _prepare(saved: SavedRun, device: str) -> SavedRun:
    """Move to the device and apply the run's `running` settings, without gradient checkpointing, compilation and the
    attention backend, which change only speed and memory and may not be installed here."""
    torch.set_float32_matmul_precision("high")
    running = instantiate(saved.config.running)
    replace(running, gradient_checkpointing=False, compile=False, attention=None).apply(saved.model)
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    saved.policy.to(target)
    saved.model.to(target)
    return saved
