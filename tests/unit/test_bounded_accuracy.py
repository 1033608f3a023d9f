"""A_t with a bound on the images of an iteration: never more of them, never older, and what is known so far."""

from __future__ import annotations

import pytest
import torch
from test_class_accuracy import CLASSES, PER_CLASS, RIGHT, Thermometer, meta_set
from test_compiled import batches, make_step

from fastlt.device.compiled import Compiler
from fastlt.device.distributed import Reducer
from fastlt.meta.bounded_accuracy import BoundedAccuracy, class_accuracy, rounds
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.recipe import load_recipe
from fastlt.typed_yaml import RecipeError

IMAGES = CLASSES * PER_CLASS


def bounded(images_per_step, **options):
    return BoundedAccuracy(*meta_set(RIGHT), CLASSES, prepare=lambda x: x, images_per_step=images_per_step, **options)


@pytest.mark.parametrize(
    ("images_per_step", "window", "k"), [(1, 1, 70), (9, 1, 8), (10, 1, 7), (10, 9, 9), (99, 1, 1)]
)
def test_no_iteration_scores_more_and_no_result_is_older_than_stated(images_per_step, window, k):
    accuracy, model = bounded(images_per_step, window=window), Thermometer()
    assert rounds(IMAGES, window, images_per_step) == accuracy.window == k
    accuracy._kept_outputs(model)  # looks for layers that are not trained, with an image
    model.seen.clear()
    last = torch.full((IMAGES,), -1)
    for call in range(3 * k):
        accuracy.update(model)
        seen = torch.cat(model.seen)
        assert len(seen) <= images_per_step
        last[seen] = call
        model.seen.clear()
        if call >= k - 1:
            assert call - last.min() < k, "an image was left unscored for a whole round"


def test_accuracies_are_those_of_the_latest_results_and_the_mean_where_there_is_none():
    """Against a record of each image's latest result, while the network changes."""
    accuracy, model = bounded(5), Thermometer()
    images, labels = meta_set(RIGHT)
    latest = {}
    accuracy._kept_outputs(model)
    model.seen.clear()
    for call in range(20):
        model.shift = (call // 7) % 3
        answer = accuracy.update(model)
        for i in torch.cat(model.seen).tolist():
            latest[i] = float((int(images[i, 0, 0, 0]) + model.shift) % CLASSES == int(labels[i]))
        model.seen.clear()
        of_class = [[right for i, right in latest.items() if labels[i] == c] for c in range(CLASSES)]
        means = [sum(rights) / len(rights) if rights else None for rights in of_class]
        known = [mean for mean in means if mean is not None]
        expected = [sum(known) / len(known) if mean is None else mean for mean in means]
        assert answer.tolist() == pytest.approx(expected), call
        assert (None in means) == (call == 0)
    assert len(latest) == IMAGES


def test_another_model_is_scored_as_a_whole_and_leaves_no_trace():
    accuracy, model = bounded(9), Thermometer()
    accuracy.update(model)
    before = {key: value.clone() for key, value in accuracy.state_dict().items() if isinstance(value, torch.Tensor)}
    assert accuracy.of(Thermometer()).tolist() == pytest.approx([right / PER_CLASS for right in RIGHT])
    assert all(torch.equal(value, accuracy.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("calls", [3, 11])
def test_state_continues_in_the_first_round_and_later(calls):
    model, one, other = Thermometer(), bounded(9), bounded(9)
    for _ in range(calls):
        one.update(model)
    other.load_state_dict(one.state_dict())
    model.shift = 6
    for _ in range(12):
        assert torch.equal(one.update(model), other.update(model))


def test_processes_share_the_bound_and_cover_the_meta_set():
    """Each process's slice is its share of the bound, rounded up, and together they score every image."""
    shares = [bounded(9, reducer=Reducer(rank, 3)) for rank in range(3)]
    assert [len(share.place) for share in shares] == [3, 3, 3]
    seen = set()
    for _ in range(shares[0].window):
        for share in shares:
            assert int(share.place.max()) < len(share.labels)
            seen |= set(share.images[share.place][:, 1, 0, 0].tolist())
            share.advance()
    assert seen == set(range(IMAGES))


def test_a_process_without_images_scores_none():
    images, labels = meta_set(RIGHT)
    accuracy = BoundedAccuracy(
        images[:2], labels[:2], CLASSES, prepare=lambda x: x, images_per_step=1, reducer=Reducer(2, 3)
    )
    assert len(accuracy.place) == 0
    accuracy._score(None, accuracy.place.split(4), 0)


def test_all_iterations_are_one_captured_graph():
    """Where it stands is read on the device: what is captured once is right for every slice."""
    step = make_step("difficulty", Compiler(), refresh="rolling")
    images, labels = batches(0)[1].images, batches(0)[1].labels
    step.parts.class_accuracy = accuracy = BoundedAccuracy(
        images, labels, 4, prepare=lambda x: x.float() / 255, images_per_step=5
    )
    variants, places = set(), []
    for iteration in range(7):
        variants.add(step.variant())
        places.append(tuple(accuracy.place.tolist()))
        step(*batches(iteration))
    assert len(variants) == 1
    assert places[:3] == places[3:6] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    counters = step.counters()
    step.advance()
    step.set_counters(counters)
    assert accuracy.place.tolist() == [4, 5, 6, 7]


def test_the_first_pass_over_all_images_is_shown_and_no_other():
    shown = []

    def watch(batches):
        shown.append(len(batches))
        return iter(batches)

    options = {"prepare": lambda x: x, "batch_size": 13, "shown": watch}
    accuracy = class_accuracy(*meta_set(RIGHT), CLASSES, refresh="rolling", window=7, **options)
    assert type(accuracy) is ClassAccuracy
    for _ in range(9):
        accuracy.update(Thermometer())
    assert shown == [6]
    bounding = class_accuracy(*meta_set(RIGHT), CLASSES, refresh="rolling", images_per_step=10, **options)
    bounding.update(Thermometer())
    assert shown == [6]


def test_a_bound_without_rolling_is_refused():
    stage = "stages.end_to_end"
    with pytest.raises(RecipeError, match=r"accuracy\.images_per_step: is 20 with refresh 'exact'.*refresh: rolling"):
        load_recipe("digits_lt", [f"{stage}.accuracy.images_per_step=20"])
    load_recipe("digits_lt", [f"{stage}.accuracy.images_per_step=20", f"{stage}.accuracy.refresh=rolling"])
