"""Model adapters, one per diffusers family. No other package imports diffusers pipelines."""
