"""Choices of the stochastic and trained steps, one file each."""

from flowalign.steps.all import All
from flowalign.steps.base import StepPlan, Steps
from flowalign.steps.branch import Branch
from flowalign.steps.fast import Fast
from flowalign.steps.random import Random
from flowalign.steps.window import Window

__all__ = ["All", "Branch", "Fast", "Random", "StepPlan", "Steps", "Window"]
