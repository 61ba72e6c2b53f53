"""The rewards that are optimised, and those that are only measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from flowalign.prompts import Prompt
from flowalign.rewards.base import Reward
from flowalign.scoring.inputs import Latents, RewardInput
from flowalign.scoring.measure import Measure, OnError
from flowalign.scoring.missing import Missing, Policy
from flowalign.scoring.queue import PendingScores, Scores
from flowalign.scoring.ramp import Ramp
from flowalign.types import Conditioning


class Scorer:
    """`objective` is optimised; `held_out` is only measured, which reveals a hacked objective.

    The objective may be several named rewards with weights (default 1). `credit` decides how they are combined into
    advantages; the metric "reward" is their weighted sum. A reward of weight 0 is measured in rollouts, not optimised.
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
        """missing: what to leave out of training when an image has no score, or "stop". max_missing: the fraction of an
        epoch's images without a score above which the run stops. on_error: a reward that raises either stops the run or
        leaves its samples without a score ("missing"). self_check: check rewards before training. ahead: number of
        batches that may wait for their scores while the next ones are sampled, each reward on a thread of its own; 0
        scores synchronously.
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
        for epoch in (0, math.inf, *self._ramp_epochs()):
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

    # ------------------------------------------------------------ rewards

    @property
    def every(self) -> dict[str, Measure]:
        """All rewards by name, optimised and held out."""
        return {**self.objective, **self.held_out}

    @property
    def measures(self) -> list[str]:
        """Names of the scores that `all` returns."""
        return list(dict.fromkeys(["reward", *self._evaluated]))

    @property
    def _evaluated(self) -> dict[str, Measure]:
        return {name: measure for name, measure in self.every.items() if measure.evaluate}

    @property
    def groupwise(self) -> bool:
        """Whether a reward of the objective has to be called with whole groups."""
        return any(measure.groupwise for measure in self.objective.values())

    @property
    def sees_media(self) -> bool:
        """Whether a reward of the objective needs decoded images."""
        return not all(measure.sees_latents for measure in self.objective.values())

    @property
    def binds(self) -> bool:
        """Whether a reward is built from the policy's own networks, and needs their weights loaded."""
        return any(measure.binds for measure in self.every.values())

    def weights(self, epoch: float = math.inf) -> Tensor:
        """Weights (R,) float64 of the objective's rewards in an epoch; by default the final ones."""
        given = [measure.weight for measure in self.objective.values()]
        return torch.tensor([float(w(epoch) if isinstance(w, Ramp) else w) for w in given], dtype=torch.float64)

    def _ramp_epochs(self) -> list[int]:
        ramps = [m.weight for m in self.objective.values() if isinstance(m.weight, Ramp)]
        return sorted({epoch for ramp in ramps for epoch in ramp.epochs})

    # ------------------------------------------------------------ before and after a run

    def check(self) -> None:
        """Run the self-checks of all rewards, except those that need `bind`. Raises RewardError at a failure."""
        if self.self_check:
            for measure in self.every.values():
                if not measure.binds:
                    measure.check()

    def check_prompts(self, trained: Sequence[Prompt], evaluated: Sequence[Prompt]) -> None:
        """Raise RewardError, naming the line, for a prompt that a reward of its phase could not score."""
        for measure in self.objective.values():
            measure.check_prompts(trained)
        for measure in self._evaluated.values():
            measure.check_prompts(evaluated)

    def bind(self, model: Any) -> None:
        """Give the model's adapter to the rewards built from the policy's own networks; once, before training."""
        for measure in self.every.values():
            measure.bind(model, self.self_check)

    def close(self) -> None:
        """Stop the scoring threads, and whatever the rewards have started."""
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)
        self._threads.clear()
        for measure in self.every.values():
            measure.close()

    # ------------------------------------------------------------ scores

    def start(self, batch: RewardInput, evaluation: bool = False) -> PendingScores:
        """Start scoring a batch by the rewards of the objective, or by all rewards that an evaluation measures."""
        measures = self._evaluated if evaluation else self.objective
        return PendingScores({name: self._submit(name, measure, batch) for name, measure in measures.items()})

    def _submit(self, name: str, measure: Measure, batch: RewardInput) -> Future[Tensor]:
        if self.ahead and measure.concurrent:
            # One thread per reward: its calls never overlap, and keep their order.
            if name not in self._threads:
                initializer = _single_threaded if batch.device.type == "cpu" else None
                self._threads[name] = ThreadPoolExecutor(1, f"reward-{name}", initializer)
            return self._threads[name].submit(measure, batch)
        future: Future[Tensor] = Future()
        future.set_result(measure(batch))
        return future

    def stacked(self, scores: Scores) -> Tensor:
        """Scores (B, R) of the objective's rewards, in their order."""
        return torch.stack([scores[name] for name in self.objective], dim=1)

    def rewards(
        self,
        media: Tensor | None,
        prompts: Sequence[Prompt],
        latents: Latents | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """Score synchronously: (B, R) float32 for the R rewards of the objective; NaN = could not be scored.

        media may be None if `sees_media` is false; groups (B,) are needed by groupwise rewards.
        """
        return self.stacked(self.start(RewardInput(prompts, media, latents, groups)).result())

    def of_noisy(self, x: Tensor, sigma: Tensor, cond: Conditioning, epoch: float = math.inf) -> Tensor:
        """Weighted sum (B,) of the objective on noisy latents x (B, …) at sigma (B,), differentiable in x."""
        counted = [(w, m) for w, m in zip(self.weights(epoch).tolist(), self.objective.values(), strict=True) if w]
        return torch.stack([w * m.reward.of_noisy(x, sigma, cond) for w, m in counted]).sum(dim=0)  # type: ignore

    def combined(self, rewards: Tensor, epoch: float = math.inf) -> Tensor:
        """Weighted sum (B,) of rewards (B, R); NaN where a reward with a weight is missing."""
        return _total(rewards, self.weights(epoch))

    def all(self, media: Tensor | None, prompts: Sequence[Prompt], latents: Latents | None = None) -> dict[str, Tensor]:
        """Scores (B,) of every evaluated reward by name, and the weighted sum of the objective as "reward"."""
        return self.summed(self.start(RewardInput(prompts, media, latents), evaluation=True).result(), len(prompts))

    def summed(self, scores: Scores, number: int) -> Scores:
        """Add the weighted sum of the objective as "reward" (number,); NaN if none of its rewards is evaluated.

        It always uses the final weights, so that evaluations of different epochs can be compared.
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


def _single_threaded() -> None:
    """Run a reward's thread without an OpenMP pool of its own while the network uses the CPU.

    With a second pool there would be more OpenMP threads than cores, and the library would then put all waiting threads
    to sleep, including the network's: an epoch took 1.3 times as long.
    """
    torch.set_num_threads(1)
