"""The manifest of a converted data set: what it says, its seal, and the checks of both.

It is the last file written, so that a folder which has one is whole. It holds the length and checksum of every other
file, and a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from fastlt.version import __version__
from loaders.cores import available_cores
from loaders.sources.split import SPLITS
from loaders.stored import FORMATS
from loaders.stored.atomic_folder import MANIFEST
from loaders.stored.damage import DamageError
from loaders.stored.forked_workers import Advance

SCHEMA = 1
LABELS, IMAGES = "labels.npz", "images.tsv"
SKIPPED, DUPLICATES = "skipped.txt", "duplicates.txt"
SHOWN_FILES = 5  # how many damaged files a message names
SEAL = "manifest_sha256"
# By format and split: the `content_sha256` of its images, and how many are files of the source as they were. Older data
# sets have neither.
CONTENTS, KEPT = "contents", "kept_files"
MANIFEST_KEYS = {
    "source": str,
    "class_names": list,
    "splits": dict,
    "formats": dict,
    "request": dict,
    "skipped": int,
    "files": dict,
    "versions": dict,
}
LIBRARIES = ("ffcv", "numpy", "opencv-python", "pillow", "scikit-learn")
MAKE = "fastlt convert SOURCE --out {folder}"


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of the folder `root`, complete; its files are not looked at.

    ValueError, with the command to run, for a folder that is no converted data set, DamageError for one whose manifest
    is not what was written.
    """
    make = f"make one with `{MAKE.format(folder=root)}`"
    if not root.is_dir():
        what = "is a file, no folder" if root.exists() else "does not exist"
        raise ValueError(f"{root} {what}, so there is no converted data set: {make}")
    path = root / MANIFEST
    if not path.is_file():
        entries = sorted(entry.name for entry in root.iterdir())
        found = f"it holds {', '.join(entries[:4])}{', …' if len(entries) > 4 else ''}" if entries else "it is empty"
        half = any(name.endswith(".beton") or name == LABELS for name in entries)
        what = "an unfinished or damaged data set" if half else "not a converted data set"
        raise ValueError(f"{root} is {what}, it has no {MANIFEST} ({found}): {make}")
    return parse_manifest(path.read_bytes(), str(root), make)


def parse_manifest(text: bytes, place: str, make: str) -> dict[str, Any]:
    """The manifest that manifest.json holds.

    place: of its folder, for messages. make: how the data set is made. ValueError and DamageError as `read_manifest`.
    """
    try:
        manifest = json.loads(text)
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        path = f"{place}/{MANIFEST}"
        what = f"{path} is not a manifest of a converted data set ({error})"
        raise DamageError(f"{what}: move its folder away and {make}") from None
    if schema != SCHEMA:
        advice = "update fastlt" if isinstance(schema, int) and schema > SCHEMA else f"{make} --overwrite"
        raise ValueError(f"{place} has schema {schema}, this version reads {SCHEMA}: {advice}")
    wrong = next((what for what, holds in _statements(manifest) if not holds), None)
    if wrong is not None:
        what = f"{MANIFEST} lacks {wrong}, or has something else in its place"
        raise DamageError(f"{place} is damaged: {what}; {make.replace('make one', 'make it again')} --overwrite")
    return manifest


def _statements(manifest: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """What a manifest must hold, each as (what, whether it does); to be read until the first that does not."""
    for key, kind in MANIFEST_KEYS.items():
        yield repr(key), isinstance(manifest.get(key), kind)
    names, formats, files = manifest["class_names"], manifest["formats"], manifest["files"]
    yield "the class names", bool(names) and all(isinstance(name, str) for name in names)
    yield f"formats, {' or '.join(FORMATS)}", bool(formats) and set(formats) <= set(FORMATS)
    for split in SPLITS:
        yield f"the split {split!r}", _describes(manifest["splits"].get(split), len(names))
    for name, expected in files.items():
        held = isinstance(expected, dict) and isinstance(expected.get("bytes"), int) and "sha256" in expected
        yield f"the length and checksum of {name}", held
    needed = [LABELS, *(f"{split}.beton" for split in SPLITS if "ffcv" in formats)]
    for name in needed + [f"dali/{split}.npz" for split in SPLITS if "dali" in formats]:
        yield f"the file {name}", name in files


def _describes(split: Any, num_classes: int) -> bool:
    """Whether this is what `describe_split` makes."""
    try:
        counts, size = split["class_counts"], split["image_size"]
        shapes = [len(size["min"]), len(size["max"])] == [2, 2] and isinstance(size["same"], bool)
        return len(counts) == num_classes and sum(counts) == split["count"] and "provenance" in split and shapes
    except (KeyError, TypeError):
        return False


def check_files(root: Path, manifest: Mapping[str, Any]) -> None:
    """DamageError unless every file is there and as long as the manifest says; no file is read."""
    changes = [_changed(root, name, expected) for name, expected in manifest["files"].items()]
    problems = [change for change in changes if change is not None]
    if problems:
        more = f"; and {len(problems) - SHOWN_FILES} more files" if len(problems) > SHOWN_FILES else ""
        raise damaged(root, "; ".join(problems[:SHOWN_FILES]) + more)


def _changed(root: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    """What can be seen to be wrong with a file without reading it."""
    path = root / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{name} has {path.stat().st_size:,} bytes, its manifest says {expected['bytes']:,}"
    return None


def damaged(root: Path, what: str) -> DamageError:
    """The error for a data set that was whole once, with the remedy."""
    return DamageError(f"{root} is damaged: {what}; make it again with `{MAKE.format(folder=root)} --overwrite`")


def sealed(manifest: Mapping[str, Any]) -> str:
    """The text of manifest.json, with a checksum of its own content by which `verify` notices edits."""
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return json.dumps({**rest, SEAL: manifest_sha256(rest)}, indent=1) + "\n"


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """The checksum of all that a manifest says, but of itself."""
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def describe_split(
    provenance: str, labels: np.ndarray, sizes: np.ndarray, skipped: int, num_classes: int
) -> dict[str, Any]:
    """What the manifest says of a split.

    labels: int64 (N,).  sizes: int64 (N, 2), (height, width) of the stored images.  skipped: images left out.
    """
    low, high = sizes.min(axis=0).tolist(), sizes.max(axis=0).tolist()
    return {
        "count": len(labels),
        "class_counts": np.bincount(labels, minlength=num_classes).tolist(),
        "provenance": provenance,
        "image_size": {"same": low == high, "min": low, "max": high},  # (height, width)
        "skipped": skipped,
    }


def describe_files(paths: Sequence[Path], folder: Path, advance: Advance) -> dict[str, dict[str, Any]]:
    """The stamp and checksum of files in `folder`, by their paths there; advance: told of bytes."""
    described = {}
    for path, checksum in zip(paths, file_checksums(paths, advance), strict=True):
        size, mtime_ns = stamp(path)
        name = path.relative_to(folder).as_posix()
        described[name] = {"bytes": size, "mtime_ns": mtime_ns, "sha256": checksum}
    return described


def stamp(path: Path) -> list[int]:
    """[length, time of the last change in ns]: who writes to a file changes its stamp; who renames it does not."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def file_sha256(path: Path, ended: threading.Event | None = None) -> str:
    """The checksum of a file, as in the manifest; of its beginning only when `ended` is set meanwhile."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while (ended is None or not ended.is_set()) and (block := file.read(1 << 22)):
            digest.update(block)
    return digest.hexdigest()


def file_checksums(paths: Sequence[Path], advance: Advance = lambda n: None) -> list[str]:
    """`file_sha256` of each, several at a time: hashing leaves the interpreter's lock alone. advance: told of bytes."""
    sizes = [path.stat().st_size for path in paths]
    ended = threading.Event()
    with ThreadPoolExecutor(available_cores()) as pool:
        checksums = []
        try:
            for size, checksum in zip(sizes, pool.map(lambda path: file_sha256(path, ended), paths), strict=True):
                checksums.append(checksum)
                advance(size)
        finally:
            ended.set()  # else a command that is interrupted would wait for the end of a large file
    return checksums


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that decide what is stored."""
    found = {"python": platform.python_version(), "fastlt": __version__}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def as_json(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request as JSON gives it back: tuples become lists, paths strings."""
    return json.loads(json.dumps(dict(request), default=str))
