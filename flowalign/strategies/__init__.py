"""Strategies that shard the denoisers; `auto` and `ddp` are Lightning's own."""
