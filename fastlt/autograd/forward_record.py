"""The tangent of a forward pass that has already run, from the activations it left behind.

A Jacobian-vector product normally runs the function a second time next to its tangent. A training step has just run it,
and autograd still holds its activations; so operations are recorded as they run, and the tangent goes through the
model's Python code once more with every recorded output in place of its computation.

Between the two, `release` frees the activations that are cheap to recompute: something else can have their memory. The
replay recomputes them on its way, and holds those that autograd saved for the backward passes that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlt.autograd.activations import Activation, Operation
from fastlt.autograd.modes import DualMode, TrackingMode
from fastlt.autograd.rules import ForwardChangedError, Rule, unpack_dual
from fastlt.autograd.saved_tensors import SavedTensorsMode

# A recorded operation, and the activation that it returned or overwrote.
Recorded = tuple[Operation, Activation]


def recordable(images: Tensor) -> bool:
    """Whether passes on such images can be recorded: where the rules know the kernels, on CPUs and CUDA devices."""
    return images.device.type in ("cpu", "cuda")


class ForwardRecord:
    """One recorded forward pass: `with record.recording(): losses = ...`, then `with record.replaying(): ...`.

    Holds references to activations that autograd mostly holds anyway; `clear` drops them.

    lean: whether `release` frees memory. Autograd then shares what it saves with the record, which holds nothing else
        but activations that cost too much to be recomputed.
    autocast: makes the context that the recorded pass runs in; `replaying` enters it, so that the tangent has its
        types.
    recorded: the operations in the order in which they ran; filled by `recording`.
    """

    def __init__(
        self, lean: bool = False, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self.recorded: list[Recorded] = []
        self.lean, self.autocast = lean, autocast

    def clear(self) -> None:
        self.recorded.clear()

    def release(self) -> None:
        """Free all activations that are cheap to recompute; `replaying` or a backward pass recomputes them."""
        for _, activation in self.recorded:
            if activation.in_memory() and activation.recomputable():
                activation.release()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, operations that have a rule are recorded; their results are the same as outside."""
        self.clear()
        with _LeanRecordMode(self.recorded) if self.lean else _RecordMode(self.recorded):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Inside a dual level, repeating the recorded forward pass with dual parameters takes its outputs from here.

        Raises ForwardChangedError when the operations are not those that were recorded, or not all of them.
        """
        mode = _ReplayMode(self.recorded)
        try:
            with self.autocast(), mode:
                yield
            mode.finish()
        except BaseException:
            mode.abandon()
            raise


class _RecordMode(TrackingMode):
    """Lists the operations and holds all of their outputs."""

    def __init__(self, recorded: list[Recorded]) -> None:
        super().__init__()
        self.recorded = recorded

    def on_output(self, activation: Activation, output: Tensor) -> None:
        activation.hold(output)
        self.recorded.append((activation.operations[-1], activation))


class _LeanRecordMode(SavedTensorsMode):
    """Lists the operations and holds activations that autograd saves, or that cost too much to be recomputed."""

    def __init__(self, recorded: list[Recorded]) -> None:
        super().__init__()
        self.recorded = recorded

    def on_output(self, activation: Activation, output: Tensor) -> None:
        if not activation.recomputable():
            activation.hold(output)
        self.recorded.append((activation.operations[-1], activation))

    def on_saved(self, activation: Activation, tensor: Tensor) -> None:
        activation.hold(tensor)


class _ReplayMode(DualMode):
    """Returns recorded outputs as dual tensors; recomputes those that are released.

    position: how many of the recorded operations have been repeated.
    recomputing: the activation of the latest operation, if it is being recomputed; operations that overwrite it may
        still follow.
    """

    def __init__(self, recorded: list[Recorded]) -> None:
        super().__init__()
        self.recorded, self.position = recorded, 0
        self.recomputing: Activation | None = None

    def run_operation(self, rule: Rule, overwrites: bool, function: Callable, args: tuple, kwargs: dict) -> Tensor:
        operation, activation = self._next(function, overwrites)
        if not overwrites:
            self._end_recompute()
        released = activation is self.recomputing or activation.tensor is None
        if not (released or activation.in_memory()):
            # An operation without a rule has overwritten the output and will do so again: it needs one of its own.
            return self.run_other(function, args, kwargs)
        constant = not torch.is_grad_enabled()
        with torch.no_grad():
            output = self._recompute(operation, activation, args, kwargs) if released else activation.tensor
            assert output is not None, "kept or computed again"
            tangent = None if constant else rule.tangent(function, operation.aux, output, *args, **kwargs)
        if overwrites:
            # The memory holds the result already. The tangent was changed in place, as the caller expects of `args[0]`.
            return args[0]
        # `.data` has no view relation to the tensor in autograd's graph, which must not receive a tangent.
        primal = output.data
        return primal if tangent is None else forward_ad.make_dual(primal, tangent)

    def finish(self) -> None:
        """The pass has ended; ForwardChangedError when it was shorter than the recorded one."""
        if self.position != len(self.recorded):
            raise ForwardChangedError(f"{self.position} of {len(self.recorded)} recorded operations were repeated")
        self._end_recompute()

    def abandon(self) -> None:
        """The pass has failed: an activation that is not finished has to be recomputed from its first operation."""
        if self.recomputing is not None:
            self.recomputing.release()

    def _recompute(self, operation: Operation, activation: Activation, args: tuple, kwargs: dict) -> Tensor:
        """Recompute an operation from the primals of this pass; its output is finished in `_end_recompute`."""
        rule = operation.rule
        assert rule.recompute is not None
        self.recomputing = activation
        sources = [unpack_dual(source)[0] for source in rule.sources(*args, **kwargs)]
        if operation.overwrites:
            sources[0] = activation.tensor
        activation.tensor = output = rule.recompute(operation.function, operation.aux, *sources)
        return output

    def _end_recompute(self) -> None:
        """The activation that was being recomputed is finished: hold it if autograd has saved it, else release it."""
        activation, self.recomputing = self.recomputing, None
        if activation is None:
            return
        assert activation.tensor is not None
        if activation.saved_for_backward:
            activation.hold(activation.tensor)
        else:
            activation.release()

    def _next(self, function: Callable, overwrites: bool) -> Recorded:
        if self.position == len(self.recorded):
            raise ForwardChangedError("the forward pass is longer than the recorded one")
        operation, activation = self.recorded[self.position]
        if operation.function is not function or operation.overwrites != overwrites:
            raise ForwardChangedError(f"operation {self.position} was {operation.function}, now it is {function}")
        self.position += 1
        return operation, activation
