"""The objective rewards and the measures that are watched but never optimised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from flowalign.prompts import Prompt
from flowalign.rewards.base import Reward
from flowalign.scoring.measure import Measure, OnError
from flowalign.scoring.missing import Missing, Policy
from flowalign.scoring.ramp import Ramp
from flowalign.scoring.seen import Latents, Seen
from flowalign.scoring.turns import Scores, Scoring
from flowalign.types import Conditioning


class Scorer:
    """`objective` is trained on; `held_out` is only looked at, so that a hacked objective shows.

    An objective may have several rewards, by name, each with its weight (1 unless given); credit then decides how they
    meet, and "reward" is their weighted sum. One of weight 0 is only looked at, in rollouts too.
    """

    def __init__(
        self,
        objective: Reward | Measure | Mapping[str, Reward | Measure],
        held_out: Mapping[str, Reward | Measure] | None = None,
        weights: Mapping[str, float | Ramp] | None = None,
        missing: Policy = "drop_sample",
        max_missing: float = 0.5,
        on_error: OnError = "stop",
        self_check: bool = True,
        ahead: int = 1,
    ) -> None:
        """missing: what is left out of training where a picture has no score, or "stop". max_missing: the share of an
        epoch's pictures above which the run stops. on_error: whether a reward that raises ends the run, or leaves its
        samples without a score. self_check: whether rewards are checked before training. ahead: batches that may be
        sampled while earlier ones are scored, each reward by a thread of its own; 0: everything in turn.
        """
        if ahead < 0:
            raise ValueError(f"ahead counts the batches that wait for their scores and is 0 or more (got {ahead}).")
        named = objective if isinstance(objective, Mapping) else {"reward": objective}
        self.objective = {name: _measure(reward) for name, reward in named.items()}
        self.held_out = {name: _measure(reward) for name, reward in (held_out or {}).items()}
        self.missing = Missing(missing, max_missing)
        self.self_check = self_check
        self.ahead = ahead
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._check_names(weights or {})
        for name, measure in self.every.items():
            measure.name, measure.on_error = name, on_error
        for name, weight in (weights or {}).items():
            self.objective[name].weight = weight
        for epoch in (0, math.inf, *self._turns()):
            w = self.weights(epoch)
            if not w.isfinite().all() or not w.any():
                raise ValueError(f"the rewards need finite weights that are not all 0 (got {w.tolist()}).")

    def _check_names(self, weights: Mapping[str, object]) -> None:
        if unknown := sorted(weights.keys() - self.objective.keys()):
            raise ValueError(f"weights are given to {unknown}, but the rewards are {sorted(self.objective)}.")
        if "reward" in self.held_out or "reward" in self.objective and len(self.objective) > 1:
            raise ValueError("a measure cannot be called `reward`: that is the objective's name.")
        if twice := sorted(self.objective.keys() & self.held_out.keys()):
            raise ValueError(f"{twice} cannot be both trained on and held out.")

    # ------------------------------------------------------------ what there is

    @property
    def every(self) -> dict[str, Measure]:
        """All rewards by name, of the objective and held out."""
        return {**self.objective, **self.held_out}

    @property
    def measures(self) -> list[str]:
        """Names of what `all` returns."""
        return list(dict.fromkeys(["reward", *self._evaluated]))

    @property
    def _evaluated(self) -> dict[str, Measure]:
        return {name: measure for name, measure in self.every.items() if measure.evaluate}

    @property
    def groupwise(self) -> bool:
        """Whether a reward of the objective needs the whole group of a prompt at once."""
        return any(measure.groupwise for measure in self.objective.values())

    @property
    def sees_media(self) -> bool:
        """Whether a reward of the objective needs decoded pictures."""
        return not all(measure.sees_latents for measure in self.objective.values())

    @property
    def binds(self) -> bool:
        """Whether a reward is made of the policy's own parts, and needs their values."""
        return any(measure.binds for measure in self.every.values())

    def weights(self, epoch: float = math.inf) -> Tensor:
        """(R,) float64, of the rewards of the objective in an epoch; the last ones unless an epoch is given."""
        given = [measure.weight for measure in self.objective.values()]
        return torch.tensor([float(w(epoch) if isinstance(w, Ramp) else w) for w in given], dtype=torch.float64)

    def _turns(self) -> list[int]:
        ramps = [m.weight for m in self.objective.values() if isinstance(m.weight, Ramp)]
        return sorted({epoch for ramp in ramps for epoch in ramp.epochs})

    # ------------------------------------------------------------ before and after a run

    def check(self) -> None:
        """The self-checks of all rewards but those that wait for `bind`; RewardError with the first one's reason."""
        if self.self_check:
            for measure in self.every.values():
                if not measure.binds:
                    measure.check()

    def bind(self, model: Any) -> None:
        """Gives the model's adapter to the rewards that are made of the policy's own parts; before training, once."""
        for measure in self.every.values():
            measure.bind(model, self.self_check)

    def close(self) -> None:
        """Lets rewards end what they have started."""
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)
        self._threads.clear()
        for measure in self.every.values():
            measure.close()

    # ------------------------------------------------------------ scores

    def start(self, seen: Seen, evaluation: bool = False) -> Scoring:
        """Begins to score by the rewards of the objective, or by all that an evaluation measures."""
        measures = self._evaluated if evaluation else self.objective
        return Scoring({name: self._started(name, measure, seen) for name, measure in measures.items()})

    def _started(self, name: str, measure: Measure, seen: Seen) -> Future[Tensor]:
        if self.ahead and measure.beside:
            # One thread a reward: none is called twice at a time, and its calls are in order.
            if name not in self._threads:
                beside_network = _without_pool if seen.device.type == "cpu" else None
                self._threads[name] = ThreadPoolExecutor(1, f"reward-{name}", beside_network)
            return self._threads[name].submit(measure, seen)
        future: Future[Tensor] = Future()
        future.set_result(measure(seen))
        return future

    def stacked(self, scores: Scores) -> Tensor:
        """(B, R) of the rewards of the objective by name."""
        return torch.stack([scores[name] for name in self.objective], dim=1)

    def rewards(
        self,
        media: Tensor | None,
        prompts: Sequence[Prompt],
        latents: Latents | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """(B, R) float32 of the R rewards of the objective; NaN = could not be scored.

        media may be None where `sees_media` says so; groups (B,) are the numbers of what is compared.
        """
        return self.stacked(self.start(Seen(prompts, media, latents, groups)).result())

    def of_noisy(self, x: Tensor, sigma: Tensor, cond: Conditioning, epoch: float = math.inf) -> Tensor:
        """The weighted sum of the objective on noisy latents x (B, …) at sigma (B,), with its gradient to x: (B,)."""
        counted = [(w, m) for w, m in zip(self.weights(epoch).tolist(), self.objective.values(), strict=True) if w]
        return torch.stack([w * m.reward.of_noisy(x, sigma, cond) for w, m in counted]).sum(dim=0)  # type: ignore

    def combined(self, rewards: Tensor, epoch: float = math.inf) -> Tensor:
        """(B, R) to their weighted sum (B,); NaN if a reward that counts is missing."""
        return _total(rewards, self.weights(epoch))

    def all(self, media: Tensor | None, prompts: Sequence[Prompt], latents: Latents | None = None) -> dict[str, Tensor]:
        """What an evaluation measures, by name, and the weighted sum of the objective under "reward"; (B,) each."""
        return self.summed(self.start(Seen(prompts, media, latents), evaluation=True).result(), len(prompts))

    def summed(self, scores: Scores, number: int) -> Scores:
        """With the weighted sum of the objective for so many samples.

        It is over what is evaluated, by the last weights, so that evaluations can be compared; NaN without any.
        """
        counted = [name for name in self.objective if name in scores]
        if not counted:  # perhaps nothing at all is evaluated, so that no score says how many samples there are
            like = next(iter(scores.values()), torch.empty(0))
            return scores | {"reward": like.new_full((number,), torch.nan)}
        weights = self.weights()[[name in scores for name in self.objective]]
        return scores | {"reward": _total(torch.stack([scores[name] for name in counted], dim=1), weights)}


def _total(rewards: Tensor, weights: Tensor) -> Tensor:
    counts = weights != 0
    return (rewards[:, counts] * weights[counts].to(rewards)).sum(dim=1)


def _measure(reward: Reward | Measure) -> Measure:
    return reward if isinstance(reward, Measure) else Measure(reward)


def _without_pool() -> None:
    """For a thread beside a network on the CPU. With a second pool of OpenMP threads there are more of them than cores,
    upon which the library lets all of them sleep at every wait, the network's own: an epoch took 1.3 times as long."""
    torch.set_num_threads(1)
