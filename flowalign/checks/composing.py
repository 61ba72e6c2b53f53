"""Compose configs with Hydra ahead of the run, without changing Hydra's global state."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from flowalign.checks.errors import ConfigError
from flowalign.checks.suggest import suggest


@dataclass(frozen=True)
class Composer:
    """Composes one primary config and lists its groups and options."""

    loader: ConfigLoaderImpl
    repository: IConfigRepository  # sees hydra.searchpath too
    name: str
    cache: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """Compose the config with its hydra node and make it current, so that ${hydra:…} resolves as in a run."""
        key = tuple(overrides)
        if key not in self.cache:
            self.cache[key] = self._compose(key)
        HydraConfig.instance().set_config(self.cache[key])
        return self.cache[key]

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        cfg = compose(self.name, list(overrides), return_hydra_config=True)
        runtime = {"runtime.output_dir": "outputs", "job.id": "0", "job.num": 0}  # known only once a run starts
        with read_write(cfg), open_dict(cfg):
            for key, value in runtime.items():
                OmegaConf.update(cfg, f"hydra.{key}", value)
        return cfg

    def is_group(self, key: str) -> bool:
        return self.repository.group_exists(key)

    def has_option(self, group: str, option: str) -> bool:
        return self.repository.config_exists(f"{group}/{option}")

    def options(self, group: str) -> list[str]:
        """All options of a group; those in sub-folders as folder/option."""
        found = list(self.repository.get_group_options(group, ObjectType.CONFIG))
        for folder in self.repository.get_group_options(group, ObjectType.GROUP):
            found += [f"{folder}/{option}" for option in self.options(f"{group}/{folder}")]
        return found

    def options_with(self, group: str, key: str) -> list[str]:
        """Options of a group whose own file sets `key`."""
        having = []
        for option in self.options(group):
            if (found := self.repository.load_config(f"{group}/{option}")) is not None:
                inside = f"{group}.{key}" if found.header.get("package") == "_global_" else key
                if OmegaConf.select(found.config, inside, default=None) is not None:
                    having.append(option)
        return having

    def chosen(self, group: str, overrides: Sequence[str]) -> list[str]:
        """The options of a group that make up its node."""
        found = self.loader.compute_defaults_list(self.name, list(overrides), RunMode.RUN).defaults
        paths = [str(entry.config_path) for entry in found if entry.package == group.replace("/", ".")]
        return [path.removeprefix(f"{group}/") for path in paths if path.startswith(f"{group}/")]

    def configs(self) -> list[str]:
        """Valid values of --config-name."""
        return [name for name in self.repository.get_group_options("", ObjectType.CONFIG) if not name.startswith("_")]

    def groups(self) -> list[str]:
        return [group for group in self.repository.get_group_options("", ObjectType.GROUP) if group != "hydra"]

    def can_be_merged(self, group: str) -> bool:
        """Whether several options can be combined: not if each describes one object, or all set the same keys."""
        seen: set[str] = set()
        for loaded in (self.repository.load_config(f"{group}/{option}") for option in self.options(group)):
            config: Any = {} if loaded is None else OmegaConf.to_container(loaded.config)
            if loaded is not None and loaded.header.get("package") == "_global_":
                config = {"_target_": 0} if "_target_" in (config.get(group) or {}) else {}
            keys = config.keys() - {"defaults"}
            if "_target_" in keys or seen & keys:
                return False
            seen |= keys
        return True


@contextmanager
def composer(conf_dir: Path, extra_dir: str | None, name: str, lines: Sequence[str]) -> Iterator[Composer]:
    """Set up Hydra as the run will. extra_dir: value of --config-dir; lines: overrides, all of which parse."""
    if not conf_dir.is_dir():
        raise ConfigError(f"the config folder {conf_dir} does not exist")
    if extra_dir is not None and not Path(extra_dir).is_dir():
        raise ConfigError(f"--config-dir {extra_dir}: there is no such folder")
    state = HydraConfig.instance()
    before = state.cfg
    with initialize_config_dir(str(conf_dir.resolve()), version_base="1.3"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run repeats them
        try:
            loader = GlobalHydra.instance().config_loader()
            assert isinstance(loader, ConfigLoaderImpl)
            if extra_dir is not None:
                path = f"file://{Path(extra_dir).resolve()}"
                loader.config_search_path.prepend("command-line", path, SearchPathQuery(provider="schema"))
                loader.repository.initialize_sources(loader.config_search_path)
            compose_config = Composer(loader, _repository(loader, name, lines), name)
            if not compose_config.repository.config_exists(name):
                raise ConfigError(f"no config called {name} in {conf_dir}; {suggest(name, compose_config.configs())}")
            yield compose_config
        finally:
            state.cfg = before


def _repository(loader: ConfigLoaderImpl, name: str, lines: Sequence[str]) -> IConfigRepository:
    try:
        return loader._parse_overrides_and_create_caching_repo(name, list(lines))[1]
    except Exception:  # a broken primary config is reported when it is composed
        return loader.repository


def without_hydra(cfg: DictConfig) -> DictConfig:
    """The part of the config that the task function receives."""
    task = cfg.copy()
    with read_write(task), open_dict(task):
        task.pop("hydra", None)
    return task


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Nested dicts, with interpolations left as text."""
    raw = OmegaConf.to_container(without_hydra(cfg), resolve=False)
    assert isinstance(raw, dict)
    return {str(key): value for key, value in raw.items()}


def parts(key: str) -> list[str]:
    """Split a key: 'a.b[0]' → a, b, 0."""
    return re.findall(r"[^.\[\]]+", key)


def dotted(node: Any, prefix: str = "") -> list[str]:
    """All keys of nested dicts, sections included."""
    if not isinstance(node, dict):
        return []
    keys = []
    for key, value in node.items():
        full = f"{prefix}{key}"
        keys += [full, *dotted(value, full + ".")]
    return keys


def walk(node: Any, key: str) -> list[Any]:
    """Nodes along a dotted key, from the root down, as far as they exist."""
    nodes = [node]
    for part in parts(key):
        here = nodes[-1]
        if isinstance(here, dict) and part in here:
            nodes.append(here[part])
        elif isinstance(here, list) and part.isdigit() and int(part) < len(here):
            nodes.append(here[int(part)])
        else:
            break
    return nodes


def exists(node: Any, key: str) -> bool:
    return len(walk(node, key)) == len(parts(key)) + 1


def belongs_to_class(node: Any, key: str) -> bool:
    """Whether a section around the key names a class, whose signature then validates the key."""
    return any(isinstance(section, dict) and "_target_" in section for section in walk(node, key))


def short(override: Override) -> str:
    """The override as typed."""
    return override.input_line or override.get_key_element()
