"""What a reward raises; without PyTorch, since the command line knows it too."""


class RewardError(RuntimeError):
    """A reward that cannot be used, and why, in a sentence."""
