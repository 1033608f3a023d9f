"""The meta set of each process: its share is read once, and above a budget it is decoded slice by slice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from short_runs import RECIPE, STAGE, comparable, make, stop_after
from test_class_accuracy import CLASSES, PER_CLASS, RIGHT, Thermometer, meta_set

from fastlt.device.distributed import Reducer
from fastlt.meta.bounded_accuracy import BoundedAccuracy
from fastlt.meta.class_accuracy import ClassAccuracy, stratified_order
from fastlt.meta.streamed_accuracy import StreamedAccuracy
from fastlt.recipe import load_recipe
from fastlt.run import loading
from fastlt.run.loading import read_share, whole_split
from fastlt.run.preflight import prepare
from fastlt.run.stopping import Interrupted
from loaders.stored.beton import Beton


@pytest.mark.parametrize("backend", ["resident", "ffcv"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_share_is_that_of_the_whole_split(digits_words, backend, rank):
    context = prepare(load_recipe(RECIPE, [*digits_words, f"data.loader={backend}"]))
    everything = whole_split(context, "meta")
    order = stratified_order(everything.labels)
    share = read_share(replace(context, reducer=Reducer(rank, 3)), "meta", order)
    assert torch.equal(share, everything.images[order[rank::3]])
    assert share.is_contiguous(memory_format=torch.channels_last)


def test_a_large_share_comes_through_a_loader_that_keeps_no_pixels(digits_words, monkeypatch):
    context = prepare(load_recipe(RECIPE, [*digits_words, "data.loader=auto"]))
    opened, make_loader = [], loading.make_loader

    def noted(*arguments, backend, **options):
        opened.append(backend)
        return make_loader(*arguments, backend=backend, **options)

    monkeypatch.setattr(loading, "make_loader", noted)
    order = stratified_order(torch.from_numpy(context.dataset.labels("meta")))
    small = read_share(context, "meta", order)
    monkeypatch.setattr(loading, "RESIDENT_BYTES", 0)
    assert torch.equal(read_share(context, "meta", order), small)
    assert opened == ["auto", "ffcv"]


def test_a_share_that_memory_has_no_room_for_is_refused_with_the_way_out(digits_words, monkeypatch):
    monkeypatch.setattr(loading, "free_share", lambda device, processes: 100)
    with pytest.raises(ValueError, match=r"refresh is 'exact'.* 0\.0 MiB of memory.*images_per_step"):
        prepare(load_recipe(RECIPE, digits_words))
    bounded = [f"{STAGE}.accuracy.refresh=rolling", f"{STAGE}.accuracy.images_per_step=9"]
    context = prepare(load_recipe(RECIPE, [*digits_words, *bounded]))
    assert loading.is_streamed(context, context.recipe.stages["end_to_end"])


def test_no_image_of_another_process_is_read(digits_words, monkeypatch):
    context = prepare(load_recipe(RECIPE, digits_words))
    labels, read, image = torch.from_numpy(context.dataset.labels("meta")), [], Beton.image
    monkeypatch.setattr(Beton, "image", lambda self, i: read.append(i) or image(self, i))
    order = stratified_order(labels)
    read_share(replace(context, reducer=Reducer(1, 3)), "meta", order)
    assert sorted(read) == sorted(order[1::3].tolist())


def test_accuracies_of_a_share_that_is_read_are_those_of_the_whole_set():
    images, labels = meta_set(RIGHT)
    for rank in range(3):
        options = {"prepare": lambda x: x, "reducer": Reducer(rank, 3)}
        given = ClassAccuracy(images, labels, CLASSES, **options)
        read = ClassAccuracy(lambda order, rank=rank: images[order[rank::3]], labels, CLASSES, **options)
        assert torch.equal(given.images, read.images)
        assert torch.equal(given.labels, read.labels)


class Slices:
    """Slices of a meta set in memory; counts where reading began anew."""

    def __init__(self, images):
        self.images, self.begun, self.read = images, [], 0

    def __call__(self, index, size):
        assert len(index) % size == 0
        slices = self.images[index].split(size)

        def endless(start):
            self.begun.append(start)
            while True:
                self.read += 1
                yield slices[start % len(slices)]
                start += 1

        return endless


def streamed(slices, labels, **options):
    return StreamedAccuracy(slices, labels, CLASSES, image_size=4, prepare=lambda x: x, images_per_step=9, **options)


def both(**options):
    images, labels = meta_set(RIGHT)
    slices = Slices(images)
    kept = BoundedAccuracy(images, labels, CLASSES, prepare=lambda x: x, images_per_step=9, **options)
    return kept, streamed(slices, labels, **options), slices


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"reducer": Reducer(0, 1), "window": 11}])
def test_slices_that_are_decoded_give_the_accuracies_of_images_in_memory(options):
    kept, decoded, slices = both(**options)
    model = Thermometer()
    for call in range(30):
        model.shift = call // 11
        assert torch.equal(kept.update(model), decoded.update(model)), call
    assert (slices.begun, slices.read) == ([0], 30)
    assert len(decoded.images) == len(decoded.place)


def test_another_model_is_scored_on_all_slices_and_the_round_goes_on():
    kept, decoded, slices = both()
    model = Thermometer()
    for _ in range(3):
        for accuracy in (kept, decoded):
            accuracy.update(model)
    assert decoded.of(Thermometer()).tolist() == pytest.approx([right / PER_CLASS for right in RIGHT])
    model.shift = 1
    for _ in range(9):
        assert torch.equal(kept.update(model), decoded.update(model))
    assert slices.begun == [0, 0, 3]


def test_a_round_is_continued_where_it_was_saved():
    kept, decoded, _ = both()
    model = Thermometer()
    for _ in range(12):
        for accuracy in (kept, decoded):
            accuracy.update(model)
    again = Slices(meta_set(RIGHT)[0])
    other = streamed(again, meta_set(RIGHT)[1])
    other.load_state_dict(decoded.state_dict())
    model.shift = 2
    for _ in range(9):
        assert torch.equal(kept.update(model), other.update(model))
    assert again.begun == [12]


def test_a_replay_finds_its_images_in_place():
    """What was captured is replayed with the memory of then: `fetch` fills it before."""
    _, decoded, slices = both()
    memory = decoded.images.data_ptr()
    for call in range(10):
        decoded.fetch()
        decoded.fetch()
        assert slices.read == call + 1
        assert decoded.images.data_ptr() == memory
        seen = decoded.images[:, 1, 0, 0].long()
        assert torch.equal(seen, decoded.mine[decoded.place])
        decoded.advance()


BOUNDED = [f"{STAGE}.accuracy.refresh=rolling", f"{STAGE}.accuracy.images_per_step=9", "data.loader=ffcv"]


def test_a_run_whose_meta_set_stays_encoded_is_the_run_with_it_in_memory(digits_words, monkeypatch, capsys):
    words = [*digits_words, *BOUNDED]
    make(words, "name=memory").fit()
    assert "9 of 100 meta images are scored in an iteration; no result is older than 12" in capsys.readouterr().out
    monkeypatch.setattr(loading, "RESIDENT_SHARE", 0)
    trainer = make(words, "name=encoded")
    trainer.fit()
    assert "the meta set stays encoded" in capsys.readouterr().out
    with pytest.raises(Interrupted):
        stop_after(make(words, "name=stopped"), 5).fit()
    make(words, "name=stopped").fit()
    runs = trainer.folder.parent
    states = [comparable(runs / name) for name in ("memory", "encoded", "stopped")]
    for state in states:
        state.pop("recipe")
    assert leaves(states[0]) == leaves(states[1]) == leaves(states[2])


def leaves(state, where=""):
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, one in items for k, v in leaves(one, f"{where}.{key}").items()}
    return {where: (state.dtype, state.numpy().tobytes()) if isinstance(state, torch.Tensor) else state}
