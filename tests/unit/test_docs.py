"""Paths, links and commands that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastlt.losses.factory import LOSSES
from fastlt.steps import STEPS
from loaders.order.sampling import SAMPLINGS

ROOT = Path(__file__).resolve().parents[2]
NOTES = ROOT / "docs" / "notes"  # a diary: what it names may be gone
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "fastlt").rglob("*.md")])
CURRENT = [page for page in PAGES if NOTES not in page.parents and page.name != "CHANGELOG.md"]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# In backticks or in a command: fastlt/meta/gradient.py, recipes/x.yaml, tests/unit/; not runs/ or data/ of a user.
PATH = re.compile(r"(?<![\w/.])((?:fastlt|loaders|tools|tests|docs|recipes)/[\w./-]*[\w/])(?![\w/*{$])")
RECIPE = re.compile(r"`((?:cifar10|cifar100|imagenet|places)_lt\w*|inaturalist2018\w*|digits_lt)`")
# Files of somebody else that a page makes up.
MADE_UP = {"recipes/mine.yaml", "recipes/x.yaml"}


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
    for path in PATH.findall(page.read_text(encoding="utf-8")):
        assert path in MADE_UP or (ROOT / path).exists(), f"there is no {path}"


@pytest.mark.parametrize("page", names(PAGES))
def test_recipes_that_a_page_names_exist(page):
    for recipe in RECIPE.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / "recipes" / f"{recipe}.yaml").exists(), f"there is no recipe {recipe}"


def test_every_method_loss_and_sampling_has_its_paragraph():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    missing = [f"method: {name}" for name in STEPS if f"`method: {name}" not in text and name != "plain"]
    missing += [f"loss: {name}" for name in LOSSES if f"`loss: {name}`" not in text]
    missing += [f"sampling: {name}" for name in SAMPLINGS if f"`{name}`" not in text]
    assert not missing


def test_every_row_of_the_tables_is_named_in_methods():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes - set(RECIPE.findall(text)) == set()
