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
    """The valid word closest to `word`, or None when nothing is near.

    Capitals and dashes do not count, and initials do: `CE` is near cross_entropy.
    """
    plain = {_plain(one): one for one in valid}
    matches = difflib.get_close_matches(_plain(word), list(plain), n=1, cutoff=0.5)
    if matches:
        return plain[matches[0]]
    return next((one for key, one in plain.items() if _plain(word) == _initials(key)), None)


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").replace(" ", "_")


def _initials(word: str) -> str:
    return "".join(part[:1] for part in word.split("_"))


def unknown(kind: str, word: object, valid: Iterable[str]) -> str:
    """One line that says `word` is no `kind`, what is allowed, and what was probably meant."""
    valid = sorted(valid)
    guess = nearest(str(word), valid)
    hint = f"; did you mean {guess!r}?" if guess else ""
    # A name with a comma would look like two in the list.
    quoted = any("," in one for one in valid)
    return f"unknown {kind} {shortened(word)}: allowed are {', '.join(map(repr, valid) if quoted else valid)}{hint}"


def pick(kind: str, name: str, table: Mapping[str, T]) -> T:
    """`table[name]`, or a ValueError that lists the valid names and the nearest match."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(unknown(kind, name, table))
    return table[name]
