"""The errors that are told in one sentence: what a user's config can cause, and what can end a run."""

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A config that cannot work; the message is one sentence for the person who typed it."""


class RunError(RuntimeError):
    """What ended a run whose config could have worked; the message is one sentence for the person who started it."""


@contextmanager
def refusals() -> Iterator[None]:
    """Inside, a ValueError is a mistake of the user's, a ConfigError; elsewhere it is a crash with its trace."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """The part of an error that helps its reader, without line breaks and without the library's own bookkeeping."""
    text = str(error)
    mark = getattr(error, "problem_mark", None)
    if mark is not None:  # YAML says what and where in separate fields
        text = f"{mark.name}, line {mark.line + 1}: {getattr(error, 'problem', None) or 'not valid YAML'}"
    lines = (line.strip() for line in text.splitlines())
    noise = ("^", "full_key:", "object_type=", "reference_type=", "See https://", "See http://")
    kept = [line for line in lines if line and not line.startswith(noise)]
    return " ".join(" ".join(kept).split()) or type(error).__name__


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain: Hydra wraps OmegaConf's precise complaint in a general one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
