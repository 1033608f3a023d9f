"""Which images of a data set of files train, validate and test: by the splits that it brings, and by drawing others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from loaders.order.longtail import class_members, holdout_per_class, longtail_subset, subsample
from loaders.sources.split import EncodedImages

T = TypeVar("T")
Shares = tuple[float, float, float]  # of train, meta and test
DEFAULT_SPLIT: Shares = (0.8, 0.1, 0.1)
CALLED = {"meta": "the meta set (validation)", "test": "the test set"}


@dataclass(frozen=True)
class Cut:
    """What the user says about the splits.

    meta_per_class: of a meta set that the data set brings, the first so many images of each class are taken. Of one
        that is drawn by a share, no class has more. Without either, the last so many of each class of train are held
        out.
    imbalance_factor: of the long tail to cut out of train by taking the first images of each class; None for all.
    split: the shares of train, meta and test in the images of each class that are not in a split yet; 0 for a split
        that the data set brings. None: with a test set nothing is drawn, without one DEFAULT_SPLIT is.
    split_seed: of what is drawn.
    """

    meta_per_class: int = 10
    imbalance_factor: float | None = None
    split: Shares | None = None
    split_seed: int = 0


def split_text(split: Shares) -> str:
    """The shares as the command line takes them, `0.8/0.1/0.1`."""
    return "/".join(f"{share:g}" for share in split)


def check_split(split: Shares) -> None:
    """ValueError for shares that are none: negative, no training images, or other than 1 together."""
    if not (all(0 <= share <= 1 for share in split) and split[0] > 0 and math.isclose(sum(split), 1, abs_tol=1e-6)):
        raise ValueError(
            f"split is {split_text(split)}: it must be the shares of train, validation and test, such as "
            f"{split_text(DEFAULT_SPLIT)}; train has more than 0, and together they are 1"
        )


class Choice(NamedTuple):
    """The images of a split: `rows`, int64 (K,), of the candidates `pool`."""

    pool: str
    rows: np.ndarray
    provenance: str


@dataclass(frozen=True)
class Candidates:
    """What the splits of a data set of files are chosen from.

    pools: the splits that the data set brings, "train" at least; their provenance is the name of their place. A lone
        validation set becomes the test set.
    shares: of each class of train, by the names of the splits that are drawn from it.
    notes: what serves as what, for the user.
    """

    pools: Mapping[str, EncodedImages]
    class_names: tuple[str, ...]
    cut: Cut
    shares: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, pools: Mapping[str, EncodedImages], class_names: tuple[str, ...], cut: Cut) -> Candidates:
        """The candidates by the rules of `Cut`; ValueError for shares that do not fit what the data set brings."""
        if cut.split is not None:
            check_split(cut.split)
            return cls(pools, class_names, cut, _asked_shares(pools, cut.split))
        if "test" in pools:
            return cls(pools, class_names, cut)
        where = pools["train"].provenance
        if "meta" in pools:
            renamed = {"train": pools["train"], "test": pools["meta"]}
            said = f"{pools['meta'].provenance} is the test set, there is no other; {{meta}} is held out of {where}"
            return cls(renamed, class_names, cut, notes=(said.format(meta=CALLED["meta"]),))
        _, meta, test = DEFAULT_SPLIT
        said = (
            f"{where} has no test set: {test:.0%} of each class are drawn as {CALLED['test']}, and {meta:.0%}, at most "
            f"{cut.meta_per_class} images, as {CALLED['meta']}; --split sets other shares"
        )
        return cls(pools, class_names, cut, {"test": test, "meta": meta}, (said,))

    def choose(self, usable: Mapping[str, np.ndarray] | None = None) -> dict[str, Choice]:
        """The images of each split, among those that can be used.

        usable: rows of each pool, int64 (K,) in order; None for all.
        Raises ValueError when a class has too few, or a split none at all.
        """
        rows = usable or {name: np.arange(len(pool)) for name, pool in self.pools.items()}
        where = {name: pool.provenance for name, pool in self.pools.items()}
        num_classes, factor = len(self.class_names), self.cut.imbalance_factor
        chosen, left = self._drawn(rows["train"])
        if "test" in self.pools:
            chosen["test"] = Choice("test", rows["test"], f"all of {where['test']}")
        if "meta" in self.pools:
            chosen["meta"] = self._first_of_meta(rows["meta"])
        elif "meta" not in chosen:
            chosen["meta"], left = self._held_out(left)
        tail = "all" if len(left) == len(rows["train"]) else "all that is not held out"
        of_left = self.pools["train"].labels[left]
        train = left[self._of_train(lambda: subsample(of_left, factor, num_classes))]
        if factor is not None:
            tail = f"first n_c of each class of {tail}, imbalance factor {factor:g},"
        choices = {"train": Choice("train", train, f"{tail} of {where['train']}"), "meta": chosen["meta"]}
        choices["test"] = chosen["test"]
        for name, choice in choices.items():
            if not len(choice.rows):
                raise ValueError(
                    f"{CALLED.get(name, name)} has no image ({choice.provenance}); its classes are too small for "
                    "that: give --split larger shares, or images of its own"
                )
        return choices

    def _first_of_meta(self, rows: np.ndarray) -> Choice:
        count, labels = self.cut.meta_per_class, self.pools["meta"].labels[rows]
        of_class = np.minimum(np.bincount(labels, minlength=len(self.class_names)), count)
        where = self.pools["meta"].provenance
        return Choice("meta", rows[longtail_subset(labels, of_class)], f"first {count} of each class of {where}")

    def _held_out(self, rows: np.ndarray) -> tuple[Choice, np.ndarray]:
        """The last images of each class among `rows` of train as the meta set, and the rows that are left."""
        count, pool = self.cut.meta_per_class, self.pools["train"]
        held, rest = self._of_train(lambda: holdout_per_class(pool.labels[rows], count, self.class_names))
        return Choice("train", rows[held], f"last {count} of each class of {pool.provenance}, held out"), rows[rest]

    def _drawn(self, rows: np.ndarray) -> tuple[dict[str, Choice], np.ndarray]:
        """The splits that are drawn from `rows` of train, by their names, and the rows that are left."""
        if not self.shares:
            return {}, rows
        pool, seed, at_most = self.pools["train"], self.cut.split_seed, self.cut.meta_per_class
        drawn: dict[str, list[np.ndarray]] = {name: [] for name in self.shares}
        left = []
        order = rows[draw_order([pool.listed(i) for i in rows], seed)]
        for members in class_members(pool.labels[order], len(self.class_names)):
            of_class = order[members]
            counts = drawn_counts(len(of_class), self.shares, at_most)
            for name, of_split in drawn.items():
                taken, of_class = np.split(of_class, [counts[name]])
                of_split.append(taken)
            left.append(of_class)
        limit = {"meta": f" (at most {at_most})"}
        choices = {}
        for name, of_split in drawn.items():
            share = f"{self.shares[name]:g} of each class{limit.get(name, '')}"
            rows_of = np.sort(np.concatenate(of_split))
            choices[name] = Choice("train", rows_of, f"{share} of {pool.provenance}, drawn with seed {seed}")
        return choices, np.sort(np.concatenate(left))

    def _of_train(self, choose: Callable[[], T]) -> T:
        """What `choose` gives; its ValueError with the name of the place in front."""
        try:
            return choose()
        except ValueError as error:
            raise ValueError(f"{self.pools['train'].provenance}: {error}") from None

    def splits(self, choices: Mapping[str, Choice]) -> dict[str, EncodedImages]:
        """The images of the choices."""
        return {
            name: self.pools[choice.pool].subset(choice.rows, choice.provenance) for name, choice in choices.items()
        }


def _asked_shares(pools: Mapping[str, EncodedImages], split: Shares) -> dict[str, float]:
    """The shares of the splits that are drawn; ValueError for one of a split that is there, or none for the test."""
    shares = dict(zip(("train", "meta", "test"), split, strict=True))
    for name in ("meta", "test"):
        if shares[name] and name in pools:
            raise ValueError(
                f"split is {split_text(split)}, but {pools[name].provenance} is {CALLED[name]}: give 0 for it, or "
                "leave split out"
            )
    if "test" not in pools and not shares["test"]:
        other = f"; {pools['meta'].provenance} serves as one when split is left out" if "meta" in pools else ""
        raise ValueError(
            f"split is {split_text(split)} and {pools['train'].provenance} has no test set: give the last share more "
            f"than 0{other}"
        )
    return {name: shares[name] for name in ("test", "meta") if shares[name]}


def drawn_counts(count: int, shares: Mapping[str, float], most_meta: int) -> dict[str, int]:
    """How many of the `count` images of a class are drawn for "test" and "meta"; at least one is left to train on.

    Shares are rounded to the nearest image; the test set goes first where a class has too few for both.
    """
    counts, room = {}, count - 1
    for name, share in shares.items():
        rounded = math.floor(share * count + 0.5 + 1e-9)
        counts[name] = max(0, min(rounded, room, most_meta if name == "meta" else rounded))
        room -= counts[name]
    return counts


def draw_order(names: list[str], seed: int) -> np.ndarray:
    """A random order of images that their names and the seed decide, int64 (N,).

    No generator's stream has to stay as it is for that, and of a data set that grows most images keep their split.
    """
    keys = [_draw_key(name, seed) for name in names]
    return np.argsort(np.array(keys, dtype=np.uint64), kind="stable")


def _draw_key(name: str, seed: int) -> int:
    text = f"{seed}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
