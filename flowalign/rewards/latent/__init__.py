"""Latent-space reward on the first blocks of the policy's own transformer: PAVRM of HY-Video-PRFL."""

from flowalign.rewards.latent.reward import Latent

__all__ = ["Latent"]
