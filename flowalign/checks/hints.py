"""Check YAML values against type hints. Values for hints that are not plain types are accepted."""

import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from flowalign.checks.suggest import nearest

NAMES = {float: "a float", int: "an integer", bool: "true or false", str: "text", type(None): "null"}
SEQUENCES = (list, tuple, set, frozenset, Sequence, Collection, Iterable)


def accepts(hint: Any, value: Any) -> bool:
    """Whether `value`, once instantiated, can satisfy `hint`. A node with its own `_target_` always can."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    hint = _bare(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(accepts(arg, value) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if isinstance(hint, type) and hint in NAMES:
        return _is_plain(hint, value)
    if (origin or hint) in SEQUENCES:
        return _is_sequence(value) and _items_fit(origin or hint, args, value)
    if (origin or hint) in (dict, Mapping):
        return isinstance(value, Mapping) and (not args or all(accepts(args[1], item) for item in value.values()))
    return not (
        _is_ours(hint) and (value is None or isinstance(value, bool | int | float | str) or _is_sequence(value))
    )


def describe(hint: Any) -> str:
    """The hint in words: 'a float', "one of 'x', 'gaussian'", 'a list of text or null'."""
    hint = _bare(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(repr(arg) for arg in args)
    if isinstance(hint, type) and hint in NAMES:
        return NAMES[hint]
    if (origin or hint) in SEQUENCES:
        inner = [arg for arg in args if arg is not Ellipsis]
        return "a list" + (f" of {describe(inner[0])}" if len(inner) == 1 else f" of {len(inner)}" if inner else "")
    if (origin or hint) in (dict, Mapping):
        return "a mapping"
    if _is_ours(hint):
        return f"a section with the _target_ of a {hint.__name__}"
    return getattr(hint, "__name__", str(hint))


def hint_of_items(hint: Any) -> Any:
    """The hint of a mapping's values; None if no mapping is accepted, or one of anything."""
    hint = _bare(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return next((found for arg in get_args(hint) if (found := hint_of_items(arg)) is not None), None)
    return get_args(hint)[1] if get_origin(hint) in (dict, Mapping) else None


def nearest_literal(hint: Any, value: Any) -> str | None:
    """The Literal string of the hint that `value` resembles, or None."""
    words = [word for word in _literals(hint) if isinstance(word, str)]
    return nearest(value, words) if isinstance(value, str) else None


def _bare(hint: Any) -> Any:
    while True:
        if get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
        elif type(hint).__name__ == "TypeAliasType":  # `type Width = int` of Python 3.12
            hint = hint.__value__
        else:
            return type(None) if hint is None else hint


def _is_ours(hint: Any) -> bool:
    """A class of this package, which no plain value can be; other classes may be built from text, as paths are."""
    return isinstance(hint, type) and hint.__module__.split(".")[0] == __name__.split(".")[0]


def _is_plain(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    # A string would be iterated letter by letter.
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _items_fit(kind: Any, args: tuple[Any, ...], value: Sequence[Any]) -> bool:
    if not args:
        return True
    if kind is tuple and Ellipsis not in args:
        return len(value) == len(args) and all(accepts(arg, item) for arg, item in zip(args, value, strict=True))
    return all(accepts(args[0], item) for item in value)


def _literals(hint: Any) -> Iterator[Any]:
    hint = _bare(hint)
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for arg in get_args(hint):
            yield from _literals(arg)
