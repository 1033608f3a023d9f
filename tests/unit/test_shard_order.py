"""The order by shards: every image once, few shards at a time, and the same batches on any number of processes."""

from __future__ import annotations

import numpy as np
import pytest

from loaders.order.crop import CropSpec
from loaders.order.plan import EpochPlan
from loaders.order.shard_order import ShardOrder

COUNT, SHARD, BATCH = 2950, 50, 16
FIRST = np.arange(0, COUNT, SHARD)
NO_IMAGES = np.full(COUNT, 8)


def plan(parts=4, block=3, rank=0, world_size=1, **options) -> EpochPlan:
    labels = np.arange(COUNT) % 7
    return EpochPlan(
        *(labels, NO_IMAGES, NO_IMAGES, CropSpec("none"), BATCH // world_size),
        **{"train": True, "seed": 5, "rank": rank, "world_size": world_size, "shard_starts": FIRST, **options},
        by_shards=ShardOrder(parts, block),
    )


def slow_order(first, members, batch_size, parts, block, rng) -> list[int]:
    """What ShardOrder says, image by image."""
    shards = [[] for _ in first]
    for image in members:
        shards[max(number for number, start in enumerate(first) if start <= image)].append(int(image))
    row = [
        (number, image)
        for number in rng.permutation([n for n, s in enumerate(shards) if s])
        for image in shards[number]
    ]
    batches = len(row) // batch_size
    places, filled = [[None] * batch_size for _ in range(batches)], 0
    for part in range(parts):
        left, right = part * batch_size // parts, (part + 1) * batch_size // parts
        segment = row[filled : filled + batches * (right - left)]
        filled += len(segment)
        segment = segment[::-1] if part % 2 else segment
        blocks, seen = [], []
        for number, image in segment:
            if number not in seen:
                seen.append(number)
            if len(blocks) <= (len(seen) - 1) // block:
                blocks.append([])
            blocks[-1].append(image)
        keys = iter(rng.random(len(segment)))
        shuffled = [image for one in blocks for _, image in sorted((next(keys), image) for image in one)]
        for k, image in enumerate(shuffled):
            places[k // (right - left)][left + k % (right - left)] = image
    rest = [image for _, image in row[filled:]]
    return [image for batch in places for image in batch] + [rest[k] for k in rng.permutation(len(rest))]


@pytest.mark.parametrize(("parts", "block", "batch_size"), [(1, 1, 16), (4, 3, 16), (3, 2, 10), (5, 100, 32)])
def test_it_is_what_the_slow_reference_says(parts, block, batch_size):
    members = np.flatnonzero(np.random.default_rng(1).random(400) < 0.7)
    first = np.array([0, 60, 90, 160, 170, 230, 300, 390])
    order = ShardOrder(parts, block).draw(first, members, batch_size, np.random.default_rng(3))
    assert order.tolist() == slow_order(first, members, batch_size, parts, block, np.random.default_rng(3))
    assert sorted(order) == members.tolist()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_processes_together_see_the_batches_of_one(world_size):
    alone = plan().index(2).reshape(-1, BATCH)
    together = [plan(rank=rank, world_size=world_size).index(2) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate([part.reshape(len(alone), -1) for part in together], axis=1), alone)


def test_each_process_reads_its_own_shards_but_for_those_where_two_segments_meet():
    shards = [set(plan(rank=rank, world_size=4).index(0) // SHARD) for rank in range(4)]
    assert set().union(*shards) == set(range(len(FIRST)))
    assert sum(len(one & other) for k, one in enumerate(shards) for other in shards[:k]) <= 3
    assert all(len(one) <= len(FIRST) / 4 + 2 for one in shards)


def test_few_shards_are_in_use_at_a_time_and_each_of_them_once():
    batches = plan().index(0).reshape(-1, BATCH) // SHARD
    used = [(np.flatnonzero((batches == number).any(axis=1)).min(), number) for number in range(len(FIRST))]
    last = {number: np.flatnonzero((batches == number).any(axis=1)).max() for _, number in used}
    in_use = [sum(begin <= k <= last[number] for begin, number in used) for k in range(len(batches))]
    assert max(in_use) <= 2 * 4 * 3
    assert np.mean(in_use) < 1.5 * 4 * 3
    # Blocks of a segment: a shard where two segments meet would else be in use from the first batch to the last.
    of_a_block = 3 * SHARD / (BATCH / 4)
    assert max(last[number] - begin for begin, number in used) <= 2 * of_a_block


def test_epochs_and_seeds_differ_and_an_epoch_resumes():
    orders = [plan().index(0), plan().index(1), plan(seed=6).index(0)]
    assert all((one != other).mean() > 0.9 for k, one in enumerate(orders) for other in orders[:k])
    np.testing.assert_array_equal(plan().index(0, first_batch=37), orders[0][37 * BATCH :])
    np.testing.assert_array_equal(plan().index(0), orders[0])


def test_neighbours_in_a_shard_are_torn_apart():
    order = plan().index(0)
    batches = order.reshape(-1, BATCH)
    assert np.mean([np.isin(batch + 1, batch).mean() for batch in batches]) < 0.1


def test_a_part_of_the_classes_and_a_last_batch():
    classes = np.arange(7) < 3
    index = plan(classes=classes, keep_last=True).index(0)
    assert sorted(index) == [i for i in range(COUNT) if i % 7 < 3]
    assert len(index) % BATCH


def test_other_samplings_are_refused():
    with pytest.raises(ValueError, match="sampling 'class_balanced' takes images from all shards"):
        plan(sampling="class_balanced")


@pytest.mark.parametrize(
    ("processes", "on_node", "segments"), [(1, 1, 8), (8, 8, 8), (16, 8, 8), (16, 2, 2), (3, 3, 8), (64, 8, 8)]
)
def test_the_room_that_a_node_needs(processes, on_node, segments):
    """Eight segments of blocks of four shards: on 16 processes of two nodes each reads one, which another reads too."""
    assert ShardOrder(8, 4).shards_in_use(processes, on_node) == 3 * 4 * segments


def test_the_room_for_what_workers_read_ahead():
    """A tenth of a shard of all eight segments may be in eight shards more."""
    assert ShardOrder(8, 4).shards_in_use(1, 1, 0.1) == (3 * 4 + 1) * 8
    assert ShardOrder(8, 4).shards_in_use(16, 2, 17.0) == (3 * 4 + 3) * 2
