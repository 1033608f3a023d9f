"""A data set before conversion."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loaders.sources.cut import Candidates, Cut
from loaders.sources.messages import some
from loaders.sources.split import EncodedImages, Split


@dataclass(frozen=True)
class Source:
    """A data set before conversion: class names in label order, and the images of each of SPLITS.

    Opened without a cut it has the splits that the data bring.

    candidates: what the splits were chosen from, where images may turn out to be damaged.
    notes: what the user should know, such as folders that were not read, one line each.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    candidates: Candidates | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of_pools(
        cls,
        name: str,
        pools: Mapping[str, EncodedImages],
        class_names: tuple[str, ...],
        cut: Cut | None,
        notes: tuple[str, ...] = (),
    ) -> Source:
        """The data set whose splits are chosen among all images of `pools`, see `Candidates`; by None these are all."""
        if cut is None:
            return cls(name, class_names, pools, None, notes)
        candidates = Candidates.of(pools, class_names, cut)
        splits = candidates.splits(candidates.choose())
        return cls(name, class_names, splits, candidates, (*notes, *candidates.notes))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def listing_sha256(self) -> str | None:
        """A checksum of which files are in which split and class, wherever their root lies; None for arrays.

        By it another folder, or a list that was edited, is told from the one that was converted.
        """
        digest = hashlib.sha256(repr(self.class_names).encode("utf-8", "surrogateescape"))
        for name, split in sorted(self.splits.items()):
            if not isinstance(split, EncodedImages):
                return None
            digest.update(f"\0{name}\0".encode())
            for i, label in enumerate(split.labels.tolist()):
                digest.update(f"{split.listed(i)}\0{label}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def absent_classes(class_names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """One line for each of the splits meta and test that lacks classes, with their names.

    counts: by split, the images of each class.
    """
    effects = {
        "meta": "their accuracy counts as the mean of the other classes, for methods that go by it",
        "test": "metrics are over the other classes",
    }
    said = []
    for split, effect in effects.items():
        absent = [name for name, count in zip(class_names, counts[split], strict=True) if not count]
        if absent:
            which = f"{len(absent):,} of {len(class_names):,} classes: {some(absent, ', ')}"
            said.append(f"warning: the {split} split has no image of {which}; {effect}")
    return tuple(said)
