"""Rewards: one file each. A reward is any callable of the form in `base.py`."""
