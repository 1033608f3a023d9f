"""The rules for single operations of a forward pass: their tangents, and how their outputs are recomputed.

Operations without a rule run as usual, under torch's own derivatives: any model works, the common ones gain.

BatchNorm gains most: torch's forward-mode formula takes a dozen passes over memory. Its derivative in the input is
symmetric, so that the fused kernel of the backward pass computes the tangent as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic


class ForwardChangedError(RuntimeError):
    """The forward pass did not repeat the operations that were recorded or planned for: nothing can be reused."""


@dataclass(frozen=True)
class Rule:
    """How one operation is recorded, differentiated and recomputed; the functions take the operation's own arguments.

    applies: (*args) -> whether the rule covers these arguments.
    overwrites: (*args) -> whether the operation writes to its first argument.
    forward: (function, *args) -> (output, aux), aux being a tuple of all that `tangent` and `recompute` need
        beside the arguments. Not called for an operation that overwrites its first argument; it has none.
    tangent: (function, aux, output, *args) -> the output's tangent, None when no argument has one. An operation
        that overwrites its first argument changes the tangent of that argument in place.
    sources: (*args) -> the arguments that `recompute` computes the output from.
    recompute: (function, aux, *sources) -> the output, to rounding, without any other effect; an operation that
        overwrites its first argument writes to it. None for operations that cost too much to be done twice.
    in_place: the function that writes the same output to either of its two arguments, given first; `recompute` takes it
        in the place of `function`. None where there is no such function.
    """

    tangent: Callable[..., Tensor | None]
    applies: Callable[..., bool] = lambda *args, **kwargs: True
    overwrites: Callable[..., bool] = lambda *args, **kwargs: False
    forward: Callable[..., tuple[Tensor, tuple]] = lambda function, *args, **kwargs: (function(*args, **kwargs), ())
    sources: Callable[..., tuple] = lambda *args, **kwargs: ()
    recompute: Callable[..., Tensor] | None = None
    in_place: Callable[..., Tensor] | None = None


def find_rule(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Rule | None:
    """The rule for a call, or None when it has to run as usual."""
    rule = RULES.get(function)
    return rule if rule is not None and rule.applies(*args, **kwargs) else None


def unpack_dual(x: Any) -> tuple[Any, Tensor | None]:
    """(primal, tangent) of an argument; the tangent of a constant, or of an argument that is no tensor, is None."""
    if not isinstance(x, Tensor):
        return x, None
    primal, tangent = forward_ad.unpack_dual(x)
    return primal, tangent


def sum_of(*tangents: Tensor | None) -> Tensor | None:
    """The sum of the tangents that are not None, added into the first of them."""
    present = [t for t in tangents if t is not None]
    if not present:
        return None
    for t in present[1:]:
        present[0].add_(t)
    return present[0]


def linear_map_tangent(function, aux, output, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args, **kw):
    """d f(x, W, b) = f(dx, W, 0) + f(x, dW, db), for convolutions and linear layers."""
    (x, dx), (w, dw), (_, db) = unpack_dual(input), unpack_dual(weight), unpack_dual(bias)
    through_input = None if dx is None else function(dx, w, None, *args, **kw)
    if dw is None and db is None:
        return through_input
    dw = torch.zeros_like(w) if dw is None else dw
    return sum_of(through_input, function(x, dw, db, *args, **kw))


def batch_norm_applies(input, running_mean, running_var, weight=None, bias=None, training=False, *args, **kwargs):
    """Batch statistics, of more than one value a channel (with fewer, torch has the error message)."""
    return training and input.numel() > input.shape[1] and input.device.type in ("cpu", "cuda")


def batch_norm_forward(
    function, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    """torch's own kernel, which F.batch_norm ends in on a CPU; it also tells the batch statistics.

    On a GPU F.batch_norm may take cuDNN's, which differs by rounding.
    """
    output, mean, inverse_std = torch.native_batch_norm(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )
    return output, (mean, inverse_std)


def batch_norm_tangent(function, aux, output, input, running_mean, running_var, *args, **kwargs) -> Tensor | None:
    """With x^ = (x - mean) / std: dy = (w / std) P dx + dw x^ + db, P taking out the mean and the part along x^.

    P is symmetric: the backward pass computes the first term from a gradient dx.
    """
    (mean, inverse_std), (weight, bias, eps) = aux, scale_shift_eps(*args, **kwargs)
    (x, dx), (w, dw), (_, db) = unpack_dual(input), unpack_dual(weight), unpack_dual(bias)
    if x.is_cuda and dx is not None and not (dw is None and db is None):
        return _batch_norm_tangent_on_gpu(x, dx, w, dw, db, mean, inverse_std)
    through_input = None
    if dx is not None:
        through_input, _, _ = torch.ops.aten.native_batch_norm_backward(
            dx, x, w, None, None, mean, inverse_std, True, eps, [True, False, False]
        )
    if dw is None and db is None:
        return through_input
    dw = torch.zeros_like(mean) if dw is None else dw
    return sum_of(through_input, normalised(x, dw, db, mean, inverse_std))


# Stands in for a weight of zero, by which nothing can be divided. The error of a channel's tangent is as small.
_ALMOST_ZERO = 1e-12


def _batch_norm_tangent_on_gpu(
    x: Tensor,
    dx: Tensor,
    w: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
) -> Tensor:
    """All of `batch_norm_tangent` in two passes over memory, by the kernels of SyncBatchNorm's backward pass.

    From a sum a of dx and a sum b of dx (x - mean), over n values, the second of them computes
    (w / std) (dx - a / n - (x - mean) b / (n std^2)). It takes both sums as arguments: the terms that
    become dw x^ + db are taken off them before.
    """
    n = x.numel() // x.shape[1]
    a, b, _, _ = torch.batch_norm_backward_reduce(dx, x, mean, inverse_std, w, True, False, False)
    if w is not None:
        w = torch.where(w.abs() < _ALMOST_ZERO, torch.full_like(w, _ALMOST_ZERO), w)
    factor = inverse_std if w is None else w * inverse_std
    if db is not None:
        a = torch.addcdiv(a, db, factor, value=-n)
    if dw is not None:
        b = torch.addcdiv(b, dw, factor * inverse_std, value=-n)
    count = torch.full((1,), n, dtype=torch.int32, device=x.device)
    return torch.batch_norm_backward_elemt(dx, x, mean, inverse_std, w, a, b, count)


def scale_shift_eps(weight=None, bias=None, training=False, momentum=0.1, eps=1e-5) -> tuple:
    """Of F.batch_norm's arguments behind the running statistics, those that a derivative depends on."""
    return weight, bias, eps


def normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse_std: Tensor) -> Tensor:
    """weight x^ + bias, in one pass: BatchNorm with the batch's statistics as constants."""
    return torch.batch_norm(x, weight, bias, mean, inverse_std.pow(-2), False, 0.0, 0.0, False)


def scaled_and_shifted(values: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """values (N, C, ...) times factor (C,) plus shift (C,), channel by channel, as one operation for the rules."""
    if has_torch_function_variadic(values, factor, shift):
        return handle_torch_function(scaled_and_shifted, (values, factor, shift), values, factor, shift)
    channels = [1, -1, *[1] * (values.dim() - 2)]
    return values * factor.view(channels) + shift.view(channels)


def scaled_and_shifted_forward(function, values, factor, shift) -> tuple[Tensor, tuple]:
    """Factor and shift are small and follow from the statistics of the batch: they are kept, not computed again."""
    return function(values, factor, shift), (factor.detach(), shift.detach())


def scaled_and_shifted_tangent(function, aux, output, values, factor, shift) -> Tensor | None:
    """dy = f dx + df x + db."""
    (x, dx), (f, df), (_, db) = unpack_dual(values), unpack_dual(factor), unpack_dual(shift)
    zeros = torch.zeros_like(f)
    through_values = None if dx is None else function(dx, f, zeros)
    if df is None and db is None:
        return through_values
    return sum_of(through_values, function(x, zeros if df is None else df, zeros if db is None else db))


def relu_tangent(function, aux, output: Tensor, input: Tensor, inplace: bool = False) -> Tensor | None:
    """dy = dx where y > 0, else 0."""
    _, dx = unpack_dual(input)
    if inplace or dx is None:
        return rectified(dx, output)
    return torch.ops.aten.threshold_backward(dx, output, 0)


def rectified(tangent: Tensor | None, output: Tensor) -> Tensor | None:
    """The tangent, overwritten by zeros where the output is not positive."""
    if tangent is None:
        return None
    return torch.ops.aten.threshold_backward.grad_input(tangent, output, 0, grad_input=tangent)


def add_applies(input: Any, other: Any, *args, **kwargs) -> bool:
    """Two tensors of one shape and type, without a factor."""
    both = isinstance(input, Tensor) and isinstance(other, Tensor) and not args and not kwargs
    return both and input.shape == other.shape and input.dtype == other.dtype and input.is_floating_point()


def add_tangent(function, aux, output, input: Tensor, other: Tensor) -> Tensor | None:
    (_, dx), (_, dy) = unpack_dual(input), unpack_dual(other)
    if dx is None or dy is None:
        # A copy: the tangent that is returned may be changed in place.
        return next((t.clone() for t in (dx, dy) if t is not None), None)
    return dx + dy


def add_in_place_tangent(function, aux, output, input: Tensor, other: Tensor) -> Tensor | None:
    (_, dx), (_, dy) = unpack_dual(input), unpack_dual(other)
    if dx is None and dy is not None:
        raise ForwardChangedError("a constant was overwritten by a sum that depends on the parameters")
    return sum_of(dx, dy)


_LINEAR_MAP = Rule(linear_map_tangent)

RULES: dict[Callable, Rule] = {
    F.conv2d: _LINEAR_MAP,
    F.linear: _LINEAR_MAP,
    F.batch_norm: Rule(
        batch_norm_tangent,
        applies=batch_norm_applies,
        forward=batch_norm_forward,
        sources=lambda input, running_mean, running_var, weight=None, bias=None, *args, **kw: (input, weight, bias),
        recompute=lambda function, aux, input, weight, bias: normalised(input, weight, bias, *aux),
    ),
    scaled_and_shifted: Rule(
        scaled_and_shifted_tangent,
        forward=scaled_and_shifted_forward,
        sources=lambda values, factor, shift: (values,),
        recompute=lambda function, aux, values: function(values, *aux),
    ),
    F.relu: Rule(
        relu_tangent,
        overwrites=lambda input, inplace=False: inplace,
        sources=lambda input, inplace=False: (input, inplace),
        recompute=lambda function, aux, input, inplace: function(input, inplace),
    ),
    Tensor.add: Rule(
        add_tangent,
        applies=add_applies,
        sources=lambda input, other: (input, other),
        recompute=lambda function, aux, input, other: function(input, other),
        in_place=Tensor.add_,
    ),
    Tensor.add_: Rule(
        add_in_place_tangent,
        applies=add_applies,
        overwrites=lambda *args: True,
        sources=lambda input, other: (input, other),
        recompute=lambda function, aux, input, other: function(input, other),
    ),
}
