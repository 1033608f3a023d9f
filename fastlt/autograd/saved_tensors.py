"""The tensors that autograd saves for a backward pass, without those that are cheap to recompute.

Under a `SavedTensorsMode` autograd gets a `SavedTensor` in place of each tensor that it saves. The handle knows the
tensor itself, or the activation that it is and that can be released.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastlt.autograd.activations import Activation
from fastlt.autograd.modes import ActivationsByTensor, TrackingMode
from fastlt.autograd.rules import Rule

# Activations that are recomputed from others that have to be recomputed first. With 1, of the residual sums of a ResNet
# every second one is held. With 0, all are; without a limit the first that is needed brings all of them back.
MAX_RECOMPUTE_DEPTH = 1


class SavedTensor:
    """The handle that autograd holds in place of a tensor that it saves.

    tensor: the tensor, detached; None once `activation` is set.
    version: the version counter of the tensor when it was saved.
    activation: the activation that the tensor is; None for all other tensors.
    """

    __slots__ = ("activation", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached: an output that knew the operation which saves it would never be freed. It shares the version.
        self.tensor: Tensor | None = tensor if tensor.is_leaf else tensor.detach()
        self.version = tensor._version
        self.activation: Activation | None = None

    def is_tensor(self, other: Tensor) -> bool:
        """Whether `other` is the same memory in the same shape."""
        assert self.tensor is not None
        return self.tensor.data_ptr() == other.data_ptr() and self.tensor.shape == other.shape

    def refer_to(self, activation: Activation) -> None:
        """Leave the tensor to the activation that it is."""
        self.activation, self.tensor = activation, None
        activation.saved_for_backward = True

    def unpack(self) -> Tensor:
        """The tensor; RuntimeError when it has been overwritten, as autograd raises without us."""
        if self.activation is not None:
            tensor = self.activation.restore()
            intact = self.activation.version == self.version and self.activation.in_memory()
        else:
            assert self.tensor is not None
            tensor = self.tensor
            intact = tensor._version == self.version
        if not intact:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was modified by an inplace "
                "operation of the model"
            )
        return tensor


class SavedTensorsMode(TrackingMode):
    """Tracks activations, and hands autograd `SavedTensor`s; subclasses say which saved activations are held.

    unmatched: the handles of tensors that the running operation has saved and that are no activation yet, as its output
        is not; None while no operation with a rule runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unmatched: list[SavedTensor] | None = None
        self.hooks = ExitStack()

    def __enter__(self):
        self.hooks.enter_context(saved_tensors_hooks(self._pack, SavedTensor.unpack))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.hooks.close()
        # The graph that autograd built refers to this object for as long as it lives: nothing here may refer to it.
        self.activations, self.returned, self.unmatched = ActivationsByTensor(), None, None

    def on_saved(self, activation: Activation, tensor: Tensor) -> None:
        """Called when autograd saves a finished activation. tensor: the activation, as the model has it."""
        raise NotImplementedError

    def run_operation(self, rule: Rule, overwrites: bool, function: Callable, args: tuple, kwargs: dict) -> Tensor:
        self.unmatched = unmatched = []
        output = super().run_operation(rule, overwrites, function, args, kwargs)
        self.unmatched, activation = None, self.activations.get(output)
        assert activation is not None
        for saved in unmatched:
            if saved.is_tensor(output):
                self._match(saved, activation, output)
        return output

    def _pack(self, tensor: Tensor) -> SavedTensor:
        saved = SavedTensor(tensor)
        if tensor.dim() < 2:
            return saved  # statistics, a BatchNorm's parameters: not worth the search
        activation = self.activations.get(tensor)
        if activation is not None and activation.version == saved.version:
            self._match(saved, activation, tensor)
        elif self.unmatched is not None:
            self.unmatched.append(saved)
        return saved

    def _match(self, saved: SavedTensor, activation: Activation, tensor: Tensor) -> None:
        saved.refer_to(activation)
        self.on_saved(activation, tensor)


class RecomputeMode(SavedTensorsMode):
    """For one forward and one backward pass: activations that are cheap to recompute are not held.

    The backward pass raises OverwrittenError where the model overwrites a tensor that is recomputed from.
    """

    def on_saved(self, activation: Activation, tensor: Tensor) -> None:
        if activation.recompute_depth > MAX_RECOMPUTE_DEPTH or not activation.recomputable():
            activation.hold(tensor)


def with_recompute(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, each call of it under a `RecomputeMode`; one backward pass may follow each call."""

    def run(*args: Any) -> Tensor:
        with RecomputeMode():
            return function(*args)

    return run
