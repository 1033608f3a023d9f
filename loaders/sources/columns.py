"""The columns of a table of images: which holds the image, which its label, and which its split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastlt.names import unknown
from loaders.sources.messages import some

# In small letters.
IMAGE_COLUMNS = frozenset(
    ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_file", "img")
)
LABEL_COLUMNS = frozenset(("label", "class", "class_name", "category", "category_name", "target", "species"))
SPLIT_COLUMNS = frozenset(("split", "set", "subset", "partition"))


def choose_column(columns: Sequence[str], asked: str | None, known: Sequence[str], what: str, where: str) -> str:
    """The column `asked` for, else the only one of `known`; ValueError, which names the option, when there is no such.

    what: "image" or "label", the option's name. where: the table in messages.
    """
    if asked is not None:
        if asked not in columns:
            raise ValueError(f"{where}: {unknown('column', asked, columns)}")
        return asked
    if len(known) != 1:
        found = f"{len(known)} columns may hold the {what}" if known else f"no column holds the {what} by its name"
        of = known or columns
        raise ValueError(f"{where}: {found} ({some([repr(name) for name in of], ', ')}); name it with --{what}-column")
    return known[0]


def called(columns: Sequence[str], names: frozenset[str]) -> list[str]:
    """The columns with one of the names, however they are capitalised."""
    return [column for column in columns if column.strip().lower() in names]


def as_classes(values: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Labels as classes to sort: whole numbers as such where all labels of all splits are, else texts."""
    everything = [value for of_split in values.values() for value in of_split]
    whole = all(_is_whole(value) for value in set(everything))
    kind = int if whole else str
    return {split: [kind(value) for value in of_split] for split, of_split in values.items()}


def _is_whole(value: Any) -> bool:
    if isinstance(value, str):  # "07" is a name: it and "7" may be two classes
        digits = value.strip().removeprefix("-")
        return digits.isdecimal() and str(int(digits)) == digits
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
