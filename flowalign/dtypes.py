"""Names of floating-point types."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name. ValueError if it is none of DTYPES."""
    if name not in DTYPES:
        raise ValueError(f"a dtype is one of {', '.join(DTYPES)} (got {name!r}).")
    return DTYPES[name]
