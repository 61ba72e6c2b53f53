"""The energies of FlowAWR: how much more often than by chance a sample should be generated."""

from typing import Literal

import torch
from torch import Tensor

from flowalign.credit.base import Credit, Groups, prepare, weighted
from flowalign.credit.group import GroupCredit


class Energies(Credit):
    """E = K (p - 1/K), at most `clip`, with p the softmax over a group of size K of the advantage / temperature.

    E is in [-1, K - 1]: 0 leaves a sample alone, 1 targets it, -1 moves away. gate="hard" divides p - 1/K by its
    standard deviation within the group instead of by 1/K, so that a rare success stands out. With several rewards,
    aggregate="rewards" sums them first and "energies" takes the mean of w_k E_k.
    """

    def __init__(
        self,
        gate: Literal["soft", "hard"] = "soft",
        temperature: float = 1.0,
        clip: float = 3.0,
        adv_clip: float = 5.0,
        std: Literal["group", "global"] = "global",
        eps: float = 1e-4,
        aggregate: Literal["rewards", "energies"] = "rewards",
    ) -> None:
        if gate not in ("soft", "hard"):
            raise ValueError(f'gate is "soft" or "hard" (got {gate!r}).')
        if aggregate not in ("rewards", "energies"):
            raise ValueError(f'aggregate is "rewards" or "energies" (got {aggregate!r}).')
        if min(temperature, clip, adv_clip) <= 0:
            raise ValueError(f"temperature and clips must be positive (got {temperature}, {clip}, {adv_clip}).")
        self.gate = gate
        self.temperature = temperature
        self.clip = clip
        self.adv_clip = adv_clip
        self.aggregate = aggregate
        self.advantage = GroupCredit(std, eps)

    def __call__(
        self, rewards: Tensor, group: Tensor, valid: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """See `Credit`. Rewards with weight 0 count in the mean, so a weight that decays to 0 causes no jump."""
        number = rewards[0].numel() if self.aggregate == "energies" else 1
        return super().__call__(rewards, group, valid, weights) / number

    def _credit(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        if self.aggregate == "rewards":
            return self._energy(weighted(rewards.T, weights), groups)
        return weighted([self._energy(r, groups) for r in rewards.T], weights)

    def _energy(self, r: Tensor, groups: Groups) -> Tensor:
        K = groups.count()
        e = self.probability(r, groups) - 1 / K
        # 1e-4 and 1e-2 as in the authors' code, for groups whose probabilities hardly differ.
        E = K * e if self.gate == "soft" else e / (groups.std(e) + 1e-4).clamp(min=1e-2)
        return torch.where(groups.alive(r), E.clamp(-self.clip, self.clip), 0.0)

    def probability(self, r: Tensor, groups: Groups) -> Tensor:
        """p (N,), which sums to 1 over the samples of a group that count."""
        A = self.advantage._credit(r[:, None], r.new_ones(1), groups)
        a = A.clamp(-self.adv_clip, self.adv_clip) / self.temperature
        weight = (a - groups.high(a)).exp()
        return weight / groups.sum(weight)

    def stats(
        self, rewards: Tensor, group: Tensor, valid: Tensor | None = None, weights: Tensor | None = None
    ) -> dict[str, float]:
        """Effective sample size 1 / Σ p^2, mean over groups, and the same divided by K.

        For the weighted sum of the rewards. A group without spread has K; a value closer to 1 than to K means that one
        sample dominates its group.
        """
        r, w, groups = prepare(rewards, group, valid, weights)
        size = 1 / groups.sum(self.probability(weighted(r.T, w), groups) ** 2)
        return {
            "effective_samples": float(groups.average(size)),
            "effective_share": float(groups.average(size / groups.count())),
        }
