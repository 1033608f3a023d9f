"""The predictions of a finished run that keeps none, made from its tested model and the data."""

from __future__ import annotations

import torch

from fastlt.ensemble import open_member
from fastlt.report.runs import Run, is_of
from fastlt.run.folder import predictions_file
from fastlt.run.predictions import PREDICTED_SPLITS, PredictionRecorder, Predictions, write_predictions


def measure(run: Run) -> str:
    """Write the predictions of a finished run where it has none; returns what was done, in a line.

    ValueError where the data or the tested model are not there any more, or are others.
    """
    assert run.result is not None
    path = predictions_file(run.folder)
    if run.predictions:
        return f"{path} is there"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    member, splits = open_member(run.folder), {}
    for split in PREDICTED_SPLITS:
        recorder, labels = PredictionRecorder(), torch.from_numpy(member.dataset.labels(split))
        for index, logits in member.batches(split, device):
            recorder.add(logits, labels[index.cpu()].to(device), index)
        splits[split] = Predictions.merged(recorder.parts())
    if not is_of(splits["test"], run.result):
        top1 = splits["test"].right.mean()
        raise ValueError(
            f"{run.folder}: its model scores {100 * top1:.2f} on the test images that are there now, and "
            f"{100 * run.result['top1']:.2f} by its result: the model or the data are others"
        )
    write_predictions(path, splits)
    return f"{path} is made"
