"""Refusals before anything heavy starts: each one sentence with the nearest thing that would have worked.

`flowalign.checks.preflight` is imported by its own name: whoever only needs `ConfigError` does not import Hydra.
"""

from flowalign.checks.errors import ConfigError, RunError, refusals
from flowalign.checks.signatures import check_signatures
from flowalign.checks.suggest import nearest, suggest

__all__ = ["ConfigError", "RunError", "check_signatures", "nearest", "refusals", "suggest"]
