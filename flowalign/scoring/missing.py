"""Which samples are trained on when some could not be scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from flowalign.credit import Groups
from flowalign.rewards.base import RewardError

Policy = Literal["drop_sample", "drop_group", "stop"]
CAUSES = (
    "Likely causes: a reward server that is down or too slow, a worker that was killed for its memory, prompts without "
    "the metadata that the reward reads, pictures that are not finite. Fix the cause and resume with ckpt_path=… from "
    "the last checkpoint, which is whole; before the end of the first epoch there is none."
)


@dataclass(frozen=True)
class Missing:
    """Selects the samples to train on. A sample counts as scored if every reward with a weight has given it a score."""

    policy: Policy = "drop_sample"
    at_most: float = 0.5
    """Largest fraction of an epoch's samples that may lack a score."""

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise ValueError(f"missing is one of {', '.join(get_args(Policy))} (got {self.policy!r}).")
        if not 0 <= self.at_most <= 1:
            raise ValueError(f"max_missing is a share of the samples, in [0, 1] (got {self.at_most}).")

    def valid(self, rewards: Tensor, groups: Tensor, weights: Tensor, names: Sequence[str]) -> Tensor:
        """Samples to train on, (N,) bool, from rewards (N, R), groups (N,) and weights (R,).

        Raises RewardError if too many scores are missing, or any under the policy "stop".
        """
        lacking = rewards.isnan() & (weights != 0).to(rewards.device)
        scored = ~lacking.any(dim=1)
        missing = int((~scored).sum())
        if missing == 0:
            return scored
        number, by = len(scored), _by_reward(lacking, names)
        if missing == number:
            raise RewardError(f"not a single picture of this epoch could be scored ({by}). {CAUSES}")
        if self.policy == "stop":
            raise RewardError(f"{missing} of {number} pictures could not be scored ({by}), and missing=stop. {CAUSES}")
        if missing > self.at_most * number:
            raise RewardError(
                f"{missing} of the {number} pictures of this epoch could not be scored ({by}), more than "
                f"max_missing={self.at_most:g} allows. {CAUSES}"
            )
        if self.policy == "drop_sample":
            return scored
        members = Groups.of(groups)
        whole = members.sum(scored.double()) == members.count()
        if not whole.any():
            raise RewardError(
                f"every group of this epoch has a picture that could not be scored ({by}), so missing=drop_group "
                f"leaves nothing: use missing=drop_sample. {CAUSES}"
            )
        return whole


def _by_reward(lacking: Tensor, names: Sequence[str]) -> str:
    """Number of missing scores per reward, most first: "ocr: 96, clip: 3"."""
    counts = {name: int(n) for name, n in zip(names, lacking.sum(dim=0), strict=True) if n}
    return ", ".join(f"{name}: {n}" for name, n in sorted(counts.items(), key=lambda item: -item[1]))
