"""What a data set is, wherever it lies: its classes, how many images each has, and the content of the images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loaders.cores import available_cores
from loaders.sources.split import SPLITS
from loaders.stored.forked_workers import Advance

if TYPE_CHECKING:
    from loaders.protocol import StoredSplit  # imports torch, which a conversion's usage errors must not wait for

CHUNK = 64  # images that are hashed one after the other; another number would be another digest
JOINED_BYTES = 1 << 22
SHOWN = 5  # differences that a message names
Content = Any  # bytes, or uint8 (n,)


@dataclass(frozen=True)
class DatasetIdentity:
    """Equal for data sets on which a run gives the same result.

    class_names: C names in label order.
    class_counts: by split, the images of each class.
    contents: by format and split, the `content_sha256` of the images in their order.
    """

    class_names: tuple[str, ...]
    class_counts: Mapping[str, Sequence[int]]
    contents: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(
        cls, class_names: Sequence[str], labels: Mapping[str, np.ndarray], contents: Mapping[str, Mapping[str, str]]
    ) -> DatasetIdentity:
        """labels: by split, int64 (N,)."""
        counts = {name: np.bincount(of_split, minlength=len(class_names)) for name, of_split in labels.items()}
        return cls(tuple(class_names), {name: of_split.tolist() for name, of_split in counts.items()}, contents)

    def to_tree(self) -> dict[str, Any]:
        """Plain containers, for JSON and checkpoints."""
        return {
            "class_names": list(self.class_names),
            "class_counts": {split: list(counts) for split, counts in self.class_counts.items()},
            "contents": {kind: dict(of_kind) for kind, of_kind in self.contents.items()},
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> DatasetIdentity:
        """The identity that `to_tree` gave; KeyError or TypeError for something else."""
        return cls(tuple(tree["class_names"]), dict(tree["class_counts"]), dict(tree["contents"]))

    def differences(self, before: DatasetIdentity) -> list[str]:
        """In what this data set is not the one of `before`, a few words each; empty when it is the same.

        A format that only one of the two holds is passed over, as long as they have another in common.
        """
        found = list(self._differences(before))
        return found if len(found) <= SHOWN else [*found[:SHOWN], f"and {len(found) - SHOWN} more differences"]

    def _differences(self, before: DatasetIdentity) -> Iterator[str]:
        names, old = self.class_names, before.class_names
        if len(names) != len(old):
            yield f"there are {len(names)} classes, there were {len(old)}"
            yield from (f"class {name!r} is new" for name in names if name not in old)
            yield from (f"class {name!r} is gone" for name in old if name not in names)
            return
        if names != old:
            for label, (name, was) in enumerate(zip(names, old, strict=True)):
                if name != was:
                    yield f"class {label} is {name!r}, it was {was!r}"
            return
        if self.class_counts != before.class_counts:
            for split in SPLITS:
                for name, count, was in zip(names, self.class_counts[split], before.class_counts[split], strict=True):
                    if count != was:
                        yield f"{split} has {count} images of class {name!r}, it had {was}"
            return
        common = [kind for kind in self.contents if kind in before.contents]
        if not common:
            stored, was = (" and ".join(identity.contents) for identity in (self, before))
            yield f"its images are stored as {stored}, they were as {was}"
        for split in SPLITS:
            if any(self.contents[kind][split] != before.contents[kind][split] for kind in common):
                yield f"{split} has as many images of each class, but they are other images or in another order"


def content_sha256(stored: StoredSplit, content: Callable[[int], Content], advance: Advance = lambda n: None) -> str:
    """The checksum of a split's labels, sizes and images in their order, whatever else lies in its files.

    FFCV's writer, for one, lays images out in the order in which its processes are done.

    content: the bytes of image i.
    advance: called with the number of images done since the last call.
    """
    digest = hashlib.sha256()
    for numbers in (stored.labels, stored.heights, stored.widths):
        digest.update(numbers.astype("<i8").tobytes())

    def of_chunk(start: int) -> bytes:
        images = [memoryview(content(i)) for i in range(start, min(start + CHUNK, len(stored)))]
        chunk = hashlib.sha256(np.array([len(image) for image in images], dtype="<i8").tobytes())
        # Small images together: between two updates threads wait for the interpreter's lock.
        for part in [b"".join(images)] if sum(map(len, images)) <= JOINED_BYTES else images:
            chunk.update(part)
        return chunk.digest()

    pool = ThreadPoolExecutor(available_cores())  # hashing leaves the interpreter's lock alone
    try:
        starts = range(0, len(stored), CHUNK)
        for start, part in zip(starts, pool.map(of_chunk, starts), strict=True):
            digest.update(part)
            advance(min(CHUNK, len(stored) - start))
    finally:
        pool.shutdown(cancel_futures=True)  # what is interrupted does not read on
    return digest.hexdigest()
