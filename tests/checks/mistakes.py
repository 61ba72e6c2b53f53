"""Wrong command lines by the hundred, made of the real configuration tree, so that they grow with it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from flowalign.checks.composing import composer, dotted, plain, walk
from flowalign.checks.hints import accepts
from flowalign.checks.signatures import locate, parameters_of

CONF = Path(__file__).parents[2] / "conf"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Mistake:
    """A command line, and what its refusal must name: one of these words, if there are any."""

    words: tuple[str, ...]
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tree:
    """What there is to be mistyped."""

    node: dict[str, Any]
    keys: list[str]
    options: dict[str, list[str]]

    @staticmethod
    def read() -> Tree:
        with composer(CONF, None, "train", []) as compose:
            node = plain(compose([]))
            groups = {group: compose.options(group) for group in compose.groups()}
        keys = [key for key in dotted(node) if not any(part.startswith("_") for part in key.split("."))]
        return Tree(node, keys, groups)

    def value(self, key: str) -> Any:
        return walk(self.node, key)[-1]

    def hints(self, key: str) -> dict[str, Any]:
        """Parameters of the class that a key belongs to; empty outside classes."""
        owner = walk(self.node, key)[-2]
        return (
            (parameters_of(locate(owner["_target_"])) or {}) if isinstance(owner, dict) and "_target_" in owner else {}
        )


def misspelt(word: str, chance: random.Random) -> str:
    """One slip: a letter left out, doubled, exchanged with its neighbour, or another one; never in the first place."""
    i = chance.randrange(1, len(word) - 1)
    return chance.choice(
        [
            word[:i] + word[i + 1 :],
            word[:i] + word[i] + word[i:],
            word[: i - 1] + word[i] + word[i - 1] + word[i + 1 :],
            word[:i] + chance.choice(LETTERS) + word[i + 1 :],
        ]
    )


def of_keys(tree: Tree, chance: random.Random) -> Iterator[Mistake]:
    """A slip in some part of a key."""
    while True:
        key = chance.choice(tree.keys)
        parts = key.split(".")
        i = chance.choice([i for i, part in enumerate(parts) if len(part) > 3] or [-1])
        if i < 0:
            continue
        wrong = ".".join([*parts[:i], misspelt(parts[i], chance), *parts[i + 1 :]])
        if wrong not in tree.keys and wrong.split(".")[0] not in tree.options.keys() - tree.node.keys():
            yield Mistake((f"{wrong}=1",), (parts[i],))


def of_groups(tree: Tree, chance: random.Random) -> Iterator[Mistake]:
    """A slip in the name of a group."""
    while True:
        group = chance.choice([group for group in tree.options if len(group) > 3])
        wrong = misspelt(group, chance)
        if wrong not in tree.options and wrong not in tree.node:
            yield Mistake((f"{wrong}={chance.choice(tree.options[group])}",), (group,))


def of_options(tree: Tree, chance: random.Random) -> Iterator[Mistake]:
    """A slip in the name of an option."""
    while True:
        group = chance.choice(list(tree.options))
        option = chance.choice(tree.options[group])
        wrong = misspelt(option, chance) if len(option) > 2 else option + "x"
        if wrong not in tree.options[group]:
            # Another option may be as near: whichever is named exists.
            yield Mistake((f"{group}={wrong}",), tuple(tree.options[group]))


def of_values(tree: Tree, chance: random.Random) -> Iterator[Mistake]:
    """A value that its class would not take, or a text for a number outside classes."""
    while True:
        key = chance.choice(tree.keys)
        leaf, value = key.rpartition(".")[2], tree.value(key)
        hint = tree.hints(key).get(leaf, Any)
        for wrong, as_read in (("nonsense", "nonsense"), ("[nonsense,1]", ["nonsense", 1]), ("{a:b}", {"a": "b"})):
            if hint is not Any and not accepts(hint, as_read):
                yield Mistake((f"{key}={wrong}",), (key,))
        if "." not in key and isinstance(value, (bool, int)):
            yield Mistake((f"{key}=nonsense",), (key,))


def of_enums(tree: Tree, chance: random.Random) -> Iterator[Mistake]:
    """A slip in a word of which there are few."""
    found = [(key, tree.hints(key).get(key.rpartition(".")[2])) for key in tree.keys]
    few = [(key, get_args(hint)) for key, hint in found if get_origin(hint) is Literal]
    while True:
        key, known = chance.choice(few)
        word = str(chance.choice(known))
        wrong = misspelt(word, chance) if len(word) > 2 else word + "x"
        if wrong not in known:
            yield Mistake((f"{key}={wrong}",), (key,))


def of_grammar(tree: Tree, chance: random.Random) -> Iterator[Mistake]:
    """No equals sign, brackets that stay open, a plus where there is something already, several values, dashes."""
    while True:
        key = chance.choice(tree.keys)
        section = chance.choice([k for k in tree.keys if isinstance(tree.value(k), dict) and k not in tree.options])
        yield Mistake((key,), (key,))
        yield Mistake((f"{key}=[1,2",), (key,))
        yield Mistake((f"{key}={{a:",), (key,))
        filled = key if tree.value(key) is not None else "batch.micro"  # Hydra lets null be added to
        yield Mistake((f"+{filled}=1",), (filled,))
        yield Mistake((f"{key}=1,2",), ("-m",))
        yield Mistake((f"--{key}=1",), (key,))
        yield Mistake((key, "=", "1"), (key,))
        yield Mistake((f"{section}=5",), (section,))
        yield Mistake((f"+{misspelt('nothing', chance)}{chance.randrange(1000)}=1",), ("nothing reads",))
        value = chance.choice([k for k in tree.keys if k not in tree.options])  # of a group it would be a choice's name
        yield Mistake((f"{value}=${{{misspelt('optimizer', chance)}.absent}}",), ("does not exist",))
        yield Mistake(("--" + misspelt("multirun", chance),), ("--multirun",))


def mistakes(seed: int, number: int) -> list[Mistake]:
    """So many different ones, of every sort equally many."""
    tree = Tree.read()
    sorts = [make(tree, random.Random(f"{seed} {make.__name__}")) for make in SORTS]
    turns = chain.from_iterable(zip(*sorts, strict=False))
    found: dict[tuple[str, ...], Mistake] = {}
    while len(found) < number:
        found |= {mistake.words: mistake for mistake in islice(turns, number - len(found))}
    return list(found.values())


SORTS = (of_keys, of_groups, of_options, of_values, of_enums, of_grammar)
