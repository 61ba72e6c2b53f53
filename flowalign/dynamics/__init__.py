"""Dynamics of the walk: one file each."""

from flowalign.dynamics.base import Dynamics, Step
from flowalign.dynamics.cps import CPS
from flowalign.dynamics.flow_sde import FlowSDE
from flowalign.dynamics.ode import ODE

__all__ = ["CPS", "ODE", "Dynamics", "FlowSDE", "Step"]
