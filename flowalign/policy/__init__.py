"""The trained network and its frozen copies, with LoRA adapters or full fine-tuning."""

from flowalign.policy.policy import Policy
from flowalign.policy.tune import Full, Lora, Tune

__all__ = ["Full", "Lora", "Policy", "Tune"]
