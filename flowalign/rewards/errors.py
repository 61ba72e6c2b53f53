"""The error that rewards raise; importable without PyTorch for the command line."""


class RewardError(RuntimeError):
    """A reward cannot be used; the message says why in a sentence."""
