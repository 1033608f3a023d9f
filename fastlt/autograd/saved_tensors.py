"""What autograd keeps of a forward pass for the backward pass, without what is cheap to compute anew.

Half of the activations of a convolutional network are outputs of BatchNorm, ReLU and additions: a thirtieth of the
arithmetic of the other half, from which they follow. Under a `KeptWatch` autograd is handed a `Kept` in place of each
activation that it wants to keep, and that knows its tensor or how to make it again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastlt.autograd.rules import Rule, RuledOperations

# Activations that are made again from others that have to be made again first. With 1, of the residual sums of a
# ResNet every second one is kept. With 0, all are; without a limit the first that is wanted brings all of them back.
MOST_IN_A_ROW = 1


class OverwrittenError(RuntimeError):
    """An operation overwrote what an activation was to be made again from."""


@dataclass(slots=True)
class Source:
    """An argument that an activation is made again from.

    value: an `Activation`, a tensor of which something else takes care (a parameter, the images), or no tensor at all.
    version: of its memory when it was read. lost: whether it is a tensor that nobody else would keep in memory.
    """

    value: Any
    version: int = 0
    lost: bool = False

    def there(self) -> bool:
        """Whether it is, or can be, as it was."""
        if isinstance(self.value, Activation):
            return self.value.version == self.version and (self.value.in_memory() or self.value.cheap())
        return not self.lost and (not isinstance(self.value, Tensor) or self.value._version == self.version)

    def get(self) -> Any:
        """The argument; raises OverwrittenError."""
        self._check()
        return self.value.tensor_again() if isinstance(self.value, Activation) else self.value

    def batch_norm(self) -> Making | None:
        """The F.batch_norm that it would have to be made by; None if it was not one, or if it is in memory."""
        self._check()
        if not isinstance(self.value, Activation) or self.value.tensor is not None or len(self.value.makings) > 1:
            return None
        making = self.value.makings[0]
        return making if making.function is F.batch_norm else None

    def _check(self) -> None:
        if not self.there():
            raise OverwrittenError("an operation of the model overwrites a tensor that another one read before")


@dataclass(slots=True, eq=False)
class Making:
    """One operation that took part in making an activation; sources: without what it overwrote."""

    rule: Rule
    function: Callable
    saved: tuple
    sources: tuple[Source, ...]

    def again(self, rule: Rule, *overwritten: Tensor) -> Tensor:
        """What it made; rule: for it, or for it and what follows; overwritten: what it overwrites, if anything."""
        if rule.of_batch_norm is not None and not overwritten:
            for mine, other in (self.sources, self.sources[::-1]):
                batch_norm = mine.batch_norm()
                if batch_norm is not None:
                    of_it = tuple(source.get() for source in batch_norm.sources)
                    return rule.of_batch_norm(batch_norm.saved, of_it, other.get())
        return rule.again(self.function, self.saved, *overwritten, *(source.get() for source in self.sources))


@dataclass(slots=True, eq=False)
class Activation:
    """The output of an operation that has a rule, and of those that went on to overwrite it, with nothing in between.

    version: of its memory when it was finished. tensor: detached; None while it is not in memory. counter: the version
        of this tensor when it was finished; another one later means that something else has written to it.
    row: how many activations have to be made before it, one from the other.
    wanted: whether autograd keeps it.
    """

    version: int = 0
    tensor: Tensor | None = None
    counter: int = 0
    makings: list[Making] = field(default_factory=list)
    row: int = 0
    wanted: bool = False

    def hold(self, tensor: Tensor) -> None:
        """Have it in memory: what was computed, finished."""
        self.tensor, self.counter = tensor.detach(), tensor._version

    def in_memory(self) -> bool:
        """Whether it is there, and nobody has written to it since it was finished."""
        return self.tensor is not None and self.tensor._version == self.counter

    def cheap(self) -> bool:
        """Whether it can be made again for little."""
        return all(m.rule.again is not None and all(s.there() for s in m.sources) for m in self.makings)

    def rule_from(self, making: Making) -> tuple[Rule, Making | None]:
        """The rule for one of the makings; where it is for the ReLU behind it as well, with the making that this is."""
        following = self.makings[self.makings.index(making) + 1 :][:1]
        if making.rule.with_relu is not None and following and following[0].function is F.relu:
            return making.rule.with_relu, following[0]
        return making.rule, None

    def tensor_again(self) -> Tensor:
        """The tensor, which from now on is in memory; raises OverwrittenError."""
        if self.tensor is None:
            made, included = None, None
            with torch.no_grad():
                for making in self.makings:
                    if making is included:
                        continue
                    rule, included = self.rule_from(making)
                    made = making.again(rule, *([] if made is None else [made]))
            self.hold(made)
        return self.tensor


class Kept:
    """What autograd holds in place of a tensor."""

    __slots__ = ("activation", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached: an output that knew the operation which keeps it would never be freed. It shares the version.
        self.tensor: Tensor | None = tensor if tensor.is_leaf else tensor.detach()
        self.version = tensor._version
        self.activation: Activation | None = None

    def leave_to(self, activation: Activation) -> None:
        """From now on it is the activation that has the tensor."""
        self.activation, self.tensor = activation, None
        activation.wanted = True

    def get(self) -> Tensor:
        """The tensor; RuntimeError when it has been overwritten, as autograd raises without us."""
        activation = self.activation
        tensor = self.tensor if activation is None else activation.tensor_again()
        if activation is None:
            intact = tensor._version == self.version
        else:
            intact = activation.version == self.version and activation.in_memory()
        if not intact:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was modified by an inplace "
                "operation of the model"
            )
        return tensor


class Known:
    """The activations that tensors of the model are, found by the tensors themselves.

    Those of tensors that are gone stay in it; a weak dictionary of torch's, which drops them, takes longer to ask.
    """

    def __init__(self) -> None:
        self.by_id: dict[int, tuple[ReferenceType[Tensor], Activation]] = {}

    def get(self, tensor: Tensor) -> Activation | None:
        tensor_then, activation = self.by_id.get(id(tensor), _NOBODY)
        return activation if tensor_then() is tensor else None

    def add(self, tensor: Tensor, activation: Activation) -> None:
        self.by_id[id(tensor)] = ref(tensor), activation


_NOBODY = (lambda: None, None)


class Watch(RuledOperations):
    """While it is entered, the outputs of operations with a rule become `Activation`s; results are as outside."""

    def __init__(self) -> None:
        super().__init__()
        self.known = Known()

    def made(self, activation: Activation, output: Tensor) -> None:
        """Called after each operation with a rule, the latest of `activation.makings`."""

    def operation(self, rule: Rule, overwrites: bool, function: Callable, args: tuple, kwargs: dict) -> Tensor:
        # Before the operation runs, as it may change their versions. What is overwritten is the activation itself.
        sources = tuple(self._source(s) for s in rule.sources(*args, **kwargs)[overwrites:])
        output, saved = (function(*args, **kwargs), ()) if overwrites else rule.forward(function, *args, **kwargs)
        activation = self.known.get(output) if overwrites else Activation()
        self.known.add(output, activation)
        activation.version = output._version
        activation.makings.append(Making(rule, function, saved, sources))
        others = [s.value for s in sources if isinstance(s.value, Activation)]
        activation.row = max([activation.row, *(a.row + 1 for a in others if a.tensor is None)])
        self.made(activation, output)
        return output

    def _source(self, argument: Any) -> Source:
        if not isinstance(argument, Tensor):
            return Source(argument)
        activation = self.known.get(argument)
        if activation is not None:
            return Source(activation, argument._version)
        # Other operations' outputs may be kept by nobody: to hold them would cost the memory that is to be saved.
        return Source(argument.detach(), argument._version) if argument.is_leaf else Source(None, lost=True)


class KeptWatch(Watch):
    """A watch under which autograd keeps `Kept`s; subclasses say what becomes of the activations that it wants."""

    def __init__(self) -> None:
        super().__init__()
        self.unclaimed: list[Kept] | None = None  # kept by the operation that is running
        self.hooks = ExitStack()

    def __enter__(self):
        self.hooks.enter_context(saved_tensors_hooks(self._keep, Kept.get))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.hooks.close()
        # The graph that autograd built refers to this object for as long as it lives: nothing here may refer to it.
        self.known, self.returned, self.unclaimed = Known(), None, None

    def wanted(self, activation: Activation, tensor: Tensor) -> None:
        """Called when autograd is about to keep a finished activation."""
        raise NotImplementedError

    def operation(self, rule: Rule, overwrites: bool, function: Callable, args: tuple, kwargs: dict) -> Tensor:
        self.unclaimed = []
        output = super().operation(rule, overwrites, function, args, kwargs)
        unclaimed, self.unclaimed = self.unclaimed, None
        for kept in unclaimed:
            if kept.tensor.data_ptr() == output.data_ptr() and kept.tensor.shape == output.shape:
                self._leave(kept, self.known.get(output), output)
        return output

    def _keep(self, tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        if tensor.dim() < 2:
            return kept  # statistics, a BatchNorm's parameters: not worth the search
        activation = self.known.get(tensor)
        if activation is not None and activation.version == kept.version:
            self._leave(kept, activation, tensor)
        elif self.unclaimed is not None:
            self.unclaimed.append(kept)
        return kept

    def _leave(self, kept: Kept, activation: Activation, tensor: Tensor) -> None:
        kept.leave_to(activation)
        self.wanted(activation, tensor)


class LeanPass(KeptWatch):
    """For one forward pass and one backward pass: what is cheap is let go at once and made again when it is needed.

    The backward pass raises OverwrittenError where the model overwrites what an activation would be made from.
    """

    def wanted(self, activation: Activation, tensor: Tensor) -> None:
        if activation.row > MOST_IN_A_ROW or not activation.cheap():
            activation.hold(tensor)
            activation.row = 0


def lean(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, each call of it as a `LeanPass`."""

    def run(*args: Any) -> Tensor:
        with LeanPass():
            return function(*args)

    return run
