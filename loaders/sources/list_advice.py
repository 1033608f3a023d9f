"""Why the files of a list are not found: mends of its lines and of the root, each tried before it is advised."""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loaders.sources.messages import printable

TRIED = 40  # paths a mend is tried on
FOLDERS = 50  # folders of the root that are looked into
PARENTS = 3
DEEPEST = 8  # folders that may be too many at the front of a path
ENDINGS = (".jpg", ".jpeg", ".JPEG", ".JPG", ".png", ".PNG")


@dataclass(frozen=True)
class Mend:
    """A change of every path of a list, and its name: what the user is asked to do."""

    advice: str
    apply: Callable[[str], str]


def _ending(new: str) -> Mend:
    return Mend(f"write the ending {new!r}, as the files have it", lambda path: os.path.splitext(path)[0] + new)


def _latin(path: str) -> str:
    return os.fsencode(path).decode("cp1252", "replace")


MENDS = (
    Mend("remove the '/' that the lines begin with", lambda path: path.lstrip("/")),
    Mend(r"write '/' for '\' in the paths", lambda path: path.replace("\\", "/")),
    Mend("remove the quotes around the paths", lambda path: re.sub(r"""^(["'])(.*)\1$""", r"\2", path)),
    *(
        Mend(f"remove the {mark!r} before the label", lambda path, mark=mark: path.removesuffix(mark).rstrip())
        for mark in ",;:|"
    ),
    Mend("save the list as UTF-8", _latin),
    *(
        Mend(
            f"write the names in Unicode form {form}, as the files' names are (they look the same)",
            lambda path, form=form: unicodedata.normalize(form, path),
        )
        for form in ("NFC", "NFD")
    ),
    *(_ending(new) for new in ENDINGS),
)


@dataclass(frozen=True)
class Attempt:
    """Some mends of the paths, a number of folders taken off their front, and another root."""

    mends: tuple[Mend, ...]
    dropped: int
    root: Path

    def path(self, path: str) -> Path | None:
        """Where the file should then be."""
        for mend in self.mends:
            path = mend.apply(path)
        parts = PurePosixPath(path).parts[self.dropped :]
        return self.root.joinpath(*parts) if parts else None

    def prefix(self, paths: Sequence[str]) -> str | None:
        """What is taken off all paths; None when it is not the same."""
        prefixes = set()
        for path in paths:
            for mend in self.mends:
                path = mend.apply(path)
            prefixes.add(PurePosixPath(path).parts[: self.dropped])
        return str(PurePosixPath(*prefixes.pop())) if len(prefixes) == 1 else None

    def finds(self, paths: Sequence[str]) -> int:
        """How many of the files are then there; 0 as soon as the first and the last are not."""
        ends = [paths[0], paths[-1]]
        if not any(_is_file(self.path(path)) for path in ends):
            return 0
        return sum(_is_file(self.path(path)) for path in paths)


def _is_file(path: Path | None) -> bool:
    return path is not None and os.path.isfile(path)  # unlike Path.is_file, it takes names that are too long


def advise(root: Path, missing: Sequence[str], present: Sequence[str] = ()) -> str:
    """A sentence that says how the missing files would be found; one that asks for the root where none is known.

    missing: paths of lines whose files are not below `root`.  present: paths of other lines, which must stay found.
    """
    tried, there = _spread(missing), _spread(present)
    best, found = _best(root, tried)
    if best is None:
        return ". Is root the folder that the paths of the list start from?"
    if best.root != root and there and Attempt((), 0, best.root).finds(there) < len(there):
        return (
            f". They are under {printable(best.root)}, and other lines are under {printable(root)}: "
            "let all lists start from one folder"
        )
    return _sentence(_steps(best, root, tried), found, len(tried))


def _sentence(steps: Sequence[str], found: int, tried: int) -> str:
    which = "They are" if found == tried else f"{found} of {tried} that were tried are"
    return f". {which} found if you {' and '.join(steps)}"


def _steps(attempt: Attempt, root: Path, paths: Sequence[str]) -> list[str]:
    """What the user has to do."""
    steps = [mend.advice for mend in attempt.mends]
    if attempt.dropped:
        prefix = printable(attempt.prefix(paths) or "")
        steps.append(f"remove '{prefix.rstrip('/')}/' from the front of the lines")
    if attempt.root != root:
        steps.append(f"give {printable(attempt.root)} as root")
    return steps


def _best(root: Path, paths: Sequence[str]) -> tuple[Attempt | None, int]:
    """The first attempt that finds all files, else the one that finds most and at least half, and how many it finds."""
    best, most = None, (len(paths) - 1) // 2
    for attempt in _attempts(root, paths):
        found = attempt.finds(paths)
        # Paths that lose different folders may become those of other images.
        if found > most and attempt.prefix(paths) is not None:
            best, most = attempt, found
            if found == len(paths):
                break
    return best, most


def _attempts(root: Path, paths: Sequence[str]) -> Iterator[Attempt]:
    """The likely ones and those with few changes first."""
    here = Path(os.path.abspath(root))
    parents = [*here.parents][:PARENTS]
    others = [*parents, *_folders(root)]
    useful = [mend for mend in MENDS if any(mend.apply(path) != path for path in paths)]
    single = [(mend,) for mend in useful]
    pairs = [*itertools.combinations(useful, 2)]
    drops = range(1, DEEPEST + 1)
    yield from (Attempt((), 0, base) for base in (root, *others))
    yield from (Attempt(mends, 0, root) for mends in single)
    yield from (Attempt((), dropped, base) for base in (root, *others) for dropped in drops)
    yield from (Attempt(mends, 0, base) for base in others for mends in single)
    yield from (Attempt(mends, 0, root) for mends in pairs)
    yield from (Attempt(mends, dropped, root) for mends in single for dropped in drops)
    yield from (Attempt(mends, 0, base) for base in parents for mends in pairs)


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir())[:FOLDERS]
    except OSError:
        return []


def _spread(paths: Sequence[str]) -> Sequence[str]:
    """At most TRIED of the paths, from the first to the last."""
    if len(paths) <= TRIED:
        return paths
    return [paths[i * (len(paths) - 1) // (TRIED - 1)] for i in range(TRIED)]


# --- lines that are no `path label`

Line = tuple[str, str]  # a path and a label


def _after(mark: str) -> Callable[[str], Line | None]:
    def split(line: str) -> Line | None:
        path, found, label = line.rpartition(mark)
        return (path.strip(), label.strip()) if found else None

    return split


def _label_first(mark: str | None) -> Callable[[str], Line | None]:
    def split(line: str) -> Line | None:
        words = line.split(mark, maxsplit=1)
        return (words[1].strip(), words[0].strip()) if len(words) == 2 else None

    return split


def _path_label(line: str) -> Line | None:
    words = line.rsplit(maxsplit=1)
    return (words[0], words[1]) if len(words) == 2 else None


FORMS: tuple[tuple[str, Callable[[str], Line | None]], ...] = (
    ("", _path_label),
    *((f"put a space for the {mark!r} before the label", _after(mark)) for mark in ",;:|"),
    ("put the label behind the path", _label_first(None)),
    *((f"put the label behind the path, with a space for the {mark!r}", _label_first(mark)) for mark in ",;:|"),
)


def advise_lines(root: Path, lines: Sequence[str], is_label: Callable[[str], bool]) -> str:
    """A sentence that says how lines would become `path label` with files that exist; empty when no way was found.

    lines: all of a list that are not empty, some of which are malformed; the first may be a header.
    is_label: whether a word is a class number.
    """
    lines = [line.strip() for line in lines]
    for advice, form in FORMS:
        parsed = [form(line) for line in lines]
        good = [(i, pair[0]) for i, pair in enumerate(parsed) if pair and is_label(pair[1].strip("\"'"))]
        header = len(good) == len(lines) - 1 and good and good[0][0] == 1
        if len(good) < len(lines) and not header:
            continue
        paths = _spread([path for _, path in good])
        best, found = _best(root, paths)
        if best is None:
            continue
        steps = ["remove line 1, a header"] if header else []
        steps += [advice] if advice else []
        return _sentence([*steps, *_steps(best, root, paths)], found, len(paths))
    return ""
