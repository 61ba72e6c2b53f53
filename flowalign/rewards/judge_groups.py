"""Groupwise comparison of samples by a vision-language model: in pairs, or as a ranking of the whole group."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.rewards.base import RewardError, as_videos
from flowalign.rewards.chat import Chat, Question, text_of
from flowalign.rewards.groupwise import win_rate
from flowalign.rewards.judge import fill_template, plain_squares
from flowalign.rewards.png import to_uint8


class GroupJudge(ABC):
    """Base class for judges that compare members of a group; `{prompt}` in the template becomes their prompt."""

    groupwise = True

    def __init__(self, chat: Chat, template: str, check: bool = True) -> None:
        """check: whether `self_check` tests that the judge can tell a red square from a blue one."""
        self.chat, self.template, self.check = chat, template, check

    @abstractmethod
    def compare(self, stills: Sequence[Tensor], prompts: Sequence[str], groups: Tensor) -> Tensor:
        """Frames (F, 3, H, W) of n samples, their prompts and groups (n,) → scores (n,) in [0, 1]."""

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]], groups: Tensor) -> Tensor:
        """`groups` (B,): samples with the same id are compared. NaN for samples without any valid verdict."""
        videos, finite = as_videos(media, prompts, metadata)
        rows, videos = finite.nonzero().flatten().cpu(), to_uint8(videos)
        scores = torch.full((len(videos),), torch.nan)
        stills = [self.chat.sample_frames(videos[i]) for i in rows]
        scores[rows] = self.compare(stills, [prompts[i] for i in rows], groups.cpu()[rows])
        return scores

    def self_check(self) -> None:
        """Raise RewardError if the judge cannot be reached or does not prefer red when asked for red."""
        self.chat.check()
        if self.check:
            groups = torch.zeros(2, dtype=torch.long)
            red, blue = self(plain_squares(), ["a plain red square"] * 2, [{}, {}], groups).tolist()
            if not red > blue:
                raise RewardError(
                    f"the judge {self.chat.model} does not prefer a red square for “a plain red square” (it wins "
                    f"{red:.3g}, a blue one {blue:.3g}): it cannot judge (check=false if the question is another one)."
                )

    def close(self) -> None:
        self.chat.close()


class Pairwise(GroupJudge):
    """Win rate in the group, with each pair shown in both orders (Pref-GRPO, arXiv:2508.20751).

    The judge answers `first`, `second` or `tie`. Verdicts that contradict each other are a tie, and a tie is half a
    win. A pair without a valid answer in both orders does not count.
    """

    def __init__(
        self,
        chat: Chat,
        template: str,
        first: str = "A",
        second: str = "B",
        tie: str = "tie",
        neighbours: int | None = None,
        check: bool = True,
    ) -> None:
        """first, second, tie: the judge's words; neighbours: each member is compared with this many on either side in
        the circularly ordered group; None: with all others, n - 1 questions per image in a group of n.
        """
        super().__init__(chat, template, check)
        self.outcome = {first.casefold(): 1.0, second.casefold(): 0.0, tie.casefold(): 0.5}
        if len(self.outcome) < 3 or neighbours is not None and neighbours < 1:
            raise ValueError("first, second and tie are three words, and neighbours at least 1 (or null for all).")
        self.neighbours = neighbours
        self._word = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, (first, second, tie)))})(?!\w)", re.IGNORECASE)

    def compare(self, stills: Sequence[Tensor], prompts: Sequence[str], groups: Tensor) -> Tensor:
        pairs = self._pairs(groups.tolist())
        orders = [*pairs, *((j, i) for i, j in pairs)]
        questions = [
            Question(torch.cat([stills[i], stills[j]]), fill_template(self.template, prompts[i]), (i, j))
            for i, j in orders
        ]
        shown_first = torch.full((len(stills), len(stills)), torch.nan)  # the row's outcome when it is shown first
        for (i, j), verdict in zip(orders, self.chat.ask(questions, self.verdict), strict=True):
            shown_first[i, j] = torch.nan if verdict is None else verdict
        return win_rate((shown_first + 1 - shown_first.T) / 2, groups)

    def verdict(self, choice: dict[str, Any]) -> float:
        """Outcome for the image shown first, 1, 0 or ½, from the last line of the answer; NaN if it has no verdict."""
        lines = text_of(choice).splitlines() or [""]
        words = {word.casefold() for word in self._word.findall(lines[-1])}
        return self.outcome[words.pop()] if len(words) == 1 else math.nan

    def _pairs(self, groups: list[int]) -> list[tuple[int, int]]:
        members: dict[int, list[int]] = {}
        for i, group in enumerate(groups):
            members.setdefault(group, []).append(i)
        found: dict[frozenset[int], tuple[int, int]] = {}
        for circle in members.values():
            n = len(circle)
            for distance in range(1, min(self.neighbours or n, n - 1) + 1):
                for place in range(n):
                    pair = (circle[place], circle[(place + distance) % n])
                    found.setdefault(frozenset(pair), pair)
        return list(found.values())


class Ranking(GroupJudge):
    """Rank in the judge's ordering of the whole group, from 0 (last) to 1 (first), averaged over two opposite displays.

    The judge answers with a JSON list of image numbers, best first, where 1 is the image shown first. Answers that are
    not a permutation do not count.
    """

    def compare(self, stills: Sequence[Tensor], prompts: Sequence[str], groups: Tensor) -> Tensor:
        members = [(groups == group).nonzero().flatten().tolist() for group in groups.unique()]
        displays: list[list[int]] = [order for rows in members if len(rows) > 1 for order in (rows, rows[::-1])]
        questions = [
            Question(torch.cat([stills[i] for i in rows]), fill_template(self.template, prompts[rows[0]]), tuple(rows))
            for rows in displays
        ]
        scores = torch.full((len(displays), len(stills)), torch.nan)
        for row, shown, order in zip(scores, displays, self.chat.ask(questions, self.order), strict=True):
            if order is not None and sorted(order) == list(range(1, len(shown) + 1)):
                for place, number in enumerate(order):
                    row[shown[number - 1]] = 1 - place / (len(shown) - 1)
        return scores.nanmean(dim=0)

    def order(self, choice: dict[str, Any]) -> list[int] | None:
        """The last list of integers in the answer."""
        lists = re.findall(r"\[[\d\s,]*\]", text_of(choice))
        try:
            return json.loads(lists[-1]) if lists else None
        except ValueError:
            return None
