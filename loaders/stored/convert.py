"""Converting a source into a data set that is read at full speed: all images are checked first, and then written."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastlt.names import unknown
from loaders.sources.cut import Shares
from loaders.sources.duplicates import KINDS, Duplicates
from loaders.sources.source import Source
from loaders.sources.split import SPLITS, EncodedImages
from loaders.stored import FORMATS
from loaders.stored.atomic_folder import MANIFEST, check_target, publish, work_folder, write_durably
from loaders.stored.dali_format import check_dali_options, write_shards
from loaders.stored.dataset import ConvertedDataset, open_split, split_file
from loaders.stored.encode import stored_sizes
from loaders.stored.ffcv_format import FfcvOptions, write_beton
from loaders.stored.forked_workers import STUCK_S
from loaders.stored.identity import content_sha256
from loaders.stored.image_check import (
    BadImage,
    ImageCheck,
    check_splits,
    content_key,
    refuse_bad_images,
    refuse_empty_classes,
    refuse_same_contents,
    same_contents,
)
from loaders.stored.manifest import (
    CONTENTS,
    DUPLICATES,
    IMAGES,
    KEPT,
    LABELS,
    SCHEMA,
    SKIPPED,
    as_json,
    describe_files,
    describe_split,
    sealed,
    versions,
)
from loaders.stored.progress import progress_bar


def conversion_request(
    source: str,
    *,
    train_list: str | Path | None = None,
    meta_list: str | Path | None = None,
    test_list: str | Path | None = None,
    imbalance_factor: float | None = None,
    convention: str = "paper",
    meta_per_class: int = 10,
    split: Shares | None = None,
    split_seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    class_names: str | Path | None = None,
    options: FfcvOptions,
) -> dict[str, Any]:
    """What identifies a converted data set: the images asked for and how they are stored, not where they came from."""
    lists = {"train_list": train_list, "meta_list": meta_list, "test_list": test_list}
    columns = {"image_column": image_column, "label_column": label_column, "split_column": split_column}
    # Data sets of earlier versions have none of these: left out where they say nothing, they stay equal to themselves.
    names = Path(class_names).name if class_names else None
    newer = {"split": split, "split_seed": split_seed, **columns, "class_names": names}
    return {
        "source": source,
        **{key: Path(path).name if path else None for key, path in lists.items()},
        "imbalance_factor": imbalance_factor,
        "convention": convention,
        "meta_per_class": meta_per_class,
        **{key: value for key, value in newer.items() if value},
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
    allow_duplicates: bool = False,
    progress: bool = True,
    overwrite: bool = False,
    timeout_s: float = STUCK_S,
) -> ConvertedDataset:
    """Write `source` to the folder `out`, whole or not at all.

    request: the arguments that `source` was opened with; they go into the manifest (`ConvertedDataset.matches`).
    formats: which of FORMATS to write; each holds all images.
    on_error: "stop" raises a ValueError that lists the images that cannot be decoded, before anything is written;
        "skip" leaves them out, before the splits are chosen, and lists them in skipped.txt.
    allow_duplicates: whether files of equal contents may be in two splits; within a split they may. All of them are
        listed in duplicates.txt.
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
        listing_sha256 = source.listing_sha256()
        source, checks, bad = _check_images(source, options, on_error, progress, timeout_s)
        duplicates = same_contents(source.splits, checks)
        if not allow_duplicates:
            refuse_same_contents(source.splits, duplicates)
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
        np.savez(work / LABELS, **labels)  # pyright: ignore[reportArgumentType]  taken for allow_pickle
        write_images(work / IMAGES, source, {name: check.good for name, check in checks.items()})
        if any(bad.values()):
            write_skipped(work / SKIPPED, bad)
        contents = {kind: {name: _content_sha256(work, name, kind) for name in SPLITS} for kind in formats}
        kept = {kind: {name: _kept_files(work, name, kind, checks[name]) for name in SPLITS} for kind in formats}
        if any(duplicates.counts().values()):
            write_duplicates(work / DUPLICATES, source, duplicates)
        manifest = {
            "schema": SCHEMA,
            "source": source.name,
            "class_names": list(source.class_names),
            "splits": {
                name: describe_split(
                    source.splits[name].provenance, labels[name], sizes[name], len(bad[name]), source.num_classes
                )
                for name in SPLITS
            },
            "formats": {kind: options.parameters() for kind in formats},
            "request": as_json(request),
            "listing_sha256": listing_sha256,
            "skipped": sum(len(images) for images in bad.values()),
            CONTENTS: contents,
            KEPT: kept,
            "duplicates": duplicates.counts(),
            "files": describe_files(work, progress),
            "versions": versions(),
        }
        write_durably(work / MANIFEST, sealed(manifest))
        publish(work, out, overwrite)
    return ConvertedDataset.open(out)


def _content_sha256(work: Path, split: str, kind: str) -> str:
    stored = open_split(split_file(work, split, kind))
    return content_sha256(stored, stored.encoded)


def _kept_files(work: Path, split: str, kind: str, check: ImageCheck) -> int:
    """How many images are stored as the source has them, byte by byte."""
    if check.digests is None:
        return 0
    stored, of_source = open_split(split_file(work, split, kind)), check.digests[check.good].tolist()
    return sum(content_key(stored.encoded(i).data) == key for i, key in enumerate(of_source))


def _check_images(
    source: Source, options: FfcvOptions, on_error: str, progress: bool, timeout_s: float
) -> tuple[Source, dict[str, ImageCheck], dict[str, tuple[BadImage, ...]]]:
    """The data set to write, its checks, and the images that are left out.

    What cannot be decoded is left out before the splits are chosen: its place is taken by the next good image.
    """
    candidates = source.candidates if on_error == "skip" else None
    pools = candidates.pools if candidates else source.splits
    checks = check_splits(pools, num_workers=options.num_workers, progress=progress, timeout_s=timeout_s)
    if on_error == "stop":
        refuse_bad_images(pools, checks)
    refuse_empty_classes(pools, checks, source.class_names)
    bad = {name: check.bad for name, check in checks.items()}
    if candidates:
        choices = candidates.choose({name: check.good for name, check in checks.items()})
        source = replace(source, splits=candidates.splits(choices))
        checks = {name: checks[choice.pool].of(choice.rows) for name, choice in choices.items()}
    return source, checks, {name: bad.get(name, ()) for name in SPLITS}


def write_images(path: Path, source: Source, good: Mapping[str, np.ndarray]) -> None:
    """A table of the images in their order: split, class and file of each; none for images that have no file.

    Source `table` reads it: the same images in the same splits, whatever chose them.
    """
    splits = [(name, split) for name, split in source.splits.items() if isinstance(split, EncodedImages)]
    if not splits:
        return
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.writer(file, "excel-tab", lineterminator="\n")
        table.writerow(("split", "label", "path"))
        for name, split in splits:
            classes = [source.class_names[label] for label in split.labels.tolist()]
            table.writerows((name, classes[i], split.listed(i)) for i in good[name].tolist())


def write_skipped(path: Path, bad: Mapping[str, tuple[BadImage, ...]]) -> None:
    """One line for each image that is left out: its split, path and reason."""
    write_table(path, [(split, image.name, image.reason) for split in SPLITS for image in bad[split]])


def write_duplicates(path: Path, source: Source, found: Duplicates) -> None:
    """One line for each group of files of equal contents: its kind, then split and path of each."""
    names = {name: split.name for name, split in source.splits.items()}
    rows = []
    for kind, group in found:
        rows.append([KINDS[kind], *(word for split, i in group for word in (split, names[split](i)))])
    write_table(path, rows)


def write_table(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Text with tabs between the fields of a line.

    Paths keep their bytes, whatever encoding these are of, but for tabs and line ends, which are spelled out.
    """
    lines = ["\t".join(text.replace("\t", "\\t").replace("\n", "\\n") for text in row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def _check_formats(formats: tuple[str, ...], options: FfcvOptions) -> None:
    if not formats or len(set(formats)) != len(formats):
        raise ValueError(f"formats is {formats}: it must name {' or '.join(FORMATS)}, or both")
    for kind in formats:
        if kind not in FORMATS:
            raise ValueError(unknown("format", kind, FORMATS))
    if "dali" in formats:
        check_dali_options(options)


def _check_space(folder: Path, sizes: dict[str, np.ndarray], options: FfcvOptions) -> None:
    """Refuse a raw conversion that the disk has no room for; how small JPEGs become is not known beforehand."""
    needed = sum(3 * int(of_split.prod(axis=1).sum()) for of_split in sizes.values())
    free = shutil.disk_usage(folder).free
    if options.mode == "raw" and needed > free:
        raise ValueError(
            f"the images need {needed / 2**30:.1f} GiB as raw pixels and {folder.parent} has {free / 2**30:.1f} GiB "
            "free: set max_resolution, use mode 'jpg', or give a folder on another disk"
        )
