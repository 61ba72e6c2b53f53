"""A Lightning strategy that shards the denoisers, and its checkpoints; `auto` and `ddp` are Lightning's own."""
