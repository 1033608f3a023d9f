"""The tangent of a forward pass that has already run, from the activations it left behind.

A Jacobian-vector product normally runs the function a second time next to its tangent. A training step has just run it,
and autograd still holds its activations; so operations are recorded as they run, and the tangent goes through the
model's Python code once more with every recorded output in place of its computation.

Between the two, `lighten` lets go of what is cheap to compute: something else can have its memory, and the tangent's
pass, which computes it on its way, gives it back to autograd for the backward passes that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastlt.autograd.cpu_kernels import fits
from fastlt.autograd.rules import ForwardChangedError, Rule, RuledOperations, parts
from fastlt.autograd.saved_tensors import Activation, KeptWatch, Making, Watch


def recordable(images: Tensor) -> bool:
    """Whether passes on such images can be recorded: where the rules know the kernels, on CPUs and CUDA devices."""
    return images.device.type in ("cpu", "cuda")


@dataclass(frozen=True)
class Call:
    """One recorded operation: `making` of `activation`, its first one or one that overwrote it."""

    activation: Activation
    making: Making
    overwrote: bool


def call_of(activation: Activation) -> Call:
    """The operation that an activation was made or gone on with last."""
    return Call(activation, activation.makings[-1], len(activation.makings) > 1)


class ForwardRecord:
    """What one forward pass computed: `with record.recording(): losses = ...`, then `with record.reused(): ...`.

    Holds references to activations that autograd mostly holds anyway; `clear` drops them.
    lean: whether `lighten` frees memory. Autograd then shares what it keeps with the record, which holds nothing else
        but what costs too much to be made again.
    autocast: makes the context that the recorded pass runs in; `reused` enters it, so that the tangent has its types.
    """

    def __init__(
        self, lean: bool = False, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self.calls: list[Call] = []
        self.lean, self.autocast = lean, autocast

    def clear(self) -> None:
        self.calls.clear()

    def lighten(self) -> None:
        """Let go of all activations that are cheap to make; `reused` or a backward pass makes them again."""
        for call in self.calls:
            if call.activation.in_memory() and call.activation.cheap():
                call.activation.tensor = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, operations that have a rule are recorded; their results are the same as outside."""
        self.clear()
        with _LeanRecord(self.calls) if self.lean else _Record(self.calls):
            yield

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Inside a dual level, repeating the recorded forward pass with dual parameters takes its outputs from here.

        Raises ForwardChangedError when the operations are not those that were recorded, or not all of them.
        """
        mode = _Reuse(self.calls)
        try:
            with self.autocast(), mode:
                yield
            if mode.position != len(self.calls):
                raise ForwardChangedError(f"{mode.position} of {len(self.calls)} recorded operations were repeated")
        except BaseException:
            mode.abandon()
            raise
        mode.settle()


class _Record(Watch):
    """Lists the operations and holds what they made."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def made(self, activation: Activation, output: Tensor) -> None:
        activation.hold(output)
        self.calls.append(call_of(activation))


class _LeanRecord(KeptWatch):
    """Lists the operations and holds what autograd wants, and what costs too much to be made again."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def made(self, activation: Activation, output: Tensor) -> None:
        if not activation.cheap():
            activation.hold(output)
        self.calls.append(call_of(activation))

    def wanted(self, activation: Activation, tensor: Tensor) -> None:
        activation.hold(tensor)


@dataclass
class _Postponed:
    """An output of BatchNorm, and its tangent, that a sum read next, which can be computed without them.

    primal, tangent: their memory, not yet filled. dual: what the model was given; once that is gone, nobody can read
    it any more. reader: the sum. read: whether this has been computed.
    """

    rule: Rule
    making: Making
    args: tuple
    kwargs: dict
    primal: Tensor
    tangent: Tensor
    dual: ReferenceType[Tensor]
    reader: Making
    read: bool = False

    def fill(self) -> None:
        function, saved = self.making.function, self.making.saved
        sources = [parts(s)[0] for s in self.rule.sources(*self.args, **self.kwargs)]
        self.primal.copy_(self.rule.again(function, saved, *sources))
        self.tangent.copy_(self.rule.tangent(function, saved, self.primal, *self.args, **self.kwargs))


class _Reuse(RuledOperations):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls, self.position = calls, 0
        self.making: Activation | None = None  # what is being made again
        self.included: Making | None = None  # a ReLU of which the latest operation did the work
        self.postponed: _Postponed | None = None

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if self.postponed is not None:
            self._about_to_run(None, ())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.postponed is not None:
            self._about_to_run(function, args)
        return super().__torch_function__(function, types, args, kwargs)

    def operation(self, rule: Rule, overwrites: bool, function: Callable, args: tuple, kwargs: dict) -> Tensor:
        call = self._next(function, overwrites)
        activation, making = call.activation, call.making
        if making is self.included:
            return args[0]
        if not overwrites:
            self.settle()
        fused, included = activation.rule_from(making)
        if activation is not self.making and activation.tensor is not None:
            if not activation.in_memory():
                # A later operation has overwritten the output and will do so again: it needs one of its own.
                return function(*args, **kwargs)
            tangent = fused.tangent(function, making.saved, activation.tensor, *args, **kwargs)
        elif self._can_wait(call, args):
            return self._postpone(rule, making, args, kwargs)
        else:
            tangent = self._make(rule, fused, activation, making, args, kwargs)
        self.included = included
        if overwrites:
            # The memory holds the result already. The tangent was changed in place, as the caller expects of `args[0]`.
            return args[0]
        # `.data` has no view relation to the tensor in autograd's graph, which must not receive a tangent.
        primal = activation.tensor.data
        return primal if tangent is None else forward_ad.make_dual(primal, tangent)

    def settle(self) -> None:
        """What was being made is finished: it stays for autograd, or goes."""
        activation, self.making = self.making, None
        if activation is not None and activation.wanted:
            activation.hold(activation.tensor)
        elif activation is not None:
            activation.tensor = None

    def abandon(self) -> None:
        """What was being made is not finished, and has to be made from the beginning."""
        if self.making is not None:
            self.making.tensor = None

    def _make(
        self, rule: Rule, fused: Rule, activation: Activation, making: Making, args: tuple, kwargs: dict
    ) -> Tensor | None:
        """Make it, or what overwrites it, again, from the primals of this pass; returns its tangent."""
        goes_on, self.making = activation is self.making, activation
        function, saved, both = making.function, making.saved, None
        if self.postponed is not None:
            of, other = self.postponed, args[args[0] is self.postponed.dual()]
            both = fused.of_batch_norm_with_tangent(of.making.saved, of.args, of.kwargs, other)
            if both is None:
                of.fill()
                self.postponed = None
        elif fused.again_and_tangent is not None:
            both = fused.again_and_tangent(function, saved, *args, **kwargs)
        if both is not None:
            activation.tensor, tangent = both
            return tangent
        sources = [parts(s)[0] for s in rule.sources(*args, **kwargs)]
        if goes_on:
            sources[0] = activation.tensor
        activation.tensor = fused.again(function, saved, *sources)
        return fused.tangent(function, saved, activation.tensor, *args, **kwargs)

    def _can_wait(self, call: Call, args: tuple) -> bool:
        """Whether a BatchNorm's output goes into a sum next, which can do without, and is not wanted by autograd."""
        activation = call.activation
        if call.making.function is not F.batch_norm or self.position == len(self.calls) or activation.wanted:
            return False
        following = self.calls[self.position]
        (x, dx), (rule, _) = parts(args[0]), following.activation.rule_from(following.making)
        return (
            len(activation.makings) == 1
            and rule.of_batch_norm_with_tangent is not None
            and not following.overwrote
            and following.activation.tensor is None
            and sum(source.value is activation for source in following.making.sources) == 1
            and dx is not None
            and fits(x, dx)
        )

    def _postpone(self, rule: Rule, making: Making, args: tuple, kwargs: dict) -> Tensor:
        primal, tangent = (torch.empty_like(part) for part in parts(args[0]))
        output, reader = forward_ad.make_dual(primal, tangent), self.calls[self.position].making
        self.postponed = _Postponed(rule, making, args, kwargs, primal, tangent, ref(output), reader)
        return output

    def _about_to_run(self, function: Callable, args: tuple) -> None:
        """Fill what was postponed, unless it is its reader that runs, or that one's ReLU, or if nobody has it."""
        postponed, dual = self.postponed, self.postponed.dual()
        if postponed.read and function is F.relu and args[0] is self.returned:
            return
        reads = function is postponed.reader.function and len(args) == 2 and any(a is dual for a in args)
        if reads and not postponed.read:
            postponed.read = True
            return
        self.postponed = None
        if dual is not None:
            postponed.fill()

    def _next(self, function: Callable, overwrites: bool) -> Call:
        if self.position == len(self.calls):
            raise ForwardChangedError("the forward pass is longer than the recorded one")
        call = self.calls[self.position]
        if call.making.function is not function or call.overwrote != overwrites:
            raise ForwardChangedError(f"operation {self.position} was {call.making.function}, now it is {function}")
        self.position += 1
        return call
