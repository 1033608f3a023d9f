"""Contexts that see every operation of a forward pass and run those that have a rule in a way of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastlt.autograd.activations import Activation, Operation, Source
from fastlt.autograd.rules import Rule, find_rule, unpack_dual


class RuleMode(TorchFunctionMode):
    """While it is entered, `run_operation` is called in place of every operation that has a rule.

    An operation that overwrites its first argument counts only directly after the operation that returned this
    argument: with something between the two, it is not known what has read the value that is overwritten.

    returned: the output of the latest operation, as long as it can be overwritten; None after one without a rule.
    """

    def __init__(self) -> None:
        super().__init__()
        self.returned: Tensor | None = None

    def run_operation(self, rule: Rule, overwrites: bool, function: Callable, args: tuple, kwargs: dict) -> Tensor:
        """Run `function(*args, **kwargs)` by its rule and return its output. overwrites: its first argument."""
        raise NotImplementedError

    def run_other(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Run an operation without a rule."""
        return function(*args, **kwargs)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        returned, self.returned = self.returned, None
        rule = find_rule(func, args, kwargs)
        if rule is None:
            return self.run_other(func, args, kwargs)
        overwrites = rule.overwrites(*args, **kwargs)
        if overwrites and args[0] is not returned:
            return self.run_other(func, args, kwargs)
        self.returned = self.run_operation(rule, overwrites, func, args, kwargs)
        return self.returned


class DualMode(RuleMode):
    """Inside a dual level, with gradients enabled: what a network computes under `torch.no_grad` has no tangent.

    Backwards it is a constant; of itself, forward mode would differentiate it.
    """

    def run_other(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        if torch.is_grad_enabled():
            return function(*args, **kwargs)
        with forward_ad._set_fwd_grad_enabled(False):
            return function(*args, **kwargs)


class NoGradWatch(TorchFunctionMode):
    """found: whether, inside, an operation took a tensor with a gradient under `torch.no_grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not torch.is_grad_enabled() and func is not Tensor.detach:
            self.found |= any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


class TangentMode(DualMode):
    """Operations with a rule have their tangents from it, next to their outputs."""

    def run_operation(self, rule: Rule, overwrites: bool, function: Callable, args: tuple, kwargs: dict) -> Tensor:
        if overwrites or not torch.is_grad_enabled():
            return self.run_other(function, args, kwargs)  # torch's own derivative is as short here
        with torch.no_grad():
            return self._with_tangent(rule, function, args, kwargs)

    def _with_tangent(self, rule: Rule, function: Callable, args: tuple, kwargs: dict) -> Tensor:
        primals = [unpack_dual(a)[0] for a in args]
        named = {name: unpack_dual(a)[0] for name, a in kwargs.items()}
        output, aux = rule.forward(function, *primals, **named)
        tangent = rule.tangent(function, aux, output, *args, **kwargs)
        return output if tangent is None else forward_ad.make_dual(output, tangent)


class ActivationsByTensor:
    """The activations that tensors of the model are, looked up by the tensors themselves.

    Entries of tensors that are gone stay; a weak dictionary of torch's, which drops them, takes longer to ask.
    """

    def __init__(self) -> None:
        self.by_id: dict[int, tuple[ReferenceType[Tensor], Activation]] = {}

    def get(self, tensor: Tensor) -> Activation | None:
        """The activation that this very tensor is, or None."""
        entry = self.by_id.get(id(tensor))
        # Another tensor may have got the id of one that is gone.
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def add(self, tensor: Tensor, activation: Activation) -> None:
        self.by_id[id(tensor)] = ref(tensor), activation


class TrackingMode(RuleMode):
    """While it is entered, the outputs of operations with a rule become `Activation`s; results are as outside.

    Activations are not held in memory by that: subclasses say which of them are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.activations = ActivationsByTensor()

    def on_output(self, activation: Activation, output: Tensor) -> None:
        """Called after each operation with a rule, the latest of `activation.operations`; output: what it returned."""

    def run_operation(self, rule: Rule, overwrites: bool, function: Callable, args: tuple, kwargs: dict) -> Tensor:
        # Before the operation runs, as it may change their versions.
        arguments = rule.sources(*args, **kwargs)[1 if overwrites else 0 :]
        sources = tuple(self._source(argument) for argument in arguments)
        output, aux = (function(*args, **kwargs), ()) if overwrites else rule.forward(function, *args, **kwargs)
        activation = self.activations.get(output) if overwrites else Activation()
        assert activation is not None, "an operation overwrote what no operation had returned"
        self.activations.add(output, activation)
        activation.append(Operation(rule, function, aux, sources, overwrites), output)
        self.on_output(activation, output)
        return output

    def _source(self, argument: Any) -> Source:
        if not isinstance(argument, Tensor):
            return Source(argument)
        activation = self.activations.get(argument)
        if activation is not None:
            return Source(activation, argument._version)
        # Nobody may keep the outputs of other operations: to hold them would cost the memory that is to be saved.
        return Source(argument.detach(), argument._version) if argument.is_leaf else Source(None, lost=True)
