"""Algorithms: one page each."""

from flowalign.algorithms.base import Algorithm
from flowalign.algorithms.decay import Decay
from flowalign.algorithms.grpo import GRPO
from flowalign.algorithms.nft import NFT

__all__ = ["GRPO", "NFT", "Algorithm", "Decay"]
