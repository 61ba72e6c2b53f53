"""Scoring of samples: named rewards, how they are called, and what happens to samples without a score."""

from flowalign.scoring.combined import combined
from flowalign.scoring.inputs import Latents, RewardInput
from flowalign.scoring.measure import Measure
from flowalign.scoring.missing import Missing
from flowalign.scoring.queue import ScoreQueue, Scores
from flowalign.scoring.ramp import Ramp
from flowalign.scoring.rollout_scores import RolloutScores
from flowalign.scoring.scorer import Scorer

__all__ = [
    "Latents",
    "Measure",
    "Missing",
    "Ramp",
    "RewardInput",
    "RolloutScores",
    "ScoreQueue",
    "Scorer",
    "Scores",
    "combined",
]
