"""Epochs that are planned during the one before: the same orders and rectangles, and two plans at most."""

from __future__ import annotations

import numpy as np
import pytest

from loaders.order import plan as planning
from loaders.order.crop import CropSpec
from loaders.order.plan import EpochPlan

COUNT = 1000


def make(**options) -> EpochPlan:
    draw = np.random.default_rng(0)
    labels, heights, widths = draw.integers(0, 7, COUNT), *draw.integers(40, 90, (2, COUNT))
    crop = CropSpec("random_resized", 32)
    return EpochPlan(labels, heights, widths, crop, batch_size=16, train=True, seed=3, **options)


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(planning, "AHEAD_FROM", 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"sampling": "class_balanced"}, {"rank": 1, "world_size": 3}, {"view": 1}, {"classes": np.arange(7) < 4}],
    ids=str,
)
def test_what_is_planned_ahead_is_what_is_planned_at_once(options, monkeypatch):
    at_once = make(**options)
    expected = [(at_once.index(epoch, first), at_once.boxes(epoch, first)) for epoch in range(4) for first in (0, 5)]
    monkeypatch.setattr(planning, "AHEAD_FROM", 1)
    plan = make(**options)
    for (index, boxes), (epoch, first) in zip(expected, ((e, f) for e in range(4) for f in (0, 5)), strict=True):
        np.testing.assert_array_equal(plan.index(epoch, first), index)
        np.testing.assert_array_equal(plan.boxes(epoch, first), boxes)


def test_each_epoch_is_planned_once_and_two_plans_are_held(ahead, monkeypatch):
    planned = []
    plan_epoch = EpochPlan._plan
    monkeypatch.setattr(EpochPlan, "_plan", lambda self, epoch: planned.append(epoch) or plan_epoch(self, epoch))
    plan = make()
    for epoch in (0, 1, 2, 7):  # a run that goes on may jump
        plan.index(epoch)
        plan.boxes(epoch)
        plan.index(epoch, 3)
        assert plan._ahead.keys() == {epoch, epoch + 1}
    plan._ahead[8].result()
    assert planned == [0, 1, 2, 3, 7, 8]


def test_an_error_of_planning_is_raised_where_the_plan_is_asked_for(ahead, monkeypatch):
    def fail(self, epoch):
        raise MemoryError(f"epoch {epoch}")

    plan = make()
    monkeypatch.setattr(EpochPlan, "_plan", fail)
    with pytest.raises(MemoryError, match="epoch 0"):
        plan.index(0)


def test_few_images_are_planned_at_once():
    plan = make()
    plan.index(0)
    assert not plan._ahead


def test_rectangles_of_very_many_images_are_drawn_block_by_block(monkeypatch):
    """Inside their images, of torchvision's areas, other in each block and epoch, the same on every process."""
    monkeypatch.setattr(planning, "ONE_STREAM", 500)
    monkeypatch.setattr(planning, "BLOCK", 256)
    plan = make()
    boxes, index = plan.boxes(0), plan.index(0)
    top, left, height, width = boxes.T
    assert ((top >= 0) & (top + height <= plan.heights[index])).all()
    assert ((left >= 0) & (left + width <= plan.widths[index])).all()
    share = height * width / (plan.heights[index] * plan.widths[index])
    assert 0.4 < share.mean() < 0.6
    assert len(np.unique(share)) > 0.98 * len(share)
    assert (boxes != plan.boxes(1)).any()
    parts = [make(rank=rank, world_size=2) for rank in range(2)]
    of_image = {i: tuple(box) for i, box in zip(index.tolist(), boxes.tolist(), strict=True)}
    for part in parts:
        for i, box in zip(part.index(0).tolist(), part.boxes(0).tolist(), strict=True):
            assert of_image.get(i, tuple(box)) == tuple(box)
