"""Images that are there more than once: as one file under several names, or as files of the same contents."""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loaders.sources.messages import printable, some
from loaders.sources.split import FileSplit

Place = tuple[str, int]  # an image: its split, and its index there
PAIRS = (("train", "test"), ("meta", "test"), ("train", "meta"))
KINDS = {"two_splits": "in two splits", "two_labels": "under two labels", "one_label": "under one label"}
TAKEN_ANYWAY = "`fastlt convert` takes them as they are with --allow-duplicates"


@dataclass(frozen=True)
class Duplicates:
    """Groups of equal images, the worst first: in two splits, in one split under two labels, under one label."""

    two_splits: tuple[tuple[Place, ...], ...]
    two_labels: tuple[tuple[Place, ...], ...]
    one_label: tuple[tuple[Place, ...], ...]

    def __iter__(self) -> Iterator[tuple[str, tuple[Place, ...]]]:
        """(kind, group) for each group."""
        for kind in KINDS:
            for group in getattr(self, kind):
                yield kind, group

    def counts(self) -> dict[str, int]:
        """The number of groups of each kind."""
        return {kind: len(getattr(self, kind)) for kind in KINDS}

    def in_both(self, a: str, b: str) -> list[tuple[int, int]]:
        """For each group with images in both splits, the first of each."""
        pairs = []
        for group in self.two_splits:
            first = {split: index for split, index in reversed(group)}
            if a in first and b in first:
                pairs.append((first[a], first[b]))
        return pairs


def find_duplicates(keys: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> Duplicates:
    """The images of all splits that have equal keys.

    keys: uint64 (N,) for each split, 0 for what is not compared.  labels: int64 (N,) for each split.
    """
    return _classified(_groups(keys), labels)


def _groups(keys: Mapping[str, np.ndarray]) -> list[tuple[Place, ...]]:
    if not keys:
        return []
    places = [(split, len(of_split)) for split, of_split in keys.items()]
    splits = np.repeat(np.arange(len(places)), [count for _, count in places])
    indices = np.concatenate([np.arange(count) for _, count in places])
    of_all = np.concatenate(list(keys.values()))
    order = np.argsort(of_all, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], of_all[order][1:] != of_all[order][:-1]]))
    ends = np.append(starts[1:], len(order))
    repeated = (ends - starts > 1) & (of_all[order[starts]] != 0)
    groups = []
    for start, end in zip(starts[repeated], ends[repeated], strict=True):
        groups.append(tuple((places[splits[i]][0], int(indices[i])) for i in order[start:end]))
    return sorted(groups)


def _classified(groups: Sequence[tuple[Place, ...]], labels: Mapping[str, np.ndarray]) -> Duplicates:
    kinds = defaultdict(list)
    for group in groups:
        if len({split for split, _ in group}) > 1:
            kinds["two_splits"].append(group)
        elif len({int(labels[split][i]) for split, i in group}) > 1:
            kinds["two_labels"].append(group)
        else:
            kinds["one_label"].append(group)
    return Duplicates(**{kind: tuple(kinds[kind]) for kind in KINDS})


def same_files(pools: Mapping[str, FileSplit], keys: Mapping[str, np.ndarray]) -> Duplicates:
    """The images that are one file: spelled in several ways, links, and hard links.

    keys: `file_keys` of each split.
    """
    groups = []
    for group in _groups(keys):
        # A key is a number of the folder's listing, which some file systems do not keep apart: the files are asked.
        by_file = defaultdict(list)
        for split, i in group:
            try:
                found = os.stat(pools[split].name(i))
            except OSError:
                continue  # a link that leads nowhere
            by_file[found.st_dev, found.st_ino].append((split, i))
        groups += [tuple(places) for places in by_file.values() if len(places) > 1]
    return _classified(sorted(groups), {split: pool.labels for split, pool in pools.items()})


def file_keys(root: Path, paths: Sequence[str]) -> np.ndarray:
    """A number for each file below `root`, uint64 (N,): the same for two names of one file, 0 where there is none.

    Each folder is listed once, and no file is looked at but links: a look-up for each image is slow over NFS.
    ValueError for a folder that cannot be read.
    """
    keys = np.zeros(len(paths), dtype=np.uint64)
    in_folder: dict[str, list[int]] = defaultdict(list)
    for i, path in enumerate(paths):
        in_folder[os.path.dirname(path)].append(i)
    for folder, indices in in_folder.items():
        numbers = _numbers_in(root / folder)
        for i in indices:
            keys[i] = numbers.get(os.path.basename(paths[i]), 0)
    return keys


def _numbers_in(folder: Path) -> dict[str, int]:
    """A number for each file of a folder, by its name; empty when there is no such folder."""
    try:
        device = os.stat(folder).st_dev
        return {entry.name: _number(entry, device) for entry in os.scandir(folder) if not entry.is_dir()}
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return {}
        raise ValueError(f"{printable(folder)} cannot be read ({error.strerror}): its images are not known") from None


def _number(entry: os.DirEntry, device: int) -> int:
    inode = entry.inode()
    if entry.is_symlink():
        try:
            target = entry.stat()
        except OSError:
            pass  # it leads nowhere: a file that cannot be read
        else:
            device, inode = target.st_dev, target.st_ino
    return (device * 0x9E3779B97F4A7C15 + inode) % (1 << 64) or 1


def refuse_shared(
    found: Duplicates, where: Mapping[str, str], describe: Callable[[str, int], str], what: str = "images"
) -> None:
    """ValueError when images are in two splits.

    where: what each split is called.  describe: what image i of a split is called.
    """
    for a, b in PAIRS:
        pairs = found.in_both(a, b)
        if pairs:
            listed = some([f"{describe(a, i)} and {describe(b, j)}" for i, j in pairs[:10]])
            raise ValueError(
                f"{len(pairs):,} {what} are in both {where[a]} and {where[b]}, so accuracies would be too high: "
                f"{listed}. Take them out of one of the two; {TAKEN_ANYWAY}"
            )


def refuse_repeated(groups: Sequence[tuple[Place, ...]], how: str, describe: Callable[[str, int], str]) -> None:
    """ValueError when there are any groups of images of one split; `how`: what is wrong with them."""
    if groups:
        listed = some([" and ".join(describe(*place) for place in group[:3]) for group in groups[:10]])
        raise ValueError(f"{len(groups):,} images {how}: {listed}. Keep one of each; {TAKEN_ANYWAY}")
