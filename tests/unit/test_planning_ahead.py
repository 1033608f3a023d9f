"""Epochs that are planned during the one before: the same orders and rectangles, and two plans at most."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from loaders.order import crop as cropping
from loaders.order import plan as planning
from loaders.order import sampling as drawing
from loaders.order.crop import CropSpec
from loaders.order.plan import EpochPlan
from loaders.order.shard_order import ShardOrder

COUNT, MANY = 1000, 300_000


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
    expected = [(at_once.index(epoch, first), at_once.boxes(epoch, first)[:]) for epoch in range(4) for first in (0, 5)]
    monkeypatch.setattr(planning, "AHEAD_FROM", 1)
    plan = make(**options)
    for (index, boxes), (epoch, first) in zip(expected, ((e, f) for e in range(4) for f in (0, 5)), strict=True):
        np.testing.assert_array_equal(plan.index(epoch, first), index)
        np.testing.assert_array_equal(plan.boxes(epoch, first)[:], boxes)


def test_each_epoch_is_planned_once_and_two_plans_are_held(ahead, monkeypatch):
    planned = []
    plan_epoch = EpochPlan.plan_epoch
    monkeypatch.setattr(EpochPlan, "plan_epoch", lambda self, epoch: planned.append(epoch) or plan_epoch(self, epoch))
    plan = make()
    for epoch in (0, 1, 2, 7):  # a run that goes on may jump
        plan.index(epoch)
        plan.boxes(epoch)
        plan.index(epoch, 3)
        assert plan._plans.keys() == {epoch, epoch + 1}
    plan._plans[8].result()
    assert planned == [0, 1, 2, 3, 7, 8]


def test_an_error_of_planning_is_raised_where_the_plan_is_asked_for(ahead, monkeypatch):
    def fail(self, epoch):
        raise MemoryError(f"epoch {epoch}")

    plan = make()
    monkeypatch.setattr(EpochPlan, "plan_epoch", fail)
    with pytest.raises(MemoryError, match="epoch 0"):
        plan.index(0)


def test_few_images_are_planned_when_their_epoch_comes():
    plan = make()
    plan.index(0)
    assert plan._plans.keys() == {0}


def test_rectangles_of_very_many_images_are_drawn_when_they_are_asked_for(monkeypatch):
    """Inside their images, of torchvision's areas, others in each epoch and view, the same on every process."""
    monkeypatch.setattr(planning, "IN_TURN", 500)
    plan = make()
    assert plan._planned(0).drawn is None
    boxes, index = plan.boxes(0)[:], plan.index(0)
    assert boxes.dtype == np.int32
    top, left, height, width = boxes.T
    assert ((top >= 0) & (top + height <= plan.heights[index])).all()
    assert ((left >= 0) & (left + width <= plan.widths[index])).all()
    share = height * width / (plan.heights[index] * plan.widths[index])
    assert 0.4 < share.mean() < 0.6
    assert len(np.unique(share)) > 0.98 * len(share)
    np.testing.assert_array_equal(plan.boxes(0, 5)[3:40], boxes[5 * 16 + 3 : 5 * 16 + 40])
    for other in (plan.boxes(1), make(view=1).boxes(0)):
        assert (boxes != other[:]).any()
    of_image = dict(zip(index.tolist(), boxes.tolist(), strict=True))
    for keep_last in (False, True):
        parts = [make(rank=rank, world_size=3, keep_last=keep_last) for rank in range(3)]
        seen = [i for part in parts for i in part.index(0).tolist()]
        assert len(set(seen)) == len(seen) == (1000 if keep_last else 48 * (1000 // 48))
        for part in parts:
            for i, box in zip(part.index(0).tolist(), part.boxes(0)[:].tolist(), strict=True):
                assert of_image.get(i, box) == box


SAMPLED = ["instance", "class_balanced", "effective_number", "class_aware_4"]


@pytest.mark.parametrize("sampling", SAMPLED)
@pytest.mark.parametrize(("processes", "in_turn"), [(1, True), (4, True), (4, False)])
def test_planning_takes_16_bytes_an_image_and_keeps_this_processs_share(sampling, processes, in_turn, monkeypatch):
    """All the memory that NumPy allocates, at any time of it."""
    labels, sides = np.random.default_rng(0).integers(0, 100, MANY), np.full(MANY, 400)
    monkeypatch.setattr(planning, "IN_TURN", MANY if in_turn else 0)
    crop = CropSpec("random_resized", 224)
    plan = EpochPlan(labels, sides, sides, crop, 32, True, sampling, rank=processes - 1, world_size=processes)
    made, kept, peak = traced(plan)
    assert made.index.nbytes <= 4 * MANY / processes
    assert kept <= (12 if in_turn else 4) * MANY / processes + 10_000
    assert peak <= 16 * MANY


def test_planning_by_shards_takes_no_more(monkeypatch):
    sides = np.full(MANY, 400)
    order = {"by_shards": ShardOrder(8, 4), "shard_starts": np.arange(0, MANY, 1000)}
    plan = EpochPlan(np.zeros(MANY, int), sides, sides, CropSpec("random_resized", 224), 32, True, **order)
    assert traced(plan)[2] <= 16 * MANY


def traced(plan: EpochPlan) -> tuple[planning.PlannedEpoch, int, int]:
    """A plan, what it keeps and what it took, in bytes."""
    tracemalloc.start()
    try:
        made = plan.plan_epoch(0)
        return made, *tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("sampling", SAMPLED)
def test_how_much_is_worked_on_at_a_time_leaves_orders_and_rectangles_alone(sampling, monkeypatch):
    plan = make(sampling=sampling)
    expected = plan.index(0), plan.boxes(0)[:]
    monkeypatch.setattr(cropping, "PIECE", 64)
    monkeypatch.setattr(drawing, "PART", 64)
    plan = make(sampling=sampling)
    np.testing.assert_array_equal(plan.index(0), expected[0])
    np.testing.assert_array_equal(plan.boxes(0)[:], expected[1])
