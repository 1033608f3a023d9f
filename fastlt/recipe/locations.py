"""Where recipe files are: those of users, and those that fastlt ships."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from fastlt.paths import expand
from fastlt.typed_yaml import RecipeError

_PACKAGE = Path(__file__).resolve().parents[1]
# Installed, the recipes are in the package; in a checkout they are beside it.
SHIPPED = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """The files of the recipes that fastlt ships, by name; a name says nothing of the folder."""
    return {path.stem: path for path in sorted(SHIPPED.rglob("*.yaml")) if path.parent != SHIPPED / "base"}


def shipped_names() -> list[str]:
    """The names of the recipes that fastlt ships."""
    return sorted(shipped_recipes())


def find_recipe(word: str | Path) -> Path:
    """The file of a recipe that a user names: a path, or the name of a shipped recipe with or without `.yaml`, or its
    path among them.

    A file that is there goes before a shipped one. RecipeError when there is neither.
    """
    path = expanded(str(word))
    if path.is_dir():
        inside = path / "recipe.yaml"
        has = f"; the recipe of the run in it is {inside}" if inside.is_file() else ""
        raise RecipeError(f"{word}: is a folder{has or '; give the path of a recipe file'}")
    if path.exists():
        return path
    shipped = shipped_recipes().get(str(word).removesuffix(".yaml"))
    if shipped is None and SHIPPED / path in shipped_recipes().values():  # as a base is named
        shipped = SHIPPED / path
    if shipped is not None:
        return shipped
    if re.fullmatch(r"[\w.]+=.*", str(word)):
        raise RecipeError(f"{word}: is an override and no recipe; the recipe comes first: digits_lt {word}")
    raise RecipeError(
        f"{word}: cannot be read (no such file); give the path of a recipe file, or the name of one that fastlt ships"
        f"{_nearest(path.name.removesuffix('.yaml').removesuffix('.yml'), shipped_names())}"
    )


def find_base(base: str, recipe: Path) -> Path:
    """The file of an entry of `base`: next to the recipe's own file, else among the shipped recipes."""
    places = (recipe.parent / expanded(base), SHIPPED / base)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        known = sorted(str(path.relative_to(SHIPPED)) for path in SHIPPED.glob("base/*.yaml"))
        raise RecipeError(
            f"base: {base} is neither next to {recipe} nor among the recipes that fastlt ships{_nearest(base, known)}"
        )
    return found


def expanded(word: str) -> Path:
    """The path of a recipe file as `expand` gives it, with a RecipeError."""
    try:
        return Path(expand(word))
    except ValueError as error:
        raise RecipeError(str(error)) from None


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""
