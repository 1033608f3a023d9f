"""The tangent of a forward pass that has already run, from the activations it left behind.

A Jacobian-vector product normally runs the function a second time next to its tangent. A training step has just run it,
and autograd still holds its activations; so the costly operations are recorded as they run, and the tangent goes
through the model's Python code once more with every recorded output in place of its computation. Operations without a
rule below run as usual, under torch's own forward-mode derivatives: any model works, the common ones are fast.

BatchNorm gains most. Its derivative in the input is symmetric, so the fused kernel of the backward pass computes the
tangent as well, where torch's forward-mode formula takes a dozen passes over memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode


class ForwardChangedError(RuntimeError):
    """The forward pass did not repeat the operations that were recorded: nothing can be reused."""


def recordable(images: Tensor) -> bool:
    """Whether passes on such images are worth recording: on a CPU; elsewhere BatchNorm has kernels without a rule."""
    return images.device.type == "cpu"


@dataclass
class Call:
    """One recorded operation.

    output: shares memory with what the operation returned. version: of that memory when the recorded chain of
    operations on it was done; another one later means that something else has written to it.
    saved: what the tangent needs beside the arguments.
    first: of an operation that overwrote the output of the call before it, with nothing between the two: the call that
        made this output.
    """

    function: Callable
    output: Tensor
    version: int
    saved: tuple[Tensor, ...] = ()
    first: Call | None = None

    def intact(self) -> bool:
        call = self.first or self
        return call.output._version == call.version


class ForwardRecord:
    """What one forward pass computed: `with record.recording(): losses = ...`, then `with record.reused(): ...`.

    Holds references to activations that autograd mostly holds anyway; `clear` drops them.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def clear(self) -> None:
        self.calls.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, operations that have a rule are recorded; their results are the same as outside."""
        self.clear()
        with _Record(self.calls):
            yield

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Inside a dual level, repeating the recorded forward pass with dual parameters takes its outputs from here.

        Raises ForwardChangedError when the operations are not those that were recorded, or not all of them.
        """
        mode = _Reuse(self.calls)
        with mode:
            yield
        if mode.position != len(self.calls):
            raise ForwardChangedError(f"{mode.position} of {len(self.calls)} recorded operations were repeated")


class _Record(TorchFunctionMode):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls
        self.chain: Call | None = None  # the call that made the tensor which was returned last
        self.returned: Tensor | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        returned, self.returned = self.returned, None
        rule = find_rule(function, args, kwargs)
        if rule is None:
            return function(*args, **kwargs)
        if not rule.overwrites(*args, **kwargs):
            output, saved = rule.forward(function, *args, **kwargs)
            # Detached, it shares the version counter, which is what tells whether anything was written later.
            self.chain = Call(function, output.detach(), output._version, saved)
            self.calls.append(self.chain)
        elif args[0] is returned:
            output = function(*args, **kwargs)
            self.chain.version = output._version
            self.calls.append(Call(function, self.chain.output, output._version, first=self.chain))
        else:
            return function(*args, **kwargs)
        self.returned = output
        return output


class _Reuse(TorchFunctionMode):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls, self.position = calls, 0
        self.returned: Tensor | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        returned, self.returned = self.returned, None
        rule = find_rule(function, args, kwargs)
        if rule is None:
            return function(*args, **kwargs)
        overwrites = rule.overwrites(*args, **kwargs)
        if overwrites and args[0] is not returned:
            return function(*args, **kwargs)
        call = self._next(function, overwrites)
        if not call.intact():
            # A later operation has overwritten the output and will do so again: it needs one of its own.
            self.returned = function(*args, **kwargs)
            return self.returned
        tangent = rule.tangent(call, *args, **kwargs)
        if overwrites:
            # The memory holds the result already. The tangent was changed in place, as the caller expects of `args[0]`.
            self.returned = args[0]
        else:
            # `.data` has no view relation to the tensor in autograd's graph, which must not receive a tangent.
            self.returned = call.output.data
            if tangent is not None:
                self.returned = forward_ad.make_dual(self.returned, tangent)
        return self.returned

    def _next(self, function: Callable, in_place: bool) -> Call:
        if self.position == len(self.calls):
            raise ForwardChangedError("the forward pass is longer than the recorded one")
        call = self.calls[self.position]
        if call.function is not function or (call.first is not None) != in_place:
            raise ForwardChangedError(f"operation {self.position} was {call.function}, now it is {function}")
        self.position += 1
        return call


@dataclass(frozen=True)
class Rule:
    """How one operation is recorded and differentiated. All functions take the operation's own arguments.

    applies: whether the rule covers these arguments. overwrites: whether the operation writes to its first argument.
    forward: (function, *args) -> (output, what the tangent needs beside the arguments).
    tangent: (call, *args) -> the output's tangent, None when no argument has one. An operation that overwrites its
        first argument changes the tangent of that argument in place.
    """

    tangent: Callable[..., Tensor | None]
    applies: Callable[..., bool] = lambda *args, **kwargs: True
    overwrites: Callable[..., bool] = lambda *args, **kwargs: False
    forward: Callable[..., tuple[Tensor, tuple]] = lambda function, *args, **kwargs: (function(*args, **kwargs), ())


def find_rule(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Rule | None:
    """The rule for a call, or None when it has to run as usual."""
    rule = RULES.get(function)
    return rule if rule is not None and rule.applies(*args, **kwargs) else None


def parts(x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(primal, tangent) of an argument; the tangent of a constant is None."""
    return (None, None) if x is None else tuple(forward_ad.unpack_dual(x))


def sum_of(*tangents: Tensor | None) -> Tensor | None:
    """The sum of the tangents that are not None, added into the first of them."""
    present = [t for t in tangents if t is not None]
    if not present:
        return None
    for t in present[1:]:
        present[0].add_(t)
    return present[0]


def linear_map_tangent(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args, **kwargs):
    """d f(x, W, b) = f(dx, W, 0) + f(x, dW, db), for convolutions and linear layers."""
    (x, dx), (w, dw), (_, db) = parts(input), parts(weight), parts(bias)
    through_input = None if dx is None else call.function(dx, w, None, *args, **kwargs)
    if dw is None and db is None:
        return through_input
    dw = torch.zeros_like(w) if dw is None else dw
    return sum_of(through_input, call.function(x, dw, db, *args, **kwargs))


def batch_norm_applies(input, running_mean, running_var, weight=None, bias=None, training=False, *args, **kwargs):
    """Batch statistics, of more than one value a channel (with fewer, torch has the error message)."""
    return training and input.numel() > input.shape[1] and input.device.type == "cpu"


def batch_norm_forward(
    function, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    """The kernel that F.batch_norm ends in on a CPU; it also tells the batch statistics."""
    output, mean, inverse_std = torch.native_batch_norm(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )
    return output, (mean, inverse_std)


def batch_norm_tangent(
    call, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    """With x^ = (x - mean) / std: dy = (w / std) P dx + dw x^ + db, P taking out the mean and the part along x^.

    P is symmetric: the first term is what the backward pass computes from a gradient dx.
    """
    mean, inverse_std = call.saved
    (x, dx), (w, dw), (_, db) = parts(input), parts(weight), parts(bias)
    through_input = None
    if dx is not None:
        through_input, _, _ = torch.ops.aten.native_batch_norm_backward(
            dx, x, w, None, None, mean, inverse_std, True, eps, [True, False, False]
        )
    if dw is None and db is None:
        return through_input
    dw = torch.zeros_like(mean) if dw is None else dw
    # dw x^ + db, in one pass: BatchNorm with the batch's statistics as constants.
    through_affine = torch.batch_norm(x, dw, db, mean, inverse_std.pow(-2), False, 0.0, 0.0, False)
    return sum_of(through_input, through_affine)


def relu_tangent(call: Call, input: Tensor, inplace: bool = False) -> Tensor | None:
    """dy = dx where y > 0, else 0."""
    _, dx = parts(input)
    if dx is None:
        return None
    if inplace:
        return torch.ops.aten.threshold_backward.grad_input(dx, call.output, 0, grad_input=dx)
    return torch.ops.aten.threshold_backward(dx, call.output, 0)


def add_applies(input: Any, other: Any, *args, **kwargs) -> bool:
    """Two tensors of one shape and type, without a factor."""
    both = isinstance(input, Tensor) and isinstance(other, Tensor) and not args and not kwargs
    return both and input.shape == other.shape and input.dtype == other.dtype and input.is_floating_point()


def add_tangent(call: Call, input: Tensor, other: Tensor) -> Tensor | None:
    (_, dx), (_, dy) = parts(input), parts(other)
    if dx is None or dy is None:
        # A copy: what is returned may be changed in place.
        return next((t.clone() for t in (dx, dy) if t is not None), None)
    return dx + dy


def add_in_place_tangent(call: Call, input: Tensor, other: Tensor) -> Tensor | None:
    (_, dx), (_, dy) = parts(input), parts(other)
    if dx is None and dy is not None:
        raise ForwardChangedError("a constant was overwritten by a sum that depends on the parameters")
    return sum_of(dx, dy)


_LINEAR_MAP = Rule(linear_map_tangent)
_ADD = Rule(add_tangent, applies=add_applies)
_ADD_IN_PLACE = Rule(add_in_place_tangent, applies=add_applies, overwrites=lambda *args: True)
RULES: dict[Callable, Rule] = {
    F.conv2d: _LINEAR_MAP,
    F.linear: _LINEAR_MAP,
    F.batch_norm: Rule(batch_norm_tangent, applies=batch_norm_applies, forward=batch_norm_forward),
    F.relu: Rule(relu_tangent, overwrites=lambda input, inplace=False: inplace),
    Tensor.add: _ADD,
    Tensor.add_: _ADD_IN_PLACE,
}
