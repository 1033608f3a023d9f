"""Paths, links and commands that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastlt.cli import COMMANDS
from fastlt.commands.benchmark import BENCHMARKS
from fastlt.losses.factory import LOSSES
from fastlt.recipe.locations import shipped_names
from fastlt.steps import STEPS
from loaders.order.sampling import SAMPLINGS

ROOT = Path(__file__).resolve().parents[2]
NOTES = ROOT / "docs" / "notes"  # dated: paths and commands in them may be gone
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "fastlt").rglob("*.md")])
CURRENT = [page for page in PAGES if NOTES not in page.parents and page.name != "CHANGELOG.md"]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# In backticks or in a command: fastlt/meta/gradient.py, recipes/x.yaml, tests/unit/; not runs/ or data/ of a user.
PATH = re.compile(r"(?<![\w/.])((?:fastlt|loaders|tools|tests|docs|recipes)/[\w./-]*[\w/])(?![\w/*{$])")
RECIPE = re.compile(r"`((?:cifar10|cifar100|imagenet|places)_lt\w*|inaturalist20\w*|digits_\w+|mine_\w+)`")
# Files that the reader is to write: `fastlt/losses/NAME.py`, and those that a page says so of.
TO_BE_WRITTEN = re.compile(r"`([\w/.]+)`, a new file|# (recipes/mine\.yaml)|`([\w/]*NAME[\w.]*)`")


def names(pages: list[Path]) -> list:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", names(PAGES))
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {target}"
        if anchor:
            assert anchor in anchors(target), f"{link}: {target.name} has no such heading"


@pytest.mark.parametrize("page", names(CURRENT))
def test_paths_of_the_repository_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    to_be_written = {path for paths in TO_BE_WRITTEN.findall(text) for path in paths}
    for path in PATH.findall(text):
        assert path in to_be_written or (ROOT / path).exists(), f"there is no {path}"


@pytest.mark.parametrize("page", names(PAGES))
def test_recipes_that_a_page_names_exist(page):
    for recipe in RECIPE.findall(page.read_text(encoding="utf-8")):
        assert recipe in shipped_names(), f"there is no recipe {recipe}"


@pytest.mark.parametrize("page", names(CURRENT))
def test_commands_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    # At the start of a line of code, behind `$`, a variable or another command; or in backticks.
    for command in re.findall(r"(?:^ {4,}(?:[\w.=]+ )?|`)fastlt ([a-z-]+)", text, flags=re.MULTILINE):
        assert command in COMMANDS, f"fastlt {command} is no command"
    for benchmark in re.findall(r"fastlt benchmark ([a-z|]+)", text):
        assert set(benchmark.split("|")) <= set(BENCHMARKS), f"there is no benchmark {benchmark}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for target in re.findall(r"(?:^ {4}|`|=\d+ )make ([a-z-]+)", text, flags=re.MULTILINE):
        assert target in targets, f"make {target} is no target"


def test_every_method_loss_and_sampling_has_its_paragraph():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    missing = [f"method: {name}" for name in STEPS if f"`method: {name}" not in text and name != "plain"]
    missing += [f"loss: {name}" for name in LOSSES if f"`loss: {name}`" not in text]
    missing += [f"sampling: {name}" for name in SAMPLINGS if f"`{name}`" not in text]
    assert not missing, "docs/methods.md has no paragraph with these words"


def test_every_row_of_the_tables_is_named_in_methods():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    unnamed = sorted(set(shipped_names()) - set(RECIPE.findall(text)))
    assert not unnamed, f"docs/methods.md does not name these, or not as RECIPE has it: {', '.join(unnamed)}"
