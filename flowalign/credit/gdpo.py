"""GDPO: every reward normalised on its own, so that none drowns the others, and their sum once more."""

from torch import Tensor

from flowalign.credit.base import Credit, Groups, standardised, weighted


class GDPO(Credit):
    """c / std(c) with c = Σ_k w_k (r_k - group mean) / group std, the last std over the whole epoch.

    eps is added to both deviations (FlowAWR: 1e-4), or is their smallest value with floor (Flow-Factory: 1e-6).
    """

    def __init__(self, eps: float = 1e-6, floor: bool = True) -> None:
        self.eps = eps
        self.floor = floor

    def _credit(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        c = weighted([standardised(r, groups, groups, self.eps, self.floor) for r in rewards.T], weights)
        # The codes subtract a mean of c again, of the group or of all; both are 0 already, but for rounding.
        return standardised(c, groups, groups.everyone(), self.eps, self.floor)
