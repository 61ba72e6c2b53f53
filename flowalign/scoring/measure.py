"""One reward as a run calls it."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowalign.rewards.base import Reward, RewardError
from flowalign.scoring.ramp import Ramp
from flowalign.scoring.seen import Seen

log = logging.getLogger("flowalign")
OnError = Literal["stop", "missing"]


class Measure:
    """A reward with what the run, not the reward, decides about it. A bare reward is a Measure with these defaults."""

    def __init__(
        self,
        reward: Reward,
        weight: float | Ramp = 1.0,
        batch_size: int | None = None,
        device: str | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] | None = None,
        evaluate: bool = True,
    ) -> None:
        """weight: in the objective. batch_size: samples in one call (groupwise: rounded to whole groups); None: as they
        come. device, dtype: what media are moved to, and a reward that is a module with them; None: they stay as they
        are. evaluate: false leaves it out of evaluations, and of their `reward`.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size counts the samples of one call and must be at least 1 (got {batch_size}).")
        self.reward = reward
        self.weight = weight
        self.batch_size = batch_size
        self.device = device
        self.dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        self.name = "reward"
        self.on_error: OnError = "stop"
        # What is compared within a group says nothing of a single picture, and an evaluation has one of a prompt.
        self.evaluate = evaluate and not self.groupwise

    # ------------------------------------------------------------ what the reward says of itself

    @property
    def groupwise(self) -> bool:
        """Whether a call needs the whole group of a prompt."""
        return bool(getattr(self.reward, "groupwise", False))

    @property
    def sees_latents(self) -> bool:
        """Whether it is called with latents, so that nothing is decoded for it."""
        return getattr(self.reward, "sees", "media") == "latents"

    @property
    def beside(self) -> bool:
        """Whether it may score while the policy samples: not with parts of the policy, whose weights are exchanged."""
        return not hasattr(self.reward, "bind")

    @property
    def described(self) -> str:
        """Name and class, or plain function: `strict` (Strict)."""
        function = getattr(self.reward, "func", self.reward)  # of functools.partial
        return f"`{self.name}` ({getattr(function, '__name__', type(function).__name__)})"

    def check(self) -> None:
        """The reward's own self-check; RewardError if it is not in working order."""
        self._optional("self_check")

    @property
    def binds(self) -> bool:
        """Whether the reward is made of the policy's own parts."""
        return hasattr(self.reward, "bind")

    def bind(self, model: Any, check: bool) -> None:
        """The model's adapter, for a reward that is made of the policy's own parts; it can be checked only now."""
        if self.binds:
            self._optional("bind", model)
            if check:
                self.check()

    def close(self) -> None:
        """Ends what the reward has started."""
        self._optional("close")

    def _optional(self, name: str, *arguments: Any) -> None:
        member = getattr(self.reward, name, None)
        if member is None:
            return
        try:
            member(*arguments)
        except Exception as error:
            raise self._refusal(f"{name.replace('_', '-')} failed", error) from error

    def _refusal(self, what: str, error: Exception) -> RewardError:
        """In the reward's own words if it gives a reason; else with the trace in the log, for whoever wrote it."""
        if isinstance(error, RewardError):
            return RewardError(f"reward {self.described}: {error}")
        log.error("the trace of reward %s:", self.described, exc_info=error)
        return RewardError(f"reward {self.described}: {what} with {type(error).__name__}: {error}")

    # ------------------------------------------------------------ scores

    @torch.no_grad()
    def __call__(self, seen: Seen) -> Tensor:
        """(B,) float32, where the samples are; NaN = could not be scored. RewardError if on_error=stop."""
        where = seen.device
        # Threads begin with the first accelerator, and without autocast: a score depends on neither.
        current = torch.cuda.device(where) if where.type == "cuda" else nullcontext()
        with current, torch.autocast(where.type, enabled=False):
            scores = torch.cat([self._scores(part) for part in seen.split(self.batch_size, self.groupwise)])
        return scores.to(where)

    def _scores(self, seen: Seen) -> Tensor:
        number = len(seen.prompts)
        try:
            scores = torch.as_tensor(self._call(seen), dtype=torch.float32)
        except Exception as error:
            refusal = self._refusal(f"scoring {number} samples failed", error)
            if self.on_error == "stop":
                raise refusal from error
            log.warning("%s; these %d samples count as not scored.", refusal, number)
            return torch.full((number,), torch.nan)
        if scores.shape != (number,):
            raise RewardError(
                f"reward {self.described} returned scores of shape {tuple(scores.shape)} for {number} samples: a "
                "reward gives one number a sample."
            )
        if scores.isinf().any():
            raise RewardError(f"reward {self.described} is infinite: what cannot be scored is NaN.")
        return scores

    def _call(self, seen: Seen) -> Tensor:
        texts, metadata = [p.text for p in seen.prompts], [p.metadata for p in seen.prompts]
        compared: dict[str, Any] = {"groups": seen.groups} if self.groupwise else {}
        if self.sees_latents:
            if seen.latents is None:
                raise RewardError("it scores latents, and only media are here.")
            x0, cond = seen.latents.x0, seen.latents.cond
            return self.reward.of_latents(x0, cond, texts, metadata, **compared)  # type: ignore[attr-defined]
        if seen.media is None:
            raise RewardError("it scores media, and nothing was decoded.")
        return self.reward(self._placed(seen.media), texts, metadata, **compared)

    def _placed(self, media: Tensor) -> Tensor:
        if self.device is not None and isinstance(self.reward, nn.Module):
            self.reward.to(self.device, self.dtype)
        return media.to(self.device, self.dtype)
