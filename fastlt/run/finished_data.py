"""The data set of a finished run, and its images as they were evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fastlt.run.loading import EVALUATION_BATCH, crop_spec
from fastlt.run.recorded import written_inputs
from fastlt.run.trained import RecordedRun
from fastlt.state import Batch
from loaders.factory import make_loader
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.unconverted import UnconvertedDataset


def check_same_images(
    run: RecordedRun,
    dataset: ConvertedDataset | UnconvertedDataset,
    say: Callable[[str], object] = lambda text: None,
) -> None:
    """ValueError when a data set holds other images than the run had, as far as the run kept a record of them.

    say: told when all of it is read.
    """
    if run.data is None:
        return
    record = written_inputs(run.folder)
    wrong = dataset.identity(run.data, {} if record is None else record.stamps, say=say).differences(run.data)
    if wrong:
        raise ValueError(f"{run.folder} was trained on other data than {dataset.place} has now: {'; '.join(wrong)}")


def evaluation_batches(
    run: RecordedRun,
    dataset: ConvertedDataset | UnconvertedDataset,
    split: str,
    device: torch.device,
    cut_as: str | None = None,
) -> Iterator[Batch]:
    """The images of a split in order. cut_as: the split whose crop they get, where that is another one."""
    data = run.recipe.data
    loader = make_loader(
        dataset,
        split,
        backend=data.loader,
        batch_size=min(EVALUATION_BATCH, len(dataset.labels(split))),
        device=device,
        train=False,
        crop=crop_spec(data, cut_as or split, train=False),
        num_workers=data.num_workers,
    )
    try:
        yield from loader.epoch(0)
    finally:
        loader.close()
