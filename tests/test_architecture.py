"""The floors of the design: who may import whom, and how long anything may become."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flowalign"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("flow", "types", "dtypes", "size", "transfer", "files", "hub"),
    ("keyed", "dynamics", "solvers", "steps", "times", "credit", "points", "shapes", "rewards"),
    ("algorithms", "models"),
    (
        "checks",
        "settings",
        "stopping",
        "lock",
        "exhausted",
        "tensors",
        "policy",
        "attention",
        "heap",
        "compiling",
        "running",
        "schedule",
        "geometry",
        "buffer",
        "pixels",
        "ffmpeg",
        "footage",
        "prompt_files",
        "prompt_media",
        "turns",
        "prompts",
        "suites",
        "sampler",
        "evaluation",
        "grid",
        "diversity",
        "embeddings",
        "conditioner",
        "scoring",
    )
    + ("report", "extremes", "rollouts", "collect", "generate", "media", "before", "guards", "strategies"),
    ("recipe", "alive", "decoding", "memory", "fitting", "evaluating", "forward", "loggers", "module", "callbacks"),
    (
        "imports",
        "reward_nodes",
        "planning",
        "compatibility",
        "launching",
        "process",
        "resuming",
        "sweep_results",
        "sweeps",
        "summary",
        "curves",
        "run",
        "serving",
        "commands",
        "cli",
        "programs",
    ),
)
"""From the ground up. Files of one floor see those named before them, which keeps circles out."""

ORDER = {name: (floor, place) for floor, names in enumerate(FLOORS) for place, name in enumerate(names)}
PURE = {"torch", "numpy"}
WORLD = PURE | {"scipy", "PIL"}  # the scenes are drawn and read with these
JUDGES = {"transformers", "huggingface_hub", "safetensors", "cv2", "rapidocr", "pytesseract"}
"""What rewards may use besides, once they are used: importing a reward must stay quick."""
PROGRAMS = {f"shapes.{name}" for name in ("pretrain", "data", "networks", "card", "tokenizer", "prompts")}
PROGRAMS |= {f"rewards.latent.{name}" for name in ("__main__", "data", "training")}
"""What made the embedded pipeline, and what makes latent rewards: run by hand, and nothing else imports it."""
HYDRA = {
    *("run", "reward_nodes", "planning", "compatibility", "launching", "sweep_results", "sweeps"),
    *("shapes.pretrain", "rewards.latent.__main__"),
}
OMEGACONF = (
    HYDRA
    | {
        "summary",
        "curves",
        "process",
        "commands.saved",
        "commands.evaluate",
        "commands.export",
        "commands.reward_server",
    }
    | PROGRAMS
)


def name_of(path: Path) -> str:
    """flowalign/steps/all.py is steps.all, a package's __init__ is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def unit(name: str) -> str:
    """What has a place on a floor: a folder, or a loose file."""
    return "programs" if name in PROGRAMS else name.split(".")[0]


SOURCES = {name_of(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py")) if "conf" not in path.parts}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Dotted names that a file imports, wherever in it, and whether for type checkers only."""
    yield from imported(ast.parse(source))


def imported(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """The same of a parsed file."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or "", id(node) in typing_only


def upward(name: str, source: str) -> list[str]:
    """Imports of our own modules that do not lie below."""
    mine = unit(name)
    found = []
    for dotted, typing_only in imports(source):
        top, _, rest = dotted.partition(".")
        other = unit(rest)
        if top != "flowalign" or typing_only or other in ("", mine):
            continue
        if ORDER[other] >= ORDER[mine]:
            found.append(f"{name} imports {dotted}")
    return found


def foreign(name: str, source: str) -> list[str]:
    """Libraries that a file of the pure floors has no business with."""
    allowed = {"shapes": WORLD, "rewards": WORLD | {"httpx"}}.get(unit(name), PURE)
    allowed = allowed | {"safetensors"} if name == "rewards.latent.files" else allowed
    tree = ast.parse(source)
    at_once = {dotted.split(".")[0] for dotted, _ in imported(ast.Module([*map(outermost, tree.body)], []))}
    tops = {dotted.split(".")[0] for dotted, _ in imported(tree)}
    later = {"rewards": JUDGES, "hub": {"huggingface_hub"}}.get(unit(name), set()) - at_once
    return sorted(tops - allowed - later - {"flowalign"} - set(sys.stdlib_module_names))


def outermost(node: ast.stmt) -> ast.stmt:
    """An import, or nothing in place of a class or function, whose imports come later."""
    return ast.Pass() if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else node


def unwelcome(name: str, source: str) -> list[str]:
    """Uses of Hydra, OmegaConf and diffusers' pipelines outside their places."""
    tops = {dotted.split(".")[0] for dotted, _ in imports(source)}
    found = []
    if "hydra" in tops and name not in HYDRA and not name.startswith("checks"):
        found.append(f"{name} imports hydra")
    if "omegaconf" in tops and name not in OMEGACONF and not name.startswith("checks"):
        found.append(f"{name} imports omegaconf")
    if "diffusers" in tops and name.split(".")[0] not in ("models", "shapes"):
        found.append(f"{name} imports diffusers")
    return found


def vague_constructors(name: str, source: str) -> list[str]:
    """Classes that take a config, or anything at all; pretraining is a `run` of its own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef):
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                arguments = [a.arg for a in [*method.args.args, *method.args.kwonlyargs]]
                adapter = name.startswith("models.")  # an adapter hands options on to its base
                takes_config = "cfg" in arguments and name not in PROGRAMS
                if takes_config or (method.args.kwarg and not adapter):
                    found.append(f"{name}.{node.name}")
    return found


def lengthy(name: str, source: str, function: int = 60, file: int = 400) -> list[str]:
    """What does not fit an eye."""
    found = [f"{name} has {n} lines"] if (n := len(source.splitlines())) > file else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > function:
                found.append(f"{name}.{node.name} has {lines} lines")
    return found


def test_every_file_has_a_floor():
    assert {unit(name) for name in SOURCES} - {""} == set(ORDER)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_file_imports_lower_floors_and_its_own_folder_only(name: str):
    assert not upward(name, SOURCES[name])


@pytest.mark.parametrize("name", [n for n in sorted(SOURCES) if ORDER.get(unit(n), (0,))[0] <= 2])
def test_the_lower_floors_are_plain_torch(name: str):
    if not name.startswith("models"):
        assert not foreign(name, SOURCES[name])


def test_hydra_and_the_pipelines_are_imported_in_their_places_only():
    assert not [line for name, source in SOURCES.items() for line in unwelcome(name, source)]


def test_no_class_takes_a_config_or_anything_at_all():
    assert not [line for name, source in SOURCES.items() for line in vague_constructors(name, source)]


def test_functions_and_files_fit_an_eye():
    others = {str(p.relative_to(ROOT)): p.read_text() for p in [ROOT / "train.py", *(ROOT / "bench").glob("*.py")]}
    assert not [line for name, source in {**SOURCES, **others}.items() for line in lengthy(name, source)]


def test_the_command_is_a_few_lines():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 30


def test_planted_violations_are_found():
    assert upward("credit", "def f():\n    from flowalign.module import AlignModule")
    assert upward("keyed", "import flowalign.points")
    assert not upward("points", "from flowalign.keyed import ids")
    assert foreign("algorithms.grpo", "import lightning") == ["lightning"]
    assert foreign("rewards.hpsv3", "import transformers") == ["transformers"]
    assert foreign("rewards.hpsv3", "def f():\n    import torchvision") == ["torchvision"]
    assert not foreign("rewards.hpsv3", "def f():\n    import transformers")
    assert upward("rewards.shapes", "from flowalign.shapes.pretrain import train")
    assert unwelcome("module", "from hydra.utils import instantiate")
    assert unwelcome("sampler", "from diffusers import FluxPipeline")
    assert vague_constructors("policy.tune", "class A:\n    def __init__(self, cfg): ...")
    assert vague_constructors("policy.tune", "class A:\n    def __init__(self, **rest): ...")
    assert lengthy("x", "def f():\n" + "    pass\n" * 61)
    assert lengthy("x", "\n" * 401)


def test_a_command_line_is_read_without_pytorch():
    """Help and refusals would have to wait for it."""
    asked = "import sys, flowalign.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], cwd=ROOT).returncode == 0
