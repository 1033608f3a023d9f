"""docs/extending.md as written: its code goes where the page says, into a copy of the project, and trains there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extending.md"

# "`path`, a new file:" or "`path`, an import and a row of `TABLE`:", and the blocks behind it.
PLACE = re.compile(r"^`([\w/.]+)`, (a new file|an import and a row of `(\w+)`)", re.MULTILINE)
BLOCK = re.compile(r"^```(?:python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def add_row(path: Path, table: str, row: str) -> None:
    """Put a row at the end of a table that is a dict over several lines."""
    text, found = re.subn(
        rf"^({table}\b[^\n]*= {{\n)(.*?)^}}", lambda m: f"{m[1]}{m[2]}{row}}}", path.read_text(), flags=re.M | re.S
    )
    assert found == 1, f"{path} has no table {table}"
    path.write_text(text)


def add_import(path: Path, line: str) -> None:
    """Put an import among those of a module."""
    text, found = re.subn(r"^(?=from fastlt)", line, path.read_text(), count=1, flags=re.M)
    assert found == 1, f"{path} imports nothing of fastlt"
    path.write_text(text)


def follow(page: str, project: Path) -> list[Path]:
    """Do what the page says; returns the new files."""
    new = []
    places = list(PLACE.finditer(page))
    for place, following in zip(places, [*places[1:], None], strict=True):
        section = page[place.end() : following.start() if following else len(page)]
        blocks, path = BLOCK.findall(section), project / place[1]
        if place[2] == "a new file":
            assert not path.exists(), f"{path} is no new file"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(blocks[0])
            new.append(path)
        else:
            add_import(path, blocks[0])
            add_row(path, place[3], blocks[1])
    return new


DRIVER = """
import sys
import pytest
from fastlt.train import main

tests, recipes, words = sys.argv[1].split(), sys.argv[2].split(), sys.argv[3:]
code = pytest.main(["-q", "-p", "no:cacheprovider", *tests])
for recipe in recipes:
    code = code or main([recipe, *words])
sys.exit(code)
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the packages and recipes, with everything of the page added."""
    for part in ("fastlt", "loaders", "recipes"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_page_leads_to_a_loss_and_a_method_that_train(project, digits):
    new = follow(PAGE.read_text(encoding="utf-8"), project)
    recipes = [path for path in new if path.suffix == ".yaml"]
    tests = [path for path in new if path.name.startswith("test_")]
    assert len(recipes) == len(tests) == 2
    stage = "stages.end_to_end"
    words = [f"data.converted={digits}", "data.loader=resident", "num_threads=1", f"runs={project / 'runs'}"]
    words += [f"{stage}.iterations=4", f"{stage}.evaluate_every=2", f"{stage}.warmup=0", "log_every=1"]
    where = {**os.environ, "PYTHONPATH": str(project)}
    command = [sys.executable, "-c", DRIVER, " ".join(map(str, tests)), " ".join(map(str, recipes)), *words]
    done = subprocess.run(command, cwd=project, env=where, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for recipe in recipes:
        assert (project / "runs" / recipe.stem / "result.json").exists()
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, *(str(path) for path in new if path.suffix == ".py")]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
