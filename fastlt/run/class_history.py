"""How every class fares over a run: accuracies, weights and difficulties at each validation, in one compact file.

`class_history.npy` is a sequence of arrays as `np.save` writes them, one a validation: `np.load` on the open file gives
one after another. Each is a 0-d array with fields: iteration, stage, and float32 (C,) values by name. At 8,142 classes
a validation takes 130 kB, a fifth of what it would take as text.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from fastlt.run.appended_file import AppendedFile
from fastlt.run.atomic_file import RunFileError

log = logging.getLogger(__name__)

NAME = "U64"  # of a stage; a longer name is cut


@dataclass(frozen=True)
class ClassRecord:
    """The values of all classes at one validation.

    iteration: counted over all stages. values: float32 (C,) by name. "accuracy" is that of the validation split, NaN
    for a class without an image there; the others are what the method reports: weight, difficulty, meta_accuracy, …
    """

    iteration: int
    stage: str
    values: Mapping[str, np.ndarray]

    def to_bytes(self) -> bytes:
        """The record as `np.save` writes it."""
        fields = [(name, "<f4", value.shape) for name, value in self.values.items()]
        array = np.zeros((), dtype=[("iteration", "<i8"), ("stage", NAME), *fields])
        array["iteration"], array["stage"] = self.iteration, self.stage
        for name, value in self.values.items():
            array[name] = value
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        return file.getvalue()

    @classmethod
    def read(cls, file: IO[bytes]) -> ClassRecord:
        """The next record of an open file; an exception of any kind when there is no whole one."""
        array = np.load(file, allow_pickle=False)
        names = [name for name in array.dtype.names if name not in ("iteration", "stage")]
        return cls(int(array["iteration"]), str(array["stage"]), {name: array[name] for name in names})


class ClassHistory(AppendedFile):
    """Appends to `class_history.npy`; on resuming, forgets what was recorded after the checkpoint."""

    def open(self, upto_iteration: int) -> None:
        """Start writing, keeping the records up to and including `upto_iteration`."""
        if not self.enabled:
            return
        records, broken = read_class_history(self.path)
        if broken:
            log.warning("%s: %s; the records before are kept", self.path, broken)
        kept = [record.to_bytes() for record in records if record.iteration <= upto_iteration]
        self.begin(b"".join(kept))

    def write(self, iteration: int, stage: str, values: Mapping[str, Sequence[float | None] | np.ndarray]) -> None:
        """One record: (C,) values by name, on the host; None is NaN. RunFileError."""
        if self.file is not None:
            columns = {name: np.asarray(v, dtype=np.float32) for name, v in values.items()}
            self.append(ClassRecord(iteration, stage, columns).to_bytes())


def read_class_history(path: Path) -> tuple[list[ClassRecord], str]:
    """The whole records of a file, and from where on it is broken, in words; "" when it is not, or is absent.

    A kill in the middle of a write leaves a last record without an end: it is no damage.
    """
    if not path.exists():
        return [], ""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunFileError(f"{path} cannot be read: {error.strerror}") from None
    file, records = io.BytesIO(content), []
    while (start := file.tell()) < len(content):
        try:
            records.append(ClassRecord.read(file))
        except Exception as error:  # a damaged header raises nearly anything
            if content.find(np.lib.format.MAGIC_PREFIX, start + 1) < 0:
                break
            return records, f"record {len(records) + 1} cannot be read ({type(error).__name__})"
    return records, ""
