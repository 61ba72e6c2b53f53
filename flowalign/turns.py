"""Turns that classes take, in given proportions."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence


class Turns:
    """An endless sequence of turns in which class k takes shares[k] of every sum(shares), spread evenly."""

    def __init__(self, shares: Sequence[int]) -> None:
        if any(share < 1 for share in shares):
            raise ValueError(f"a share is a whole number of turns, at least 1 (got {list(shares)}): leave out the rest")
        common = math.gcd(*shares)
        shares = [share // common for share in shares]
        # The middle of each of a class's equal parts of the round; the first class goes first.
        wanted = sorted(((i + 0.5) / share, k) for k, share in enumerate(shares) for i in range(share))
        self._order = [k for _, k in wanted]
        self._turns: list[list[int]] = [[] for _ in shares]
        for turn, k in enumerate(self._order):
            self._turns[k].append(turn)

    def whose(self, turn: int) -> int:
        """The class that takes a turn, counted from 0."""
        return self._order[turn % len(self._order)]

    def taken(self, k: int, turns: int) -> int:
        """How many of the first `turns` class k takes."""
        rounds, rest = divmod(turns, len(self._order))
        return rounds * len(self._turns[k]) + bisect_left(self._turns[k], rest)

    def most(self, k: int, turns: int) -> int:
        """The most that class k takes of so many successive turns, wherever they begin."""
        return max(self.taken(k, start + turns) - self.taken(k, start) for start in self._turns[k])
