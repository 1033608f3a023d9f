"""The compiled loops compute what torch's operations do, in any shape and with any number of threads."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from fastlt.autograd import cpu_kernels as fused_loops

# One image, one pixel, one channel; odd numbers; several pieces of rows; more channels than a piece has elements.
SHAPES = [
    (2, 1, 1, 1),
    (5, 3),
    (1, 7, 3, 5),
    (33, 17, 9, 7),
    (6, 5, 61, 1),
    (9, fused_loops.PIECE + 1),
    (4, 2, 3, 3, 3),
]
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13}


def channels_inside(*shape, dtype, scale=1.0, shift=0.0):
    """Random values with the channels side by side in memory."""
    n, c, *rest = shape
    return (torch.randn(n, *rest, c, dtype=dtype) * scale + shift).movedim(-1, 1)


def batch_norm_problem(shape, dtype):
    """(dx, x, weight, dweight, dbias, mean, inverse_std) and a bias."""
    torch.manual_seed(sum(shape))
    dx, x = channels_inside(*shape, dtype=dtype, shift=0.3), channels_inside(*shape, dtype=dtype, scale=2.0, shift=1.0)
    weight, dweight, dbias, bias = (torch.randn(shape[1], dtype=dtype) for _ in range(4))
    _, mean, inverse_std = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, 1e-5)
    return (dx, x, weight, dweight, dbias, mean, inverse_std), bias


def assert_close(found, expected):
    dtype = found.dtype
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= ROUNDING[dtype] * (1 + expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [False, True])
def test_tangent_of_batch_norm_is_that_of_forward_mode_in_float64(shape, dtype, relu):
    arguments, bias = batch_norm_problem(shape, dtype)
    dx, x, weight, dweight, dbias = (t.double() for t in arguments[:5])

    def forward(x, weight, bias):
        return F.batch_norm(x, None, None, weight, bias, True)

    output, expected = torch.func.jvp(forward, (x, weight, bias.double()), (dx, dweight, dbias))
    assert fused_loops.fits(*arguments[:2])
    if not relu:
        assert_close(fused_loops.batch_norm_tangent(*arguments), expected)
        return
    output = output.relu().to(dtype).movedim(1, -1).contiguous().movedim(-1, 1)
    found = fused_loops.batch_norm_tangent(*arguments, output)
    assert_close(found, torch.where(output > 0, expected, 0))


@pytest.mark.parametrize("absent", ["weight", "dweight", "dbias"])
def test_what_is_none_is_a_weight_of_ones_or_no_tangent(absent):
    (dx, x, *vectors), _ = batch_norm_problem((3, 5, 4, 4), torch.float64)
    place = ["weight", "dweight", "dbias"].index(absent)
    with_none, without = list(vectors), list(vectors)
    with_none[place] = None
    without[place] = (torch.ones_like if absent == "weight" else torch.zeros_like)(vectors[place])
    found = fused_loops.batch_norm_tangent(dx, x, *with_none)
    assert torch.equal(found, fused_loops.batch_norm_tangent(dx, x, *without))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_rectified_batch_norm_is_batch_norm_and_relu(shape, dtype):
    (_, x, weight, _, _, mean, inverse_std), bias = batch_norm_problem(shape, dtype)
    for w, b in ((weight, bias), (None, None)):
        expected = F.batch_norm(x.double(), None, None, *(v if v is None else v.double() for v in (w, b)), True).relu()
        assert_close(fused_loops.rectified_batch_norm(x, w, b, mean, inverse_std), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("summed", [False, True])
def test_an_output_made_with_its_tangent_is_what_each_is_alone(shape, dtype, summed):
    (dx, x, weight, dweight, dbias, *statistics), bias = batch_norm_problem(shape, dtype)
    sums = [channels_inside(*shape, dtype=dtype) for _ in range(2 * summed)]
    y, dy = fused_loops.rectified_batch_norm_and_tangent(dx, x, weight, dweight, bias, dbias, *statistics, *sums)
    assert torch.equal(y, fused_loops.rectified_batch_norm(x, weight, bias, *statistics, *sums[:1]))
    tangent = fused_loops.batch_norm_tangent(dx, x, weight, dweight, dbias, *statistics)
    assert_close(dy, torch.where(y > 0, tangent + sums[1] if summed else tangent, 0).double())
    normalised = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
    assert_close(y, (normalised + sums[0] if summed else normalised).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_sum(shape, dtype):
    torch.manual_seed(0)
    a, b, output = (channels_inside(*shape, dtype=dtype) for _ in range(3))
    expected = torch.where(output > 0, a + b, 0)
    assert torch.equal(fused_loops.masked_sum(a, b, output), expected)
    assert torch.equal(fused_loops.masked_sum(a, a, output), torch.where(output > 0, a + a, 0))
    assert fused_loops.masked_sum(a, b, output, into=a) is a
    assert torch.equal(a, expected)


def test_values_that_are_not_finite_are_treated_as_by_torch():
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.0])
    ones = torch.ones(6, 1)
    tangent = torch.ops.aten.threshold_backward(ones + ones, special.view(6, 1), 0)
    assert torch.equal(fused_loops.masked_sum(ones, ones, special.view(6, 1)), tangent)
    again = fused_loops.rectified_batch_norm(special.view(6, 1), None, None, torch.zeros(1), torch.ones(1))
    torch.testing.assert_close(again, special.view(6, 1).relu(), equal_nan=True, rtol=0, atol=0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype, threads):
    arguments, bias = batch_norm_problem((33, 17, 19, 11), dtype)
    dx, x, weight, dweight, dbias, mean, inverse_std = arguments
    assert x.numel() > fused_loops.SMALLEST_SHARED

    def all_loops():
        output = fused_loops.rectified_batch_norm(x, weight, bias, mean, inverse_std)
        tangent = fused_loops.batch_norm_tangent(*arguments, output)
        both = [
            t
            for summands in ((), (dx, x))
            for t in fused_loops.rectified_batch_norm_and_tangent(
                dx, x, weight, dweight, bias, dbias, mean, inverse_std, *summands
            )
        ]
        return output, tangent, fused_loops.batch_norm_tangent(*arguments), fused_loops.masked_sum(dx, x, output), *both

    threads(1)
    alone = all_loops()
    for count in (2, 3, 8):
        threads(count)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(all_loops(), alone, strict=True))


def test_loops_run_from_any_thread_of_the_process(threads):
    threads(2)
    arguments, _ = batch_norm_problem((33, 17, 19, 11), torch.float32)
    expected, found = fused_loops.batch_norm_tangent(*arguments), []
    others = [
        threading.Thread(target=lambda: found.extend(fused_loops.batch_norm_tangent(*arguments) for _ in range(5)))
        for _ in range(3)
    ]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert len(found) == 15
    assert all(torch.equal(f, expected) for f in found)


def test_where_the_loops_do_not_fit():
    images = torch.randn(2, 3, 4, 4)
    inside = images.contiguous(memory_format=torch.channels_last)
    assert fused_loops.fits(inside, inside)
    assert fused_loops.fits(torch.randn(2, 3))
    assert not fused_loops.fits(images)
    assert not fused_loops.fits(inside, images)
    assert not fused_loops.fits(inside, inside.double())
    assert not fused_loops.fits(inside, inside[:1])
    assert not fused_loops.fits(inside[:, :2])
    assert not fused_loops.fits(inside.bfloat16())
    assert not fused_loops.fits(inside.to("meta"))
    assert not fused_loops.fits(torch.nn.Parameter(inside))
    assert not fused_loops.fits(torch.randn(3))
