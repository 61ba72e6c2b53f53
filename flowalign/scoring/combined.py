"""Several options of the group `reward` as one: what `reward=[a,b]` on the command line builds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature

from flowalign.rewards.base import Reward
from flowalign.scoring.measure import Measure, OnError
from flowalign.scoring.missing import Policy
from flowalign.scoring.ramp import Ramp, product
from flowalign.scoring.scorer import Scorer


def combined(
    parts: Mapping[str, Scorer],
    held_out: Mapping[str, Reward | Measure] | None = None,
    weights: Mapping[str, float | Ramp] | None = None,
    missing: Policy = "drop_sample",
    max_missing: float = 0.5,
    on_error: OnError = "stop",
    self_check: bool = True,
    ahead: int = 1,
) -> Scorer:
    """Combine the rewards of several Scorers, and what they hold out unless another trains on a reward of that name.

    A part with one reward gives it the part's name; those with several keep the rewards' names. A weight multiplies the
    part's own weights. The remaining arguments are those of Scorer, for all parts together: ValueError for a part
    with others of its own.
    """
    weights = weights or {}
    if unknown := sorted(weights.keys() - parts.keys()):
        raise ValueError(f"weights are given to {unknown}, but the rewards are {sorted(parts)}.")
    objective: dict[str, Measure] = {}
    weighted: dict[str, float | Ramp] = {}
    watched: dict[str, Reward | Measure] = {}
    for part, scorer in parts.items():
        _check_settings(part, scorer)
        for name, measure in _named(part, scorer):
            if name in objective:
                raise ValueError(f"two of the rewards are called {name}: leave one out.")
            objective[name], weighted[name] = measure, product(measure.weight, weights.get(part, 1.0))
        watched |= scorer.held_out
    watched = {name: measure for name, measure in watched.items() if name not in objective}
    return Scorer(
        objective, watched | dict(held_out or {}), weighted, missing, max_missing, on_error, self_check, ahead
    )


def _named(part: str, scorer: Scorer) -> Iterator[tuple[str, Measure]]:
    for name, measure in scorer.objective.items():
        yield part if name == "reward" else name, measure


def _check_settings(part: str, scorer: Scorer) -> None:
    own = {
        "missing": scorer.missing.policy,
        "max_missing": scorer.missing.at_most,
        "on_error": next(iter(scorer.objective.values())).on_error,
        "self_check": scorer.self_check,
        "ahead": scorer.ahead,
    }
    for key, value in own.items():
        if value != signature(Scorer).parameters[key].default:
            raise ValueError(f"{part} sets {key}={value} for itself: set reward.{key}, for all rewards together.")
