"""GDPO: normalises each reward on its own, so that none dominates the others, and then their sum."""

from torch import Tensor

from flowalign.credit.base import Credit, Groups, check_eps, standardised, weighted


class GDPO(Credit):
    """c / std(c) with c = Σ_k w_k (r_k - group mean) / group std, and std(c) over the whole epoch.

    eps is added to both standard deviations (FlowAWR: 1e-4) or, with floor, is their minimum (Flow-Factory: 1e-6).
    """

    def __init__(self, eps: float = 1e-6, floor: bool = True) -> None:
        check_eps(eps)
        self.eps = eps
        self.floor = floor

    def _credit(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        c = weighted([standardised(r, groups, groups, self.eps, self.floor) for r in rewards.T], weights)
        # Published code also subtracts the mean of c, over the group or over all; both are 0 up to rounding.
        return standardised(c, groups, groups.everyone(), self.eps, self.floor)
