"""Reductions over processes: one flat all-reduce for a list of tensors, nothing at all in a single process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 << 20  # of gradients that are reduced together, as in DistributedDataParallel


@dataclass(frozen=True)
class Reducer:
    """Sums and averages tensors in place over `world_size` processes, of which this is number `rank`.

    The step reduces its own gradients instead of wrapping the model in DistributedDataParallel: a forward-mode
    derivative does not pass through that wrapper, and a meta-step has several gradients. `fastlt.device.gradients`
    reduces them while they are computed.

    compressed: whether gradients are communicated in bfloat16. bucket_bytes: of gradients that are reduced together.
    """

    rank: int = 0
    world_size: int = 1
    compressed: bool = False
    bucket_bytes: int = BUCKET_BYTES

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over processes. All have one dtype and are on one device."""
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        offset = 0
        for t in tensors:
            t.copy_(flat[offset : offset + t.numel()].view_as(t))
            offset += t.numel()

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to replace a contiguous tensor by its sum over processes; what is returned waits for it.

        These sums keep their order with each other, on all processes, and with nothing else that is communicated: a
        backward pass may come to a bucket of gradients sooner or later than to a collective of its own.
        """
        work = dist.all_reduce(tensor, group=_group_of_gradients(), async_op=True)
        assert work is not None, "this process is in the group"

        def wait() -> None:  # where a broken connection is noticed, see `fastlt.device.peers`
            work.wait()

        return wait

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each floating-point tensor by its mean over processes."""
        if self.world_size == 1 or not tensors:
            return
        torch._foreach_div_(list(tensors), self.world_size)
        self.sum_(tensors)

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, concatenated along the first axis in the order of ranks; all have one shape."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def gather_with_gradient(self, tensor: Tensor) -> Tensor:
        """As `gather`, differentiable: each process's part gets the gradients of the losses of all processes, summed.

        Every process has to run the backward pass. With `mean_` over the parameters' gradients, processes then descend
        the mean of their losses as one process does that has the whole batch.
        """
        return tensor if self.world_size == 1 else _Gather.apply(tensor, self)

    def mine(self, gathered: Tensor) -> Tensor:
        """This process's part of what `gather` returned."""
        return gathered.chunk(self.world_size)[self.rank]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reducer: Reducer) -> Tensor:
        ctx.reducer = reducer
        return reducer.gather(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        gradient = grad_outputs[0].clone()
        ctx.reducer.sum_([gradient])
        return ctx.reducer.mine(gradient), None


# Known weakly: `destroy_process_group` ends it.
_gradients: ReferenceType[dist.ProcessGroup] | None = None


def _group_of_gradients() -> dist.ProcessGroup:
    """All processes, beside the group in which everything else is communicated; made when first asked for."""
    global _gradients
    group = None if _gradients is None else _gradients()
    if group is None:
        group = dist.new_group()
        assert isinstance(group, dist.ProcessGroup), "every process is in it"
        _gradients = ref(group)
    return group
