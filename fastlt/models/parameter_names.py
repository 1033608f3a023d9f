"""Which parameters a pattern takes: by the names of parameters, and of the modules that they are in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

BACKBONE = "backbone."


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """Those of the names that `pattern` takes.

    names: of parameters. A pattern takes every parameter whose name it matches, and all parameters of a module whose
        name it matches; `*` stands for any characters, dots too. Names of a model that begin with "backbone." may be
        given without that.
    """
    return [name for name in names if any(fnmatchcase(part, pattern) for part in _candidates(name))]


def nearest_names(names: Iterable[str], pattern: str) -> list[str]:
    """At most three names, of parameters or modules, that are near a pattern which takes none of `names`."""
    known = dict.fromkeys(part for name in names for part in reversed(_candidates(name)))
    return difflib.get_close_matches(pattern.removeprefix(BACKBONE), list(known), n=3, cutoff=0.5)


def _candidates(name: str) -> list[str]:
    """The name of a parameter and of each module that it is in, the inner one first; then without "backbone."."""
    own = name.removeprefix(BACKBONE)
    return _with_modules(name) + (_with_modules(own) if own != name else [])


def _with_modules(name: str) -> list[str]:
    """The name of a parameter, and of each module that it is in, the inner one first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
