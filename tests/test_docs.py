"""What the documentation tells people to write works as written."""

from __future__ import annotations

import gc
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from omegaconf import OmegaConf

from flowalign.checks import ConfigError
from flowalign.checks.preflight import preflight
from flowalign.launching import check_launch
from flowalign.planning import devices
from flowalign.run import CONF, check, size_of
from tests.conftest import ROOT, TINY, installed, settled

if TYPE_CHECKING:
    from omegaconf import DictConfig

FENCED = re.compile(r"(?:`([^`\s]+)`:\n\n)?```(?:python|yaml)\n(?:# (\S+/\S+|\w+\.py)\n)?(.*?)```", re.DOTALL)
"""A block that is a file. Its name is in the line above, or its first line: not for what begins with `# @package`."""
PAGES = ("docs/architecture.md", "docs/adding-a-model.md")


def files_of(page: Path, *folders: str) -> dict[str, str]:
    """The files that a page tells people to write, by those beginnings of their names."""
    found = {above or inside: text for above, inside, text in FENCED.findall(page.read_text())}
    return {path: text for path, text in found.items() if path.startswith(folders)}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the files that the documentation adds, and not a line changed elsewhere."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("flowalign", "conf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for page in PAGES:
        for path, text in files_of(ROOT / page, "flowalign/", "conf/", "tests/").items():
            assert not (folder / path).exists()
            (folder / path).write_text(text)
    return folder


AWR = ("algo=awr", "algo.temperature=0.5", "algo.kl_beta=0.1")
OTHERS = ("algo=grpo", "dynamics=fading_noise", "reward=redness")


@pytest.mark.parametrize("words", [AWR, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_what_the_four_doors_show_trains(extended: Path, words: tuple[str, ...]):
    run = extended / words[0].replace("=", "_")
    overrides = settled(*TINY, f"hydra.run.dir={run}", "test=false", *words)
    done = subprocess.run(
        [sys.executable, "train.py", *overrides], cwd=extended, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (run / "checkpoints" / "last.ckpt").is_file()


def test_the_example_of_a_model_passes_what_every_model_has_to(extended: Path):
    words = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/models/test_families.py",
        "-k",
        "OvisImage or ovis_image",
    ]
    environment = os.environ | {"PYTHONPATH": str(extended)}
    done = subprocess.run(
        [sys.executable, *words], cwd=extended, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-300:]
    assert int(passed[1]) > 12  # the whole contract


def test_the_example_of_an_algorithm_is_twenty_lines():
    files = files_of(ROOT / "docs/architecture.md", "flowalign/")
    assert len(files["flowalign/algorithms/awr.py"].strip().splitlines()) <= 20


def test_the_algorithm_of_a_folder_of_ones_own_passes_its_tests_and_trains(tmp_path: Path):
    files = files_of(ROOT / "docs/adding-an-algorithm.md", "my_", "test_my_")
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    overrides = settled(*TINY, f"hydra.run.dir={tmp_path / 'run'}", "test=false", "algo=nudge", "algo.kl_beta=0.1")
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_algos.py"]
    for words in (tests, [str(ROOT / "train.py"), "--config-dir", "my_conf", *overrides]):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize("page", [*PAGES, "docs/adding-an-algorithm.md", "docs/configuration.md"])
def test_a_block_that_is_copied_whole_begins_with_its_package(page: str):
    """Hydra reads `# @package` in the first line only."""
    assert "# @package" in (ROOT / page).read_text()
    assert not re.search(r"```yaml\n(?!# @package)[^`]*# @package", (ROOT / page).read_text())


# ------------------------------------------------------------ commands


STARTS = re.compile(
    r"(?:exec |srun (?:--\S+ )?)?(?:python train\.py|flowalign-train|make train|torchrun .*?train\.py)(?= |$)"
)
"""What a command of a run begins with."""
CELLS = ("command", "write")
"""Columns of tables whose cells are the overrides of a run."""
STAND_INS = {"algo=NAME": "algo=nft", "HOST:29500": "localhost:29500"}
"""For words in capitals that the reader replaces."""
LEFT_OUT = {
    "algo=awr": "test_what_the_four_doors_show_trains runs it",
}
"""Words of commands that are not tried here, and why."""
EXTRAS = {"hydra/launcher=": "hydra_plugins", "hparams_search=optuna": "hydra_plugins", "wandb": "wandb"}
"""Words of commands that compose only with an extra of the package."""


class Command(NamedTuple):
    """A documented run: where, as printed, and the beginning of the sentence that is printed to refuse it."""

    where: str
    text: str
    refusal: str = ""


def logical_lines(text: str) -> list[tuple[int, str]]:
    """Lines of a block by their first number, those that end in a backslash joined with the next."""
    lines: list[tuple[int, str]] = []
    joined, first = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        first = first if joined else number
        joined += line.strip() if joined else line
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        lines.append((first, joined))
        joined = ""
    return lines


def commands_of(page: Path) -> list[Command]:
    """The commands of blocks, of code within a line, and of the tables of CELLS."""
    found: list[Command] = []
    columns: list[int] = []
    refusing, fenced = False, False
    lines = logical_lines(page.read_text())
    for i, (number, line) in enumerate(lines):
        where = f"{page.relative_to(ROOT)}:{number}"
        fenced ^= line.startswith("```")
        stripped = line.strip().removeprefix("# " if page.suffix == ".yaml" else "$ ")
        if (fenced or line.startswith("    ") or page.suffix == ".yaml") and STARTS.match(stripped):
            after = lines[i + 1][1].strip() if i + 1 < len(lines) else ""
            found.append(Command(where, stripped, after.removeprefix("error: ") if after.startswith("error: ") else ""))
            continue
        if fenced or not line.startswith("|"):
            columns = []
            found += [Command(where, span) for span in re.findall("`([^`]+)`", line) if STARTS.match(span)]
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if i + 1 < len(lines) and lines[i + 1][1].startswith("|--"):
            columns = [at for at, cell in enumerate(cells) if cell in CELLS]
            refusing = "what it says" in cells
            continue
        for at, cell in enumerate(cells):
            for span in re.findall("`([^`]+)`", cell):
                if STARTS.match(span):
                    found.append(Command(where, span))
                elif span.startswith("-m ") or (at in columns and "=" in span):
                    said = re.findall("`([^`]+)`", cells[at + 1])[0] if refusing else ""
                    found.append(Command(where, f"python train.py {span}", said))
                elif at in columns and span.startswith("~"):
                    found.append(Command(where, f"python train.py {span}"))
    return found


DOCUMENTED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "conf/experiment").glob("*.yaml"))
COMMANDS = [pytest.param(c, id=c.where) for page in DOCUMENTED for c in commands_of(page)]
# Recipes are checked on their devices by the contract tests; their commands take a while.
COMMANDS += [pytest.param(c, id=c.where, marks=pytest.mark.slow) for page in RECIPES for c in commands_of(page)]


def words_of(command: str) -> tuple[list[str], dict[str, str]]:
    """The arguments of a run without what the reader fills in, and the variables that its launcher would set."""
    words = [STAND_INS.get(word, word) for word in shlex.split(command, comments=True) if word != "…"]
    words = [word.replace("…", "any") for word in words]
    launcher, arguments = [], words
    for start in ("train.py", "flowalign-train", "train"):
        if start in words:
            at = words.index(start)
            launcher, arguments = words[:at], words[at + 1 :]
            break
    if launcher[:1] == ["make"]:
        arguments = shlex.split(arguments[0].removeprefix("ARGS=")) if arguments else []
    if "torchrun" not in launcher:
        return arguments, {}
    given = dict(zip(launcher[1:], launcher[2:], strict=False))
    nodes, local = int(given.get("--nnodes", 1)), int(given["--nproc-per-node"])
    ranks = {"WORLD_SIZE": str(nodes * local), "LOCAL_WORLD_SIZE": str(local), "RANK": "0"}
    return arguments, ranks | {"TORCHELASTIC_RUN_ID": "documented"}


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that readers have been told to write by then."""
    folder = tmp_path_factory.mktemp("beside")
    for page in DOCUMENTED:
        for path, text in files_of(page, "my_").items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
    (folder / "mypackage").mkdir()
    (folder / "mypackage/rewards.py").write_text(
        "class Contrast:\n    def __call__(self, media, prompts, metadata): ...\n"
    )
    return folder


def checked(cfg: DictConfig, multirun: bool) -> None:
    """What a run checks before anything is loaded, and what it would say once the networks are."""
    check(cfg)
    check_launch(cfg, multirun)
    size = OmegaConf.select(cfg, "trainer.num_nodes") * devices(cfg.trainer)
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) != size:
        raise ConfigError(f"torchrun starts {os.environ['WORLD_SIZE']} processes for {size} devices.")
    for part in ("train", "eval"):
        size_of(cfg, part)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_accepted_or_refused_as_printed(
    command: Command, beside: Path, monkeypatch: pytest.MonkeyPatch
):
    for word, why in LEFT_OUT.items():
        if word in command.text:
            pytest.skip(why)
    for word, module in EXTRAS.items():
        if word in command.text and not installed(module):
            pytest.skip(f"{word} needs {module}")
    words, environment = words_of(command.text)
    for name in [name for name in os.environ if name == "WORLD_SIZE" or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(beside)
    monkeypatch.syspath_prepend(beside)
    said = refused(tuple(words), tuple(environment.items()))
    if command.refusal:
        assert _matches(command.refusal, said), f"{command.text}\n{said or 'is accepted'}"
    else:
        assert not said, f"{command.text}\n{said}"


@cache
def refused(words: tuple[str, ...], launched: tuple[tuple[str, str], ...]) -> str:
    """The sentence against a run, or nothing; many pages name the same one. Each makes half a million objects."""
    gc.disable()
    try:
        preflight(words, CONF, "train", partial(checked, multirun="-m" in words))
    except ConfigError as refusal:
        return str(refusal)
    finally:
        gc.enable()
    return ""


def _matches(printed: str, said: str) -> bool:
    """Whether a sentence is the printed one, which may leave the rest of a list to `…`."""
    return re.fullmatch(".*".join(map(re.escape, printed.split("…"))), said) is not None


def test_the_commands_are_found():
    commands = [command for page in (*DOCUMENTED, *RECIPES) for command in commands_of(page)]
    assert len(commands) >= 155
    pages = {command.where.partition(":")[0] for command in commands}
    assert {"README.md", "CONTRIBUTING.md", "docs/scaling.md", "docs/algorithms/nft.md"} <= pages
    assert sum(bool(command.refusal) for command in commands) >= 9


# ------------------------------------------------------------ tables


def test_every_table_has_its_header_right_above_the_rule():
    """With an empty line between them, the page shows neither as a table."""
    apart = re.compile(r"^\|.*\|\n\n\|[ :]*-[-|: ]*\|$", re.MULTILINE)
    assert [str(page.relative_to(ROOT)) for page in DOCUMENTED if apart.search(page.read_text())] == []


# ------------------------------------------------------------ links


BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)?$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page; one that occurs again gets a number."""
    found: set[str] = set()
    for heading in HEADING.findall(BLOCK.sub("", text)):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        numbered = (f"{name}-{i}" for i in itertools.count(1))
        found.add(name if name not in found else next(n for n in numbered if n not in found))
    return found


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that name no file, or no heading of one."""
    broken = []
    for target in LINK.findall(BLOCK.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.is_file() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", DOCUMENTED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text(
        "# A page\n[1](other.md#two-words) [2](#a-page) [3](https://example.org) ![4](other.md)\n"
        "[5](absent.md) [6](#absent) [7](other.md#in-a-block) [8](other.md#code-val-and-a_b-1)\n"
        "```\n[9](absent.md)\n```\n"
    )
    other.write_text("## Two words\n## Code: `val/…` and a_b\n## Code: `val` and a_b\n```\n# In a block\n```\n")
    assert broken_links(page) == ["absent.md", "#absent", "other.md#in-a-block"]
