"""A converted data set: a folder with a manifest, the labels, and one file of images a split.

The folder is made under another name and renamed when it is whole, and the manifest is the last file written: what
opens is complete, whatever was killed when.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlt.names import pick, unknown
from loaders.sources.split import ArraySplit, Source, Split
from loaders.stored import FORMATS
from loaders.stored.atomic_folder import LOCK, MANIFEST, check_target, publish, work_folder, write_durably
from loaders.stored.beton import Beton
from loaders.stored.dali_format import check_dali_options, write_shards
from loaders.stored.damage import DamageError, read_arrays
from loaders.stored.ffcv_format import FfcvOptions, stored_sizes, write_beton
from loaders.stored.image_check import STUCK_S, BadImage, ImageCheck, available_cores, check_images
from loaders.stored.progress import progress_bar
from loaders.stored.tar_shards import TarShards

if TYPE_CHECKING:
    from fastlt.state import ClassCounts

SCHEMA = 1
LABELS, SKIPPED = "labels.npz", "skipped.txt"
SPLITS = ("train", "meta", "test")
SHOWN = 1000  # how many bad images a message names
SHOWN_FILES = 5  # how many damaged files it names
SEAL = "manifest_sha256"
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
LIBRARIES = ("fastlt", "ffcv", "numpy", "opencv-python", "pillow", "scikit-learn")
MAKE = "python tools/convert_dataset.py SOURCE --out {folder}"


@dataclass(frozen=True)
class ConvertedDataset:
    """A complete converted data set on disk.

    root: its folder.
    class_names: C names in label order.
    manifest: the content of manifest.json.
    """

    root: Path
    class_names: tuple[str, ...]
    manifest: dict[str, Any]

    @classmethod
    def open(cls, root: Path | str) -> ConvertedDataset:
        """Open a folder; checks that its files are there and as long as the manifest says (contents: `verify`).

        Raises ValueError, with the command to run, for a folder that is no converted data set, DamageError for one that
        is not whole any more.
        """
        root = Path(root)
        try:
            manifest = _read_manifest(root)
            changes = [_changed(root, name, expected) for name, expected in manifest["files"].items()]
        except OSError as error:
            raise DamageError(f"{root} cannot be read: {error.strerror} ({error.filename})") from None
        problems = [change for change in changes if change is not None]
        if problems:
            more = f"; and {len(problems) - SHOWN_FILES} more files" if len(problems) > SHOWN_FILES else ""
            raise _damaged(root, "; ".join(problems[:SHOWN_FILES]) + more)
        return cls(root, tuple(manifest["class_names"]), manifest)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def _labels(self) -> dict[str, np.ndarray]:
        try:
            labels = read_arrays(self.root / LABELS, SPLITS)
        except DamageError as error:
            raise _damaged(self.root, f"{LABELS} cannot be read ({error})") from None
        for split, of_split in labels.items():
            counts = self.manifest["splits"][split]["class_counts"]
            if of_split.dtype != np.int64 or of_split.ndim != 1 or of_split.min(initial=0) < 0:
                raise _damaged(self.root, f"the labels of {split!r} in {LABELS} are no class numbers")
            if np.bincount(of_split, minlength=self.num_classes).tolist() != counts:
                raise _damaged(self.root, f"{LABELS} and {MANIFEST} disagree on the class counts of {split!r}")
        return labels

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split, int64 (N,)."""
        return pick("split", split, self._labels)

    def class_counts(self, shots: tuple[int, int] = (100, 20)) -> ClassCounts:
        """Training images per class; `shots` are the many and few thresholds (`fastlt.state.ClassCounts`)."""
        from fastlt.state import (
            ClassCounts,
        )  # lazily: it imports torch, which a conversion's usage error must not wait for

        counts = np.bincount(self.labels("train"), minlength=self.num_classes).astype(np.int64)
        return ClassCounts(counts, self.class_names, tuple(shots))

    def beton(self, split: str) -> Path:
        """The FFCV file of a split; sample i has label `labels(split)[i]`."""
        pick("split", split, self.manifest["splits"])
        self._require("ffcv", "FFCV")
        return self.root / f"{split}.beton"

    def shards(self, split: str) -> Path:
        """The index of a split's shards, the DALI format; sample i has label `labels(split)[i]`."""
        pick("split", split, self.manifest["splits"])
        self._require("dali", "DALI's shards")
        return self.root / "dali" / f"{split}.npz"

    def stored(self, split: str, kind: str) -> Beton | TarShards:
        """The images of a split in the format `kind`, one of FORMATS; ValueError when it lacks that."""
        return TarShards.open(self.shards(split)) if kind == "dali" else Beton.open(self.beton(split))

    @property
    def formats(self) -> tuple[str, ...]:
        """Which of FORMATS it holds."""
        return tuple(self.manifest["formats"])

    def image_shape(self, split: str) -> tuple[int, int] | None:
        """(H, W) of a split's stored images when all have one size, else None."""
        size = pick("split", split, self.manifest["splits"])["image_size"]
        return tuple(size["min"]) if size["same"] else None

    def matches(self, request: Mapping[str, Any]) -> bool:
        """Whether this is what `convert` would make of `request`."""
        return not self.differences(request)

    def differences(self, request: Mapping[str, Any]) -> list[str]:
        """In what it is not what `convert` would make of `request`, one line each."""
        made, wanted = self.manifest["request"], _plain(request)
        keys = [*wanted, *(key for key in made if key not in wanted)]
        return [
            f"{key} is {made.get(key)!r}, not {wanted.get(key)!r}" for key in keys if made.get(key) != wanted.get(key)
        ]

    def _require(self, kind: str, what: str) -> None:
        if kind not in self.formats:
            make = f"{MAKE.format(folder=self.root)} --format both --overwrite"
            raise ValueError(f"{self.root} was not converted to {what}: make it with `{make}`")


def conversion_request(
    source: str,
    *,
    train_list: str | Path | None = None,
    meta_list: str | Path | None = None,
    test_list: str | Path | None = None,
    imbalance_factor: float | None = None,
    convention: str = "paper",
    meta_per_class: int = 10,
    options: FfcvOptions,
) -> dict[str, Any]:
    """What identifies a converted data set: the images asked for and how they are stored, not where they came from."""
    lists = {"train_list": train_list, "meta_list": meta_list, "test_list": test_list}
    return {
        "source": source,
        **{key: Path(path).name if path else None for key, path in lists.items()},
        "imbalance_factor": imbalance_factor,
        "convention": convention,
        "meta_per_class": meta_per_class,
        **options.parameters(),
    }


def convert(
    source: Source,
    out: Path | str,
    *,
    options: FfcvOptions,
    request: Mapping[str, Any],
    formats: tuple[str, ...] = ("ffcv",),
    on_error: str = "stop",
    progress: bool = True,
    overwrite: bool = False,
    timeout_s: float = STUCK_S,
) -> ConvertedDataset:
    """Write `source` to the folder `out`, whole or not at all.

    request: the arguments that `source` was opened with; they go into the manifest (`ConvertedDataset.matches`).
    formats: which of FORMATS to write; each holds all images.
    on_error: "stop" raises a ValueError that lists the images that cannot be decoded, before anything is written;
        "skip" leaves them out and lists them in skipped.txt.
    overwrite: whether a converted data set that stands at `out` is replaced (after the new one is whole).
    timeout_s: processes that check or write images are ended when there is no progress for so long.
    Raises ValueError, too, when `out` is in the way, another conversion is writing to it, or the writer fails.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error is {on_error!r}: it must be 'stop' or 'skip'")
    _check_formats(formats, options)
    out = Path(out)
    check_target(out, overwrite=overwrite)
    with work_folder(out) as work:
        checks = check_source(source, num_workers=options.num_workers, progress=progress, timeout_s=timeout_s)
        refuse_bad_images(source, checks, on_error)
        sizes = {name: stored_sizes(check.sizes[check.good], options.max_resolution) for name, check in checks.items()}
        labels = {name: source.splits[name].labels[check.good] for name, check in checks.items()}
        if "ffcv" in formats:
            _check_space(work, sizes, options)
        for name, split in source.splits.items():
            if "ffcv" in formats:
                with progress_bar(f"write {name}", len(labels[name]), progress) as advance:
                    write_beton(
                        work / f"{name}.beton", split, options, check=checks[name], advance=advance, timeout_s=timeout_s
                    )
            if "dali" in formats:
                with progress_bar(f"write {name} shards", len(labels[name]), progress) as advance:
                    write_shards(
                        work / "dali" / f"{name}.npz",
                        split,
                        options,
                        check=checks[name],
                        advance=advance,
                        timeout_s=timeout_s,
                    )
        np.savez(work / LABELS, **labels)
        bad = {name: check.bad for name, check in checks.items()}
        if any(bad.values()):
            write_skipped(work / SKIPPED, bad)
        manifest = {
            "schema": SCHEMA,
            "source": source.name,
            "class_names": list(source.class_names),
            "splits": {
                name: _describe(source.splits[name], labels[name], sizes[name], bad[name], source.num_classes)
                for name in SPLITS
            },
            "formats": {kind: options.parameters() for kind in formats},
            "request": _plain(request),
            "listing_sha256": source.listing_sha256(),
            "skipped": sum(len(images) for images in bad.values()),
            "files": _files(work, progress),
            "versions": _versions(),
        }
        write_durably(work / MANIFEST, sealed(manifest))
        publish(work, out, overwrite)
    return ConvertedDataset.open(out)


def write_skipped(path: Path, bad: Mapping[str, tuple[BadImage, ...]]) -> None:
    """One line for each image that is left out: its split, path and reason, with tabs between them.

    Paths keep their bytes, whatever encoding these are of, but for tabs and line ends, which are spelled out.
    """
    lines = []
    for split in SPLITS:
        for image in bad[split]:
            fields = [text.replace("\t", "\\t").replace("\n", "\\n") for text in (image.name, image.reason)]
            lines.append("\t".join([split, *fields]) + "\n")
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def file_sha256(path: Path) -> str:
    """The checksum of a file, as in the manifest."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(root: Path) -> dict[str, Any]:
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
    try:
        manifest = json.loads(path.read_text())
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamageError(f"{path} is not a manifest of a converted data set ({error}): {make} --overwrite") from None
    if schema != SCHEMA:
        advice = "update fastlt" if isinstance(schema, int) and schema > SCHEMA else f"{make} --overwrite"
        raise ValueError(f"{root} has schema {schema}, this version reads {SCHEMA}: {advice}")
    wrong = next((what for what, holds in _statements(manifest) if not holds), None)
    if wrong is not None:
        raise _damaged(root, f"{MANIFEST} lacks {wrong}, or has something else in its place")
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


def _describes(split: object, num_classes: int) -> bool:
    """Whether this is what `_describe` makes."""
    try:
        counts, size = split["class_counts"], split["image_size"]
        shapes = [len(size["min"]), len(size["max"])] == [2, 2] and isinstance(size["same"], bool)
        return len(counts) == num_classes and sum(counts) == split["count"] and "provenance" in split and shapes
    except (KeyError, TypeError):
        return False


def _changed(root: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    """What can be seen to be wrong with a file without reading it."""
    path = root / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{name} has {path.stat().st_size:,} bytes, its manifest says {expected['bytes']:,}"
    return None


def _damaged(root: Path, what: str) -> DamageError:
    return DamageError(f"{root} is damaged: {what}; make it again with `{MAKE.format(folder=root)} --overwrite`")


def sealed(manifest: Mapping[str, Any]) -> str:
    """The text of manifest.json, with a checksum of its own content by which `verify` notices edits."""
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return json.dumps({**rest, SEAL: manifest_sha256(rest)}, indent=1) + "\n"


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """The checksum of all that a manifest says, but of itself."""
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_formats(formats: tuple[str, ...], options: FfcvOptions) -> None:
    if not formats or len(set(formats)) != len(formats):
        raise ValueError(f"formats is {formats}: it must name {' or '.join(FORMATS)}, or both")
    for kind in formats:
        if kind not in FORMATS:
            raise ValueError(unknown("format", kind, FORMATS))
    if "dali" in formats:
        check_dali_options(options)


def check_source(
    source: Source, *, num_workers: int | None = None, progress: bool = True, timeout_s: float = STUCK_S
) -> dict[str, ImageCheck]:
    """Decode every image of every split once (`check_images`)."""
    assert set(source.splits) == set(SPLITS), sorted(source.splits)
    checks = {}
    for name, split in source.splits.items():
        shown = progress and not isinstance(split, ArraySplit)  # in memory, nothing is to be decoded
        with progress_bar(f"check {name}", len(split), shown) as advance:
            checks[name] = check_images(split, num_workers=num_workers, advance=advance, timeout_s=timeout_s)
    return checks


def refuse_bad_images(source: Source, checks: Mapping[str, ImageCheck], on_error: str) -> None:
    """Refuse bad images ("stop"), or a split that they leave without images of a class ("skip")."""
    bad: list[BadImage] = [image for check in checks.values() for image in check.bad]
    if bad and on_error == "stop":
        more = f"\n  … and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        listed = "".join(f"\n  {image}" for image in bad[:SHOWN])
        raise ValueError(
            f"{len(bad)} of {sum(len(split) for split in source.splits.values())} images cannot be converted; "
            f"replace them, or leave them out with --on-error skip:{listed}{more}"
        )
    for name, check in checks.items():
        counts = np.bincount(source.splits[name].labels[check.good], minlength=source.num_classes)
        empty = [source.class_names[c] for c in np.flatnonzero(counts == 0)]
        if empty:
            raise ValueError(
                f"split {name!r} has no image of {len(empty)} of {source.num_classes} classes that can be decoded: "
                f"{', '.join(empty[:5])}{', …' if len(empty) > 5 else ''}"
            )


def _check_space(folder: Path, sizes: dict[str, np.ndarray], options: FfcvOptions) -> None:
    """Refuse a raw conversion that the disk has no room for; how small JPEGs become is not known beforehand."""
    needed = sum(3 * int(of_split.prod(axis=1).sum()) for of_split in sizes.values())
    free = shutil.disk_usage(folder).free
    if options.mode == "raw" and needed > free:
        raise ValueError(
            f"the images need {needed / 2**30:.1f} GiB as raw pixels and {folder.parent} has {free / 2**30:.1f} GiB "
            "free: set max_resolution, use mode 'jpg', or give a folder on another disk"
        )


def _describe(
    split: Split, labels: np.ndarray, sizes: np.ndarray, bad: tuple[BadImage, ...], num_classes: int
) -> dict[str, Any]:
    low, high = sizes.min(axis=0).tolist(), sizes.max(axis=0).tolist()
    return {
        "count": len(labels),
        "class_counts": np.bincount(labels, minlength=num_classes).tolist(),
        "provenance": split.provenance,
        "image_size": {"same": low == high, "min": low, "max": high},  # (height, width)
        "skipped": len(bad),
    }


def file_checksums(paths: list[Path], progress: bool) -> list[str]:
    """`file_sha256` of each, several at a time (hashing leaves the interpreter's lock alone), with a progress bar."""
    sizes = [path.stat().st_size for path in paths]
    bar = progress_bar("checksums", sum(sizes), progress, unit="B")
    with bar as advance, ThreadPoolExecutor(available_cores()) as pool:
        checksums = []
        for size, checksum in zip(sizes, pool.map(file_sha256, paths), strict=True):
            checksums.append(checksum)
            advance(size)
    return checksums


def _files(folder: Path, progress: bool) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(paths, file_checksums(paths, progress), strict=True)
    }


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES if _installed(name)}
    return {"python": platform.python_version(), **versions}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _plain(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request as JSON gives it back: tuples become lists, paths strings."""
    return json.loads(json.dumps(dict(request), default=str))
