"""What is kept of the gradients of single samples: the rules for functions that take trained parameters.

A backward pass brings the gradient d of the sum of all losses in the output of a layer. Where samples do not couple,
the rows of d that belong to sample i are the gradient of its own loss. With the layer's input a, they give the gradient
of any weighted sum of the losses. A rule turns (a, d) into something that is `Kept`, in the form that takes the least
memory:

    SampleGradients     the gradient of every sample in the parameter itself: biases, norms, depthwise convolutions, and
                        matrices that have no more entries than a and d of a sample
    RowFactors          a and d of a linear layer: the weighted gradient is (w d)^T a, the tangent <d, a V^T>
    ConvolutionFactors  a and d of a convolution

The smaller form is the faster one as well. A weighted sum of sample gradients reads each of them once, where the
product (w d)^T a takes as long as a forward pass of the layer, and a step needs three of them. ViT-Tiny's fc1 with 64
images of 197 tokens, two threads: 2 ms and 103 ms; to make the sample gradients takes 150 ms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Arguments = Mapping[str, Any]


class NotCoveredError(RuntimeError):
    """A use of a trained parameter that no rule covers.

    parameter: its name.
    """

    def __init__(self, parameter: str, how: str) -> None:
        super().__init__(f"{parameter} {how}")
        self.parameter = parameter


class Kept(Protocol):
    """The gradients g_i of b losses in one tensor, in some form."""

    def weighted(self, weights: Tensor) -> Tensor:
        """sum_i w_i g_i, with the entries of the tensor in order. weights: (b,)."""
        ...

    def along(self, direction: Tensor) -> Tensor:
        """<g_i, direction> for each sample: (b,). direction: of the tensor's shape."""
        ...


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are taken in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class SampleGradients:
    """The gradients themselves.

    values: (b, ...), float32 at least: half types would round the weights that they are multiplied by.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values.flatten(1).to(_wide(values.dtype))

    def weighted(self, weights: Tensor) -> Tensor:
        return (weights[None].to(self.values.dtype) @ self.values)[0]

    def along(self, direction: Tensor) -> Tensor:
        return self.values @ direction.flatten().to(self.values.dtype)


@dataclass(frozen=True)
class RowFactors:
    """Of a linear layer on n rows a sample.

    inputs: (b, n, in). grad_outputs: (b, n, out).
    """

    inputs: Tensor
    grad_outputs: Tensor

    def weighted(self, weights: Tensor) -> Tensor:
        a, d = self.inputs, self.grad_outputs
        if a.shape[2] <= d.shape[2]:
            a = _scaled(a, weights)
        else:
            d = _scaled(d, weights)
        return d.flatten(0, 1).t() @ a.flatten(0, 1)

    def along(self, direction: Tensor) -> Tensor:
        a, d = self.inputs, self.grad_outputs
        matrix = direction.reshape(d.shape[2], a.shape[2]).to(d.dtype)
        # Of <d, a V^T> and <d V, a>, both the same, the one with the smaller product to write.
        products = (d @ matrix) * a if a.shape[2] <= d.shape[2] else (a @ matrix.t()) * d
        return products.flatten(1).sum(1, dtype=_wide(products.dtype))


@dataclass(frozen=True)
class ConvolutionFactors:
    """Of a convolution.

    samples: b. inputs: (R, in, H, W). grad_outputs: (R, out, H', W'), R a multiple of b. weight: for its shape and
    place. options: stride, padding, dilation and groups.
    """

    samples: int
    inputs: Tensor
    grad_outputs: Tensor
    weight: Tensor
    options: dict[str, Any]

    def weighted(self, weights: Tensor) -> Tensor:
        weights = weights.repeat_interleave(len(self.inputs) // self.samples)
        a, d = self.inputs, self.grad_outputs
        if a.numel() <= d.numel():
            a = _scaled(a, weights)
        else:
            d = _scaled(d, weights)
        return _weight_gradient(a, d, self.weight, **self.options)

    def along(self, direction: Tensor) -> Tensor:
        d = self.grad_outputs
        products = F.conv2d(self.inputs, direction.reshape(self.weight.shape).to(d.dtype), **self.options) * d
        return products.flatten(1).sum(1, dtype=_wide(d.dtype)).view(self.samples, -1).sum(1)


def _scaled(tensor: Tensor, weights: Tensor) -> Tensor:
    """Each entry of the first axis times its weight, rounded once."""
    return (tensor * weights.view(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)


def _weight_gradient(
    a: Tensor, d: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    return torch.ops.aten.convolution_backward(
        d, a, weight, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )[1]


@dataclass(frozen=True)
class Rule:
    """How the gradients in the parameters of one function are kept.

    signature: the names of the function's arguments, in order; `input` is the data.
    keep: (arguments, grad_output, samples, wanted) -> the name and what is kept, for each argument of `wanted`. The
        input is there if the weight is wanted.
    parameters: the arguments that may be trained parameters.
    in_type_of_output: whether `keep` takes the input in the type of the output, as mixed precision computes.
    refuses: (arguments) -> why this call is not covered, None where it is.
    """

    signature: tuple[str, ...]
    keep: Callable[[Arguments, Tensor, int, set[str]], Iterator[tuple[str, Kept]]]
    parameters: tuple[str, ...] = ("weight", "bias")
    in_type_of_output: bool = False
    refuses: Callable[[Arguments], str | None] = lambda arguments: None

    def bind(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name."""
        return {**dict(zip(self.signature, args, strict=False)), **kwargs}


def keep_rows(a: Tensor, d: Tensor) -> Kept:
    """Of a product of rows with a matrix (out, in), for all n rows of a sample. a: (b, n, in), d: (b, n, out)."""
    (_, n, width), out = a.shape, d.shape[2]
    # `SampleGradients` are float32 at least.
    if width * out * _wide(d.dtype).itemsize <= n * (width + out) * d.dtype.itemsize:
        return SampleGradients(torch.bmm(d.transpose(1, 2), a))
    return RowFactors(a, d)


def keep_linear(arguments: Arguments, d: Tensor, samples: int, wanted: set[str]) -> Iterator[tuple[str, Kept]]:
    d = d.reshape(samples, -1, d.shape[-1])
    if "weight" in wanted:
        a = arguments["input"]
        yield "weight", keep_rows(a.reshape(samples, -1, a.shape[-1]), d)
    if "bias" in wanted:
        yield "bias", SampleGradients(_sum_of_places(d))


def keep_convolution(arguments: Arguments, d: Tensor, samples: int, wanted: set[str]) -> Iterator[tuple[str, Kept]]:
    if "weight" in wanted:
        yield (
            "weight",
            _keep_kernel(arguments["input"], d, arguments["weight"], samples, convolution_options(arguments)),
        )
    if "bias" in wanted:
        yield "bias", SampleGradients(_by_sample(_sum_of_map(d), samples))


def _keep_kernel(a: Tensor, d: Tensor, weight: Tensor, samples: int, options: dict[str, Any]) -> Kept:
    kernel, groups = (weight.shape[2], weight.shape[3]), options["groups"]
    no_overlap = options["padding"] == (0, 0) and options["dilation"] == (1, 1)
    if groups == 1 and no_overlap and (kernel == (1, 1) or kernel == options["stride"]):
        rows = d.flatten(2).transpose(1, 2).reshape(samples, -1, d.shape[1])
        return keep_rows(_patches(a, d, kernel, options["stride"]).reshape(samples, len(rows[0]), -1), rows)
    if groups == a.shape[1]:
        # The channels of all samples are channels of one image, which have kernels of their own.
        images, slopes = (t.reshape(1, -1, *t.shape[2:]) for t in (a, d))
        of_all = weight.detach().repeat(len(a), 1, 1, 1)
        gradients = _weight_gradient(images, slopes, of_all, **{**options, "groups": groups * len(a)})
        return SampleGradients(_by_sample(gradients.reshape(len(a), -1), samples))
    return ConvolutionFactors(samples, a, d, weight.detach(), options)


def _patches(a: Tensor, d: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """The pixels that a kernel without overlap sees at each place of its output: (R, H' W', in * kernel)."""
    (height, width), (rows, columns) = d.shape[2:], kernel
    if kernel == (1, 1):
        a = a if stride == (1, 1) else a[:, :, :: stride[0], :: stride[1]]
        return a.flatten(2).transpose(1, 2)
    a = a[:, :, : height * rows, : width * columns].reshape(*a.shape[:2], height, rows, width, columns)
    return a.permute(0, 2, 4, 1, 3, 5).reshape(len(a), height * width, -1)


def convolution_options(arguments: Arguments) -> dict[str, Any]:
    """stride, padding and dilation as pairs, and groups."""

    def pair(name: str, default: int) -> tuple[int, int]:
        value = arguments.get(name, default)
        if isinstance(value, int):
            return value, value
        return (value[0], value[0]) if len(value) == 1 else tuple(value)

    dilation, padding = pair("dilation", 1), arguments.get("padding", 0)
    if padding == "same":
        kernel = arguments["weight"].shape[2:]
        padding = tuple(step * (size - 1) // 2 for step, size in zip(dilation, kernel, strict=True))
    elif padding == "valid":
        padding = (0, 0)
    else:
        padding = pair("padding", 0)
    return {"stride": pair("stride", 1), "padding": padding, "dilation": dilation, "groups": arguments.get("groups", 1)}


def refuses_convolution(arguments: Arguments) -> str | None:
    if arguments["input"].dim() != 4:
        return "belongs to a convolution of a single image"
    if arguments.get("padding") == "same" and any((size - 1) % 2 for size in arguments["weight"].shape[2:]):
        return "belongs to a convolution that pads one side more than the other"
    return None


def keep_scale_and_shift(
    normalised: Callable[[Arguments], Tensor], channels_last: bool
) -> Callable[[Arguments, Tensor, int, set[str]], Iterator[tuple[str, Kept]]]:
    """For y = weight * x^ + bias, x^ = `normalised`. channels_last: the channels are the last axes, not the second."""

    def keep(arguments: Arguments, d: Tensor, samples: int, wanted: set[str]) -> Iterator[tuple[str, Kept]]:
        def summed(values: Tensor) -> Tensor:
            """Over all places of a sample: (b, channels)."""
            if channels_last:
                return _sum_of_places(values.reshape(samples, -1, math.prod(arguments["normalized_shape"])))
            return _by_sample(_sum_of_map(values), samples)

        if "weight" in wanted:
            x = normalised(arguments)
            yield "weight", SampleGradients(summed(x.mul_(d) if x.dtype == d.dtype else x * d))
        if "bias" in wanted:
            yield "bias", SampleGradients(summed(d))

    return keep


def _sum_of_places(values: Tensor) -> Tensor:
    """(b, n, channels) to (b, channels), in float32 at least."""
    if values.shape[1] == 1:
        return values[:, 0].to(_wide(values.dtype))
    if values.device.type == "cpu" and values.dtype == _wide(values.dtype):
        # A product with ones takes a third of the time of a sum over an axis that is not the last one.
        return torch.matmul(values.new_ones(1, values.shape[1]), values)[:, 0]
    return values.sum(1, dtype=_wide(values.dtype))


def _sum_of_map(values: Tensor) -> Tensor:
    """(R, channels, ...) to (R, channels), in float32 at least."""
    if values.dim() == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last):
        return _sum_of_places(values.permute(0, 2, 3, 1).flatten(1, 2))
    return values.flatten(2).sum(2, dtype=_wide(values.dtype))


def _by_sample(of_rows: Tensor, samples: int) -> Tensor:
    """Sums over the rows of each sample: (R, ...) to (b, ...)."""
    return of_rows if len(of_rows) == samples else of_rows.view(samples, -1, *of_rows.shape[1:]).sum(1)


def refuses_batch_statistics(arguments: Arguments) -> str | None:
    return "belongs to a BatchNorm that normalises with its batch" if arguments.get("training") else None


RULES: dict[Callable, Rule] = {
    F.linear: Rule(("input", "weight", "bias"), keep_linear, in_type_of_output=True),
    F.conv2d: Rule(
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
        keep_convolution,
        in_type_of_output=True,
        refuses=refuses_convolution,
    ),
    F.layer_norm: Rule(
        ("input", "normalized_shape", "weight", "bias", "eps"),
        keep_scale_and_shift(
            lambda a: F.layer_norm(a["input"], a["normalized_shape"], eps=a.get("eps", 1e-5)), channels_last=True
        ),
    ),
    F.rms_norm: Rule(
        ("input", "normalized_shape", "weight", "eps"),
        keep_scale_and_shift(
            lambda a: F.rms_norm(a["input"], a["normalized_shape"], eps=a.get("eps")), channels_last=True
        ),
        parameters=("weight",),
    ),
    F.group_norm: Rule(
        ("input", "num_groups", "weight", "bias", "eps"),
        keep_scale_and_shift(
            lambda a: F.group_norm(a["input"], a["num_groups"], eps=a.get("eps", 1e-5)), channels_last=False
        ),
    ),
    F.batch_norm: Rule(
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        keep_scale_and_shift(
            lambda a: F.batch_norm(a["input"], a["running_mean"], a["running_var"], eps=a.get("eps", 1e-5)),
            channels_last=False,
        ),
        refuses=refuses_batch_statistics,
    ),
}

# Functions that compute each entry of their output from one entry of each argument, which are broadcast.
_OPERATORS = (
    "add",
    "sub",
    "subtract",
    "mul",
    "multiply",
    "div",
    "divide",
    "true_divide",
    "addcmul",
    "addcdiv",
    "where",
)
ELEMENTWISE = {
    getattr(owner, name)
    for owner, form in itertools.product((torch, Tensor), ("{}", "{}_", "__{}__", "__r{}__", "__i{}__"))
    for name in (form.format(one) for one in _OPERATORS)
    if hasattr(owner, name)
}
