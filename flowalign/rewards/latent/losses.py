"""Losses of latent rewards."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from flowalign.rewards.latent.network import Link

Loss = Literal["bce", "bradley_terry", "regression"]


def targets(kind: Loss, label: Tensor) -> tuple[Tensor, Link]:
    """Training targets (N,) for labels (N,), and the link from logits to rewards that fits them.

    Raises ValueError for cross entropy with labels outside [0, 1].
    """
    if kind == "regression":
        scale, shift = float(label.std().clamp(min=1e-6)), float(label.mean())
        return (label - shift) / scale, Link("line", scale, shift)
    if kind == "bce" and (label.min() < 0 or label.max() > 1):
        raise ValueError(
            f"loss=bce takes labels in [0, 1], and these reach from {float(label.min()):.3g} to "
            f"{float(label.max()):.3g}: use loss=bradley_terry or loss=regression."
        )
    return label, Link("sigmoid")


def pointwise(kind: Loss, logit: Tensor, label: Tensor) -> Tensor:
    """Loss (B,) of logits and labels (B,): cross entropy for labels in [0, 1], squared error for standardised ones."""
    if kind == "bce":
        return binary_cross_entropy_with_logits(logit, label, reduction="none")
    return (logit - label) ** 2


def preference(better: Tensor, worse: Tensor) -> Tensor:
    """Bradley-Terry loss -log σ(f_w - f_l), (B,), for the logits (B,) of the better and the worse of each pair."""
    return -logsigmoid(better - worse)


def pairs(prompt: Tensor, label: Tensor) -> Tensor:
    """Indices (P, 2) of (better, worse) examples of the same prompt; equal or missing labels make no pair."""
    found = []
    for number in prompt.unique():
        rows = (prompt == number).nonzero().flatten()
        better, worse = (label[rows, None] > label[rows]).nonzero(as_tuple=True)
        found.append(torch.stack([rows[better], rows[worse]], dim=1))
    return torch.cat(found) if found else torch.empty(0, 2, dtype=torch.long)


def accuracy(logit: Tensor, of: Tensor) -> float:
    """Fraction of the pairs (P, 2) that the logits (N,) order correctly; a tie counts half."""
    gap = logit[of[:, 0]] - logit[of[:, 1]]
    return float(((gap > 0).double() + 0.5 * (gap == 0)).mean())
