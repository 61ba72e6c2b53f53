"""Model adapters: one per diffusers family, and the only importers of diffusers pipelines."""
