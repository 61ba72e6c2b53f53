"""Explain why a config cannot be composed, by applying its overrides one at a time until one fails."""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig

from flowalign.checks.composing import Composer, dotted, exists, parts, plain, short, walk
from flowalign.checks.errors import ConfigError, one_line, root_cause
from flowalign.checks.signatures import locate, parameters_of
from flowalign.checks.suggest import listing, nearest, suggest

# Hydra plugins add these options; without the plugin the option does not exist.
EXTRAS = {"submitit_slurm": "slurm", "submitit_local": "slurm", "joblib": "sweep", "optuna": "sweep"}
# Arguments of Lightning's Trainer that a run sets itself, by what to use instead.
SET_BY_THE_RUN = {
    "accumulate_grad_batches": "it follows from the batch plan, so choose batch.updates and batch.micro instead",
    "callbacks": "use the group callbacks=… instead",
    "logger": "use the group logger=… instead",
    "plugins": "its checkpoint plugin is the only one; trainer.precision and trainer.strategy choose the others",
}
MISPLACED_OVERRIDE = re.compile(r"Could not override '[\w/]+@\w+\.")
"""Hydra's message for `override /group` in a file that lacks `# @package _global_`."""


def explain(compose: Composer, overrides: Sequence[Override], error: Exception) -> ConfigError:
    """The ConfigError for a failed composition of these overrides, none of which is a sweep."""
    for override in overrides:
        missing = missing_option(compose, override)
        if missing:
            return ConfigError(missing)
    groups = [o for o in overrides if chooses(compose, o)]
    values = [o for o in overrides if not chooses(compose, o)]
    done, cfg = [], _try(compose, [])
    if not isinstance(cfg, DictConfig):  # a group has no default: compose all group choices together
        done, groups = [short(o) for o in groups], []
        cfg = _try(compose, done)
        if not isinstance(cfg, DictConfig):
            return ConfigError(_sentence(cfg))
    for override in [*groups, *values]:
        following = _try(compose, [*done, short(override)])
        if not isinstance(following, DictConfig):
            return ConfigError(_explain_override(compose, override, cfg, following))
        done, cfg = [*done, short(override)], following
    return ConfigError(_sentence(error))


def chooses(compose: Composer, override: Override) -> bool:
    """Whether the override selects an option of a group rather than setting a value."""
    return compose.is_group(override.key_or_group)


def missing_option(compose: Composer, override: Override) -> str | None:
    """'no algo called nftt; …' if the override names an option that its group does not have."""
    group = override.key_or_group
    if not chooses(compose, override) or override.is_delete() or override.is_sweep_override():
        return None
    named = override.value()
    for option in named if isinstance(named, list) else [named]:
        word = str(option).lower() if isinstance(option, bool) else str(option)
        if option is not None and not isinstance(option, dict) and not compose.has_option(group, word):
            return f"no {group} called {word}; {_suggest_option(word, compose.options(group))}"
    return None


def unknown_key(compose: Composer, node: dict[str, Any], key: str, chosen: Mapping[str, str]) -> str:
    """'unknown option algo.kl_bta; did you mean algo.kl_beta?', or which other options of the group have the key."""
    way = walk(node, key)
    if len(way) <= len(parts(key)) and len(way) > 1 and not isinstance(way[-1], dict | list | str | None):
        owner = ".".join(parts(key)[: len(way) - 1])
        return f"unknown option {key}: {owner} is a value, not a section; did you mean {owner}={way[-1]}?"
    if taken := _taken(node, key):
        return taken
    group, _, leaf = key.partition(".")
    # Names given by the user, as in reward.weights, are not those of another option.
    named = len(way) == len(parts(key)) > 2 and isinstance(way[-1], dict) and way[-1] and "_target_" not in way[-1]
    other = group in chosen and chosen[group] != "several" and not named  # reward=[a,b] has the keys of all its parts
    if other and (having := compose.options_with(group, leaf)):
        others = " and ".join(f"{group}={option}" for option in having[:3])
        return f"{group}={chosen[group]} has no {leaf}, but {others} {'have' if having[1:] else 'has'} one"
    if group == "trainer" and leaf in SET_BY_THE_RUN:
        return f"trainer.{leaf} is set by the run: {SET_BY_THE_RUN[leaf]}"
    return f"unknown option {key}; {suggest_key(node, key, compose.groups())}"


def _taken(node: dict[str, Any], key: str) -> str:
    """'add it with +model.absent=…' if the class of the key's section takes an argument that its YAML does not list."""
    *section, leaf = parts(key)
    way = walk(node, ".".join(section)) if section else []
    owner = way[-1] if len(way) == len(section) + 1 else None
    if not isinstance(owner, dict) or leaf in SET_BY_THE_RUN or not (name := owner.get("_target_")):
        return ""
    try:
        takes = leaf in (parameters_of(locate(name)) or {})
    except ConfigError:  # a class that cannot be imported is told of when its node is checked
        return ""
    kind = name.rpartition(".")[2]
    return f"the YAML does not list {key}, but {kind} takes it: add it with +{key}=…" if takes else ""


def suggest_key(node: dict[str, Any], key: str, groups: Sequence[str] = ()) -> str:
    """Suggest the nearest key: a typo in the last part, the same name in another section, or a typo anywhere."""
    known = [k for k in dotted(node) if not k.rpartition(".")[2].startswith("_")]
    parent, _, leaf = key.rpartition(".")
    beside = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent] if parent else [*node, *groups]
    sibling = nearest(leaf, beside)
    if sibling:
        return f"did you mean {parent + '.' if parent else ''}{sibling}?"
    elsewhere = [k for k in known if k.rpartition(".")[2] == leaf]
    if elsewhere:
        elsewhere.sort(key=lambda k: -SequenceMatcher(None, k, key).ratio())
        return f"did you mean {' or '.join(elsewhere[:2])}?"
    close = nearest(key, known)
    if close:
        return f"did you mean {close}?"
    return listing(f"{parent}.{name}" if parent and beside else name for name in beside or [*node, *groups])


def _suggest_option(option: str, options: Sequence[str]) -> str:
    if option in EXTRAS:
        return f"it comes with pip install 'flowalign[{EXTRAS[option]}]' ({listing(options)})"
    close = nearest(option, options)
    return f"did you mean {close}? ({listing(options)})" if close else listing(options)


def _try(compose: Composer, lines: Sequence[str]) -> DictConfig | Exception:
    try:
        return compose(lines)
    except Exception as error:  # Hydra raises its own errors, OmegaConf's, YAML's and ValueError
        return error


def _explain_override(compose: Composer, override: Override, before: DictConfig, error: Exception) -> str:
    if chooses(compose, override):
        return _explain_choice(compose, override, before, error)
    key, node, bare = override.key_or_group, plain(before), short(override).lstrip("+~")
    if "/" in key:
        return f"unknown config group {key}; {suggest(key, compose.groups())}"
    if key.startswith("hydra."):
        return f"{short(override)}: {_sentence(error)}"
    if override.type is OverrideType.ADD and exists(node, key):
        return f"{key} exists already: write {bare}, without the plus"
    if override.is_delete() and exists(node, key):
        return f"{key} is null, which Hydra takes for absent: {key}=0 {short(override)} removes it"
    if not override.is_add() and not override.is_force_add() and not exists(node, key):
        return unknown_key(compose, node, key, before.hydra.runtime.choices)
    if unlisted := _unlisted(node, key, override.value()):
        return f"the YAML does not list {unlisted}: add it with +{unlisted}=…"
    return f"{short(override)}: {_sentence(error)}"


def _unlisted(node: dict[str, Any], key: str, value: Any) -> str | None:
    """The first key of a mapping that its section does not have, which Hydra only adds with a plus."""
    section = walk(node, key)[-1]
    if not isinstance(value, dict) or not isinstance(section, dict):
        return None
    return next((f"{key}.{name}" for name in map(str, value) if name not in section), None)


def _explain_choice(compose: Composer, override: Override, before: DictConfig, error: Exception) -> str:
    group, chosen = override.key_or_group, before.hydra.runtime.choices
    if override.value() is None and not override.is_delete():
        instead = f"use {group}=none" if compose.has_option(group, "none") else f"leave {group} out"
        return f"{group}=null is not understood by Hydra: {instead}"
    if override.is_add() and group in chosen:
        return f"{group} is in the defaults already: write {short(override).lstrip('+')}, without the plus"
    if override.type is OverrideType.CHANGE and group not in chosen:
        return f"{group} is not in the defaults: add it with +{short(override)}"
    if override.is_force_add():
        return f"{short(override)}: a group takes no plus signs; did you mean {short(override).lstrip('+')}?"
    return f"{short(override)}: {_sentence(error)}"


def _sentence(error: BaseException) -> str:
    sentence = one_line(root_cause(error))
    if MISPLACED_OVERRIDE.search(sentence):
        sentence += " (A file that overrides other groups has `# @package _global_` as its first line.)"
    return sentence
