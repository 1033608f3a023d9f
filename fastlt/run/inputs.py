"""What a run reads: whether its data, and the weights that it starts from, are those with which it began."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlt.recipe import Recipe
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.identity import DatasetIdentity
from loaders.stored.manifest import file_sha256
from loaders.stored.tar_shards import TarShards
from loaders.stored.unconverted import UnconvertedDataset


@dataclass(frozen=True)
class RunInputs:
    """Equal for inputs with which a recipe gives the same result.

    pretrained: checksum of the file `model.checkpoint`; None without one.
    shards: checksum of which training images are in which shard, where that decides their order; else None.
    """

    data: DatasetIdentity
    pretrained: str | None
    shards: str | None = None

    def to_tree(self) -> dict[str, Any]:
        """Plain containers, for JSON and checkpoints."""
        return {"data": self.data.to_tree(), "pretrained": self.pretrained, "shards": self.shards}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> RunInputs:
        """The inputs that `to_tree` gave; KeyError or TypeError for something else."""
        return cls(DatasetIdentity.from_tree(tree["data"]), tree["pretrained"], tree.get("shards"))

    def differences(self, before: RunInputs) -> list[str]:
        """In what they are not the inputs of `before`, a few words each."""
        weights = ["model.checkpoint has another content"] if self.pretrained != before.pretrained else []
        shards = ["its training images lie in other shards, which decide their order"] * (self.shards != before.shards)
        return [*self.data.differences(before.data), *weights, *shards]


@dataclass(frozen=True)
class InputsRecord:
    """Inputs, and by which files they are known.

    stamps: of the data set's files while they held these inputs, see `loaders.stored.manifest.stamp`.
    """

    inputs: RunInputs
    stamps: Mapping[str, Sequence[int]]

    def to_tree(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        return {**self.inputs.to_tree(), "stamps": {name: list(of) for name, of in self.stamps.items()}}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> InputsRecord:
        """The record that `to_tree` gave; KeyError or TypeError for something else."""
        return cls(RunInputs.from_tree(tree), dict(tree["stamps"]))


def read_inputs(
    recipe: Recipe,
    dataset: ConvertedDataset | UnconvertedDataset,
    known: InputsRecord | None,
    say: Callable[[str], object],
) -> InputsRecord:
    """The inputs as they are now; a large data set is read only where its files are not `known`.

    DamageError when a converted data set does not hold what was converted.
    """
    before = (None, None) if known is None else (known.inputs.data, known.stamps)
    data = dataset.identity(*before, say=say)
    weights = recipe.model.checkpoint
    # A file that is not there is refused with the model.
    pretrained = file_sha256(Path(weights)) if weights is not None and Path(weights).is_file() else None
    return InputsRecord(RunInputs(data, pretrained, _shards(recipe, dataset)), dataset.stamps())


def _shards(recipe: Recipe, dataset: ConvertedDataset | UnconvertedDataset) -> str | None:
    """See RunInputs."""
    if recipe.data.order != "shards":
        return None
    stored = dataset.stored("train", "dali")
    assert isinstance(stored, TarShards), stored
    return hashlib.sha256(stored.first.astype("<i8").tobytes()).hexdigest()


def check_same_data(
    dataset: ConvertedDataset | UnconvertedDataset, of_main: InputsRecord, say: Callable[[str], object]
) -> None:
    """ValueError unless the data set, as it lies on this machine, is that of the main process.

    Read as in `read_inputs`; files with the stamps that they have there are known.
    """
    here = dataset.identity(of_main.inputs.data, of_main.stamps, say=say)
    wrong = here.differences(of_main.inputs.data)
    if wrong:
        raise ValueError(
            f"{dataset.place} is not the data set that process 0 has at this path:\n  " + "\n  ".join(wrong) + "\ncopy "
            "that one here, or convert the same images in the same way"
        )
