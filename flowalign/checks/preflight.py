"""Validate the command line before anything heavy is imported.

Composes the configs that Hydra is about to compose (for a sweep, every value once) and reports the first mistake in one
sentence.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from flowalign.checks.arguments import asks_hydra, expand_rewards, parse, quote_choices, read_flags, runs
from flowalign.checks.composing import Composer, belongs_to_class, composer, exists, plain, short, walk, without_hydra
from flowalign.checks.errors import ConfigError, one_line
from flowalign.checks.explain import chooses, explain, suggest_key
from flowalign.checks.signatures import check_signatures
from flowalign.checks.suggest import listing, nearest

Check = Callable[[DictConfig], object]


def preflight(argv: Sequence[str], conf_dir: str | Path, config_name: str, also: Check | None = None) -> list[str]:
    """Raise ConfigError if the run described by these arguments cannot work.

    argv: the arguments without the program's name. also: an additional check of every composed config (without its
    hydra node); its ValueErrors become ConfigErrors too. Resolvers must be registered before.
    Returns the arguments to pass to Hydra, which differ in quotes (quote_choices) and several rewards (expand_rewards).
    """
    flags = read_flags(argv)
    folder, name = Path(flags.config_path or conf_dir), flags.config_name or config_name
    folders = [folder] + [Path(extra) for extra in [flags.config_dir] if extra]
    argv = expand_rewards(quote_choices(argv, folders))
    if asks_hydra(argv, flags):
        return argv
    flags.overrides = expand_rewards(quote_choices(flags.overrides, folders))
    with composer(folder, flags.config_dir, name, flags.overrides) as compose:
        overrides = parse(flags.overrides, compose.loader)
        overrides += _swept_by_config(compose, overrides, flags.multirun)
        for lines in runs(overrides):
            _check_run(compose, parse(lines, compose.loader), also)
    return argv


def section(key: str, lines: Sequence[str], conf_dir: Path, extra_dir: str | None, config_name: str) -> DictConfig:
    """Compose a config and return one of its nodes, resolved, for callers that need only that node.

    Raises ConfigError as `preflight` does. extra_dir: an additional folder of config groups.
    """
    folders = [conf_dir, *([Path(extra_dir)] if extra_dir else [])]
    lines = expand_rewards(quote_choices(lines, folders))
    with composer(conf_dir, extra_dir, config_name, lines) as compose:
        overrides = parse(lines, compose.loader)
        task = without_hydra(_composed(compose, overrides))
        _check_additions(task, [o for o in overrides if not chooses(compose, o)])
        node = OmegaConf.create({key: OmegaConf.to_container(task[key], resolve=True)})
    _check_complete(node)
    check_signatures(node)
    return node[key]


def preflight_or_exit(
    argv: Sequence[str], conf_dir: str | Path, config_name: str, also: Check | None = None
) -> list[str]:
    """Run `preflight` for a command: errors go to stderr, with exit code 2. HYDRA_FULL_ERROR=1 keeps the trace."""
    try:
        return preflight(argv, conf_dir, config_name, also)
    except ConfigError as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        _exit(error)


def _exit(error: ConfigError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def _check_run(compose: Composer, overrides: Sequence[Override], also: Check | None) -> None:
    _check_merges(compose, overrides)
    _check_removals(compose, overrides)
    cfg = _composed(compose, overrides)
    _check_merges_of_files(compose, cfg, overrides)
    _check_interpolations(cfg)
    _check_complete(cfg)
    _check_additions(cfg, [o for o in overrides if not chooses(compose, o)])
    _check_plain_values(compose, cfg, overrides)
    task = without_hydra(cfg)
    if also is not None:  # before the signatures, which import every class the config names
        try:
            also(task)
        except ValueError as error:
            raise ConfigError(one_line(error)) from error
    check_signatures(task)


def _check_merges(compose: Composer, overrides: Sequence[Override]) -> None:
    """Reject several options of a group whose options describe one object each: Hydra would mix their keys."""
    for override in overrides:
        named = override.value()
        if not isinstance(named, list) or len(named) < 2 or not chooses(compose, override):
            continue
        if not compose.can_be_merged(group := override.key_or_group):
            if group == "reward":  # a single list of rewards has become one option by now
                raise ConfigError(
                    f"{short(override)} cannot be one value of a sweep: make each combination an option of its own "
                    "(docs/rewards.md#several-rewards)"
                )
            raise ConfigError(
                f"{short(override)} would mix options that exclude each other: choose one, or write "
                f"{group}={','.join(map(str, named))} with -m to run one job for each"
            )


def _check_removals(compose: Composer, overrides: Sequence[Override]) -> None:
    """Reject ~steps and steps=[]: Hydra composes a config without the group's node, which every run reads."""
    removed = [o for o in overrides if (o.is_delete() or o.value() == []) and o.package is None and chooses(compose, o)]
    removed = [o for o in removed if not o.is_hydra_override()]
    if not removed:
        return
    before = _composed(compose, [o for o in overrides if o not in removed])
    for override in removed:
        group = override.key_or_group
        if group in before:
            options = compose.options(group)
            instead = f"{group}=none" if "none" in options else f"another option ({listing(options)})"
            raise ConfigError(f"{short(override)} removes what every run needs: use {instead}")


def _check_merges_of_files(compose: Composer, cfg: DictConfig, overrides: Sequence[Override]) -> None:
    """As above for `override /group: [a, b]` in a recipe."""
    unnamed = [group for group in compose.groups() if group in cfg and group not in cfg.hydra.runtime.choices]
    for group in unnamed:  # Hydra lists no choice where there are several
        if compose.can_be_merged(group):
            continue
        chosen = compose.chosen(group, [short(o) for o in overrides])
        if len(chosen) > 1:
            instead = " (several rewards: docs/rewards.md#several-rewards)" if group == "reward" else ""
            raise ConfigError(f"/{group}: [{', '.join(chosen)}] would mix options that exclude each other{instead}")


def _composed(compose: Composer, overrides: Sequence[Override]) -> DictConfig:
    try:
        return compose([short(o) for o in overrides])
    except Exception as error:  # any failure here is caused by the config or the command line
        raise explain(compose, overrides, error) from error


def _swept_by_config(compose: Composer, overrides: Sequence[Override], multirun: bool) -> list[Override]:
    """Sweep parameters from the config itself (hydra.sweeper.params). Raises ConfigError for a sweep without -m."""
    swept = [o for o in overrides if o.is_sweep_override()]
    for override in swept:
        if override.is_hydra_override():
            raise ConfigError(f"{short(override)}: Hydra's own options cannot be swept; choose one value")
    cfg = _composed(compose, [o for o in overrides if not o.is_sweep_override()] if swept else overrides)
    if not multirun and cfg.hydra.mode != RunMode.MULTIRUN:
        if swept:
            raise ConfigError(_not_a_sweep(compose, swept[0]))
        return []
    given = {o.key_or_group for o in overrides}
    params = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    lines = [f"{key}={value}" for key, value in params.items() if key not in given]
    return parse(lines, compose.loader)


def _not_a_sweep(compose: Composer, override: Override) -> str:
    line, key = short(override), override.key_or_group
    advice = "add -m to run one job for each"
    if chooses(compose, override) and "=" in line and "(" not in line and compose.can_be_merged(key):
        value = line.split("=", 1)[1]
        for option in value.split(","):
            if not compose.has_option(key, option):
                close = nearest(option, compose.options(key))
                value = value.replace(option, close) if close else value
        advice = f"write {key}=[{value}] to have them together, or {advice}"
    return f"{line} gives several values: {advice}"


def _check_interpolations(cfg: DictConfig) -> None:
    try:
        OmegaConf.to_container(without_hydra(cfg), resolve=True)
    except RecursionError as error:
        raise ConfigError("the config refers to itself in a circle: look for ${…} that point at each other") from error
    except InterpolationKeyError as error:
        absent = str(error.msg).split("'")[1]
        where = error.full_key or "the config"
        raise ConfigError(f"{where} refers to ${{{absent}}}, which does not exist; {_near(cfg, absent)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'the config'}: {one_line(error)}") from error


def _check_complete(cfg: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(without_hydra(cfg)))
    if missing:
        rest = f" (and so do {', '.join(missing[1:])})" if missing[1:] else ""
        raise ConfigError(f"{missing[0]} needs a value{rest}: give it as {missing[0]}=…")


def _check_additions(cfg: DictConfig, overrides: Sequence[Override]) -> None:
    """Reject +typo=1, which composes but is never read. Keys of classes are checked against their signature."""
    node = plain(cfg)
    for override in overrides:
        key = override.key_or_group
        adds = override.is_add() or override.is_force_add()
        if not adds or override.is_hydra_override() or not exists(node, key) or belongs_to_class(node, key):
            continue
        rest = _without(node, key)
        parent, _, leaf = key.rpartition(".")
        siblings = walk(rest, parent)[-1] if parent else rest
        in_the_way = nearest(leaf, siblings) if isinstance(siblings, dict) else None
        if (in_the_way or not parent) and leaf not in siblings and f"${{{key}" not in str(node):
            raise ConfigError(f"nothing reads {key}; {suggest_key(rest, key)}")


def _check_plain_values(compose: Composer, cfg: DictConfig, overrides: Sequence[Override]) -> None:
    """Outside classes, require the type of the default: a number for a number, a bool for a bool.

    A default of null or text accepts anything, and null replaces anything.
    """
    node = plain(cfg)
    values = [o for o in overrides if not chooses(compose, o) and not o.is_delete() and not o.is_hydra_override()]
    values = [o for o in values if exists(node, o.key_or_group) and not belongs_to_class(node, o.key_or_group)]
    if not values:
        return
    before = plain(compose([short(o) for o in overrides if chooses(compose, o) or o.is_hydra_override()]))
    compose([short(o) for o in overrides])  # make this run's hydra node current again
    for override in values:
        way = walk(before, override.key_or_group)
        if exists(before, override.key_or_group):
            _check_kind(override.key_or_group, way[-1], override.value())


def _check_kind(key: str, default: Any, value: Any) -> None:
    kinds: dict[type, tuple[Any, str]] = {bool: (bool, "true or false"), int: (int | float, "a number")}
    keys = ", ".join(str(k) for k in default if not str(k).startswith("_")) if isinstance(default, dict) else ""
    kinds |= {float: kinds[int], dict: (dict, f"a section, of which you set a key ({keys})")}
    if value is None or type(default) not in kinds or (isinstance(value, str) and value.startswith("${")):
        return
    kind, words = kinds[type(default)]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        like = f" such as {default}" if kind == int | float else ""
        raise ConfigError(f"{key}: expected {words}{like}, got {value!r}")


def _near(cfg: DictConfig, key: str) -> str:
    return suggest_key(plain(cfg), key.lstrip("."))


def _without(node: Any, key: str) -> Any:
    head, _, rest = key.partition(".")
    if not rest:
        return {k: v for k, v in node.items() if k != head}
    return {**node, head: _without(node[head], rest)} if isinstance(node.get(head), dict) else node
