"""Long-tailed subsets against published counts, and the properties every split must have."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.order.longtail import (
    apply_convention,
    class_members,
    holdout_per_class,
    largest_n_max,
    ldam_convention,
    longtail_counts,
    longtail_subset,
    paper_convention,
    subsample,
)


def cifar_labels(num_classes: int, per_class: int) -> np.ndarray:
    return np.random.default_rng(5).permutation(np.repeat(np.arange(num_classes), per_class))


@pytest.mark.parametrize(
    ("num_classes", "n_max", "imbalance_factor", "total"),
    [
        (10, 5000, 100, 12_406),
        (10, 5000, 50, 13_996),
        (10, 5000, 10, 20_431),
        (100, 500, 100, 10_847),
        (100, 500, 50, 12_608),
        (100, 500, 10, 19_573),
    ],
)
def test_published_sizes_of_cifar_lt(num_classes, n_max, imbalance_factor, total):
    assert longtail_counts(n_max, num_classes, imbalance_factor).sum() == total
    tail = ldam_convention(cifar_labels(num_classes, n_max), imbalance_factor, 10, num_classes)
    assert len(tail.train) == total


def test_the_papers_smallest_and_largest_classes():
    """Table 5 of the supplement: 49-2 images in the smallest class, 490 in the largest."""
    for imbalance_factor, smallest in ((10, 49), (200, 2)):
        labels = cifar_labels(100, 500)
        tail = paper_convention(labels, imbalance_factor, 10, 100)
        counts = np.bincount(labels[tail.train])
        assert (counts[0], counts[-1]) == (490, smallest)
    ten = cifar_labels(10, 5000)
    assert np.bincount(ten[paper_convention(ten, 100, 10, 10).train])[0] == 4990


def test_paper_convention_against_a_slow_reference():
    labels = cifar_labels(10, 60)
    tail = paper_convention(labels, 7, 10, 10)
    train, meta = [], []
    for c in range(10):
        members = [i for i, label in enumerate(labels) if label == c]
        meta += members[-10:]
        train += members[:-10][: int(50 * 7 ** (-c / 9))]
    assert tail.train.tolist() == sorted(train)
    assert tail.meta.tolist() == sorted(meta)
    assert tail.num_shared == 0


def test_ldam_convention_draws_what_the_global_generator_drew():
    labels = cifar_labels(10, 60)
    tail = ldam_convention(labels, 7, 10, 10)
    state = np.random.get_state()
    np.random.seed(0)
    train, meta = [], []
    for c in range(10):
        members = np.where(labels == c)[0]
        np.random.shuffle(members)
        train += members[: int(60 * (1 / 7) ** (c / 9))].tolist()
        meta += members[-10:].tolist()
    np.random.set_state(state)
    assert tail.train.tolist() == sorted(train)
    assert tail.meta.tolist() == sorted(meta)
    assert tail.num_shared == len(set(train) & set(meta)) == 10  # class 0 trains on all; class 1 on 48 of its 60
    assert "10 of 100 shared with train" in tail.provenance


@given(n_max=st.integers(1, 5000), num_classes=st.integers(1, 300), factor=st.floats(1, 5000))
def test_counts_fall_from_n_max_by_the_imbalance_factor(n_max, num_classes, factor):
    if n_max / factor < 1 and num_classes > 1:
        with pytest.raises(ValueError, match="leaves the last of"):
            longtail_counts(n_max, num_classes, factor * (1 + 1e-9))
        return
    counts = longtail_counts(n_max, num_classes, factor)
    assert counts.dtype == np.int64
    assert counts[0] == n_max
    assert (np.diff(counts) <= 0).all()
    if num_classes > 1:
        assert counts[-1] in (int(n_max / factor), round(n_max / factor))


@given(st.integers(1, 2000))
def test_an_imbalance_of_n_max_leaves_one_image(n_max):
    """Rounding must not lose it: 49 * 49**-1.0 is just below 1."""
    assert longtail_counts(n_max, 10, n_max)[-1] == 1


@pytest.mark.parametrize("factor", [0.5, 0, -1, float("nan")])
def test_an_imbalance_below_one_is_refused(factor):
    with pytest.raises(ValueError, match="must be 1"):
        longtail_counts(100, 10, factor)


@settings(max_examples=50)
@given(st.lists(st.integers(30, 400), min_size=2, max_size=40), st.floats(1, 25))
def test_the_largest_n_max_is_the_largest_that_fits(available, factor):
    available = np.array(available)
    n_max = largest_n_max(available, factor)
    assert (longtail_counts(n_max, len(available), factor) <= available).all()
    assert (longtail_counts(n_max + 1, len(available), factor) > available).any()


@settings(max_examples=50)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.integers(1, 5))
def test_held_out_images_are_the_last_of_each_class(labels, per_class):
    labels = np.array(labels)
    counts = np.bincount(labels, minlength=7)
    if (counts <= per_class).any():
        with pytest.raises(ValueError, match="--meta-per-class"):
            holdout_per_class(labels, per_class, range(7))
        return
    held, rest = holdout_per_class(labels, per_class, range(7))
    assert sorted([*held, *rest]) == list(range(len(labels)))
    assert (np.bincount(labels[held], minlength=7) == per_class).all()
    for c in range(7):
        assert held[labels[held] == c].min() > rest[labels[rest] == c].max()


def test_subset_takes_the_first_of_each_class_in_file_order():
    labels = np.array([1, 0, 1, 0, 1, 0])
    assert longtail_subset(labels, np.array([1, 2])).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="class 0 has 3 images, 4 are wanted"):
        longtail_subset(labels, np.array([4, 1]))


def test_subsample_makes_the_most_frequent_class_the_head():
    labels = np.repeat([0, 1, 2], [40, 400, 90])
    kept = np.bincount(labels[subsample(labels, 10, 3)])
    assert kept.tolist() == [28, 287, 90]  # n_max 287 is the largest for which 287 * 10**-0.5 is at most 90
    assert len(subsample(labels, None, 3)) == len(labels)


def test_an_existing_tail_is_reproduced_by_its_own_factor():
    labels = np.repeat(np.arange(100), longtail_counts(490, 100, 10))
    assert len(subsample(labels, 10, 100)) == len(labels)
    higher = np.bincount(labels[subsample(labels, 100, 100)])
    assert higher.tolist() == longtail_counts(490, 100, 100).tolist()


def test_members_are_in_file_order_and_complete():
    labels = np.array([2, 0, 2, 2, 0])
    assert [members.tolist() for members in class_members(labels, 4)] == [[1, 4], [], [0, 2, 3], []]


def test_a_misspelt_convention_is_refused():
    with pytest.raises(ValueError, match="did you mean 'paper'"):
        apply_convention("papers", cifar_labels(10, 60), 10, 10, 10)
