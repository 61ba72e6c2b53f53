"""Reward server for `reward=remote`: serves rewards over HTTP."""
