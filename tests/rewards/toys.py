"""Rewards that live, or die, in processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.rewards.base import RewardError


class Light:
    """Mean of a picture. A prompt says what happens besides: `crash`, `crash once`, `hang`, `raise`, `refuse`."""

    def __init__(self, folder: str = "") -> None:
        self.folder, self.made_in = folder, os.getpid()

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        for prompt in prompts:
            self._do(prompt)
        return media.flatten(1).mean(1) + self.offset(metadata)

    def offset(self, metadata: list[dict[str, Any]]) -> Tensor:
        return torch.tensor([float(entry.get("plus", 0)) for entry in metadata])

    def _do(self, prompt: str) -> None:
        first = not self._mark(prompt).exists()
        if self.folder:
            self._mark(prompt).touch()
        if prompt == "crash" or prompt == "crash once" and first:
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "hang":
            time.sleep(1000)
        if prompt == "raise":
            raise KeyError("colour")
        if prompt == "refuse":
            raise RewardError("no metadata.")

    def _mark(self, prompt: str) -> Path:
        return Path(self.folder or "/nowhere") / prompt.replace(" ", "_")

    def self_check(self) -> None:
        if self.folder == "broken":
            raise RewardError("it is broken.")


class Compared(Light):
    """How many of its group are here."""

    groupwise = True

    def __call__(  # type: ignore[override]
        self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]], groups: Tensor
    ) -> Tensor:
        return (groups[:, None] == groups).sum(1).float()


def process(media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """The number of the process that scores."""
    return torch.full((len(media),), float(os.getpid()))
