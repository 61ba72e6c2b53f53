"""A run's checkpoint, opened for use."""

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
from flowalign.run import composed, instantiate, size_of
from flowalign.sampler import Sampling
from flowalign.scoring import Scorer
from flowalign.size import Size
from flowalign.strategies import folders


@dataclass
class Saved:
    """What a checkpoint says of its run, with the pipeline and the weights in it."""

    path: Path
    weights: str
    config: DictConfig
    model: FlowModel
    policy: Policy
    epoch: int
    scorer: Scorer | None = None

    @property
    def judged_by(self) -> Scorer:
        """The rewards that were asked for when it was opened."""
        if self.scorer is None:
            raise RuntimeError("this checkpoint was opened without rewards.")
        return self.scorer

    @contextmanager
    def use(self, weights: str) -> Iterator[None]:
        """Inside, the network is the live one, a frozen copy (`ema`), or as it was before training (`base`), and
        computes in the run's precision."""
        with self.policy.use(None if weights == "live" else weights), self._precision():
            yield

    def _precision(self) -> AbstractContextManager[None]:
        """What the Trainer has around a forward pass; under 64-true float32, which differs by rounding."""
        from lightning.pytorch.plugins import MixedPrecision

        mixed = str(self.config.trainer.precision).removesuffix("-mixed")
        if mixed not in ("16", "bf16"):
            return nullcontext()
        device = self.model.device.type
        kind = "bf16-mixed" if device == "cpu" else f"{mixed}-mixed"  # the Trainer too knows no float16 on CPUs
        return MixedPrecision(kind, device).forward_context()  # type: ignore[arg-type]

    def sampling(self, steps: int = 0, guidance: float = -1.0, batch: int = 0) -> Sampling:
        """That of the run's evaluation, where nothing else is asked for."""
        node = self.config.evaluation.sampling.copy()
        node.num_steps, node.guidance = steps or node.num_steps, node.guidance if guidance < 0 else guidance
        node.batch_size = batch or node.batch_size
        return instantiate(node)

    def size(self, size: int = 0) -> Size:
        """That of the run's evaluation; `size` makes a square."""
        made = size_of(self.config, "eval")
        if size:
            made = replace(made, height=size, width=size)
        self.model.check_size(*made.area)
        return made


Rewards = Callable[[DictConfig], Scorer]
"""Makes the rewards of a config."""


def opened(ckpt: str, weights: str, base: bool = False, device: str = "auto", rewards: Rewards | None = None) -> Saved:
    """A checkpoint of flowalign that holds such weights, "" for those that its run judges; base=True keeps those before
    training too.

    Raises ValueError with one sentence for anything else.
    """
    path = Path(ckpt).expanduser()
    path = Path(last_checkpoint(path) or path)
    if not path.exists():
        raise ValueError(f"ckpt={ckpt} does not exist.")
    try:
        state = folders.read(path)
    except Exception as error:  # torch names neither the file nor a cause that a user knows
        raise ValueError(f"ckpt={ckpt} cannot be read as a checkpoint ({type(error).__name__}).") from error
    if not isinstance(state, dict) or "flowalign" not in state:
        raise ValueError(f"ckpt={ckpt} was not written by flowalign.")
    config = DictConfig(state["flowalign"]["config"])
    held = {key.removeprefix("policy."): value for key, value in state["state_dict"].items()}
    copies = sorted({key.split(".")[1] for key in held if key.startswith("copies.")})
    weights = weights or config.evaluation.weights
    if weights not in (known := ["live", *copies, "base"]):
        raise ValueError(f"weights={weights}: the checkpoint holds {', '.join(known)}.")
    model = instantiate(config.model)
    if state["flowalign"].get("base") not in (None, weights_fingerprint(model.denoisers())):
        raise ValueError(f"ckpt={ckpt} was trained on another base than {config.model.pretrained} is now.")
    scorer = _bound(rewards, config, model)
    # Made before the trained weights come in, "base" keeps those of the pipeline.
    before = ["base"] if base or weights == "base" else []
    tune = config.tune.copy()
    if not before and "start" in tune:
        tune.start = None  # the checkpoint holds what became of it, and the file may be gone
    policy = Policy(model.denoisers(), instantiate(tune), model.lora_targets, [*copies, *before])
    differing = sorted({key for key in policy.checkpoint_keys() if not key.startswith("copies.base.")} ^ held.keys())
    if differing:
        raise ValueError(f"ckpt={ckpt} does not fit its own config ({len(differing)} entries, first {differing[0]}).")
    policy.load_state_dict(held, strict=False)
    return _placed(Saved(path, weights, config, model, policy, int(state.get("epoch", 0)) + 1, scorer), device)


def untrained(model: str, device: str = "auto", rewards: Rewards | None = None) -> Saved:
    """A model of conf/model as it comes, evaluated as a run with it would be; its only weights are the live ones."""
    config = composed(f"model={model}", "tune=lora")  # adapters begin as nothing, and leave the network's own type
    pipeline = instantiate(config.model)
    scorer = _bound(rewards, config, pipeline)
    policy = Policy(pipeline.denoisers(), instantiate(config.tune), pipeline.lora_targets)
    return _placed(Saved(Path(model), "live", config, pipeline, policy, 0, scorer), device)


def _bound(rewards: Rewards | None, config: DictConfig, model: FlowModel) -> Scorer | None:
    """Bound to the pipeline as it comes, since they may be made of its parts."""
    if rewards is None:
        return None
    scorer = rewards(config)
    scorer.bind(model)
    return scorer


def _placed(saved: Saved, device: str) -> Saved:
    """On its device, where networks run as in the run, but for what is only quicker or may not be installed here."""
    torch.set_float32_matmul_precision("high")
    running = instantiate(saved.config.running)
    replace(running, gradient_checkpointing=False, compile=False, attention=None).apply(saved.model)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    saved.policy.to(where)
    saved.model.to(where)
    return saved
