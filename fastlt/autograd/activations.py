"""Activations: outputs of operations of a forward pass, which can be released and recomputed.

Half of the activations of a convolutional network are outputs of BatchNorm, ReLU and additions. They follow from the
other half by a thirtieth of the arithmetic that this half takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastlt.autograd.rules import Rule


class OverwrittenError(RuntimeError):
    """An operation overwrote a tensor that an activation was to be recomputed from."""


@dataclass(slots=True)
class Source:
    """An argument that an operation is recomputed from. Never changes.

    value: an `Activation`; a tensor that something else keeps in memory (a parameter, the images); or an argument that
        is no tensor.
    version: the version counter of the tensor's memory when the operation read it.
    lost: whether the argument was a tensor that nothing keeps in memory; the operation cannot be recomputed then.
    """

    value: Any
    version: int = 0
    lost: bool = False

    def available(self) -> bool:
        """Whether the argument is, or can be recomputed, as the operation read it."""
        if isinstance(self.value, Activation):
            return self.value.version == self.version and (self.value.in_memory() or self.value.recomputable())
        return not self.lost and (not isinstance(self.value, Tensor) or self.value._version == self.version)

    def released(self) -> bool:
        """Whether the argument is an activation that is not in memory now."""
        return isinstance(self.value, Activation) and self.value.tensor is None

    def get(self) -> Any:
        """The argument; raises OverwrittenError. An activation stays in memory if autograd has saved it."""
        if not self.available():
            raise OverwrittenError("an operation of the model overwrites a tensor that another one read before")
        if not isinstance(self.value, Activation):
            return self.value
        # An overwritten tensor stays with the activation, where `SavedTensor.unpack` finds it and refuses it.
        return self.value.restore() if self.value.saved_for_backward and self.released() else self.value.get()


@dataclass(slots=True, eq=False)
class Operation:
    """One call of a function that has a rule. Never changes.

    aux: the constants that `rule.forward` returned beside the output.
    sources: the arguments that the output is recomputed from, without the one that the operation overwrote.
    overwrites: whether the operation wrote to its first argument, the output of the operation before.
    """

    rule: Rule
    function: Callable
    aux: tuple
    sources: tuple[Source, ...]
    overwrites: bool

    def recomputable(self) -> bool:
        """Whether it is cheap to recompute, and its sources are available."""
        return self.rule.recompute is not None and all(source.available() for source in self.sources)

    def recompute(self, overwritten: Tensor | None) -> Tensor:
        """The output anew. overwritten: the tensor that it writes to, None if it overwrites nothing."""
        assert self.rule.recompute is not None
        if self.overwrites:
            return self.rule.recompute(self.function, self.aux, overwritten, *(source.get() for source in self.sources))
        arguments = [source.get() for source in self.sources]
        # Those that are still released have been recomputed for this operation alone: the output can have their memory.
        temporary = [a for source, a in zip(self.sources, arguments, strict=True) if source.released()]
        if self.rule.in_place is None or not temporary:
            return self.rule.recompute(self.function, self.aux, *arguments)
        first = temporary[0]
        others = [a for a in arguments if a is not first]
        return self.rule.recompute(self.rule.in_place, self.aux, first, *others)


@dataclass(slots=True, eq=False)
class Activation:
    """The output of an operation that has a rule, and of those that overwrote it with nothing in between.

    operations: the one that returned it, then those that overwrote it. Grows during the forward pass only.
    version: the version counter of the model's tensor after the latest of the operations.
    tensor: the finished output, detached; None while it is not in memory.
    tensor_version: the version counter of `tensor` when it was finished. Another one means that the model has written
        to it since.
    saved_for_backward: whether autograd has saved it for a backward pass; true from then on.
    recompute_depth: how many released activations have to be recomputed before it, one from the other, as far as the
        forward pass has come; 0 when it is put into memory.
    """

    operations: list[Operation] = field(default_factory=list)
    version: int = 0
    tensor: Tensor | None = None
    tensor_version: int = 0
    saved_for_backward: bool = False
    recompute_depth: int = 0

    def append(self, operation: Operation, output: Tensor) -> None:
        """Add the operation that has just returned `output`."""
        self.operations.append(operation)
        self.version = output._version
        depths = [s.value.recompute_depth + 1 for s in operation.sources if s.released()]
        self.recompute_depth = max([self.recompute_depth, *depths])

    def in_memory(self) -> bool:
        """Whether it is in memory, and nobody has written to it since it was finished."""
        return self.tensor is not None and self.tensor._version == self.tensor_version

    def recomputable(self) -> bool:
        """Whether it can be recomputed at little cost."""
        return all(operation.recomputable() for operation in self.operations)

    def hold(self, tensor: Tensor) -> None:
        """Have it in memory. tensor: the finished output."""
        self.tensor, self.tensor_version, self.recompute_depth = tensor.detach(), tensor._version, 0

    def release(self) -> None:
        """Have it in memory no longer."""
        self.tensor = None

    def get(self) -> Tensor:
        """The output, recomputed where it is not in memory, without holding it anew; raises OverwrittenError."""
        output = self.tensor if self.in_memory() else None
        if output is None:
            with torch.no_grad():
                for operation in self.operations:
                    output = operation.recompute(output)
        assert output is not None, "an activation without an operation"
        return output

    def restore(self) -> Tensor:
        """The output, recomputed where it was released; from now on it is held."""
        if self.tensor is None:
            self.hold(self.get())
        assert self.tensor is not None
        return self.tensor
