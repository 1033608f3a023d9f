"""BatchNorm over the batches of all processes, with a forward-mode derivative.

torch's SyncBatchNorm has none, and refuses tensors on a CPU; the meta-gradient needs the one, tests the other.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist

# Public in timm, which does not say so in a way that type checkers read.
from timm.layers import BatchNormAct2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastlt.autograd import scaled_and_shifted
from fastlt.device.distributed import Reducer


class SumOverProcesses(torch.autograd.Function):
    """y = sum of x over processes, on each of them; backward and tangent are sums over processes as well.

    The gradient is that of the sum of all processes' objectives; the tangent supposes that all of them perturb their
    parameters alike. Every process has to call it in the same order, in all three directions.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    # torch's stub takes any number of arguments; a function of one input gets one.
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return SumOverProcesses.apply(gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return SumOverProcesses.apply(tangent)


def moments(x: Tensor, reducer: Reducer) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel over the batches of all processes: (C,) each.

    x: (N, C, ...), of the same shape on every process. One all-reduce of two numbers a channel and process: the moments
    of each process are put side by side, because E[x^2] - E[x]^2 would lose the variance where the mean is large.
    """
    variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    own = torch.stack([mean, variance])
    rows = [own if rank == reducer.rank else torch.zeros_like(own) for rank in range(reducer.world_size)]
    means, variances = SumOverProcesses.apply(torch.stack(rows, 1))
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


class Synchronised(_BatchNorm):
    """The base of the BatchNorm classes below; `synchronise_batch_norm` makes their instances.

    In training mode the statistics are those of all processes' batches, which have one size; the running ones are then
    the same everywhere, bit for bit. Moves them as nn.BatchNorm does. In eval mode nothing is communicated.
    """

    reducer: Reducer

    def forward(self, input: Tensor) -> Tensor:
        return self.normalised(input) if self.training else super().forward(input)

    def normalised(self, x: Tensor) -> Tensor:
        """x (N, C, ...) normalised, scaled and shifted, in its own dtype; statistics in float32 at least."""
        values = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        mean, variance = moments(values, self.reducer)
        if self.track_running_stats:
            count = values.numel() // values.shape[1] * self.reducer.world_size
            self._follow(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        factor = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            factor = factor * self.weight
        shift = -mean * factor if self.bias is None else self.bias - mean * factor
        return scaled_and_shifted(values, factor, shift).to(x.dtype)

    def _follow(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            share = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(unbiased_variance, share)


class SyncBatchNorm1d(Synchronised, nn.BatchNorm1d):
    pass


class SyncBatchNorm2d(Synchronised, nn.BatchNorm2d):
    pass


class SyncBatchNorm3d(Synchronised, nn.BatchNorm3d):
    pass


class SyncBatchNormAct2d(Synchronised, BatchNormAct2d):
    drop: nn.Module
    act: nn.Module

    # timm calls x what torch calls input.
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.act(self.drop(self.normalised(x))) if self.training else BatchNormAct2d.forward(self, x)


SYNCHRONISED: dict[type[_BatchNorm], type[Synchronised]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    # By timm's stub a mere module.
    cast("type[_BatchNorm]", BatchNormAct2d): SyncBatchNormAct2d,
}


def synchronise_batch_norm(model: nn.Module, reducer: Reducer) -> None:
    """Make every BatchNorm of `model`, in place, normalise with the batches of all processes.

    Parameters, buffers, names and hooks stay; what is synchronised already stays too. ValueError for a kind of
    BatchNorm that has no synchronised counterpart here, before anything is changed.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, Synchronised)]
    unknown = sorted({type(layer).__name__ for layer in layers} - {kind.__name__ for kind in SYNCHRONISED})
    if unknown:
        raise ValueError(
            f"sync_batch_norm: is true, but the model has {', '.join(unknown)}; "
            f"only {', '.join(kind.__name__ for kind in SYNCHRONISED)} can be synchronised. Set it to false"
        )
    for layer in layers:
        layer.__class__ = SYNCHRONISED[type(layer)]
        assert isinstance(layer, Synchronised)
        layer.reducer = reducer
