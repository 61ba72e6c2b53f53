"""Classes that the toy configs of these tests name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from nowhere import Unknown  # pyright: ignore[reportMissingImports]


class GRPO:
    def __init__(
        self,
        dynamics: Any,
        clip: float = 1e-4,
        kl_beta: float = 0.0,
        kl: Literal["x", "gaussian", "v"] = "x",
    ):
        self.dynamics, self.clip, self.kl_beta, self.kl = dynamics, clip, kl_beta, kl


class NFT:
    def __init__(self, beta: float = 1.0, kl_beta: float = 0.0, adv_range: float | None = None, rounds: int = 1):
        self.beta, self.kl_beta, self.adv_range, self.rounds = beta, kl_beta, adv_range, rounds


@dataclass
class Recipe:
    size: tuple[int, int]
    weights: dict[str, float]
    names: Sequence[str] = ()
    deep: bool = False
    other: Unknown | None = None


class Logger:
    def __init__(self, folder: str, **extra: Any):
        self.folder, self.extra = folder, extra


def build(name: str, inner: NFT | None = None) -> tuple[str, NFT | None]:
    return name, inner
