"""The live network and its frozen copies, for adapters and for full fine-tuning."""

from flowalign.policy.policy import Policy
from flowalign.policy.tune import Full, Lora, Tune

__all__ = ["Full", "Lora", "Policy", "Tune"]
