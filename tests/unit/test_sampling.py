"""The order of an epoch: what each sampling promises, for any labels."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.order import sampling as module
from loaders.order.sampling import (
    SAMPLINGS,
    effective_number_probabilities,
    epoch_order,
    shard,
    share_places,
    share_size,
)

labels_strategy = st.lists(st.integers(0, 8), min_size=1, max_size=300).map(lambda labels: np.array(labels))
seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@settings(max_examples=60)
@given(labels=labels_strategy, seed=seeds, epoch=st.integers(0, 500))
def test_an_epoch_has_as_many_draws_as_images_and_depends_on_seed_and_epoch_alone(sampling, labels, seed, epoch):
    order = epoch_order(labels, sampling=sampling, seed=seed, epoch=epoch)
    assert order.dtype == np.int32
    assert order.shape == labels.shape
    assert ((order >= 0) & (order < len(labels))).all()
    np.testing.assert_array_equal(order, epoch_order(labels, sampling=sampling, seed=seed, epoch=epoch))
    if len(labels) > 50:
        assert (order != epoch_order(labels, sampling=sampling, seed=seed, epoch=epoch + 1)).any()
        assert (order != epoch_order(labels, sampling=sampling, seed=seed + 1, epoch=epoch)).any()


def order_in_one_piece(labels, sampling, rng):
    """The orders of the first version, whose runs go on with them: every step on all images at a time."""
    count = len(labels)
    if sampling == "instance":
        return rng.permutation(count)
    if sampling == "effective_number":
        probabilities = effective_number_probabilities(np.bincount(labels))
        classes = rng.choice(len(probabilities), size=count, p=probabilities)
    else:
        row = 4 if sampling == "class_aware_4" else 1
        present, groups = np.unique(labels), -(-count // row)
        rounds = rng.permuted(np.tile(present, (-(-groups // len(present)), 1)), axis=1)
        classes = np.repeat(rounds.reshape(-1)[:groups], row)[:count]
    counts, drawn = np.bincount(labels, minlength=9), np.bincount(classes, minlength=9)
    cards = [
        (c, cycle, i)
        for c in range(9)
        for cycle in range(-(-drawn[c] // max(counts[c], 1)))
        for i in members(labels, c)
    ]
    keys = rng.random(len(cards))
    shuffled = sorted(zip(cards, keys, strict=True), key=lambda card: (*card[0][:2], card[1]))
    decks = {c: iter([i for (of, _, i), _ in shuffled if of == c]) for c in range(9)}
    return np.array([next(decks[c]) for c in classes])


def members(labels, c):
    return np.flatnonzero(labels == c).tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@settings(max_examples=40, deadline=None)
@given(labels=labels_strategy, seed=seeds, part=st.sampled_from([1, 7, 1 << 18]))
def test_an_order_is_the_same_whatever_is_worked_on_at_a_time(sampling, labels, seed, part):
    expected = order_in_one_piece(labels, sampling, np.random.default_rng(np.random.SeedSequence([seed, 2, 0])))
    with patch.object(module, "PART", part):
        found = epoch_order(labels, sampling=sampling, seed=seed, epoch=2)
    np.testing.assert_array_equal(found, expected)


@given(labels=labels_strategy, seed=seeds)
def test_instance_sampling_visits_each_image_once(labels, seed):
    order = epoch_order(labels, sampling="instance", seed=seed, epoch=3)
    assert sorted(order.tolist()) == list(range(len(labels)))


@given(labels=labels_strategy, seed=seeds)
def test_class_balanced_visits_each_class_once_a_round(labels, seed):
    drawn = labels[epoch_order(labels, sampling="class_balanced", seed=seed, epoch=0)]
    present = np.unique(labels)
    for start in range(0, len(drawn) - len(present) + 1, len(present)):
        assert sorted(drawn[start : start + len(present)].tolist()) == present.tolist()
    counts = np.bincount(drawn, minlength=9)[present]
    assert counts.max() - counts.min() <= 1


@given(labels=labels_strategy, seed=seeds)
def test_class_aware_4_visits_each_class_once_a_round_with_four_images_in_a_row(labels, seed):
    drawn = labels[epoch_order(labels, sampling="class_aware_4", seed=seed, epoch=2)]
    whole = drawn[: len(drawn) // 4 * 4].reshape(-1, 4)
    assert (whole == whole[:, :1]).all()
    assert len(set(drawn[len(whole) * 4 :].tolist())) <= 1
    groups, present = drawn[::4], np.unique(labels)
    for start in range(0, len(groups), len(present)):
        part = groups[start : start + len(present)].tolist()
        assert len(set(part)) == len(part)
        assert set(part) <= set(present.tolist())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_class_aware_4_gives_every_process_whole_groups_of_distinct_images(world_size):
    labels = np.repeat(np.arange(10), 40)
    order = epoch_order(labels, sampling="class_aware_4", seed=3, epoch=5)
    size = 32 // world_size
    for rank in range(world_size):
        own = shard(order, rank, world_size, drop_last=True, batch_size=size).reshape(-1, size // 4, 4)
        assert (labels[own] == labels[own[:, :, :1]]).all()
        assert all(len(set(group.tolist())) == 4 for batch in own for group in batch)


def test_class_aware_4_repeats_images_only_of_classes_that_have_too_few():
    labels = np.repeat([0, 1], [60, 3])
    order = epoch_order(labels, sampling="class_aware_4", seed=0, epoch=0)
    groups = order[:60].reshape(-1, 4)
    assert {len(set(g.tolist())) for g in groups if labels[g[0]] == 0} == {4}
    assert {len(set(g.tolist())) for g in groups if labels[g[0]] == 1} == {3}


@pytest.mark.parametrize("sampling", ["class_balanced", "effective_number", "class_aware_4"])
@settings(max_examples=60)
@given(labels=labels_strategy, seed=seeds)
def test_all_images_of_a_class_come_before_any_comes_again(sampling, labels, seed):
    order = epoch_order(labels, sampling=sampling, seed=seed, epoch=1)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        visits = order[labels[order] == c]
        for start in range(0, len(visits), len(members)):
            cycle = visits[start : start + len(members)].tolist()
            assert len(set(cycle)) == len(cycle)


def test_a_classs_list_is_reshuffled_when_it_is_used_up():
    labels = np.repeat([0, 1], [990, 10])
    order = epoch_order(labels, sampling="class_balanced", seed=0, epoch=0)
    cycles = order[labels[order] == 1].reshape(50, 10)
    assert len(np.unique(cycles, axis=0)) > 45


def test_every_image_of_a_class_is_equally_likely_to_come_first():
    labels = np.repeat([0, 1], [30, 5])
    first = [epoch_order(labels, sampling="class_balanced", seed=0, epoch=e) for e in range(2000)]
    heads = np.bincount([order[labels[order] == 1][0] - 30 for order in first], minlength=5)
    assert abs(heads - 400).max() < 90  # five standard deviations of a fair draw


def test_effective_number_is_between_instance_and_class_balanced():
    counts = np.array([5000, 500, 5])
    np.testing.assert_allclose(
        effective_number_probabilities(counts, beta=0.0 + 1e-12), counts / counts.sum(), rtol=1e-6
    )
    np.testing.assert_allclose(effective_number_probabilities(counts, beta=1 - 1e-9), np.full(3, 1 / 3), rtol=1e-4)
    slow = counts * (1 - 0.9999) / (1 - 0.9999**counts)
    np.testing.assert_allclose(effective_number_probabilities(counts), slow / slow.sum(), rtol=1e-9)
    assert effective_number_probabilities(np.array([3, 0, 4]))[1] == 0


def test_effective_number_draws_classes_at_its_rates():
    labels = np.repeat([0, 1, 2], [30_000, 3000, 30])
    order = epoch_order(labels, sampling="effective_number", seed=2, epoch=0)
    rates = np.bincount(labels[order]) / len(labels)
    expected = effective_number_probabilities(np.array([30_000, 3000, 30]))
    np.testing.assert_allclose(rates, expected, atol=5 * np.sqrt(0.25 / len(labels)))


def test_evaluation_keeps_split_order():
    labels = np.array([1, 0, 1])
    assert epoch_order(labels, sampling="instance", seed=9, epoch=9, shuffle=False).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="needs shuffle"):
        epoch_order(labels, sampling="class_balanced", seed=0, epoch=0, shuffle=False)
    with pytest.raises(ValueError, match="did you mean 'class_balanced'"):
        epoch_order(labels, sampling="class_balance", seed=0, epoch=0)


@given(st.integers(0, 500), st.integers(1, 7), st.integers(1, 20))
def test_training_shards_are_full_batches_of_one_common_order(count, world_size, batch_size):
    order = np.random.default_rng(0).permutation(count)
    shards = [shard(order, r, world_size, drop_last=True, batch_size=batch_size) for r in range(world_size)]
    steps = count // (batch_size * world_size)
    assert {len(part) for part in shards} == {steps * batch_size}
    for step in range(steps):
        together = np.concatenate([part[step * batch_size : (step + 1) * batch_size] for part in shards])
        start = step * batch_size * world_size
        assert together.tolist() == order[start : start + batch_size * world_size].tolist()


@given(st.integers(0, 500), st.integers(1, 7))
def test_evaluation_shards_cover_each_image_exactly_once(count, world_size):
    order = np.arange(count)
    shards = [shard(order, r, world_size, drop_last=False, batch_size=16) for r in range(world_size)]
    assert sorted(np.concatenate(shards).tolist()) == order.tolist()
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(images=st.integers(0, 200), world_size=st.integers(1, 5), drop_last=st.booleans(), batch_size=st.integers(1, 9))
def test_the_size_and_the_places_of_a_share_are_those_of_what_it_is_given(images, world_size, drop_last, batch_size):
    options = {"drop_last": drop_last, "batch_size": batch_size}
    for rank in range(world_size):
        share = shard(np.arange(images), rank, world_size, **options)
        assert share_size(images, rank, world_size, **options) == len(share)
        start = len(share) // 3
        places = share_places(start, len(share), rank, world_size, **options)
        np.testing.assert_array_equal(places, share[start:])
