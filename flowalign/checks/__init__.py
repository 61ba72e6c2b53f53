"""Checks that run before anything heavy starts. Each error is one sentence naming the nearest valid choice.

Import `flowalign.checks.preflight` by its own name, so that code which only needs `ConfigError` does not import Hydra.
"""

from flowalign.checks.errors import ConfigError, RunError, as_config_errors
from flowalign.checks.signatures import check_signatures
from flowalign.checks.suggest import nearest, suggest

__all__ = ["ConfigError", "RunError", "as_config_errors", "check_signatures", "nearest", "suggest"]
