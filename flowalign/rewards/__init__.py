"""Rewards, one per file. A reward is any callable that follows the protocol in `base.py`."""
