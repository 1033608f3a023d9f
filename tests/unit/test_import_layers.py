"""Imports go down only, read off the source: no package knows the packages above it."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A package may import from its own layer and from lower ones. One without a place here fails the test.
LAYERS = [
    {"fastlt.file_lock", "fastlt.names", "fastlt.paths", "fastlt.ranges", "fastlt.state", "fastlt.strict_json"}
    | {"fastlt.markdown_table", "fastlt.parent_process", "fastlt.version", "loaders.cores", "loaders.daemon_threads"},
    {"fastlt.arguments", "fastlt.console", "fastlt.error_message", "fastlt.typed_yaml"},
    {"fastlt.autograd", "fastlt.device", "fastlt.losses", "fastlt.augment", "loaders.order", "loaders.protocol"},
    {"fastlt.meta", "fastlt.models", "fastlt.optim", "loaders.sources"},
    {"fastlt.steps", "loaders.stored"},
    {"loaders.readers"},
    {"fastlt.batches", "fastlt.recipe", "loaders.factory"},
    {"fastlt.run"},
    {"fastlt.report", "fastlt.ensemble", "fastlt.export", "fastlt.inference", "fastlt.reproduce", "fastlt.benchmarks"}
    | {"fastlt.inspection"},
    {"fastlt"},  # the public names
    {"fastlt.commands"},
    {"fastlt.train", "fastlt.cli"},
    {"fastlt.__main__"},
]
ALLOWED_BY_LOADERS = {"fastlt.state", "fastlt.names", "fastlt.file_lock", "fastlt.parent_process", "fastlt.version"}


def package(module: str) -> str:
    """fastlt.steps.base -> fastlt.steps; loaders.sources.cifar -> loaders.sources."""
    return ".".join(module.split(".")[:2])


def of_loaders(module: str) -> bool:
    return module.split(".")[0] == "loaders"


def layer(module: str) -> int:
    for depth, packages in enumerate(LAYERS):
        if package(module) in packages:
            return depth
    raise AssertionError(f"{module} has no place in LAYERS")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from fastlt import meta_gradient` imports the module, not the package.
            names = [f"{node.module}.{a.name}" for a in node.names]
            found |= {n if (ROOT / (n.replace(".", "/") + ".py")).exists() else node.module for n in names}
    return {m for m in found if m.split(".")[0] in ("fastlt", "loaders", "tools")}


SOURCES = sorted([*(ROOT / "fastlt").rglob("*.py"), *(ROOT / "loaders").rglob("*.py")])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    module = module_of(path)
    for imported in imports(path):
        assert not imported.startswith("tools"), f"{module} imports {imported}"
        assert layer(imported) <= layer(module), f"{module} imports {imported}, which lies above it"
        if package(module) != "fastlt.autograd":
            assert not imported.startswith("fastlt.autograd."), f"{module} imports {imported}: import fastlt.autograd"
        if of_loaders(module):
            assert of_loaders(imported) or package(imported) in ALLOWED_BY_LOADERS, f"{module} imports {imported}"
        if package(module) == "fastlt.steps":
            assert not of_loaders(imported), f"{module} imports {imported}: a step never sees a loader"


ENTRY_POINTS = ("fastlt.cli", "fastlt.train", "fastlt.commands.")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_imports_what_users_call(path):
    """But that `python -m fastlt` imports the command, and commands each other."""
    inside = str(path.relative_to(ROOT))
    own = "fastlt.cli" if inside == "fastlt/__main__.py" else "fastlt.commands." if "/commands/" in inside else "none"
    assert not [m for m in imports(path) if m.startswith(ENTRY_POINTS) and not m.startswith(own)]


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda p: p.name)
def test_scripts_of_tools_import_the_command_alone(path):
    assert imports(path) == {"fastlt.cli"}


def test_no_two_modules_import_each_other():
    """Neither do longer circles exist, also not for annotations alone: a CycleError names the modules of one."""
    TopologicalSorter({module_of(path): imports(path) for path in SOURCES}).prepare()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_accelerate_is_known_to_the_run_alone(path):
    if path.parent != ROOT / "fastlt" / "run":
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        assert not {"accelerate", "accelerate.utils"} & {n.module for n in nodes if isinstance(n, ast.ImportFrom)}


def test_no_module_hides_one_of_the_standard_library():
    """`accelerate launch fastlt/train.py` puts fastlt/ first on sys.path."""
    names = {
        p.stem for p in (ROOT / "fastlt").iterdir() if p.suffix == ".py" or (p.is_dir() and p.name != "__pycache__")
    }
    assert not names & set(sys.stdlib_module_names)
