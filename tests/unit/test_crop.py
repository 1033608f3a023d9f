"""Crop rectangles: where they lie, what they refuse, and how random ones are distributed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from loaders.order import crop as cropping
from loaders.order.crop import (
    CropSpec,
    center_boxes,
    crop_boxes,
    drawn_by_place,
    drawn_in_turn,
    random_resized_boxes,
)

sides = st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=20)


def as_arrays(shapes: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array(shapes, dtype=np.int64).T)


def in_turn(seed, count):
    return drawn_in_turn(np.random.default_rng(seed))


def by_place(seed, count):
    return drawn_by_place([seed], np.arange(count))


WAYS = pytest.mark.parametrize("draws", [in_turn, by_place])


@given(
    shapes=sides,
    kind=st.sampled_from(["none", "center", "in turn", "by place"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_every_box_is_a_non_empty_part_of_its_image(shapes, kind, seed):
    heights, widths = as_arrays(shapes)
    if kind in ("none", "center"):
        boxes = crop_boxes(CropSpec(kind, 8), heights, widths)
    else:
        draws = (in_turn if kind == "in turn" else by_place)(seed, len(heights))
        boxes = random_resized_boxes(heights, widths, (0.08, 1.0), (3 / 4, 4 / 3), draws)
    top, left, height, width = boxes.astype(np.int64).T
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= heights).all()
    assert (left + width <= widths).all()


@given(shapes=sides, ratio=st.floats(0.05, 1.0))
@settings(max_examples=100, deadline=None)
def test_center_box_is_the_rounded_down_central_square(shapes, ratio):
    heights, widths = as_arrays(shapes)
    for (height, width), box in zip(shapes, center_boxes(heights, widths, ratio), strict=True):
        side = max(int(ratio * min(height, width)), 1)
        assert box.tolist() == [(height - side) // 2, (width - side) // 2, side, side]


@WAYS
@pytest.mark.parametrize(("height", "width"), [(96, 128), (200, 90), (64, 64)])
def test_random_boxes_are_distributed_as_torchvisions(height, width, draws):
    scale, aspect, count = (0.08, 1.0), (3 / 4, 4 / 3), 4000
    torch.manual_seed(5)
    picture = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(picture, list(scale), list(aspect)) for _ in range(count)])
    sizes = np.full(count, height), np.full(count, width)
    ours = random_resized_boxes(*sizes, scale, aspect, draws(5, count)).astype(np.int64)
    for column, name in enumerate(["top", "left", "height", "width"]):
        assert ks_2samp(theirs[:, column], ours[:, column]).pvalue > 1e-3, name
    areas, aspects = (lambda box: box[:, 2] * box[:, 3]), (lambda box: box[:, 3] / box[:, 2])
    assert ks_2samp(areas(theirs), areas(ours)).pvalue > 1e-3
    assert ks_2samp(aspects(theirs), aspects(ours)).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(1000, 10), (10, 1000), (500, 3)])
def test_images_too_narrow_for_any_draw_get_torchvisions_fallback(height, width):
    scale, aspect = [0.9, 1.0], [3 / 4, 4 / 3]
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), scale, aspect)
    box = random_resized_boxes(np.array([height]), np.array([width]), tuple(scale), tuple(aspect), in_turn(0, 1))
    assert tuple(box[0]) == tuple(expected)


def as_it_was_drawn_first(heights, widths, scale, aspect, rng):
    """All images at a time, as orders of earlier versions were: their runs go on with the same rectangles."""
    boxes = cropping._fallback_boxes(heights, widths, aspect)
    pending = np.arange(len(heights))
    for _ in range(10):
        height, width, count = heights[pending], widths[pending], len(pending)
        area = height * width * rng.uniform(scale[0], scale[1], count)
        shape = np.exp(rng.uniform(np.log(aspect[0]), np.log(aspect[1]), count))
        w, h = (np.rint(np.sqrt(side)).astype(np.int64) for side in (area * shape, area / shape))
        down, across = rng.random(count), rng.random(count)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        places = [np.floor(down * (height - h + 1)), np.floor(across * (width - w + 1)), h, w]
        boxes[pending[fits]] = np.stack(places, axis=1).astype(np.int64)[fits]
        pending = pending[~fits]
    return boxes


def test_rectangles_drawn_in_turn_are_those_of_one_generator_whatever_is_drawn_at_a_time(monkeypatch):
    rng = np.random.default_rng(4)
    heights, widths = rng.integers(30, 500, (2, 1000))
    images = rng.permutation(1000)
    options = (0.3, 1.0), (3 / 4, 4 / 3)
    expected = as_it_was_drawn_first(heights[images], widths[images], *options, np.random.default_rng([3, 1, 2]))
    for piece in (7, 1 << 16):
        monkeypatch.setattr(cropping, "PIECE", piece)
        draws = drawn_in_turn(np.random.default_rng([3, 1, 2]))
        np.testing.assert_array_equal(random_resized_boxes(heights, widths, *options, draws, images), expected)


def test_rectangles_drawn_by_place_do_not_depend_on_what_else_is_drawn():
    heights, widths = np.random.default_rng(4).integers(30, 500, (2, 100))
    options = (0.3, 1.0), (3 / 4, 4 / 3)
    whole = random_resized_boxes(heights, widths, *options, by_place(1, 100))
    some = np.array([70, 3, 99])
    alone = random_resized_boxes(heights, widths, *options, drawn_by_place([1], some), some)
    np.testing.assert_array_equal(alone, whole[some])
    assert (random_resized_boxes(heights, widths, *options, by_place(2, 100)) != whole).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "centre", "size": 8}, "did you mean 'center'"),
        ({"kind": "center"}, "crop size 0"),
        ({"kind": "random_resized", "size": -1}, "crop size -1"),
        ({"kind": "center", "size": 8, "ratio": 1.5}, "crop ratio 1.5"),
        ({"kind": "random_resized", "size": 8, "scale": (0.5, 0.1)}, "crop scale"),
        ({"kind": "random_resized", "size": 8, "aspect": (0.0, 1.0)}, "crop aspect"),
    ],
)
def test_impossible_crops_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CropSpec(**arguments)


def test_no_crop_needs_one_size():
    with pytest.raises(ValueError, match="heights run from 4 to 5"):
        CropSpec("none").output_shape(np.array([4, 5]), np.array([4, 4]))
