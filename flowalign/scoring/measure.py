"""A reward together with the settings that a run chooses for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowalign.dtypes import torch_dtype
from flowalign.prompt_files import Prompt
from flowalign.rewards.base import Reward, RewardError
from flowalign.scoring.inputs import RewardInput
from flowalign.scoring.ramp import Ramp

log = logging.getLogger("flowalign")
OnError = Literal["stop", "missing"]


class Measure:
    """A reward with its batch size, device and dtype. A bare reward becomes a Measure with the default ones."""

    def __init__(
        self,
        reward: Reward,
        weight: float | Ramp = 1.0,
        batch_size: int | None = None,
        device: str | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] | None = None,
        evaluate: bool = True,
    ) -> None:
        """weight: weight in the objective. batch_size: samples per call (groupwise: whole groups); None: those of a
        rollout batch. device, dtype: where media, and a reward that is a module, are moved to; None: unchanged.
        evaluate: whether evaluations measure it, and include it in their `reward`.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size counts the samples of one call and must be at least 1 (got {batch_size}).")
        self.reward = reward
        self.weight = weight
        self.batch_size = batch_size
        self.device = device
        self.dtype: torch.dtype | None = torch_dtype(dtype) if dtype else None
        self.name = "reward"
        self.on_error: OnError = "stop"
        # A groupwise reward cannot score a single image, and an evaluation has one image per prompt.
        self.evaluate = evaluate and not self.groupwise

    # ------------------------------------------------------------ properties of the reward

    @property
    def groupwise(self) -> bool:
        """Whether a call needs the whole group of a prompt."""
        return bool(getattr(self.reward, "groupwise", False))

    @property
    def sees_latents(self) -> bool:
        """Whether it scores latents, which then need no decoding."""
        return getattr(self.reward, "sees", "media") == "latents"

    @property
    def concurrent(self) -> bool:
        """Whether it may score while the policy samples. Not if it uses the policy's networks, whose weights change."""
        return not self.binds

    @property
    def described(self) -> str:
        """Name and class, or function, for messages: `strict` (Strict)."""
        function = getattr(self.reward, "func", self.reward)  # of functools.partial
        return f"`{self.name}` ({getattr(function, '__name__', type(function).__name__)})"

    def check(self) -> None:
        """Run the reward's self-check. Raises RewardError if it fails."""
        self._optional("self_check")

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Raise RewardError for the first prompt that the reward could not score whatever the image, if it can tell."""
        if self.on_error == "missing" or not hasattr(self.reward, "check_prompt"):
            return
        for prompt in prompts:
            try:
                self.reward.check_prompt(prompt.text, prompt.metadata)  # type: ignore[attr-defined]
            except (ValueError, RewardError) as error:
                raise RewardError(f"{prompt.source}: reward {self.described}: {error}") from error

    @property
    def binds(self) -> bool:
        """Whether the reward is built from the policy's own networks."""
        return hasattr(self.reward, "bind")

    def bind(self, model: Any, check: bool) -> None:
        """Give the model's adapter to a reward built from the policy's networks, and check it."""
        if self.binds:
            self._optional("bind", model)
            if check:
                self.check()

    def close(self) -> None:
        """Stop whatever the reward has started, such as worker processes."""
        self._optional("close")

    def _optional(self, name: str, *arguments: Any) -> None:
        member = getattr(self.reward, name, None)
        if member is None:
            return
        try:
            member(*arguments)
        except Exception as error:
            raise self._reward_error(f"{name.replace('_', '-')} failed", error) from error

    def _reward_error(self, what: str, error: Exception) -> RewardError:
        """A RewardError that names the reward. The trace of an unexpected exception goes to the log."""
        if isinstance(error, RewardError):
            return RewardError(f"reward {self.described}: {error}")
        log.error("the trace of reward %s:", self.described, exc_info=error)
        return RewardError(f"reward {self.described}: {what} with {type(error).__name__}: {error}")

    # ------------------------------------------------------------ scores

    @torch.no_grad()
    def __call__(self, batch: RewardInput) -> Tensor:
        """Scores (B,) float32 on the samples' device; NaN = could not be scored. RewardError if on_error=stop."""
        device = batch.device
        # A new thread starts on the first GPU and without autocast: scores must not depend on the thread.
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with current, torch.autocast(device.type, enabled=False):
            scores = torch.cat([self._scores(part) for part in batch.split(self.batch_size, self.groupwise)])
        return scores.to(device)

    def _scores(self, batch: RewardInput) -> Tensor:
        number = len(batch.prompts)
        try:
            scores = torch.as_tensor(self._call(batch), dtype=torch.float32)
        except Exception as error:
            error_of_reward = self._reward_error(f"scoring {number} samples failed", error)
            if self.on_error == "stop":
                raise error_of_reward from error
            log.warning("%s; these %d samples count as not scored.", error_of_reward, number)
            return torch.full((number,), torch.nan)
        if scores.shape != (number,):
            raise RewardError(
                f"reward {self.described} returned scores of shape {tuple(scores.shape)} for {number} samples: a "
                "reward gives one number a sample."
            )
        if scores.isinf().any():
            raise RewardError(f"reward {self.described} is infinite: what cannot be scored is NaN.")
        return scores

    def _call(self, batch: RewardInput) -> Tensor:
        texts, metadata = [p.text for p in batch.prompts], [p.metadata for p in batch.prompts]
        compared: dict[str, Any] = {"groups": batch.groups} if self.groupwise else {}
        if self.sees_latents:
            if batch.latents is None:
                raise RewardError("it scores latents, and only media are here.")
            x0, cond = batch.latents.x0, batch.latents.cond
            return self.reward.of_latents(x0, cond, texts, metadata, **compared)  # type: ignore[attr-defined]
        if batch.media is None:
            raise RewardError("it scores media, and nothing was decoded.")
        return self.reward(self._placed(batch.media), texts, metadata, **compared)

    def _placed(self, media: Tensor) -> Tensor:
        if self.device is not None and isinstance(self.reward, nn.Module):
            self.reward.to(self.device, self.dtype)
        return media.to(self.device, self.dtype)
