"""Shared fixtures: reference vectors, composed configs of a tiny geometry, and a random SD3 with all its parts."""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
# Equality to the last bit is a statement about our code; two threads may split the same product differently. It is
# quicker too, for networks of this size.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


def installed(module: str) -> bool:
    """Whether a module can be imported; false too where the package that it would lie in is missing."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture
def golden() -> Callable[[str], dict]:
    """Loader of one reference file: numeric arrays as tensors, the others as they are."""

    def load(name: str) -> dict:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(a) if a.dtype.kind in "fi" else a for key, a in arrays.items()}

    return load


@pytest.fixture
def agrees() -> Callable[[Tensor, Tensor, float], bool]:
    """max |ours - theirs| ≤ tolerance · max |theirs|, for equal shapes."""

    def compare(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        ours, theirs = ours.detach().double(), theirs.double()
        return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())

    return compare


# ------------------------------------------------------------ what is there once

ROOT = Path(__file__).parents[1]


def pytest_collection_finish() -> None:
    """The libraries are imported by now. Their half a million objects are no garbage: the collector, which would go
    through them every few hundred configs, is to look at what the tests make."""
    gc.collect()
    gc.freeze()


def as_it_is(file: Path) -> tuple[str, int, int] | None:
    """Tells a file from others and from what it was before; None: there is none."""
    return (str(file), file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None


@pytest.fixture(scope="session", autouse=True)
def read_once() -> Iterator[None]:
    """Hydra reads a YAML again only when it has changed: reading is two fifths of what a composition takes."""
    from hydra._internal.config_repository import ConfigRepository

    load = ConfigRepository.load_config
    read: dict[Any, Any] = {}

    def kept(self: ConfigRepository, config_path: str) -> Any:
        sources = [(source.scheme(), source.path) for source in self.sources]
        key = config_path, *sources, *(as_it_is(Path(path, f"{config_path}.yaml")) for _, path in sources)
        if key not in read:
            read[key] = load(self, config_path)
        return copy.deepcopy(read[key])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ConfigRepository, "load_config", kept)
        yield


@pytest.fixture(scope="session", autouse=True)
def loaded_once() -> Iterator[None]:
    """The pipeline of a folder is loaded once, and whoever asks for it has a copy of their own, a third of the time."""
    from flowalign.models import base, loading

    loaded: dict[Any, Any] = {}

    def kept(
        name: str, pretrained: str, revision: Any, variant: Any, dtypes: dict, arguments: dict, trained: Any
    ) -> Any:
        whole = Path(loading.resolve(pretrained)).is_dir() and not loading._without_weights.get()
        if not whole or any(arguments.values()):  # parts that are given are not ours to copy
            return loading.load_pipeline(name, pretrained, revision, variant, dtypes, arguments, trained)
        files = loading.fingerprint(pretrained, revision, ("*", "."))
        key = name, files, revision, variant, tuple(dtypes.items()), tuple(arguments), tuple(trained)
        if key not in loaded:
            loaded[key] = loading.load_pipeline(name, pretrained, revision, variant, dtypes, arguments, trained)
        return copy.deepcopy(loaded[key])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(base, "load_pipeline", kept)
        yield


# ------------------------------------------------------------ composed configs

TINY = (
    "batch.prompts=2",
    "batch.group_size=2",
    "batch.micro=3",
    "batch.updates=2",
    "tune=lora",
    "rollout.num_steps=4",
    "rollout.batch_size=4",
    "times.num=null",
    "evaluation.sampling.num_steps=3",
    "evaluation.num_val=4",
    "evaluation.num_test=4",
    "evaluation.shown=2",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.check_val_every_n_epoch=1",
)
"""Two groups of two pictures in four steps: everything happens, twice, and nothing takes long."""


def settled(*overrides: str) -> list[str]:
    """Overrides with the last word on every key, since Hydra refuses two choices of one group."""
    return list({word.partition("=")[0]: word for word in overrides}.values())


@cache
def choices(name: str, *words: str) -> DictConfig:
    """What Hydra composes of choices of groups, which takes it a sixth of a second. Never handed out but as a copy."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, list(words))


@cache
def parsed(word: str) -> Override:
    """A word of a command line, read by Hydra."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(word)


def chooses(word: str) -> bool:
    """Whether a word decides which files are read; Hydra sets the others' values when all is composed."""
    key = word.partition("=")[0].lstrip("+~").partition("@")[0]
    return key.startswith("hydra") or (ROOT / "conf" / key).is_dir()


def composition(name: str, *words: str) -> DictConfig:
    """A config of one's own, as Hydra composes it of these words; see choices."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    cfg = copy.deepcopy(choices(name, *(word for word in words if chooses(word))))
    ConfigLoaderImpl._apply_overrides_to_config([parsed(word) for word in words if not chooses(word)], cfg)
    return cfg


@pytest.fixture
def compose(tmp_path: Path) -> Callable[..., DictConfig]:
    """The config that a command line would compose, without Hydra's runtime node; outputs go to a temporary folder."""

    def composed(*overrides: str, name: str = "train", paths: bool = True) -> DictConfig:
        folder = [f"paths.output_dir={tmp_path}"] if paths else []
        return composition(name, *settled(*folder, *overrides))

    return composed


@pytest.fixture
def tiny(compose: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """The same with the tiny geometry, silent unless an override says otherwise."""

    def composed(*overrides: str) -> DictConfig:
        return compose("logger=none", "callbacks=none", *TINY, *overrides)

    return composed


# ------------------------------------------------------------ commands


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A command in this process, which is faster: exit code, stdout, stderr."""

    def run(main: Callable[[], None], *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *words])
        monkeypatch.chdir(ROOT)
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        written = capsys.readouterr()
        return code, written.out, written.err

    return run


# ------------------------------------------------------------ a random SD3


@pytest.fixture
def transformer() -> Any:
    """A random SD3 transformer of 50 thousand parameters, the same every time."""
    from diffusers import SD3Transformer2DModel

    from tests.models.tiny.parts import seeded
    from tests.models.tiny.sd3 import TRANSFORMER

    return seeded(SD3Transformer2DModel, **TRANSFORMER)


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline in diffusers layout with two CLIPs, a T5 and shift 3."""
    from tests.models.tiny.sd3 import build

    folder = tmp_path_factory.mktemp("random_sd3")
    build().save_pretrained(folder)
    return folder


@pytest.fixture
def random_sd3(sd3_folder: Path) -> tuple[str, ...]:
    """Words of a run that are quicker than the embedded pipeline and its reward. What it paints is of no shape, and
    more or less bright."""
    return (f"model.pretrained={sd3_folder}", "model.max_sequence_length=4", "reward=brightness")


@pytest.fixture(scope="session")
def untaught() -> Callable[[Any, Path], Path]:
    """Writes a latent reward of random weights for a model's adapter: its first block, which it may change, and a
    head."""

    def write(model: Any, folder: Path) -> Path:
        from flowalign.rewards.latent.files import save
        from flowalign.rewards.latent.network import Build, Network
        from flowalign.rewards.latent.trunk import Trunk, main_blocks

        torch.manual_seed(0)
        first = main_blocks(list(model.denoisers().values())[-1])[0]
        width = next(p.shape[0] for name, p in first.named_parameters() if name.endswith("to_out.0.weight"))
        save(Network(Trunk(model, 1), Build(1, 1, heads=2, hidden=[8]), width), folder, {})
        return folder

    return write


@pytest.fixture(scope="session")
def sd3_reward(
    sd3_folder: Path, untaught: Callable[[Any, Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A latent reward for the random SD3."""
    from flowalign.models.sd3 import SD3

    return untaught(SD3(str(sd3_folder), max_sequence_length=4), tmp_path_factory.mktemp("sd3_reward"))


# ------------------------------------------------------------ given videos


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan in diffusers layout."""
    from tests.models.tiny.wan2_1 import build

    folder = tmp_path_factory.mktemp("random_wan")
    build().save_pretrained(folder)
    return folder


@pytest.fixture
def of_videos(wan_folder: Path, tmp_path: Path) -> tuple[str, ...]:
    """Words of a run that learns from two videos, a square that moves to the right and one that moves down."""
    from flowalign.media import save

    ways = {"right": (0, 4), "down": (2, 0)}
    for way, slope in ways.items():
        save(moving(*slope), tmp_path / f"{way}.gif")
    lines = [json.dumps({"prompt": f"a square moves {way}", "video": f"{way}.gif"}) for way in ways]
    for stage in ("train", "test"):
        (tmp_path / f"{stage}.jsonl").write_text("\n".join(lines))
    return (
        "algo=sft", "tune=full", "optimizer.lr=0.003", "times.num=4", "batch.micro=4", "reward=jpeg",
        "model=wan2_1_t2v", f"model.pretrained={wan_folder}", "model.dtype=float32", "model.train_dtype=float32",
        "model.max_sequence_length=16", "encoding.cache=null", "data=folder", f"data.folder={tmp_path}",
        *(f"++resolution.{part}.{key}={n}" for part in ("train", "eval")
          for key, n in (("height", 32), ("width", 48), ("frames", 5))),
    )  # fmt: skip


def moving(down: int, right: int) -> Tensor:
    """(9, 3, 40, 60) of a white square on blue, so many pixels further in each frame."""
    video = torch.tensor([0.0, 0.0, 1.0])[:, None, None].repeat(9, 1, 40, 60)
    for i, frame in enumerate(video):
        frame[:, 4 + i * down : 20 + i * down, 4 + i * right : 20 + i * right] = 1
    return video
