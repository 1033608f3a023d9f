"""The record of a run whose numbers became infinite or NaN, for whoever goes on with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from fastlt.run.atomic_file import read_json, write_json
from fastlt.run.folder import divergence_file


@dataclass(frozen=True)
class Divergence:
    """stage, iteration: where it was noticed. places: the first tensors that are not finite, by name."""

    stage: str
    iteration: int
    places: list[str]

    def write(self, folder: Path) -> None:
        """Into a run folder."""
        write_json(divergence_file(folder), asdict(self))


def recorded_divergence(folder: Path) -> Divergence | None:
    """What was noticed after the last checkpoint of a run; None when all has been finite."""
    file = divergence_file(folder)
    return Divergence(**read_json(file, "move it away to go on from the last checkpoint")) if file.exists() else None
