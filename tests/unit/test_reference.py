"""The page of recipe keys is what the code says."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from fastlt.losses import LOSSES
from fastlt.recipe import reference
from fastlt.recipe.schema import DataRecipe, StageRecipe
from fastlt.steps import STEPS
from loaders.readers import BACKENDS
from loaders.sources import SOURCES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8").strip() == reference.reference().strip(), (
        f"docs/recipes.md is stale; renew it: {reference.COMMAND}"
    )


def test_the_page_has_every_key_method_and_loss():
    page = reference.reference()
    for cls in (DataRecipe, StageRecipe):
        for field in fields(cls):
            assert f"| `{field.name}`" in page
    for name in (*STEPS, *LOSSES):
        assert f"### `{name}`" in page
    for name in (*BACKENDS, *SOURCES):
        assert f"| `{name}` |" in page


@dataclass(frozen=True)
class Base:
    """A base.

    one: the first key,
        over two lines.
    """

    one: int = 1


@dataclass(frozen=True)
class Part(Base):
    """A part with a | in it.

    two: of a list. A second sentence.
    Not a key: since it has spaces.
    """

    two: tuple[float, float] = (0.5, 2.0)


def test_a_docstring_describes_the_keys_of_its_class_and_of_those_above():
    assert reference.described(Part) == {
        "one": "the first key, over two lines.",
        "two": "of a list. A second sentence.",
    }
    assert reference.summary(Part) == "A part with a | in it."


def test_a_key_without_a_description_is_noticed():
    @dataclass(frozen=True)
    class Silent:
        """Says nothing."""

        key: int = 0

    with pytest.raises(AssertionError, match="does not describe key"):
        list(reference._keys_of(Silent))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int | None, "integer, or null"),
        (float | str, "number or text"),
        (tuple[float, float], "list of 2 numbers"),
        (list[str], "list of names"),
        (dict[str, float], "mapping of names to numbers"),
        (bool, "`true`, `false`"),
    ],
)
def test_types_are_told_in_words(kind, words):
    assert reference.allowed_values(kind) == words


@pytest.mark.parametrize(
    ("value", "written"),
    [(None, "`null`"), (True, "`true`"), (1e-4, "`0.0001`"), ((0.5, 2.0), "`[0.5, 2]`"), ({}, "`{}`")],
)
def test_defaults_are_written_as_yaml(value, written):
    assert reference.shown(value) == written
