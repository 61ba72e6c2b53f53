"""Errors that are reported as one sentence: invalid configs, and failures of a run with a valid one."""

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A config that cannot work. The message is one sentence for the user who wrote it."""


class RunError(RuntimeError):
    """A failure of a run whose config is valid. The message is one sentence for the user who started it."""


@contextmanager
def as_config_errors() -> Iterator[None]:
    """Turn ValueErrors raised inside into ConfigErrors, for code where they can only mean a user's mistake."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """The helpful part of an error's message, without line breaks and library bookkeeping."""
    text = str(error)
    mark = getattr(error, "problem_mark", None)
    if mark is not None:  # YAML errors keep problem and position in separate fields
        text = f"{mark.name}, line {mark.line + 1}: {getattr(error, 'problem', None) or 'not valid YAML'}"
    lines = (line.strip() for line in text.splitlines())
    noise = ("^", "full_key:", "object_type=", "reference_type=", "See https://", "See http://")
    kept = [line for line in lines if line and not line.startswith(noise)]
    return " ".join(" ".join(kept).split()) or type(error).__name__


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain: Hydra wraps OmegaConf's precise error in a general one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
