"""tools/benchmark.py's `data`: what our loaders are compared with does all of an epoch's work within that epoch."""

from __future__ import annotations

import inspect

import pytest
import torch
from small_betons import SmallDataset, needs_dali, write_small

from fastlt.benchmarks.bare_loaders import bare_dali
from loaders.order.crop import CropSpec

COUNT = 24


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> SmallDataset:
    return write_small(tmp_path_factory.mktemp("small") / "train.beton", [(16, 16)] * COUNT, "raw")


@needs_dali
@pytest.mark.parametrize("batches", [1, 3, 6])
def test_bare_dali_leaves_no_batch_to_be_decoded_after_an_epoch(small, batches):
    settings = {"batch": COUNT // batches, "workers": 1, "device": torch.device("cpu")}
    epochs = bare_dali(small.shards("train"), crop=CropSpec("none"), **settings, decoding={})
    pipeline = inspect.getclosurevars(epochs).nonlocals["pipeline"]
    for _ in range(2):
        assert [len(images) for images in epochs()] == [COUNT // batches] * batches
        with pytest.raises(StopIteration):  # DALI has nothing scheduled; else this would be the batch
            pipeline.share_outputs()
