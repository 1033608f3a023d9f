"""WebDataset: tar files whose members `KEY.jpg` and `KEY.cls`, or `KEY.json`, are an image and its label."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loaders.sources.classes import number_classes
from loaders.sources.columns import LABEL_COLUMNS, as_classes, called, choose_column
from loaders.sources.cut import Cut
from loaders.sources.decode import EXTENSIONS
from loaders.sources.messages import printable, shortened, some
from loaders.sources.source import Source
from loaders.sources.split import SPLIT_WORDS, EncodedImages, file_stamp

CLASS_NAMES = ("classnames.txt", "classes.txt")
LAYOUT = "tar files of KEY.jpg and KEY.cls, or KEY.json with a label"


@dataclass(frozen=True)
class TarSplit(EncodedImages):
    """Images in tar files.

    tars: relative to `root`. tar, offset, size: int64 (N,), where each image's file lies. keys: of the samples.
    """

    root: Path
    tars: tuple[str, ...]
    tar: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    keys: tuple[str, ...]
    labels: np.ndarray
    provenance: str

    def contents(self, i: int) -> bytes:
        path = self.root / self.tars[self.tar[i]]
        try:
            with path.open("rb") as file:
                data = os.pread(file.fileno(), int(self.size[i]), int(self.offset[i]))
        except OSError as error:
            raise ValueError(f"{printable(path)} cannot be read: {error.strerror}") from None
        if len(data) < self.size[i]:
            raise ValueError(f"{printable(path)} is cut short")
        if not data:
            raise ValueError("the file is empty (0 bytes)")
        return data

    def name(self, i: int) -> str:
        return str(self.root / self.listed(i))

    def listed(self, i: int) -> str:
        return f"{self.tars[self.tar[i]]}/{self.keys[i]}"

    def stamp(self, i: int) -> tuple[int, int]:
        return file_stamp(os.path.join(self.root, self.tars[self.tar[i]]))

    def subset(self, indices: np.ndarray, provenance: str | None = None) -> TarSplit:
        return replace(
            self,
            tar=self.tar[indices],
            offset=self.offset[indices],
            size=self.size[indices],
            keys=tuple(self.keys[i] for i in indices),
            labels=self.labels[indices],
            provenance=self.provenance if provenance is None else provenance,
        )


def open_webdataset(root: Path, *, label_column: str | None, cut: Cut | None) -> Source:
    """Read the tar files below `root`; their split is a word of their name or folder, `train-000.tar` or `val/000.tar`.

    Tar files without such a word are all train. Labels are those of `.cls`, else of the key `label_column` of `.json`,
    found by its usual names unless it is given: whole numbers or names. A file CLASS_NAMES in `root` has the names of
    numbered classes, a line each. Samples without an image are passed over, and counted in the notes.
    Raises ValueError for tar files that cannot be read, samples without a label, with two images or with the key of
    another one, and as `Cut`.
    """
    tars = _tars(root)
    if cut is not None and "train" not in tars:
        raise ValueError(f"{printable(root)} holds no tar files of split train, only of {' and '.join(tars)}")
    shards = {split: [_Shard.read(root, name, label_column) for name in names] for split, names in tars.items()}
    values = {split: [label for shard in of_split for label in shard.labels] for split, of_split in shards.items()}
    empty = next((split for split in tars if not values[split] and (split == "train" or cut is None)), None)
    if empty is not None:
        raise ValueError(f"{printable(root / tars[empty][0])} and its like hold no image: expected {LAYOUT}")
    where = {split: f"{printable(root)} ({split}: {len(names)} tar files)" for split, names in tars.items()}
    classes = as_classes(values)
    numbered = classes["train"] if cut is not None else [one for of_split in classes.values() for one in of_split]
    labels, names = number_classes(classes, where, _class_name(root, numbered), cut=cut)
    pools = {split: _pool(root, tars[split], shards[split], labels[split], where[split]) for split in tars}
    return Source.of_pools("webdataset", pools, names, cut, _notes(root, shards))


def _tars(root: Path) -> dict[str, list[str]]:
    """The tar files of each split, relative to `root`, sorted."""
    where = printable(root)
    found = sorted(path.relative_to(root) for path in root.rglob("*.tar") if path.is_file())
    if not found:
        packed = sorted(path.name for pattern in ("*.tar.*", "*.tgz") for path in root.rglob(pattern))
        hint = f"; it has {some([*map(printable, packed)], ', ')}: unpack these to .tar first" if packed else ""
        raise ValueError(f"{where} holds no .tar files: expected {LAYOUT}{hint}")
    splits: dict[str, list[str]] = defaultdict(list)
    for path in found:
        words = [word for part in path.with_suffix("").parts for word in re.split("[^a-z]+", part.lower())]
        splits[next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), "")].append(str(path))
    if set(splits) == {""}:
        return {"train": splits[""]}
    if "" in splits:
        raise ValueError(
            f"{where}: {len(splits[''])} tar files have no split in their name ({some(splits[''], ', ')}), and others "
            f"have: name all by {', '.join(SPLIT_WORDS)}, or none"
        )
    return dict(splits)


@dataclass(frozen=True)
class _Shard:
    """The samples of a tar file: where each image lies, its key and label; and how many have none."""

    images: list[tarfile.TarInfo]
    keys: list[str]
    labels: list[Any]
    without_image: int

    @classmethod
    def read(cls, root: Path, name: str, label_column: str | None) -> _Shard:
        where = printable(root / name)
        images, keys, labels, without_image = [], [], [], 0
        try:
            with tarfile.open(root / name, "r:") as tar:
                for key, files in _samples(tar, where).items():
                    sample = f"{where}: sample {printable(shortened(key))}"
                    kinds = [kind for kind in files if kind in EXTENSIONS]
                    if len(kinds) > 1:
                        raise ValueError(f"{sample} has {len(kinds)} images ({some(kinds, ', ')}): keep one")
                    if not kinds:
                        without_image += 1
                        continue
                    images.append(files[kinds[0]])
                    keys.append(key)
                    labels.append(_label(tar, files, label_column, sample))
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{where} cannot be read as a plain tar file ({error}): get it anew") from None
        return cls(images, keys, labels, without_image)


def _samples(tar: tarfile.TarFile, where: str) -> dict[str, dict[str, tarfile.TarInfo]]:
    """The files of each sample by what follows the first dot of their names, by the sample's key.

    ValueError for two files of one name: they are of two samples of one key.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        folder, slash, file = member.name.rpartition("/")
        key, _, kind = file.partition(".")
        if member.isfile() and key:
            files, ending = samples.setdefault(folder + slash + key, {}), f".{kind.lower()}"
            if ending in files:
                sample = printable(shortened(folder + slash + key))
                raise ValueError(f"{where}: sample {sample} has two files {ending}: give each sample a key of its own")
            files[ending] = member
    return samples


def _label(tar: tarfile.TarFile, files: dict[str, tarfile.TarInfo], column: str | None, where: str) -> Any:
    """The label of a sample: a whole number or a name."""
    if ".cls" in files and column is None:
        text = _member(tar, files[".cls"]).decode("utf-8", "surrogateescape").strip()
        if not text:
            raise ValueError(f"{where} has an empty .cls: it must hold the label")
        return text
    if ".json" not in files:
        raise ValueError(f"{where} has no label: expected {LAYOUT}")
    try:
        content = json.loads(_member(tar, files[".json"]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: its .json cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: its .json is no mapping with a label")
    value = content[choose_column(list(content), column, called(list(content), LABEL_COLUMNS), "label", where)]
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise ValueError(f"{where}: its label is {shortened(repr(value))}, and must be a number or a name")
    return value


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, member
    return file.read()


def _pool(root: Path, tars: list[str], shards: list[_Shard], labels: np.ndarray, where: str) -> TarSplit:
    return TarSplit(
        root,
        tuple(tars),
        np.repeat(np.arange(len(shards)), [len(shard.keys) for shard in shards]),
        np.array([image.offset_data for shard in shards for image in shard.images], dtype=np.int64),
        np.array([image.size for shard in shards for image in shard.images], dtype=np.int64),
        tuple(key for shard in shards for key in shard.keys),
        labels,
        where,
    )


def _class_name(root: Path, classes: list[Any]) -> Any:
    """The name of a class: itself, or its line in a file of CLASS_NAMES."""
    path = next((root / name for name in CLASS_NAMES if (root / name).is_file()), None)
    if path is None or not all(isinstance(one, int) for one in classes):
        return str
    names = [line.strip() for line in os.fsdecode(path.read_bytes()).splitlines() if line.strip()]
    if not 0 <= min(classes) <= max(classes) < len(names):
        raise ValueError(
            f"{printable(path)} names {len(names):,} classes, but labels are {min(classes)} to {max(classes)}: give a "
            "line for each number from 0 on, or take the file away"
        )
    return lambda one: names[one] if 0 <= one < len(names) else str(one)


def _notes(root: Path, shards: dict[str, list[_Shard]]) -> tuple[str, ...]:
    without = sum(shard.without_image for of_split in shards.values() for shard in of_split)
    return (f"{printable(root)}: {without:,} samples without an image are not read",) if without else ()
