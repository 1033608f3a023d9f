"""Converting a source into a data set that is read at full speed: images are checked and stored, and then described."""

from __future__ import annotations

import csv
import io
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastlt.names import unknown
from loaders.sources.cut import Candidates, Shares, draw_order
from loaders.sources.decode import header_size
from loaders.sources.duplicates import KINDS, Duplicates
from loaders.sources.messages import readable_bytes
from loaders.sources.source import Source
from loaders.sources.split import SPLITS, ArraySplit, EncodedImages, Split, called
from loaders.stored import FORMATS
from loaders.stored.atomic_folder import (
    CONVERTED,
    MANIFEST,
    check_target,
    publish,
    refuse_source_inside,
    work_folder,
    write_durably,
)
from loaders.stored.dali_format import check_dali_options
from loaders.stored.dataset import ConvertedDataset, open_split, split_file
from loaders.stored.encode import stored_sizes
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.forked_workers import Advance
from loaders.stored.identity import content_sha256
from loaders.stored.image_check import (
    BadImage,
    ImageCheck,
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
from loaders.stored.piece_writer import arrange_shards, finish_split, store_images
from loaders.stored.pieces import Group, PieceStore, Table
from loaders.stored.progress import TotalProgress, total_progress

SIZED_IMAGES = 200  # of a split, by which the room for raw pixels is estimated
# The parts of a conversion in the time of all of it, for photographs that are stored as JPEG files.
STORING_SHARE, CONTENTS_SHARE, CHECKSUMS_SHARE = 0.97, 0.02, 0.01


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
    restart: bool = False,
    say: Callable[[str], object] = lambda text: None,
    shard_images: int | None = None,
    shuffle_seed: int | None = None,
) -> ConvertedDataset:
    """Write `source` to the folder `out`, whole or not at all; what is finished stays when it is interrupted.

    request: the arguments that `source` was opened with; they go into the manifest (`ConvertedDataset.matches`).
    formats: which of FORMATS to write; each holds all images.
    on_error: "stop" raises a ValueError that lists the images that cannot be decoded; "skip" leaves them out, before
        the splits are chosen, and lists them in skipped.txt.
    allow_duplicates: whether files of equal contents may be in two splits; within a split they may. All of them are
        listed in duplicates.txt.
    overwrite: whether a converted data set that stands at `out` is replaced (after the new one is whole).
    restart: whether what an interrupted conversion to `out` has finished is thrown away; else it is compared with its
        checksums and with the source's files, and taken over.
    say: told in a sentence what is taken over.
    shard_images: images a shard, see `shard_size`.
    shuffle_seed: of the random order in which training images are stored, for shards that are read one by one; None
        keeps the source's order.
    Raises ConversionRunningError when another conversion is writing to `out`; ValueError when it is in the way, a
    conversion that stores images otherwise was interrupted there, or a process fails.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error is {on_error!r}: it must be 'stop' or 'skip'")
    _check_formats(formats, options)
    out = Path(out)
    check_target(out, overwrite=overwrite)
    for root in _roots(source):
        refuse_source_inside(out, Path(root))
    with work_folder(out) as work:
        check_target(out, overwrite=overwrite)  # again: while the lock was waited for, its owner may have finished
        store = PieceStore(work, options, formats, _description(source, options, formats), shard_images)
        listing_sha256 = source.listing_sha256()
        store.begin(restart=restart)
        order = None
        if shuffle_seed is not None:
            source, order = _shuffled(source, shuffle_seed)
        if "ffcv" in formats:
            _check_space(work, source, options)
        groups = _groups(source, on_error)
        count = sum(len(group.split) for group in groups.values())
        with total_progress(count, progress) as bar:
            tables = _store(store, groups, bar, say)
            source, checks, bad = _choose(source, groups, tables, on_error, order)
            if shuffle_seed is not None and source.candidates is not None and on_error == "skip":  # chosen anew
                source, rows = _shuffled(source, shuffle_seed)
                checks["train"] = checks["train"].of(rows)
            duplicates = same_contents(source.splits, checks)
            if not allow_duplicates:
                refuse_same_contents(source.splits, duplicates)
            if any(bad.values()):
                groups = {name: Group(split) for name, split in source.splits.items()}
                tables = store_images(store, groups)
                # Of files that have changed meanwhile, too.
                checks = {name: table.check(groups[name].split) for name, table in tables.items()}
                refuse_bad_images(source.splits, checks)
            else:
                groups = {name: groups[name] for name in source.splits}
            if "dali" in formats:
                arrange_shards(store, groups, tables)
            for name, group in groups.items():
                finish_split(store, name, group, tables[name])
            manifest = {
                **_describe(store, source, tables, checks, bad, duplicates, bar),
                "request": as_json(request),
                "listing_sha256": listing_sha256,
            }
        write_durably(store.converted / MANIFEST, sealed(manifest))
        publish(work, out, overwrite)
    return ConvertedDataset.open(out)


def _describe(
    store: PieceStore,
    source: Source,
    tables: Mapping[str, Table],
    checks: Mapping[str, ImageCheck],
    bad: Mapping[str, tuple[BadImage, ...]],
    duplicates: Duplicates,
    bar: TotalProgress,
) -> dict[str, Any]:
    """Write the files beside the images; the manifest, but for what was asked for."""
    folder, options, formats = store.converted, store.options, store.formats
    labels = {name: split.labels for name, split in source.splits.items()}
    sizes = {name: stored_sizes(check.sizes, options.max_resolution) for name, check in checks.items()}
    np.savez(folder / LABELS, **labels)  # pyright: ignore[reportArgumentType]  taken for allow_pickle
    write_images(folder / IMAGES, source)
    if any(bad.values()):
        write_skipped(folder / SKIPPED, bad)
    if any(duplicates.counts().values()):
        write_duplicates(folder / DUPLICATES, source, duplicates)
    advance = bar.phase("contents", CONTENTS_SHARE, len(formats) * sum(map(len, labels.values())))
    contents = {kind: {name: _content_sha256(folder, name, kind, advance) for name in SPLITS} for kind in formats}
    splits = {
        name: describe_split(
            source.splits[name].provenance, labels[name], sizes[name], len(bad[name]), source.num_classes
        )
        for name in SPLITS
    }
    return {
        "schema": SCHEMA,
        "source": source.name,
        "class_names": list(source.class_names),
        "splits": splits,
        "formats": {kind: options.parameters() for kind in formats},
        "skipped": sum(len(images) for images in bad.values()),
        CONTENTS: contents,
        KEPT: {kind: {name: _kept_files(tables[name], kind, options) for name in SPLITS} for kind in formats},
        "duplicates": duplicates.counts(),
        "files": _describe_files(folder, bar),
        "versions": versions(),
    }


def _shuffled(source: Source, seed: int) -> tuple[Source, np.ndarray]:
    """The source with its training images in a random order, and the row of each before, int64 (N,).

    Their names decide it: where some are left out, the order of the others is the same. Another word than the name
    alone, by which images are drawn for the splits: those of train would not be spread evenly.
    """
    train = source.splits["train"]
    rows = draw_order([f"shuffle\0{called(train, i)}" for i in range(len(train))], seed)
    return replace(source, splits={**source.splits, "train": train.subset(rows)}), rows


def _store(
    store: PieceStore,
    groups: Mapping[str, Group],
    bar: TotalProgress,
    say: Callable[[str], object],
) -> dict[str, Table]:
    """Check and store the images that an earlier conversion has not; says what is taken over from it."""
    count = sum(len(group.split) for group in groups.values())
    advance = bar.phase("images", STORING_SHARE, count)

    def tell(taken: int, lost: int) -> None:
        if taken or lost:
            changed = f"; {lost:,} others are not what they were, or not asked for" if lost else ""
            say(f"{taken:,} of {count:,} images are taken over from an interrupted conversion{changed}")
        bar.done_before(STORING_SHARE, taken)

    return store_images(store, groups, advance=advance, taken=tell)


def _roots(source: Source) -> list[str]:
    """The folders of a source's images."""
    splits = source.splits.values()
    return sorted({os.path.abspath(split.root) for split in splits if isinstance(split, EncodedImages)})


def _description(source: Source, options: FfcvOptions, formats: tuple[str, ...]) -> dict[str, Any]:
    """What must be the same for images to be taken over: where they lie, and how they are stored.

    Which of them are in which split may change: each image is found by its name.
    """
    stored = {"formats": sorted(formats), **options.parameters(), "versions": versions()}
    return as_json({"source": source.name, "root": ", ".join(_roots(source)), **stored})


def _groups(source: Source, on_error: str) -> dict[str, Group]:
    """The images of the splits; where bad ones are to be left out, those that may take their places, too."""
    groups = {name: Group(split) for name, split in source.splits.items()}
    if on_error == "skip" and source.candidates is not None:
        for pool, rows in _not_chosen(source.candidates).items():
            groups[f"rest of {pool}"] = Group(source.candidates.pools[pool].subset(rows), stored=False)
    return groups


def _not_chosen(candidates: Candidates) -> dict[str, np.ndarray]:
    """The rows of each pool that no split takes, as long as all images are good, int64 (K,)."""
    taken = {pool: np.zeros(len(images), dtype=bool) for pool, images in candidates.pools.items()}
    for choice in candidates.choose().values():
        taken[choice.pool][choice.rows] = True
    rows = {pool: np.flatnonzero(~of_pool) for pool, of_pool in taken.items()}
    return {pool: of_pool for pool, of_pool in rows.items() if len(of_pool)}


def _choose(
    source: Source,
    groups: Mapping[str, Group],
    tables: Mapping[str, Table],
    on_error: str,
    order: np.ndarray | None,
) -> tuple[Source, dict[str, ImageCheck], dict[str, tuple[BadImage, ...]]]:
    """The source of good images, their checks, and the images that are left out.

    order: of the training images that were stored among those chosen at first, None where they have that order.
    The place of an image that cannot be decoded is taken by the next good one. ValueError for images that cannot be
    converted, and a class that loses all of them.
    """
    checks = {name: table.check(groups[name].split) for name, table in tables.items()}
    candidates = source.candidates if on_error == "skip" else None
    pools: Mapping[str, Split] = source.splits
    if candidates is not None:
        pools, checks = candidates.pools, _checks_of_pools(candidates, checks, order)
    if on_error == "stop":
        refuse_bad_images(pools, checks)
    refuse_empty_classes(pools, checks, source.class_names)
    bad = {name: check.bad for name, check in checks.items()}
    good = {name: check.good for name, check in checks.items()}
    if candidates is not None:
        choices = candidates.choose(good)
        splits: Mapping[str, Split] = candidates.splits(choices)
        checks = {name: checks[choice.pool].of(choice.rows) for name, choice in choices.items()}
    else:
        splits = {name: split.subset(good[name]) if bad[name] else split for name, split in source.splits.items()}
        checks = {name: check.of(good[name]) for name, check in checks.items()}
    return replace(source, splits=splits), checks, {name: bad.get(name, ()) for name in SPLITS}


def _checks_of_pools(
    candidates: Candidates, checks: Mapping[str, ImageCheck], order: np.ndarray | None
) -> dict[str, ImageCheck]:
    """The checks of the pools, put together from those of the splits and of the rest; order: as of `_choose`."""
    rows = {name: (choice.pool, choice.rows) for name, choice in candidates.choose().items()}
    if order is not None:
        pool, of_train = rows["train"]
        rows["train"] = pool, of_train[order]
    rows |= {f"rest of {pool}": (pool, of_pool) for pool, of_pool in _not_chosen(candidates).items()}
    found = {}
    for pool, images in candidates.pools.items():
        sizes, digests = np.zeros((len(images), 2), dtype=np.int64), np.zeros(len(images), dtype=np.uint64)
        bad = []
        for name, (of, where) in rows.items():
            if of == pool:
                check = checks[name]
                assert check.digests is not None, name
                sizes[where], digests[where] = check.sizes, check.digests
                bad += [replace(image, index=int(where[image.index])) for image in check.bad]
        found[pool] = ImageCheck(sizes, tuple(sorted(bad, key=lambda image: image.index)), digests)
    return found


def _content_sha256(folder: Path, split: str, kind: str, advance: Advance) -> str:
    stored = open_split(split_file(folder, split, kind))
    return content_sha256(stored, stored.encoded, advance)


def _describe_files(folder: Path, bar: TotalProgress) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in paths)
    return describe_files(paths, folder, bar.phase("checksums", CHECKSUMS_SHARE, total))


def _kept_files(table: Table, kind: str, options: FfcvOptions) -> int:
    """How many images are stored as the source has them, byte by byte."""
    return int(table.rows["kept"].sum()) if kind == "dali" or options.mode == "jpg" else 0


def write_images(path: Path, source: Source) -> None:
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
            table.writerows((name, classes[i], split.listed(i)) for i in range(len(split)))


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


def _check_space(folder: Path, source: Source, options: FfcvOptions) -> None:
    """Refuse a raw conversion that the disk has no room for, by the headers of some images.

    How small JPEGs become is not known beforehand. What is stored already counts as room.
    """
    if options.mode != "raw":
        return
    needed = sum(map(lambda split: _raw_bytes(split, options), source.splits.values()))
    stored = sum(path.stat().st_blocks * 512 for path in (folder / CONVERTED).glob("*.beton"))
    free = shutil.disk_usage(folder).free
    if needed > free + stored:
        raise ValueError(
            f"the images need about {readable_bytes(needed)} as raw pixels and {folder.parent} has "
            f"{readable_bytes(free)} free: set max_resolution, use mode 'jpg', or give a folder on another disk"
        )


def _raw_bytes(split: Split, options: FfcvOptions) -> float:
    """The bytes of a split's pixels as they are stored, by some of the images."""
    if isinstance(split, ArraySplit):
        sizes = np.array([split.image_size])
    else:
        some = np.linspace(0, len(split) - 1, min(len(split), SIZED_IMAGES)).astype(int).tolist()
        sizes = np.array([size for i in some if (size := _header_size(split, i)) is not None]).reshape(-1, 2)
    if not len(sizes):
        return 0.0
    return len(split) * 3 * float(stored_sizes(sizes, options.max_resolution).prod(axis=1).mean())


def _header_size(split: Split, i: int) -> tuple[int, int] | None:
    """(height, width) by the image's header; None where it cannot be read, which is told later."""
    try:
        data = split.contents(i) if isinstance(split, EncodedImages) else None
        if data is None:
            height, width = split.image(i).shape[:2]
            return height, width
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as when it is decoded
            return header_size(io.BytesIO(data))
    except ValueError:
        return None
