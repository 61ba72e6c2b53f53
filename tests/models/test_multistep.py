"""A rollout uses only the shift of the multistep schedulers that some families ship."""

from __future__ import annotations

import pytest
import torch

from flowalign.models import schedule


@pytest.mark.parametrize("solver", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_multistep_solver_leaves_its_shift_to_euler(solver: str):
    import diffusers

    shipped = getattr(diffusers, solver)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    expected = schedule.sigmas(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 6, evenly=False, mu=None)
    assert torch.equal(schedule.sigmas(schedule.euler(shipped), 6, evenly=False, mu=None), expected)
    assert schedule.shift(schedule.euler(shipped).config, None) == 3.0
