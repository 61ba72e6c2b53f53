"""Text conditioning, encoded once a prompt and kept on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flowalign.models.base import FlowModel
from flowalign.prompts import Prompt
from flowalign.types import Conditioning


class Conditioner:
    """Prompts to Conditioning rows. The unconditional branch is encoded only if somebody will guide with it."""

    def __init__(self, model: FlowModel, guided: bool, batch_size: int = 64) -> None:
        self.model, self.guided, self.batch_size = model, guided, batch_size
        self._rows: dict[tuple[str, str], Conditioning] = {}

    def __call__(self, prompts: Sequence[Prompt], device: torch.device) -> Conditioning:
        """One row a prompt, in order."""
        keys = [(p.text, p.negative or "") for p in prompts]
        missing = [key for key in dict.fromkeys(keys) if key not in self._rows]
        for start in range(0, len(missing), self.batch_size):
            self._encode(missing[start : start + self.batch_size])
        return Conditioning.cat([self._rows[key] for key in keys]).to(device)

    def _encode(self, keys: list[tuple[str, str]]) -> None:
        negatives = [negative for _, negative in keys] if self.guided else None
        cond = self.model.encode([text for text, _ in keys], negatives).to("cpu")
        for i, key in enumerate(keys):
            self._rows[key] = cond.index(slice(i, i + 1))
