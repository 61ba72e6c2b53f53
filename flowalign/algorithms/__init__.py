"""Algorithms, one file each."""

from flowalign.algorithms.awm import AWM
from flowalign.algorithms.base import Algorithm
from flowalign.algorithms.crd import CRD
from flowalign.algorithms.decay import Decay
from flowalign.algorithms.dgpo import DGPO
from flowalign.algorithms.dpo import DPO
from flowalign.algorithms.flow_dppo import FlowDPPO
from flowalign.algorithms.flowawr import FlowAWR
from flowalign.algorithms.grpo import GRPO
from flowalign.algorithms.grpo_guard import GRPOGuard
from flowalign.algorithms.nft import NFT
from flowalign.algorithms.prfl import PRFL
from flowalign.algorithms.sft import SFT
from flowalign.algorithms.tempflow import TempFlow

__all__ = [
    "AWM",
    "CRD",
    "DGPO",
    "DPO",
    "GRPO",
    "NFT",
    "PRFL",
    "SFT",
    "Algorithm",
    "Decay",
    "FlowAWR",
    "FlowDPPO",
    "GRPOGuard",
    "TempFlow",
]
