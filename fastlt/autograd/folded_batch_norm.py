"""Evaluation passes without BatchNorm: where one directly follows a convolution, its affine map goes into the weights.

In eval mode BatchNorm is y = x * g / sqrt(var + eps) + (b - mean * g / sqrt(var + eps)), channel by channel, so
BatchNorm(conv(x, W)) is one convolution with other weights and a bias. The network that is trained stays as it is: the
weights are exchanged while they are on their way to the operation, not in the module, so that nothing has to be put
back, and any model works; all other operations run as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlt.autograd.rules import ForwardChangedError

# Operations (input, weight, bias, ...) that are linear in weight and bias, with the output channels first in both.
LINEAR_MAPS = (F.conv1d, F.conv2d, F.conv3d, F.linear)
# What reads a tensor's shape and not its values (properties are told apart by what they return).
SHAPE_READERS = (Tensor.dim, Tensor.size)


@dataclass(frozen=True)
class Pair:
    """A linear map and the BatchNorm behind it: the model's own tensors, so that folding always sees the latest values.

    position: of the map among the calls of LINEAR_MAPS in a forward pass. bias, scale and shift are constants of ours
    where the model has none.
    """

    position: int
    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    scale: Tensor
    shift: Tensor
    eps: float


class FoldedForward:
    """Evaluation passes of `model` with BatchNorm folded: `with folded.weights(): logits = folded(images)`.

    model: in eval mode, without gradient, in every call, the first included; never changed.
    example: an input of one image, (1, 3, H, W), which goes through the model once to find the pairs.
    A model that does not do the same in every pass is run as usual as soon as that shows.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = model
        self.pairs = find_pairs(model, example)
        self._folded: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Inside, passes use the parameters and statistics as they were on entry.

        Holds one more copy of the weights of the folded convolutions meanwhile.
        """
        self._folded = fold(self.pairs) if self.pairs else []
        try:
            yield
        finally:
            self._folded = []

    def __call__(self, images: Tensor) -> Tensor:
        """What `model(images)` returns, up to rounding."""
        if not self.pairs:
            return self.model(images)
        mode = _Fold(self.pairs, self._folded)
        try:
            with mode:
                output = self.model(images)
            mode.finish()
            return output
        except ForwardChangedError:
            self.pairs = []
            return self.model(images)


def find_pairs(model: nn.Module, example: Tensor) -> list[Pair]:
    """The linear maps of a forward pass whose result is read by one BatchNorm and by nothing else.

    Weights that the model computes from its parameters (weight standardisation) are left alone, and so is BatchNorm
    that normalises with the batch: the pair would not be a fixed affine map of parameters.
    """
    search = _Search()
    with search:
        output = model(example)
    search.read_by(None, output)
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    pairs = [found.pair(own) for found in search.found.values()]
    return [pair for pair in pairs if pair is not None]


def fold(pairs: list[Pair]) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of the one linear map that does the work of each pair."""
    with torch.no_grad():
        # A few calls for the whole network, not half a dozen for each pair: 1.5 ms for the 31 pairs of ResNet-32.
        variances = torch._foreach_add([p.variance for p in pairs], [p.eps for p in pairs])
        factors = torch._foreach_div([p.scale for p in pairs], torch._foreach_sqrt(variances))
        columns = [f.view(-1, *[1] * (p.weight.dim() - 1)) for f, p in zip(factors, pairs, strict=True)]
        weights = torch._foreach_mul([p.weight for p in pairs], columns)
        centred = torch._foreach_sub([p.bias for p in pairs], [p.mean for p in pairs])
        biases = torch._foreach_addcmul([p.shift for p in pairs], centred, factors)
    return list(zip(weights, biases, strict=True))


class _Fold(TorchFunctionMode):
    """Gives linear maps their folded weights and lets the BatchNorm behind them pass its input on."""

    def __init__(self, pairs: list[Pair], folded: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        assert len(pairs) == len(folded), "a pass outside `weights`"
        self.work = {pair.position: (pair, *tensors) for pair, tensors in zip(pairs, folded, strict=True)}
        self.waiting: dict[int, tuple[Tensor, Pair]] = {}
        self.position = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in LINEAR_MAPS:
            return self._linear_map(function, *args, **kwargs)
        if function is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        return function(*args, **kwargs)

    def _linear_map(self, function: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args, **kw):
        pair, folded_weight, folded_bias = self.work.get(self.position, (None, weight, bias))
        self.position += 1
        output = function(input, folded_weight, folded_bias, *args, **kw)
        if pair is not None:
            if weight is not pair.weight:
                raise ForwardChangedError
            self.waiting[id(output)] = (output, pair)
        return output

    def _batch_norm(self, input: Tensor, running_mean: Tensor | None, *args, **kwargs) -> Tensor:
        _, pair = self.waiting.pop(id(input), (None, None))
        if pair is None:
            return F.batch_norm(input, running_mean, *args, **kwargs)
        if running_mean is not pair.mean:
            raise ForwardChangedError
        return input

    def finish(self) -> None:
        """ForwardChangedError when not every pair was met."""
        if self.waiting or self.position <= max(self.work):
            raise ForwardChangedError


@dataclass
class _Found:
    """A linear map and who reads its output: the arguments of a BatchNorm, None for anything else."""

    position: int
    output: Tensor
    weight: Tensor
    bias: Tensor | None
    readers: list[tuple | None]

    def pair(self, own: set[int]) -> Pair | None:
        """The pair, or None where folding would not be right. own: ids of the model's parameters and buffers."""
        if len(self.readers) != 1 or self.readers[0] is None:
            return None
        mean, variance, scale, shift, training, eps = self.readers[0]
        tensors = [t for t in (self.weight, self.bias, mean, variance, scale, shift) if t is not None]
        if training or mean is None or variance is None or not all(id(t) in own for t in tensors):
            return None
        # BatchNorm's channels are the second axis, which is not a linear layer's output axis on sequences.
        if self.output.dim() != self.weight.dim():
            return None
        zeros = torch.zeros_like(mean)
        return Pair(
            position=self.position,
            weight=self.weight,
            bias=zeros if self.bias is None else self.bias,
            mean=mean,
            variance=variance,
            scale=torch.ones_like(mean) if scale is None else scale,
            shift=zeros if shift is None else shift,
            eps=eps,
        )


class _Search(TorchFunctionMode):
    """Notes every linear map of a pass and who reads its output."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, _Found] = {}  # by the id of the output, which `_Found` keeps alive
        self.position = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if function is F.batch_norm:
            input, arguments = _batch_norm_arguments(*args, **kwargs)
            self.read_by(arguments, input)
        elif not _reads_shape(function, output):
            self.read_by(None, (args, kwargs))
        if function in LINEAR_MAPS:
            self._note(output, *args, **kwargs)
        return output

    def _note(self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args, **kwargs) -> None:
        self.found[id(output)] = _Found(self.position, output, weight, bias, [])
        self.position += 1

    def read_by(self, reader: tuple | None, value: Any) -> None:
        """Note a reader of every tensor in `value`, through containers."""
        if isinstance(value, Tensor):
            if id(value) in self.found:
                self.found[id(value)].readers.append(reader)
        elif isinstance(value, (list, tuple)):
            for part in value:
                self.read_by(reader, part)
        elif isinstance(value, dict):
            self.read_by(reader, list(value.values()))


def _reads_shape(function: Callable, output: Any) -> bool:
    """Whether a call asked for a shape or the like: a property that is no tensor, or a method that is known for it."""
    is_property = getattr(function, "__name__", "") == "__get__" and not isinstance(output, Tensor)
    return is_property or function in SHAPE_READERS


def _batch_norm_arguments(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> tuple[Tensor, tuple]:
    return input, (running_mean, running_var, weight, bias, training, eps)
