"""Dynamics of a sampling step, one file each."""

from flowalign.dynamics.base import Dynamics, Step
from flowalign.dynamics.cps import CPS
from flowalign.dynamics.dance_sde import DanceSDE
from flowalign.dynamics.flow_sde import FlowSDE
from flowalign.dynamics.ode import ODE
from flowalign.dynamics.sde import SDE

__all__ = ["CPS", "ODE", "SDE", "DanceSDE", "Dynamics", "FlowSDE", "Step"]
