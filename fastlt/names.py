"""Looking a user's word up in one of our tables, with advice when it is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")
LONGEST = 200  # characters of a value in a message


def shortened(value: object) -> str:
    """A value as it is written in Python, without its middle where that is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-20:]}"


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The valid word closest to `word`, or None when nothing is near."""
    matches = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(kind: str, word: object, valid: Iterable[str]) -> str:
    """One line that says `word` is no `kind`, what is allowed, and what was probably meant."""
    valid = sorted(valid)
    guess = nearest(str(word), valid)
    hint = f"; did you mean {guess!r}?" if guess else ""
    return f"unknown {kind} {shortened(word)}: allowed are {', '.join(valid)}{hint}"


def pick(kind: str, name: str, table: Mapping[str, T]) -> T:
    """`table[name]`, or a ValueError that lists the valid names and the nearest match."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(unknown(kind, name, table))
    return table[name]
