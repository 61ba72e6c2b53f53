"""`flowalign COMMAND key=value …`: the commands for checkpoints and rewards."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from flowalign.commands.evaluate import evaluate
from flowalign.commands.export import export
from flowalign.commands.reward_server import reward_server
from flowalign.commands.sample import sample
from flowalign.process import add_cwd_to_path, silence_libraries
from flowalign.rewards.base import RewardError

COMMANDS: dict[str, Callable[..., None]] = {
    "sample": sample,
    "evaluate": evaluate,
    "export": export,
    "reward-server": reward_server,
}
HELP = {"-h", "--help", "help"}
BOOLEANS = {"true": True, "false": False}


def parse(name: str, words: list[str]) -> dict[str, Any]:
    """Parse key=value words into typed arguments of a command; everything after the first = is the value.

    A command with `**options` also accepts dotted keys, which are options of the config.
    """
    known = dict(inspect.signature(COMMANDS[name]).parameters)
    takes_options = known.pop("options", None) is not None
    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and takes_options and "." in key:
            arguments[key] = value
            continue
        if not equals or key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}=…?" if close else ""
            raise ValueError(f"flowalign {name} takes {', '.join(f'{k}=…' for k in known)}, and not {word!r}{hint}")
        arguments[key] = _typed(key, value, known[key])
    missing = [key for key, p in known.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise ValueError(f"flowalign {name} needs {', '.join(f'{key}=…' for key in missing)}.")
    return arguments


def _typed(key: str, value: str, parameter: inspect.Parameter) -> Any:
    kind = str if parameter.default is parameter.empty else type(parameter.default)
    try:
        return BOOLEANS[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        expected = "true or false" if kind is bool else f"a {kind.__name__}"
        raise ValueError(f"{key} takes {expected}, and not {value!r}.") from None


def _word(key: str, parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_KEYWORD:
        return "[group.key=…]"
    return f"{key}=…" if parameter.default is parameter.empty else f"[{key}={parameter.default}]"


def _help(*names: str) -> None:
    for command in names:
        function = COMMANDS[command]
        parameters = inspect.signature(function).parameters.items()
        words = [_word(key, parameter) for key, parameter in parameters]
        print(f"flowalign {command} {' '.join(words)}\n    {(function.__doc__ or '').strip()}")


def main() -> None:
    """Run a command; a user error ends with one sentence and exit code 2."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in HELP:
        _help(*COMMANDS)
        return
    if name in COMMANDS and not HELP.isdisjoint(words):
        _help(name)
        return
    silence_libraries()
    add_cwd_to_path()
    try:
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]}? There" if close else "there"
            raise ValueError(f"there is no command {name!r}; {hint} are {', '.join(COMMANDS)}.")
        COMMANDS[name](**parse(name, words))
    except (ValueError, RewardError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
