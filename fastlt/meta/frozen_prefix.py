"""The part of a network before its first trained parameter: it makes the same of an image in every iteration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Cuts that are tried, the latest first. Behind the last frozen block of a ViT come up to eight frozen modules of the
# first block that has an adapter.
CUTS = 12


class FrozenPrefix:
    """Passes of a network, in eval mode, that begin with the output of one of its modules.

    cut: the module. one: its output for one image, (1, ...). before: modules that run before it, with their outputs for
    one image; nothing but the modules up to the cut needs them.
    """

    def __init__(
        self, model: nn.Module, cut: nn.Module, one: Tensor, before: Sequence[tuple[nn.Module, Tensor]] = ()
    ) -> None:
        self.model, self.cut, self.one, self.before = model, cut, one, before

    def __call__(self, images: Tensor, outputs: Tensor) -> Tensor:
        """What the network returns for images (N, ...), of which `outputs` (N, ...) are the cut's."""
        with self._replaced(len(images), outputs):
            return self.model(images)

    def outputs(self, images: Tensor) -> Tensor:
        """The cut's outputs for images (N, ...): by a whole pass."""
        seen: list[Tensor] = []

        def note(module: nn.Module, args: tuple, output: Any) -> None:
            seen.append(output.clone())  # what follows may write to it

        handle = self.cut.register_forward_hook(note)
        try:
            self.model(images)
        finally:
            handle.remove()
        return seen[0]

    def state(self) -> tuple[tuple[int, int], ...]:
        """Another one whenever something has written to what the cut's output depends on."""
        frozen = (p for p in self.model.parameters() if not p.requires_grad)
        buffers = (b for m in (*(module for module, _ in self.before), self.cut) for b in m.buffers())
        return tuple((id(t), t._version) for t in (*frozen, *buffers))

    @contextmanager
    def _replaced(self, count: int, outputs: Tensor) -> Iterator[None]:
        """Inside, the cut returns `outputs`, and modules before it nothing but NaN."""
        for module, one in self.before:
            nothing = one.new_full((), torch.nan).expand(count, *one.shape[1:])
            module.forward = lambda *args, _nothing=nothing, **kwargs: _nothing
        self.cut.forward = lambda *args, **kwargs: outputs.clone()  # what follows may write to it
        try:
            yield
        finally:
            for module in (*(module for module, _ in self.before), self.cut):
                del module.forward


def moving_statistics(model: nn.Module) -> set[int]:
    """The ids of the modules whose statistics follow the batches that the model is trained on."""
    kind = nn.modules.batchnorm._BatchNorm
    return {id(module) for module in model.modules() if isinstance(module, kind) and module.training}


def find_prefix(model: nn.Module, moving: set[int], image: Tensor) -> FrozenPrefix | None:
    """The longest part of `model` that depends on nothing that is trained; None where there is none with a parameter.

    model: in eval mode. moving: see `moving_statistics`. image: (1, ...). A part is taken if the network returns the
    same for the image with nothing but the output of its last module.
    """
    finished: list[tuple[nn.Module, Tensor]] = []
    begun = False

    def enter(module: nn.Module, args: tuple) -> None:
        nonlocal begun
        begun = begun or id(module) in moving

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        # With a gradient it would depend on a trained parameter, whichever module this belongs to.
        if not begun and isinstance(output, Tensor) and not output.requires_grad and len(output) == 1:
            finished.append((module, output.clone()))

    handles = [m.register_forward_pre_hook(enter) for m in model.modules()]
    handles += [m.register_forward_hook(leave) for m in model.modules()]
    try:
        with torch.enable_grad():
            expected = model(image).detach()
    finally:
        for handle in handles:
            handle.remove()
    inner = {id(part) for module, _ in finished for part in module.modules() if part is not module}
    outer = [(m, output) for m, output in finished if id(m) not in inner and "forward" not in vars(m)]
    if not any(True for module, _ in outer for _ in module.parameters()):
        return None  # a head on features: it is as quick without
    for position in reversed(range(max(0, len(outer) - CUTS), len(outer))):
        prefix = FrozenPrefix(model, *outer[position], outer[:position])
        try:
            if torch.equal(prefix(image, prefix.one), expected):
                return prefix
        except RuntimeError:
            continue  # something between the modules writes to what one of them returned
    return None
