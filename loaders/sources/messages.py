"""Names and sizes of files in messages and reports: printable, and of a length that can be read."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence

SHOWN = 5  # how many names a message has
LONGEST = 160  # letters of a name that is shown whole


def printable(name: str | os.PathLike[str]) -> str:
    r"""The name of a file as text; a byte that is not UTF-8 becomes a backslash escape, as in `caf\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def one_line(name: str | os.PathLike[str]) -> str:
    """`printable` without control characters: a name with a line's end in it stays on its line of a listing."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in printable(name))


def shortened(name: str) -> str:
    """The name, without its middle when it is long."""
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST // 2]} … ({len(name):,} letters) … {name[-LONGEST // 4 :]}"


def some(names: Sequence[str], separator: str = "; ") -> str:
    """The first names, and a sign that there are more."""
    return separator.join(names[:SHOWN]) + (f"{separator}…" if len(names) > SHOWN else "")


def readable_bytes(num_bytes: float) -> str:
    """In GiB or MiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
