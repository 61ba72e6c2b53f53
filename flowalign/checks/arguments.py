"""Parse the command line before Hydra does: flags, overrides, and the runs of a sweep."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from flowalign.checks.errors import ConfigError, one_line
from flowalign.checks.suggest import nearest

NUMBER = re.compile(r"\d[\d_.]*")
SEVERAL_REWARDS = re.compile(r"\+?reward=\[([^\[\],]+(?:,[^\[\],]+)+)\]")
SEVERAL, PART, WEIGHT, EQUAL = "reward=several", "+reward@reward.parts.", "+reward.weights.", "=1.0"
EXCLUSIVE = ("run", "multirun", "cfg", "info", "shell_completion")
VERSION_FLAG = "--version"  # argparse would print it and exit


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags with Hydra's own parser; raise ConfigError instead of printing its usage page."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError(_flag_problem(argv, message))

    parser.error = refuse
    flags = parser.parse_args(list(argv))
    if len(asked := [flag for flag in EXCLUSIVE if getattr(flags, flag)]) > 1:
        raise ConfigError(f"--{asked[0]} and --{asked[1]} cannot be asked for together: choose one")
    return flags


def asks_hydra(argv: Sequence[str], flags: argparse.Namespace) -> bool:
    """Whether Hydra answers by itself (help, printed config, completion, rerun) without starting a new run."""
    asked = (flags.help, flags.hydra_help, flags.cfg, flags.info, flags.shell_completion, flags.experimental_rerun)
    return any(asked) or VERSION_FLAG in argv


def quote_choices(argv: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Quote numeric group options: resolution=64 becomes resolution='64', also in a list.

    Hydra parses 64 as a number and then rejects it, since an option must be a name. folders: config folders to look for
    the groups in.
    """
    return [_quote_choice(word, folders) for word in argv]


def _quote_choice(word: str, folders: Sequence[Path]) -> str:
    key, _, value = word.partition("=")
    opening, closing = ("[", "]") if value.startswith("[") and value.endswith("]") else ("", "")
    group = key.lstrip("+").partition("@")[0]
    options = value.removeprefix(opening).removesuffix(closing).split(",")
    if not group or not any(NUMBER.fullmatch(option) for option in options):
        return word
    if not any((folder / group).is_dir() for folder in folders):
        return word
    quoted = ",".join(f"'{option}'" if NUMBER.fullmatch(option) else option for option in options)
    return f"{key}={opening}{quoted}{closing}"


def expand_rewards(argv: Sequence[str]) -> list[str]:
    """Replace reward=[a,b], whose keys Hydra would mix, by reward=several and a package for each of its parts.

    The replacements come before all other overrides, so that those can set their keys.
    """
    found = [match for word in argv if (match := SEVERAL_REWARDS.fullmatch(word))]
    if len(found) != 1:  # none, or a mistake that Hydra reports
        return list(argv)
    first = next(i for i, word in enumerate(argv) if "=" in word and not word.startswith("-"))
    options = [option.strip().strip("'\"") for option in found[0][1].split(",")]
    parts = [(option.rsplit("/", 1)[-1], option) for option in options]
    if twice := sorted({name for name, _ in parts if [other for other, _ in parts].count(name) > 1}):
        raise ConfigError(f"{found[0][0]} names {twice[0]} twice: name it once, with reward.weights.{twice[0]}=2")
    added = [SEVERAL, *(f"{PART}{name}={option}" for name, option in parts)]
    added += [f"{WEIGHT}{name}{EQUAL}" for name, _ in parts]
    return [*argv[:first], *added, *(word for word in argv[first:] if word != found[0][0])]


def collapse_rewards(words: Sequence[str]) -> list[str]:
    """The inverse of `expand_rewards`, for a command line that is shown."""
    options = [word.partition("=")[2] for word in words if word.startswith(PART)]
    named = {SEVERAL, *(f"{PART}{option.rsplit('/', 1)[-1]}={option}" for option in options)}
    if len(options) < 2 or not named <= set(words):  # parts with names of their own
        return list(words)
    added = [word for word in words if word.startswith(PART) or (word.startswith(WEIGHT) and word.endswith(EQUAL))]
    return [f"reward=[{','.join(options)}]", *(word for word in words if word not in [*added, SEVERAL])]


def parse(lines: Sequence[str], loader: ConfigLoader) -> list[Override]:
    """Parse overrides; raise ConfigError naming the first that cannot be parsed."""
    parser = OverridesParser.create(loader)
    overrides = []
    for i, line in enumerate(lines):
        try:
            parsed = parser.parse_overrides([line])
            if not parsed[0].key_or_group:
                raise HydraException("no key")
            overrides += parsed
        except HydraException as error:
            raise ConfigError(_unreadable(lines, i, error)) from error
    return overrides


def alternatives(override: Override) -> list[str]:
    """Expand a sweep override into single ones; a range or an interval is represented by its two ends."""
    key, swept = override.get_key_element(), override.value()
    if isinstance(swept, IntervalSweep):
        values = [str(swept.start), str(swept.end)]
    else:
        values = list(override.sweep_string_iterator())
        if override.is_range_sweep():
            values = values[:1] + values[1:][-1:]
    if not values:
        raise ConfigError(f"{override.input_line} gives no value to try")
    return [f"{key}={value}" for value in values]


def runs(overrides: Sequence[Override]) -> list[list[str]]:
    """Override lists that cover every value of a sweep: the first of each, then one change at a time."""
    columns = [alternatives(o) if o.is_sweep_override() else [o.input_line or ""] for o in overrides]
    first = [column[0] for column in columns]
    changed = [[*first[:i], other, *first[i + 1 :]] for i, column in enumerate(columns) for other in column[1:]]
    return [first, *changed]


def _flag_problem(argv: Sequence[str], message: str) -> str:
    known = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    dashed = [word for word in argv if word.startswith("-") and word.split("=")[0] not in known]
    if dashed and "=" in dashed[0]:
        return f"{dashed[0]} is not a flag: options are written without dashes; did you mean {dashed[0].lstrip('-')}?"
    if dashed:
        flag = nearest(dashed[0], known)
        hint = f"did you mean {flag}?" if flag else "options are written key=value, without dashes"
        return f"there is no flag {dashed[0]}; {hint}"
    if message.startswith("unrecognized arguments"):
        return f"{message}: write all key=value options side by side, with the flags before or after them"
    return message


def _unreadable(lines: Sequence[str], i: int, error: HydraException) -> str:
    line, following = lines[i], "".join(lines[i + 1 : i + 2])
    if line.startswith("="):
        return f"{line} has no key: options are written key=value, without spaces around the equals sign"
    if "=" not in line:
        if following.startswith("="):
            return f"{line} has no value: write {line}=value without spaces around the equals sign"
        return f"{line} has no value: options are written key=value, so did you mean {line}=…?"
    return f"{line} cannot be read: {one_line(error)} (put the value in quotes if it holds special characters)"
