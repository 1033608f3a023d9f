"""What each process has of its own, when a run goes on with another number of processes."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastlt.device.distributed import Reducer
from fastlt.meta.bounded_accuracy import class_accuracy
from fastlt.meta.class_accuracy import stratified_order
from fastlt.run.redistribution import redistributed

COUNTS = (1, 2, 3, 4)


def accuracy(labels, reducer, images_per_step=None):
    images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    options = {"prepare": lambda x: x.float(), "refresh": "rolling", "window": 3, "reducer": reducer}
    return class_accuracy(images, labels, 5, images_per_step=images_per_step, **options)


def own_state(rank, world_size, labels, right):
    """As a checkpoint holds it; right: by image of the meta set, in its order."""
    state = accuracy(labels, Reducer(rank, world_size)).state_dict()
    state |= {"correct": right[stratified_order(labels)[rank::world_size]], "calls": 7, "due": False}
    generator = {"generator": torch.Generator().manual_seed(rank).get_state()}
    return {
        "step": {"augment": generator, "meta_augment": None, "class_accuracy": state, "second_augment": generator},
        "random": {"cpu": torch.Generator().manual_seed(40 + rank).get_state(), "cuda": []},
        "backends": {"train": "resident"},
        "buffers": {"bn.running_mean": torch.full((2,), float(rank)), "bn.num_batches_tracked": torch.tensor(7)},
    }


@pytest.mark.parametrize(("before", "now"), [pair for pair in itertools.product(COUNTS, COUNTS) if len(set(pair)) == 2])
def test_every_image_of_the_meta_set_keeps_its_result(before, now):
    labels = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 0, 2, 1])
    right = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0])
    processes = [own_state(rank, before, labels, right) for rank in range(before)]
    for rank in range(now):
        state = redistributed(processes, rank, now, seed=0, done=7)["step"]["class_accuracy"]
        resumed = accuracy(labels, Reducer(rank, now))
        resumed.load_state_dict(state)
        assert torch.equal(resumed.correct, right[stratified_order(labels)[rank::now]])
        assert (resumed.calls, resumed.due) == (7, False)


def test_images_that_have_no_result_yet_have_none_afterwards():
    labels, scored = torch.tensor([0, 1, 1, 2, 3, 4, 4]), torch.tensor([1.0, 0, 1, 0, 1, 1, 0])
    order, processes = stratified_order(labels), []
    for rank in range(2):
        before = accuracy(labels, Reducer(rank, 2), images_per_step=2)
        processes.append({"class_accuracy": before.state_dict() | {"scored": scored[order[rank::2]], "calls": 2}})
    whole = [{"step": step, "random": {"cpu": None, "cuda": []}} for step in processes]
    resumed = accuracy(labels, Reducer(0, 1), images_per_step=2)
    resumed.load_state_dict(redistributed(whole, 0, 1, seed=0, done=2)["step"]["class_accuracy"])
    assert torch.equal(resumed.scored, scored[order])


def test_the_rest_follows_the_rules():
    labels, right = torch.arange(5), torch.ones(5)
    processes = [own_state(rank, 3, labels, right) for rank in range(3)]
    kept = [one["buffers"]["bn.running_mean"].clone() for one in processes]
    found = [redistributed(processes, rank, 2, seed=5, done=7) for rank in range(2)]
    for own in found:
        assert torch.equal(own["buffers"]["bn.running_mean"], torch.ones(2)), "the mean of 0, 1 and 2"
        assert own["buffers"]["bn.num_batches_tracked"] == 7
        assert own["backends"] == {"train": "resident"}
        assert own["step"]["meta_augment"] is None
        assert "average_buffers" not in own
    states = [own["step"][stream]["generator"] for own in found for stream in ("augment", "second_augment")]
    states += [one["step"]["augment"]["generator"] for one in processes]
    states += [one["random"]["cpu"] for one in (*found, *processes)]
    assert len({state.numpy().tobytes() for state in states}) == len(states), "no stream is drawn twice"
    again = redistributed(processes, 0, 2, seed=5, done=7)["step"]["augment"]["generator"]
    assert torch.equal(again, states[0]), "the same start gives the same draws"
    assert all(torch.equal(one["buffers"]["bn.running_mean"], old) for one, old in zip(processes, kept, strict=True))


def test_averaged_weights_have_their_statistics_too():
    processes = [
        {"step": {}, "random": {"cpu": None, "cuda": []}, "buffers": {}, "average_buffers": {"v": torch.tensor([v])}}
        for v in (1.0, 3.0)
    ]
    assert redistributed(processes, 0, 1, seed=0, done=0)["average_buffers"] == {"v": torch.tensor([2.0])}
