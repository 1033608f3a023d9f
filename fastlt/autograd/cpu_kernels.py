"""Loops over activations that are several passes over memory as torch's operations: compiled by numba, run by torch.

What stands between two convolutions does little arithmetic: it takes as long as memory takes. numba compiles each loop
to a plain function, and the OpenMP runtime that torch itself runs on calls it, once in each of torch's threads. With a
pool of its own (numba's `prange`) threads of one pool wait for cores on which those of the other spin: with numba's TBB
layer nothing was gained, and its OpenMP layer is a second copy of that runtime.

`fits` says where they can be used. Elsewhere, callers use torch's operations, which compute the same.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PIECE = 16384  # elements that are summed up one after the other; the sums of the pieces are added in float64
WIDE = 128  # elements in an inner loop that adds nothing up: with 16 channels, it would end as it gets going
SMALLEST_SHARED = 32768  # elements; fewer are not worth waking threads for (as in torch's own loops)
REALS = {torch.float32: np.float32, torch.float64: np.float64}


def fits(*tensors: Tensor) -> bool:
    """Whether the loops take these activations: (N, C, ...) of one shape, in memory with the channels side by side.

    That is channels_last, and (N, C) as it usually is; in float32 or float64, on a CPU. False also on a system where
    torch does not run on OpenMP with GNU's interface (Windows, macOS), and where numba is not installed.
    """
    first = tensors[0]
    return (
        all(type(t) is Tensor and t.shape == first.shape and t.dtype == first.dtype for t in tensors)
        and first.device.type == "cpu"
        and first.dtype in REALS
        and first.dim() > 1
        and all(t.movedim(1, -1).is_contiguous() for t in tensors)
        and _runtime() is not None
    )


def batch_norm_tangent(
    dx: Tensor,
    x: Tensor,
    weight: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    output: Tensor | None = None,
) -> Tensor:
    """The tangent of BatchNorm with the batch's statistics, and of a ReLU behind it, in two passes over memory.

    dx, x: (N, C, ...), for which `fits`. output: of the ReLU, `fits` with x; None for none. All others: (C,); None for
    a weight of ones, and for tangents of constants. The result is a new tensor, with zeros where output <= 0.
    With x^ = (x - mean) / std: dy = (w / std) (dx - mean(dx) - x^ mean(dx x^)) + dw x^ + db.
    """
    what, y = (_AS_IT_IS, dx) if output is None else (_MASKED, output)
    return _combined(what, dx, x, weight, dweight, None, dbias, mean, inverse_std, dx, dx, y)


def rectified_batch_norm_and_tangent(
    dx: Tensor,
    x: Tensor,
    weight: Tensor | None,
    dweight: Tensor | None,
    bias: Tensor | None,
    dbias: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    summand: Tensor | None = None,
    dsummand: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rectified_batch_norm` and its tangent, new tensors, in the two passes of `batch_norm_tangent`.

    summand, dsummand: `fits` with x, or None, both.
    """
    y = torch.empty_like(x)
    what, *summands = (_RECTIFIED, dx, dx) if summand is None else (_SUMMED, summand, dsummand)
    return y, _combined(what, dx, x, weight, dweight, bias, dbias, mean, inverse_std, *summands, y)


def rectified_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    summand: Tensor | None = None,
) -> Tensor:
    """max(0, weight x^ + bias + summand) in one pass over memory, as a new tensor.

    summand: `fits` with x; None for none. The others are as for `batch_norm_tangent`.
    """
    vectors = _vectors(x, weight, bias, mean, inverse_std)
    y = torch.empty_like(x)
    _run("rectify", (*_sizes(x), summand is not None), x, x if summand is None else summand, *vectors, y)
    return y


def masked_sum(a: Tensor, b: Tensor, output: Tensor, into: Tensor | None = None) -> Tensor:
    """a + b with zeros where output <= 0, in one pass over memory; all (N, C, ...), for which `fits`.

    into: what is overwritten, which may be a or b; None for a new tensor.
    """
    into = torch.empty_like(a) if into is None else into
    _run("masked_sum", (a.numel(),), a, b, output, into)
    return into


# What `combine` does besides the tangent: nothing; masks it by the output of a ReLU; makes this output; or makes it as
# that of a sum.
_AS_IT_IS, _MASKED, _RECTIFIED, _SUMMED = range(4)


def _combined(what: int, dx: Tensor, x: Tensor, weight, dweight, bias, dbias, mean, inverse_std, z, dz, y) -> Tensor:
    rows, channels, _ = sizes = _sizes(x)
    vectors = _vectors(x, weight, dweight, bias, dbias, mean, inverse_std)
    piece = max(1, PIECE // channels)
    partial = x.new_empty(-(-rows // piece), 2, channels)
    _run("sums", (rows, channels, piece), dx, x, vectors[-2], partial)
    dy = torch.empty_like(dx)
    _run("combine", (*sizes, len(partial), what), dx, x, partial, *vectors, z, dz, y, dy)
    return dy


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Rows, channels, and how many rows, if they are short, are taken as one where they are nothing to each other."""
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    return rows, channels, math.gcd(rows, max(1, WIDE // channels))


def _vectors(x: Tensor, weight: Tensor | None, *others: Tensor | None) -> list[Tensor]:
    """(C,) each, in the type of x; ones for a weight that is None, and zeros for the others."""
    vectors = [x.new_ones(x.shape[1]) if weight is None else weight]
    vectors += [x.new_zeros(x.shape[1]) if v is None else v for v in others]
    return [v if v.dtype == x.dtype and v.is_contiguous() else v.to(x.dtype).contiguous() for v in vectors]


def _run(name: str, sizes: tuple[int, ...], *tensors: Tensor) -> None:
    """Run a loop in all of torch's threads; the first of the tensors says whether it is worth that."""
    loop = _loops(tensors[0].dtype)[name]
    numbers = (ctypes.c_int64 * len(sizes))(*sizes)
    arguments = (ctypes.c_void_p * (1 + len(tensors)))(
        ctypes.addressof(numbers), *[tensor.data_ptr() for tensor in tensors]
    )
    # Either everything that torch has, or this thread alone: a team of another size would end threads of torch's pool.
    threads = torch.get_num_threads() if tensors[0].numel() >= SMALLEST_SHARED else 1
    if threads == 1:
        loop.alone(arguments)
    else:
        _runtime().parallel(loop.address, arguments, threads, 0)


class _Runtime(NamedTuple):
    """Functions of the OpenMP runtime that torch runs on.

    parallel: (address of a C function, its argument, threads, 0), calls it once in each thread of a team. thread,
    threads: the number of a thread and how many there are; 0 and 1 outside.
    """

    parallel: Callable[[int, ctypes.Array, int, int], None]
    thread: Callable[[], int]
    threads: Callable[[], int]


@functools.cache
def _runtime() -> _Runtime | None:
    """None where there is none with GNU's interface (which Intel's and LLVM's have as well on Linux), or no numba."""
    if sys.platform != "linux" or not _numba_works():
        return None
    # Where torch's own references to it are resolved: torch loads it for the whole process.
    process = ctypes.CDLL(None)
    try:
        parallel, most = process.GOMP_parallel, process.omp_get_max_threads
        thread, threads = process.omp_get_thread_num, process.omp_get_num_threads
    except AttributeError:
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    for function in (most, thread, threads):
        function.argtypes, function.restype = [], ctypes.c_int
    # Another runtime than torch's would not know what torch has set.
    return _Runtime(parallel, thread, threads) if most() == torch.get_num_threads() else None


def _numba_works() -> bool:
    try:
        import numba  # here, for it takes a moment
    except ImportError:
        return False
    return not numba.config.DISABLE_JIT


class _Loop(NamedTuple):
    """compiled: what keeps the code in memory. alone: calls it in this thread. address: of the code."""

    compiled: Any
    alone: Callable[[ctypes.Array], None]
    address: int


@functools.cache
def _loops(dtype: torch.dtype) -> dict[str, _Loop]:
    """The compiled loops for one type, by name.

    Compiled once a process, in one to two seconds, by which its first meta-step takes longer.

    Each takes a pointer to pointers: to int64 sizes, and to the tensors in the order in which `_run` is given them.
    Work is cut into pieces by the sizes alone, and each piece is done by one thread: results do not depend on how many
    there are.
    """
    from numba import carray, cfunc, njit, types

    real, runtime = REALS[dtype], _runtime()
    thread, threads = runtime.thread, runtime.threads
    # `contract`: a product and a sum may become one instruction. NaN and infinity are treated as everywhere.
    compiled = cfunc(types.void(types.CPointer(types.voidptr)), fastmath={"contract"}, error_model="numpy")

    @njit(inline="always")
    def share(count):
        """The part of `count` things that this thread does, from, to."""
        me, all_of_us = thread(), threads()
        return me * count // all_of_us, (me + 1) * count // all_of_us

    @compiled
    def sums(pointers):
        """Of u and u (x - mean), channel by channel, for each piece of rows."""
        sizes = carray(pointers[0], 3, np.int64)
        rows, channels, piece = sizes[0], sizes[1], sizes[2]
        pieces = -(-rows // piece)
        u, x = carray(pointers[1], (rows, channels), real), carray(pointers[2], (rows, channels), real)
        mean, partial = carray(pointers[3], channels, real), carray(pointers[4], (pieces, 2, channels), real)
        start, end = share(pieces)
        for k in range(start, end):
            first, last = k * piece, min(rows, (k + 1) * piece)
            u_piece, x_piece, ours = u[first:last], x[first:last], partial[k]
            ours[:] = 0
            for i in range(last - first):
                for c in range(channels):
                    ours[0, c] += u_piece[i, c]
                    ours[1, c] += u_piece[i, c] * (x_piece[i, c] - mean[c])

    @njit(inline="always")
    def repeated(vectors, channels):
        """Fill the rest of each vector with repetitions of its first values."""
        for k in range(vectors.shape[0]):
            for c in range(channels, vectors.shape[1]):
                vectors[k, c] = vectors[k, c - channels]

    @njit(inline="always")
    def affine(weight, bias, mean, inverse_std, channels, out):
        """BatchNorm as a factor of x and what is added."""
        for c in range(channels):
            out[0, c] = np.float64(weight[c]) * inverse_std[c]
            out[1, c] = bias[c] - np.float64(weight[c]) * inverse_std[c] * mean[c]
        repeated(out, channels)

    @compiled
    def combine(pointers):
        """dy = factor_u u + factor_x x + shift + dz, zero where y is not positive; y: given, or made here, with z."""
        sizes = carray(pointers[0], 5, np.int64)
        rows, channels, together, pieces, what = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
        partial = carray(pointers[3], (pieces, 2, channels), real)
        weight, dweight = carray(pointers[4], channels, real), carray(pointers[5], channels, real)
        bias, dbias = carray(pointers[6], channels, real), carray(pointers[7], channels, real)
        mean, inverse_std = carray(pointers[8], channels, real), carray(pointers[9], channels, real)
        wide = channels * together
        # Each thread has all of them: they are less than the work of starting threads once more.
        factors, through = np.empty((3, wide), real), np.empty((2, wide), real)
        affine(weight, bias, mean, inverse_std, channels, through)
        for c in range(channels):
            sum_u, sum_ux = 0.0, 0.0
            for k in range(pieces):
                sum_u += partial[k, 0, c]
                sum_ux += partial[k, 1, c]
            through_u = np.float64(weight[c]) * inverse_std[c]
            through_x = inverse_std[c] * (dweight[c] - through_u * inverse_std[c] * (sum_ux / rows))
            factors[0, c] = through_u
            factors[1, c] = through_x
            factors[2, c] = dbias[c] - through_u * (sum_u / rows) - through_x * mean[c]
        repeated(factors, channels)
        shape, (start, end) = (rows // together, wide), share(rows // together)
        u, x = carray(pointers[1], shape, real)[start:end], carray(pointers[2], shape, real)[start:end]
        z, dz = carray(pointers[10], shape, real)[start:end], carray(pointers[11], shape, real)[start:end]
        y, dy = carray(pointers[12], shape, real)[start:end], carray(pointers[13], shape, real)[start:end]
        for i in range(end - start):
            if what == _AS_IT_IS:
                for c in range(wide):
                    dy[i, c] = factors[0, c] * u[i, c] + factors[1, c] * x[i, c] + factors[2, c]
            elif what == _MASKED:
                for c in range(wide):
                    value = factors[0, c] * u[i, c] + factors[1, c] * x[i, c] + factors[2, c]
                    dy[i, c] = real(0) if y[i, c] <= 0 else value
            elif what == _SUMMED:
                for c in range(wide):
                    output = through[0, c] * x[i, c] + through[1, c] + z[i, c]
                    value = factors[0, c] * u[i, c] + factors[1, c] * x[i, c] + factors[2, c] + dz[i, c]
                    y[i, c] = real(0) if output <= 0 else output
                    dy[i, c] = real(0) if output <= 0 else value
            else:
                for c in range(wide):
                    output = through[0, c] * x[i, c] + through[1, c]
                    value = factors[0, c] * u[i, c] + factors[1, c] * x[i, c] + factors[2, c]
                    y[i, c] = real(0) if output <= 0 else output
                    dy[i, c] = real(0) if output <= 0 else value

    @compiled
    def rectify(pointers):
        """y = max(0, BatchNorm of x + z); z: where it is asked for."""
        sizes = carray(pointers[0], 4, np.int64)
        rows, channels, together, summed = sizes[0], sizes[1], sizes[2], sizes[3]
        weight, bias = carray(pointers[3], channels, real), carray(pointers[4], channels, real)
        mean, inverse_std = carray(pointers[5], channels, real), carray(pointers[6], channels, real)
        wide = channels * together
        through = np.empty((2, wide), real)
        affine(weight, bias, mean, inverse_std, channels, through)
        shape, (start, end) = (rows // together, wide), share(rows // together)
        x, z = carray(pointers[1], shape, real)[start:end], carray(pointers[2], shape, real)[start:end]
        y = carray(pointers[7], shape, real)[start:end]
        for i in range(end - start):
            if summed:
                for c in range(wide):
                    value = through[0, c] * x[i, c] + through[1, c] + z[i, c]
                    y[i, c] = real(0) if value <= 0 else value
            else:
                for c in range(wide):
                    value = through[0, c] * x[i, c] + through[1, c]
                    y[i, c] = real(0) if value <= 0 else value

    @compiled
    def masked_sum(pointers):
        """y = a + b, zero where the mask is not positive."""
        count = carray(pointers[0], 1, np.int64)[0]
        start, end = share(count)
        a, b = carray(pointers[1], count, real)[start:end], carray(pointers[2], count, real)[start:end]
        mask, y = carray(pointers[3], count, real)[start:end], carray(pointers[4], count, real)[start:end]
        for i in range(end - start):
            value = a[i] + b[i]
            y[i] = real(0) if mask[i] <= 0 else value

    loops = {"sums": sums, "combine": combine, "rectify": rectify, "masked_sum": masked_sum}
    return {name: _Loop(loop, loop.ctypes, loop.address) for name, loop in loops.items()}
