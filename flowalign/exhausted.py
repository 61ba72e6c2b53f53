"""Explain out-of-memory errors in one sentence: the phase, and the settings that reduce memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flowalign.checks.errors import RunError

REMEDIES = {
    "build": "tune=lora, policy.device_of_frozen=cpu, strategy=fsdp",
    "encode": "a smaller encoding.batch_size, encoding.release=true",
    "rollout": "a smaller rollout.batch_size, running.vae_slicing=true, encoding.release=true",
    "frozen copies": "a smaller rollout.batch_size, policy.device_of_frozen=cpu",
    "fit": "running.gradient_checkpointing=true, tune=lora, policy.device_of_frozen=cpu, strategy=fsdp, "
    "a smaller resolution",
    "optimise": "a smaller batch.micro, running.gradient_checkpointing=true, policy.device_of_frozen=cpu, tune=lora",
    "evaluate": "a smaller evaluation.sampling.batch_size, running.vae_slicing=true, running.vae_tiling=true",
}
"""Settings that reduce memory, by phase, most effective first."""


class NoMemoryError(RunError):
    """The accelerator or the machine ran out of memory."""


@contextmanager
def explain_oom(phase: str) -> Iterator[None]:
    """Turn out-of-memory errors into NoMemoryError, which names the innermost phase."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise NoMemoryError(
            f"out of memory in the phase '{phase}' ({_first_words(error)}); what helps, most first: {REMEDIES[phase]}."
        ) from error


def nothing_fits(micro: int) -> NoMemoryError:
    """The error for batch.micro=auto when not even its smallest micro-batch fits."""
    return NoMemoryError(
        f"batch.micro=auto: the smallest micro-batch, of {micro} point(s), does not fit into the memory that is left; "
        f"what helps, most first: {REMEDIES['fit']}. batch.micro={micro} tries it all the same."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error."""
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _first_words(error: BaseException) -> str:
    text = str(error).partition("DefaultCPUAllocator: ")[2] or str(error) or type(error).__name__
    return ". ".join(text.splitlines()[0].split(". ")[:2]).rstrip(".")
