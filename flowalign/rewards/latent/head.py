"""Reward head: attention pooling with a learned query, then an MLP (PAVRM of HY-Video-PRFL)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """Maps tokens (B, L, width) to logits (B,). Pooling adds the attention output to the query."""

    def __init__(self, width: int, heads: int = 8, hidden: Sequence[int] = (1024, 512)) -> None:
        super().__init__()
        if width % heads:
            fitting = max(n for n in range(1, heads + 1) if width % n == 0)
            raise ValueError(f"{heads} heads do not divide tokens of width {width}; {fitting} do.")
        self.query = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, width)))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        sizes = [width, *hidden, 1]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            linear = nn.Linear(n_in, n_out)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query.expand(len(tokens), 1, -1)
        pooled = query + self.attention(query, tokens, tokens, need_weights=False)[0]
        return self.mlp(pooled[:, 0])[:, 0]
