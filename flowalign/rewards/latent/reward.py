"""Reward of latents, clean or noisy, by the first blocks of the policy; nothing is decoded (PRFL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowalign.flow import interpolate
from flowalign.keyed import INITIAL, keyed_randn
from flowalign.rewards.base import RewardError
from flowalign.rewards.latent.files import find_folder, load
from flowalign.rewards.latent.network import Network

if TYPE_CHECKING:
    from flowalign.models.base import FlowModel
    from flowalign.types import Conditioning


class Latent:
    """Latent reward with the network in the folder `weights`, or in the one of that name in this package.

    A clean latent scores the mean over the noise levels `sigmas`, each with one fixed noise: slightly noised latents
    are scored more accurately than clean ones, which training never sees.
    """

    sees = "latents"

    def __init__(self, weights: str, sigmas: Sequence[float] = (0.1,)) -> None:
        if not sigmas or not all(0 <= sigma <= 1 for sigma in sigmas):
            raise ValueError(
                f"sigmas are the noise levels at which latents are judged, in [0, 1] (got {list(sigmas)})."
            )
        find_folder(weights)
        self.weights, self.sigmas = weights, tuple(sigmas)
        self._network: Network | None = None

    def bind(self, model: FlowModel) -> None:
        """Build the network on a copy of the model's first blocks. Call it before they become part of the policy."""
        self._network = load(model, self.weights)

    @property
    def network(self) -> Network:
        if self._network is None:
            raise RewardError("a latent reward needs the model that it judges for: call bind(model) first.")
        return self._network

    @torch.no_grad()
    def of_latents(self, x0: Tensor, cond: Conditioning, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score final latents x0 (B, …), with one row of cond per sample → (B,); NaN for non-finite latents."""
        del prompts, metadata
        finite = x0.isfinite().flatten(1).all(dim=1)
        scores = x0.new_full((len(x0),), torch.nan, dtype=torch.float32)
        if finite.any():
            scores[finite] = self._mean_over_sigmas(x0[finite].float(), cond.index(finite))
        return scores

    def _mean_over_sigmas(self, x0: Tensor, cond: Conditioning) -> Tensor:
        noises = keyed_randn(0, 0, range(len(self.sigmas)), INITIAL, x0.shape[1:], x0.device)
        levels = [x0.new_full((len(x0),), sigma) for sigma in self.sigmas]
        noisy = [interpolate(x0, eps.expand_as(x0), sigma) for eps, sigma in zip(noises, levels, strict=True)]
        return torch.stack([self.of_noisy(x, s, cond) for x, s in zip(noisy, levels, strict=True)]).mean(dim=0)

    def of_noisy(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Score noisy latents x (B, …) at noise levels sigma (B,) → (B,), differentiable in x."""
        network = self.network.to(x.device)
        return network.reward(x, sigma, cond)
