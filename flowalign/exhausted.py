"""Memory that does not suffice, told as one sentence: in which phase, and what makes it smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flowalign.checks.errors import RunError

COMMON = "trainer.strategy (docs/scaling.md)"
REMEDIES = {
    "build": ("tune=lora", "policy.device_of_frozen=cpu", COMMON),
    "encode": ("encoding.batch_size", "encoding.release=true"),
    "rollout": ("rollout.batch_size", "running.vae_slicing=true", "running.vae_tiling=true", "encoding.release=true"),
    "frozen copies": ("rollout.batch_size", "policy.device_of_frozen=cpu"),
    "optimise": ("batch.micro", "running.gradient_checkpointing=true", "policy.device_of_frozen=cpu", "tune=lora"),
    "evaluate": ("evaluation.sampling.batch_size", "running.vae_slicing=true", "running.vae_tiling=true"),
}
"""What to lower or set, by phase, what helps most first."""


class NoMemoryError(RunError):
    """The accelerator's memory or the machine's did not suffice."""


@contextmanager
def memory_of(phase: str) -> Iterator[None]:
    """Inside, memory that does not suffice becomes NoMemoryError; the innermost phase is named."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_exhaustion(error):
            raise
        words = [word if "=" in word else f"a smaller {word}" for word in REMEDIES[phase] if word != COMMON]
        words += [word for word in REMEDIES[phase] if word == COMMON]
        raise NoMemoryError(
            f"out of memory in the phase '{phase}' ({_first_words(error)}): what helps is {', '.join(words)}."
        ) from error


def _is_exhaustion(error: BaseException) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _first_words(error: BaseException) -> str:
    text = str(error).partition("DefaultCPUAllocator: ")[2] or str(error) or type(error).__name__
    return ". ".join(text.splitlines()[0].split(". ")[:2]).rstrip(".")
