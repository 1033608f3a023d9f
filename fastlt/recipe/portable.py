"""A recipe that says nothing of the machine, for others to read and to compare."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from fastlt.recipe.schema import Recipe, is_harmless, recipe_from_tree, values
from loaders.stored.manifest import file_sha256


def without_paths(recipe: Recipe) -> Recipe:
    """The recipe with file names for paths: equal for the same files, wherever they are, and different for others.

    A file is named with its checksum, `NAME (sha256 DIGITS)`. A path that changes no result is at its default.
    """
    tree = recipe.to_tree()
    for (*parents, last), value in values(recipe).items():
        if value.field is not None and value.field.metadata.get("path") and value.value is not None:
            part = tree
            for name in parents:
                part = part[name]
            # Where converted images lie changes no result, and their content is no part of a recipe.
            left_out = is_harmless(value.field) or (*parents, last) == ("data", "converted")
            part[last] = value.field.default if left_out else _named(value.value)
    return recipe_from_tree(tree)


def _named(path: str) -> str:
    """The name of a file with its checksum, that of a folder or of a file that is gone, or a word that is no path."""
    file = Path(path)
    if not file.is_file():
        return file.name
    stat = file.stat()
    return f"{file.name} (sha256 {_digits(file, stat.st_size, stat.st_mtime_ns)})"


@lru_cache
def _digits(file: Path, size: int, modified_ns: int) -> str:
    """Sixteen digits of a file's checksum. size, modified_ns: a file that has changed is read again."""
    return file_sha256(file)[:16]
