"""What is measured of a data set: its classes, sizes, bytes, copies, and how fast it is decoded."""

from __future__ import annotations

import io
import os
import stat
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from fastlt.state import ClassCounts
from loaders.cores import available_cores
from loaders.sources.decode import MAX_BYTES, header_size
from loaders.sources.duplicates import KINDS, find_duplicates
from loaders.sources.messages import printable, readable_bytes
from loaders.sources.source import Source
from loaders.sources.split import EncodedImages, FileSplit, Split
from loaders.stored.damage import DamageError
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.forked_workers import chunks_of
from loaders.stored.image_check import content_key
from loaders.stored.manifest import DUPLICATES
from loaders.stored.progress import progress_bar

SMALL_SIDE = 64  # pixels; images whose shorter side has no more are called small
SHOWN_GROUPS = 10  # groups of copies that are named, of each kind
DECODED = 128  # images of the sample that is decoded
DECODED_S = 3.0  # after so long it ends
Advance = Callable[[int], object]


@dataclass(frozen=True)
class SplitProfile:
    """labels: int64 (N,). sizes: int64 (N, 2), (height, width), (0, 0) where the header cannot be read.

    file_bytes: int64 (N,), of the file or the pixels of each image.
    """

    labels: np.ndarray
    sizes: np.ndarray
    file_bytes: np.ndarray
    provenance: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def known_sizes(self) -> np.ndarray:
        """(height, width) of the images whose header can be read, int64 (K, 2)."""
        return self.sizes[self.sizes.min(axis=1) > 0]


@dataclass(frozen=True)
class Copies:
    """Images that are there more than once, byte by byte.

    groups: how many groups of each of KINDS. images: how many images these have. named: (kind, names) of the first.
    """

    groups: Mapping[str, int]
    images: Mapping[str, int] = field(default_factory=dict)
    named: Sequence[tuple[str, tuple[str, ...]]] = ()


@dataclass(frozen=True)
class Decoding:
    """A sample of training images, decoded one after the other by one thread.

    images: how many. seconds: of all. decoder: what decoded them. mean, std: of their pixels in [0, 1], a channel each.
    """

    images: int
    seconds: float
    decoder: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def images_per_s(self) -> float:
        """Of one core."""
        return self.images / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Profile:
    """All that is measured of a data set.

    source: its name. place: where it is. converted: whether the images lie in a converted data set.
    splits: by name. unreadable: (name, reason) of each image. disk_bytes: of the files, each counted once.
    decoding: None where no image of the sample can be decoded. notes: what the source says to the user.
    """

    source: str
    place: str
    converted: bool
    class_names: tuple[str, ...]
    splits: Mapping[str, SplitProfile]
    unreadable: Sequence[tuple[str, str]]
    copies: Copies
    disk_bytes: int
    decoding: Decoding | None
    notes: tuple[str, ...] = ()

    def counts(self, split: str) -> np.ndarray:
        """Images of each class, int64 (C,)."""
        return np.bincount(self.splits[split].labels, minlength=len(self.class_names))

    @cached_property
    def class_counts(self) -> ClassCounts:
        """Of the training images, in groups by 100 and 20 images."""
        return ClassCounts(self.counts("train").astype(np.int64), self.class_names)

    def absent(self, split: str) -> list[str]:
        """The classes without an image in a split."""
        return [self.class_names[c] for c in np.flatnonzero(self.counts(split) == 0)]

    @cached_property
    def known_sizes(self) -> np.ndarray:
        """(height, width) of all images whose header can be read, int64 (K, 2)."""
        return np.concatenate([split.known_sizes for split in self.splits.values()])

    @property
    def small_share(self) -> float:
        """The share of images whose shorter side has at most SMALL_SIDE pixels."""
        return float((self.known_sizes.min(axis=1) <= SMALL_SIDE).mean()) if len(self.known_sizes) else 0.0


@dataclass(frozen=True)
class _Looked:
    """Of each image of all splits in a row: size (height, width), bytes, key of its contents (0: its own), reason."""

    sizes: np.ndarray
    file_bytes: np.ndarray
    keys: np.ndarray
    reasons: Mapping[int, str]
    disk_bytes: int


def profile_source(source: Source, place: str, *, workers: int | None = None, progress: bool = True) -> Profile:
    """Read the headers of all images, and the contents of those that may be copies; a sample is decoded."""
    splits = source.splits
    total = sum(len(split) for split in splits.values())
    with progress_bar("headers", total, progress) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken EXIF blocks
        if all(isinstance(split, FileSplit) for split in splits.values()):
            paths = [split.name(i) for split in splits.values() for i in range(len(split))]
            looked = _look_at_files(paths, workers or available_cores(), advance)
        else:
            looked = _look_at_contents(list(splits.values()), advance)
    ends = np.cumsum([len(split) for split in splits.values()])
    starts = dict(zip(splits, ends - [len(split) for split in splits.values()], strict=True))
    profiles = {
        name: SplitProfile(
            split.labels,
            looked.sizes[starts[name] : starts[name] + len(split)],
            looked.file_bytes[starts[name] : starts[name] + len(split)],
            split.provenance,
        )
        for name, split in splits.items()
    }

    def called(place: int) -> str:
        name = next(name for name in reversed(starts) if starts[name] <= place)
        return printable(splits[name].name(place - int(starts[name])))

    keys = {name: looked.keys[starts[name] : starts[name] + len(split)] for name, split in splits.items()}
    usable = np.setdiff1d(np.arange(len(splits["train"])), [i - starts["train"] for i in looked.reasons])
    decoder = "Pillow" if isinstance(splits["train"], EncodedImages) else "a copy in memory"
    return Profile(
        source.name,
        place,
        False,
        source.class_names,
        profiles,
        [(called(i), reason) for i, reason in sorted(looked.reasons.items())],
        _copies(keys, splits),
        looked.disk_bytes,
        _decode_sample(splits["train"].image, usable, decoder),
        source.notes,
    )


def profile_converted(dataset: ConvertedDataset) -> Profile:
    """What the manifest and the tables of a converted data set say; a sample is decoded."""
    kind = dataset.formats[0]
    profiles = {}
    for name, described in dataset.manifest["splits"].items():
        stored = dataset.stored(name, kind)
        sizes = np.stack([stored.heights, stored.widths], axis=1).astype(np.int64)
        profiles[name] = SplitProfile(
            dataset.labels(name), sizes, stored.sizes.astype(np.int64), described["provenance"]
        )
    stored = dataset.stored("train", kind)
    decoder = "FFCV's reader of raw pixels" if dataset.manifest["request"].get("mode") == "raw" else "FFCV's decoder"
    return Profile(
        dataset.manifest["source"],
        str(dataset.root),
        True,
        dataset.class_names,
        profiles,
        [],
        _recorded_copies(dataset),
        sum(file["bytes"] for file in dataset.manifest["files"].values()),
        _decode_sample(stored.image, np.arange(len(stored)), "DALI's files by FFCV" if kind == "dali" else decoder),
    )


def _recorded_copies(dataset: ConvertedDataset) -> Copies:
    """What the conversion found."""
    named: list[tuple[str, tuple[str, ...]]] = []
    images = dict.fromkeys(KINDS, 0)
    of_words = {words: kind for kind, words in KINDS.items()}
    file = dataset.root / DUPLICATES
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="backslashreplace").splitlines():
            words, *places = line.split("\t")
            kind = of_words[words]
            images[kind] += len(places) // 2
            if sum(known == kind for known, _ in named) < SHOWN_GROUPS:
                named.append((kind, tuple(places[1::2])))
    return Copies(dataset.manifest.get("duplicates", dict.fromkeys(KINDS, 0)), images, named)


def _copies(keys: Mapping[str, np.ndarray], splits: Mapping[str, Split]) -> Copies:
    found = find_duplicates(keys, {name: split.labels for name, split in splits.items()})
    images = dict.fromkeys(KINDS, 0)
    named: list[tuple[str, tuple[str, ...]]] = []
    for kind, group in found:
        images[kind] += len(group)
        if sum(known == kind for known, _ in named) < SHOWN_GROUPS:
            named.append((kind, tuple(printable(splits[split].name(i)) for split, i in group[:SHOWN_GROUPS])))
    return Copies(found.counts(), images, named)


def _look_at_files(paths: Sequence[str], workers: int, advance: Advance) -> _Looked:
    """Files with the same device and inode are read once, and hashed only where others have as many bytes."""
    with ThreadPoolExecutor(workers) as pool:
        stats = [one for part in pool.map(_stats, _parts(paths)) for one in part]
        first: dict[tuple[int, int], int] = {}  # the first place of each file
        reasons: dict[int, str] = {}
        same = np.arange(len(paths))
        for i, found in enumerate(stats):
            if isinstance(found, str):
                reasons[i] = found
            else:
                same[i] = first.setdefault((found.st_dev, found.st_ino), i)
        files = np.array(list(first.values()), dtype=np.int64)
        file_bytes = np.array([0 if isinstance(one, str) else one.st_size for one in stats], dtype=np.int64)
        sizes = np.zeros((len(paths), 2), dtype=np.int64)
        advance(len(paths) - len(files))

        def headers(chunk: range) -> list[tuple[int, int] | str]:
            found = [_header(paths[int(files[i])]) for i in chunk]
            advance(len(chunk))
            return found

        read = [one for part in pool.map(headers, chunks_of(len(files))) for one in part]
        for place, found in zip(files.tolist(), read, strict=True):
            if isinstance(found, str):
                reasons[place] = found
            else:
                sizes[place] = found
        _, which, often = np.unique(file_bytes[files], return_inverse=True, return_counts=True)
        alike = files[(often[which] > 1) & (file_bytes[files] > 0)]
        keys = np.zeros(len(paths), dtype=np.uint64)
        # A file of a size of its own equals no other: any number of its own tells its names from other files.
        keys[files] = [content_key(b"%d:%d" % file) for file in first]
        hashed = pool.map(lambda chunk: [_hash(paths[int(alike[i])]) for i in chunk], chunks_of(len(alike)))
        keys[alike] = [key for part in hashed for key in part]
    for i in np.flatnonzero(same != np.arange(len(paths))).tolist():
        if int(same[i]) in reasons:
            reasons[i] = reasons[int(same[i])]
    keys = keys[same]
    keys[list(reasons)] = 0
    return _Looked(sizes[same], file_bytes, keys, reasons, int(file_bytes[files].sum()))


def _parts(paths: Sequence[str]) -> list[Sequence[str]]:
    return [paths[chunk.start : chunk.stop] for chunk in chunks_of(len(paths))]


def _stats(paths: Sequence[str]) -> list[os.stat_result | str]:
    return [_stat(path) for path in paths]


def _stat(path: str) -> os.stat_result | str:
    """Of a file; else why there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return "not a file (a folder, a pipe or a device)"
    if not found.st_size:
        return "the file is empty (0 bytes)"
    if found.st_size > MAX_BYTES:
        return f"{readable_bytes(found.st_size)} are more than the {readable_bytes(MAX_BYTES)} allowed for an image"
    return found


def _header(path: str) -> tuple[int, int] | str:
    """(height, width), else why it cannot be read."""
    try:
        with open(path, "rb") as file:
            return header_size(file)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _hash(path: str) -> int:
    """The key of a file's contents; 0 where it cannot be read."""
    try:
        return content_key(Path(path).read_bytes())
    except OSError:
        return 0


def _look_at_contents(splits: Sequence[Split], advance: Advance) -> _Looked:
    """Images that are no files of their own: each is read whole."""
    count = sum(len(split) for split in splits)
    sizes, file_bytes = np.zeros((count, 2), dtype=np.int64), np.zeros(count, dtype=np.int64)
    keys, reasons = np.zeros(count, dtype=np.uint64), {}
    place = 0
    for split in splits:
        for i in range(len(split)):
            try:
                if isinstance(split, EncodedImages):
                    data = split.contents(i)
                    sizes[place] = header_size(io.BytesIO(data))
                else:
                    pixels = split.image(i)
                    data, sizes[place] = pixels.tobytes(), pixels.shape[:2]
                file_bytes[place], keys[place] = len(data), content_key(data)
            except ValueError as error:
                reasons[place] = str(error)
            place += 1
            advance(1)
    return _Looked(sizes, file_bytes, keys, reasons, int(file_bytes.sum()))


def _decode_sample(image: Callable[[int], np.ndarray], usable: np.ndarray, decoder: str) -> Decoding | None:
    """Decode images that lie evenly in the split; None where none can be decoded."""
    if not len(usable):
        return None
    chosen = usable[np.unique(np.linspace(0, len(usable) - 1, DECODED).astype(np.int64))].tolist()
    seconds, done, pixels = 0.0, 0, 0
    sums, squares = np.zeros(3), np.zeros(3)
    for number, i in enumerate([chosen[0], *chosen]):
        started = time.perf_counter()
        try:
            found = image(i)
        except (ValueError, DamageError):
            continue
        taken = time.perf_counter() - started
        if not number:  # the first starts libraries
            continue
        seconds, done, pixels = seconds + taken, done + 1, pixels + found.shape[0] * found.shape[1]
        flat = found.reshape(-1, 3)
        sums += flat.sum(axis=0, dtype=np.float64) / 255
        squares += np.einsum("ic,ic->c", flat, flat, dtype=np.float64) / 255**2
        if seconds > DECODED_S:
            break
    if not done:
        return None
    mean = sums / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 1e-6))
    red, green, blue = (round(float(x), 4) for x in mean)
    of_red, of_green, of_blue = (round(float(x), 4) for x in std)
    return Decoding(done, seconds, decoder, (red, green, blue), (of_red, of_green, of_blue))
