"""Validate config nodes against the signatures of the classes they name.

YAML alone would accept `kl_beta=abc` and fail an hour later, far away. A separate schema would have to be kept in sync
with every class. Constructors already declare names and types, in this package and in any other.
"""

import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flowalign.checks.errors import ConfigError, one_line
from flowalign.checks.hints import accepts, describe, hint_of_items, nearest_literal
from flowalign.checks.suggest import nearest, suggest

INSTRUCTIONS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}  # to hydra.utils.instantiate


def check_signatures(cfg: Any) -> None:
    """Raise ConfigError for the first key or value that the class of its node does not accept.

    cfg: a composed config or plain dicts and lists. Missing keys are fine: code may pass them itself.
    Classes of this package come first, because they import faster than other libraries.
    """
    for path, node in sorted(_target_nodes("", cfg), key=lambda item: not _is_ours(item[1]["_target_"])):
        _check_node(path, node)


def locate(target: str) -> Any:
    """Import the object with this dotted name; ConfigError says which part of the name is wrong."""
    parts = target.split(".")
    module, rest = _deepest_module(parts)
    found = module
    for i, part in enumerate(rest, start=len(parts) - len(rest)):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ConfigError(f"{'.'.join(parts[:i])} has no {part}; {suggest(part, _names(found))}") from None
        except Exception as error:  # lazily importing packages may raise anything here
            raise ConfigError(f"cannot import {target}: {one_line(error)}") from error
    return found


def _target_nodes(path: str, node: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield path, node
        for key in node:
            # The target of an interpolation is visited at its own place, under the name that the user knows.
            if not (isinstance(node, DictConfig) and OmegaConf.is_interpolation(node, key)):
                yield from _target_nodes(f"{path}.{key}" if path else str(key), node[key])
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for i, item in enumerate(node):
            yield from _target_nodes(f"{path}[{i}]", item)


def _is_ours(target: str) -> bool:
    return target.split(".")[0] == __name__.split(".")[0]


def _check_node(path: str, node: Mapping[str, Any]) -> None:
    try:
        target = locate(node["_target_"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    parameters = parameters_of(target)
    if parameters is None:
        return
    for key, value in node.items():
        if key not in INSTRUCTIONS:
            _check_value(path, target, parameters, str(key), value)


def _check_value(path: str, target: Any, parameters: dict[str, Any], key: str, value: Any) -> None:
    full = f"{path}.{key}" if path else key
    if key not in parameters:
        if "**" in parameters:
            return
        name = getattr(target, "__name__", str(target))
        # The key may come from a default that was written for another class.
        removes = f"{full}=0 ~{full}" if value is None else f"~{full}"  # Hydra takes null for absent
        removal = "" if "[" in full or nearest(key, parameters) else f"; {removes} removes it"
        raise ConfigError(f"{full}: {name} has no parameter {key}; {suggest(key, parameters)}{removal}")
    hint = parameters[key]
    if not accepts(hint, value):
        raise ConfigError(_misfit(full, hint, value))


def _misfit(path: str, hint: Any, value: Any) -> str:
    """'algo.clip: expected a float, got …'; for a mapping, of its first item that does not fit."""
    item = hint_of_items(hint)
    if isinstance(value, Mapping) and item is not None:
        name, wrong = next((name, inner) for name, inner in value.items() if not accepts(item, inner))
        return _misfit(f"{path}.{name}", item, wrong) + (f"; ~{path}.{name} removes it" if wrong is None else "")
    near = nearest_literal(hint, value)
    suggestion = f"; did you mean {near}?" if near else ""
    return f"{path}: expected {describe(hint)}, got {_shown(value)}{suggestion}"


def parameters_of(target: Any) -> dict[str, Any] | None:
    """Names and hints of keyword parameters, with "**" for any; None if Python has no signature."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    hints: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            hints["**"] = Any
        elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            hints[name] = _hint(target, parameter.annotation)
    if "**" in hints and inspect.isclass(target) and _is_ours(target.__module__):  # ours pass them to their base
        del hints["**"]
        return (parameters_of(target.__mro__[1]) or {}) | hints
    return hints


def _hint(target: Any, annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    function: Callable[..., Any] = target.__init__ if inspect.isclass(target) else target
    try:  # one hint at a time: others may name classes that are imported for type checkers only
        return eval(annotation, getattr(inspect.unwrap(function), "__globals__", {}))
    except Exception:
        return Any


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return repr(list(value)) if isinstance(value, Sequence) and not isinstance(value, str) else repr(value)


def _deepest_module(parts: list[str]) -> tuple[Any, list[str]]:
    """The longest importable prefix, and the rest of the name."""
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            return import_module(name), parts[length:]
        except ModuleNotFoundError as error:
            absent = error.name or ""
            if name != absent and not name.startswith(absent + "."):
                raise ConfigError(f"cannot import {name}: {absent} is not installed") from error
        except Exception as error:
            raise ConfigError(f"cannot import {name}: {one_line(error)}") from error
    raise ConfigError(f"cannot import {'.'.join(parts)}: there is no module {parts[0]}")


def _names(owner: Any) -> list[str]:
    public = [name for name in dir(owner) if not name.startswith("_")]
    return public + [info.name for info in pkgutil.iter_modules(getattr(owner, "__path__", []))]
