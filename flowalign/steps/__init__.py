"""Choices of the stochastic and trained steps: one file each."""

from flowalign.steps.all import All
from flowalign.steps.base import StepPlan, Steps
from flowalign.steps.random import Random

__all__ = ["All", "Random", "StepPlan", "Steps"]
