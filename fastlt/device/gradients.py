"""Gradients averaged over processes while the backward pass that computes them runs on.

    autograd, from the last layer on  ->  bucket full  ->  sum over processes begins
    ...                                                      |
    the pass has ended  ->  the buckets that are left  ->  all sums have ended

A gradient goes into its bucket when it is whole. A bucket is on its way as soon as it is full and those before it are
on theirs, so all processes send the same buckets in the same order, whatever a process has no gradient of: it counts as
zero there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from fastlt.device.distributed import Reducer

FIRST_BUCKET_BYTES = 1 << 20  # so that the first is on its way early, as in DistributedDataParallel


def mean_gradients(
    reducer: Reducer,
    objective: Tensor,
    parameters: Sequence[Tensor],
    *,
    retain_graph: bool = False,
    added_to: Sequence[Tensor] | None = None,
    share: float = 1.0,
) -> list[Tensor]:
    """The gradient of `objective` (0-d), averaged over processes: one tensor a parameter, zeros where unused.

    parameters: leaves. added_to: what this process has already, one tensor a parameter; the mean is that of
    added_to + share * gradient. These tensors may be changed in place. Every process has to call it.
    """
    if reducer.world_size == 1:
        gradients = torch.autograd.grad(
            objective, parameters, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
        )
        if added_to is None:
            return list(gradients)
        torch._foreach_add_(list(added_to), gradients, alpha=share)  # pyright: ignore[reportPrivateImportUsage]  # public all the same
        return list(added_to)
    mean = _BucketedMean(reducer, parameters)

    def put(i: int, gradient: Tensor) -> Tensor:
        return mean.put(i, gradient if added_to is None else added_to[i].add(gradient, alpha=share))

    with _as_they_come(parameters, put):
        torch.autograd.grad(objective, parameters, retain_graph=retain_graph, allow_unused=True)
    return mean.finish(added_to)


def mean_of_each(
    reducer: Reducer, parameters: Sequence[Tensor], gradients: Iterable[tuple[int, Tensor]]
) -> list[Tensor]:
    """The gradients that come one by one, averaged over processes: one tensor a parameter.

    gradients: of each parameter its number and its gradient, the last parameter first.
    """
    if reducer.world_size == 1:
        found = dict(gradients)
        return [found[i] for i in range(len(parameters))]
    mean = _BucketedMean(reducer, parameters)
    for i, gradient in gradients:
        mean.put(i, gradient)
    return mean.finish()


@contextmanager
def _as_they_come(parameters: Sequence[Tensor], put: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Inside, a backward pass calls `put` with each parameter's number and its whole gradient, and takes the result."""
    hooks = [parameter.register_hook(partial(put, i)) for i, parameter in enumerate(parameters)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Bucket:
    """The gradients of some parameters in one piece of memory, each laid out as its parameter is.

    Parameters are alike on all processes; the layout of a gradient need not be. There is no memory before the first
    gradient comes.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters, self.missing = parameters, len(parameters)
        self.flat: Tensor | None = None
        self.views: list[Tensor] = []
        self.finish: Callable[[], object] | None = None

    def put(self, place: int, gradient: Tensor) -> Tensor:
        """Take the gradient of one of the parameters; returns the memory in which its mean will be."""
        if self.flat is None:
            sizes = [p.numel() for p in self.parameters]
            self.flat = self.parameters[0].new_empty(sum(sizes))
            self.views = list(map(_laid_out, self.flat.split(sizes), self.parameters))
        self.missing -= 1
        return self.views[place].copy_(gradient)

    def send(self, reducer: Reducer) -> None:
        """Begin the mean over processes; `finish` waits for it, and on a GPU its stream alone."""
        assert self.flat is not None
        assert not self.missing
        flat = self.flat.div_(reducer.world_size)
        if not reducer.compressed:
            self.finish = reducer.start_sum(flat)
            return
        low = flat.to(torch.bfloat16)
        wait = reducer.start_sum(low)
        self.finish = lambda: (wait(), flat.copy_(low))


class _BucketedMean:
    """Takes the gradients of `parameters` one by one, and returns their means over processes at the end.

    The last parameters fill the first bucket: a backward pass comes to them first. All have one dtype and are on one
    device.
    """

    def __init__(self, reducer: Reducer, parameters: Sequence[Tensor]) -> None:
        self.reducer, self.parameters = reducer, parameters
        self.buckets: list[_Bucket] = []
        self.places: dict[int, tuple[_Bucket, int]] = {}
        for members in _divided(parameters, reducer.bucket_bytes):
            bucket = _Bucket([parameters[i] for i in members])
            self.buckets.append(bucket)
            self.places |= {i: (bucket, place) for place, i in enumerate(members)}
        self.sent = 0
        self.missing = set(self.places)

    def put(self, i: int, gradient: Tensor) -> Tensor:
        """Take the gradient of parameter `i`; returns the memory in which its mean will be."""
        self.missing.remove(i)
        bucket, place = self.places[i]
        view = bucket.put(place, gradient)
        while self.sent < len(self.buckets) and not self.buckets[self.sent].missing:
            self.buckets[self.sent].send(self.reducer)
            self.sent += 1
        return view

    def finish(self, others: Sequence[Tensor] | None = None) -> list[Tensor]:
        """All means, one a parameter; for gradients that have not come, `others` or zeros count."""
        for i in sorted(self.missing):
            self.put(i, torch.zeros_like(self.parameters[i]) if others is None else others[i])
        for bucket in self.buckets:
            assert bucket.finish is not None, "all have been sent"
            bucket.finish()
        return [bucket.views[place] for _, (bucket, place) in sorted(self.places.items())]


def _divided(parameters: Sequence[Tensor], bucket_bytes: int) -> list[list[int]]:
    """The numbers of the parameters, from the last to the first, in the buckets that they fill; the first is small."""
    buckets: list[list[int]] = []
    room = 0
    for i, parameter in reversed(list(enumerate(parameters))):
        size = parameter.numel() * parameter.element_size()
        if not buckets or (size > room and buckets[-1]):
            room = min(FIRST_BUCKET_BYTES, bucket_bytes) if not buckets else bucket_bytes
            buckets.append([])
        buckets[-1].append(i)
        room -= size
    return buckets


def _laid_out(flat: Tensor, like: Tensor) -> Tensor:
    """Contiguous memory in the shape and, where it has no gaps, the layout of another tensor."""
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return flat.as_strided(like.shape, like.stride(), flat.storage_offset())
    return flat.view(like.shape)
