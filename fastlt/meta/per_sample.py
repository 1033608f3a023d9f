"""The meta-gradient where the samples of a batch do not couple: in 2 to 2.7 plain steps instead of 3.3.

Without batch statistics the loss l_i of sample i depends on sample i alone. One forward and one backward pass of the
sum of all losses then hold the gradients of all of them: each layer keeps its input a and the gradient d in its output,
or what follows from the two (see `per_sample_rules`). For *any* weights w and any direction v,

    grad (1/b) sum_i w_i l_i  =  (1/b) sum_i w_i d_i^T a_i,        <grad l_i, v>  =  <d_i, a_i V^T>,

which are the lookahead (Eq. 9), the update (Eq. 11) and the tangent (Eq. 10). Nothing goes forward or back again.

Let F be a forward pass; a backward pass takes 2 F, one for the inputs and one for the weights; a plain step takes 3 F.
- With a and d kept, the step takes F + F here, F each for lookahead, tangent and update, and 3 F for the meta batch:
  8 F, or 2.67 plain steps. Two backward passes and a forward-mode one over a recorded forward take 10 F.
- With the gradients of single samples kept, making them takes F, and the three read each of them once: 6 F and a
  little, or 2 plain steps.
- With few parameters trained, a plain step takes 2 F and the exact one 4 F and a little.

The pass goes through the model's own Python code under a mode that sees every function. A trained parameter may
- be the weight or the bias of a function in `RULES`;
- be broadcast over the batch by an elementwise function, by `expand`, or as a mask of attention. It is expanded first,
  and autograd's gradient in what was expanded is that of each sample: class token, position embedding, layer scale;
- go through other functions first, alone or with constants: a normalised head, a table of position biases. What they
  return is then used as above, and autograd has their derivative.

It may be used any number of times. Any other use raises `NotCoveredError` with the parameter's name. One that the mode
cannot see does so too, as autograd finds the parameter. `try_network` tries all this on a few images.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlt.losses import PerSampleLoss
from fastlt.meta.gradient import Tensors, along_unit_direction, random_state, set_random_state, trainable_parameters
from fastlt.meta.per_sample_rules import ELEMENTWISE, RULES, Kept, NotCoveredError, Rule, SampleGradients


class PerSampleGradients:
    """The gradients of the losses of one batch in the trained parameters, of each sample, as they were kept.

    kept: for each use of a parameter, or of a function of parameters, this tensor and what is kept. uses: see `Trial`.
    """

    def __init__(self, kept: Sequence[tuple[Tensor, Kept]], uses: Sequence[str]) -> None:
        self.kept, self.uses = kept, uses

    def weighted(self, weights: Tensor, parameters: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The gradient of sum_i weights_i l_i: one new tensor a parameter with its number, the last parameter first.

        weights: (b,). The tensors are zeros where a parameter is unused.
        """
        of: dict[int, tuple[Tensor, list[Kept]]] = {}
        for used, kept in self.kept:
            of.setdefault(id(used), (used, []))[1].append(kept)
        functions = [(used, _weighted_sum(weights, used, kept)) for used, kept in of.values() if not used.is_leaf]
        through: Sequence[Tensor | None] = [None] * len(parameters)
        if functions:
            outputs, slopes = zip(*functions, strict=True)
            through = torch.autograd.grad(outputs, parameters, slopes, retain_graph=True, allow_unused=True)
        for i, parameter in reversed(list(enumerate(parameters))):
            direct = _weighted_sum(weights, *of[id(parameter)]) if id(parameter) in of else None
            yield i, _sum(parameter, direct, through[i])

    def tangents(self, parameters: Tensors, direction: Sequence[Tensor]) -> Tensor:
        """d/de l(parameters + e * direction) at e = 0, for each sample: (b,). direction: a tensor a parameter."""

        def along(_: Tensors, unit: Tensors) -> Tensor:
            moved = {id(p): unit[name] for name, p in parameters.items()}
            total = None
            for used, kept in self.kept:
                if id(used) not in moved:
                    moved[id(used)] = _pushed_forward(used, list(parameters.values()), list(unit.values()))
                term = kept.along(moved[id(used)])
                total = term if total is None else total + term
            assert total is not None, "nothing was kept"
            return total

        return along_unit_direction(along, parameters, direction)


def _sum(like: Tensor, *gradients: Tensor | None) -> Tensor:
    present = [g for g in gradients if g is not None]
    if not present:
        return torch.zeros_like(like)
    return present[0] if len(present) == 1 else present[0] + present[1]


def _weighted_sum(weights: Tensor, used: Tensor, kept: Sequence[Kept]) -> Tensor:
    """The gradient of sum_i weights_i l_i in what was used, from what is kept of each use."""
    with torch.no_grad():
        terms = (one.weighted(weights).reshape(used.shape).to(used.dtype) for one in kept)
        return functools.reduce(torch.add, terms)


def _pushed_forward(used: Tensor, parameters: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """The tangent of a function of parameters along a direction, by differentiating its backward pass; else zeros."""
    if used.is_leaf:
        return torch.zeros_like(used)  # a parameter that the direction does not move
    with torch.enable_grad():
        slope = torch.zeros_like(used, requires_grad=True)
        back = torch.autograd.grad(used, parameters, slope, create_graph=True, allow_unused=True)
        pairs = [(g, v) for g, v in zip(back, direction, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros_like(used)
        outputs, tangents = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, slope, tangents, retain_graph=True, materialize_grads=True)[0]


def kept_pass(
    losses: Callable[[], Tensor], network: nn.Module, samples: int, uses: Sequence[str] | None = None
) -> tuple[Tensor, PerSampleGradients]:
    """The losses (b,) of one batch, constant, and their gradients in the trained parameters of `network`.

    losses: runs the network in the mode it is in, once. samples: b. uses: what parameters were used for when it was
    tried, see `Trial`. Raises NotCoveredError, also where they are used otherwise.
    """
    mode = _KeepMode(network, samples)
    with torch.enable_grad(), mode:
        values = losses()
    if uses is not None and mode.log != list(uses):
        pairs = itertools.zip_longest(mode.log, uses)
        use = next(one or other for one, other in pairs if one != other)
        raise NotCoveredError(str(use).split()[0], "is used otherwise than when it was tried")
    return values.detach(), PerSampleGradients(mode.backward(values), mode.log)


class _Set:
    """Tensors, looked up by themselves; they may be freed meanwhile."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.by_id: dict[int, ReferenceType[Tensor]] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        self.by_id[id(tensor)] = ref(tensor)

    def __contains__(self, tensor: Tensor) -> bool:
        found = self.by_id.get(id(tensor))
        return found is not None and found() is tensor


class _Use:
    """One call of a function with a rule. Called with the gradient d in its output, it keeps what the rule says.

    used: the tensors with a gradient, by the names of the function's arguments.
    """

    def __init__(self, rule: Rule, arguments: dict[str, Any], used: dict[str, Tensor], samples: int, name: str) -> None:
        self.rule, self.arguments, self.used, self.samples, self.name = rule, arguments, used, samples, name
        self.version: int = arguments["input"]._version
        if "weight" not in used:
            del arguments["input"]
        self.kept: list[tuple[Tensor, Kept]] = []

    def __call__(self, grad_output: Tensor) -> None:
        if "input" in self.arguments and self.arguments["input"]._version != self.version:
            raise NotCoveredError(self.name, "belongs to a layer whose input is overwritten afterwards")
        with torch.no_grad():
            kept = self.rule.keep(self.arguments, grad_output.detach(), self.samples, set(self.used))
            self.kept += [(self.used[argument], one) for argument, one in kept]
        self.arguments = {}


class _KeepMode(TorchFunctionMode):
    """Takes trained parameters out of the graph of a forward pass, and watches what they are used for.

    samples: b. names: of the trained parameters and of functions of them, by id; these are in `sources`, so that no id
    is used twice. constants: what depends on no image. anchor: 0-d zero; outputs without a gradient have it added, so
    that the backward pass comes to each use, and to nothing before the first of them.
    """

    def __init__(self, network: nn.Module, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.trained = trainable_parameters(network)
        self.sources: list[Tensor] = list(self.trained.values())
        self.names = {id(p): name for name, p in self.trained.items()}
        self.constants = _Set([*network.buffers(), *(p for p in network.parameters() if not p.requires_grad)])
        self.anchor = torch.zeros((), device=next(network.parameters()).device, requires_grad=True)
        self.uses: list[_Use] = []
        self.expanded: list[tuple[Tensor, Tensor]] = []  # a source, and what it was expanded to
        self.log: list[str] = []  # every use, in words

    def backward(self, losses: Tensor) -> list[tuple[Tensor, Kept]]:
        """One backward pass of unit weights: what is kept of each source."""
        inputs = [self.anchor, *(leaf for _, leaf in self.expanded), *self.trained.values()]
        if not losses.requires_grad:
            raise NotCoveredError(
                next(iter(self.trained)), "and no other trained parameter has an effect on the losses"
            )
        gradients = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        of_leaves, of_parameters = gradients[1 : 1 + len(self.expanded)], gradients[1 + len(self.expanded) :]
        for name, gradient in zip(self.trained, of_parameters, strict=True):
            if gradient is not None:
                raise NotCoveredError(name, "is used where no rule sees it")
        kept = [entry for use in self.uses for entry in use.kept]
        for (source, _), gradient in zip(self.expanded, of_leaves, strict=True):
            if gradient is not None:
                by_row = gradient.reshape(self.samples, -1, source.numel())
                kept.append((source, SampleGradients(by_row.sum(1) if by_row.shape[1] > 1 else by_row[:, 0])))
        return kept

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors(args, kwargs))
        if not any(id(t) in self.names for t in tensors):
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and all(t in self.constants for t in tensors):
                self.constants.add(result)
            return result
        rule = RULES.get(func)
        if rule is not None:
            arguments = rule.bind(args, kwargs)
            if not self._is_constant(arguments["input"]):
                return self._watched(func, rule, arguments)
        if func is F.scaled_dot_product_attention or func in ELEMENTWISE or func is Tensor.expand:
            grown = self._expanded(func, args, kwargs, tensors)
            if grown is not None:
                return func(*grown[0], **grown[1])
        if all(self._is_constant(t) for t in tensors):
            return self._function_of_parameters(func, args, kwargs, tensors)
        raise NotCoveredError(self._name(tensors), f"is used by {getattr(func, '__name__', func)}, which has no rule")

    def _is_constant(self, tensor: Any) -> bool:
        """Whether it is a source or depends on no image."""
        return id(tensor) in self.names or tensor in self.constants

    def _note(self, name: str, func: Callable, rows: int) -> None:
        self.log.append(f"{name} {getattr(func, '__name__', func)} {rows}")

    def _name(self, tensors: Iterable[Tensor]) -> str:
        return next(self.names[id(t)] for t in tensors if id(t) in self.names)

    def _watched(self, func: Callable, rule: Rule, arguments: dict[str, Any]) -> Tensor:
        """Run a function of the batch and of sources, by a rule."""
        used = {n: a for n, a in arguments.items() if isinstance(a, Tensor) and id(a) in self.names}
        name = self._name(used.values())
        refused = rule.refuses(arguments)
        if refused is None and not used.keys() <= set(rule.parameters):
            refused = f"is an argument of {func.__name__} that has no rule"
        data = arguments["input"]
        if refused is None and (data.dim() < 2 or len(data) % self.samples):
            refused = (
                f"belongs to a layer whose input is of shape {tuple(data.shape)}, which is no batch of {self.samples}"
            )
        if refused is not None:
            raise NotCoveredError(name, refused)
        result = func(**{n: a.detach() if n in used else a for n, a in arguments.items()})
        if not result.requires_grad:
            result = result + self.anchor
        low = rule.in_type_of_output and data.dtype != result.dtype
        kept_input = data.detach().to(result.dtype) if low else data.detach()
        use = _Use(rule, {**arguments, "input": kept_input}, used, self.samples, name)
        result.register_hook(use)
        self.uses.append(use)
        self._note(name, func, len(data) // self.samples)
        return result

    def _expanded(self, func: Callable, args: tuple, kwargs: dict, tensors: list[Tensor]) -> tuple[tuple, dict] | None:
        """The arguments with sources expanded over the batch; None where there is nothing to expand them to."""
        if func is Tensor.expand:
            shape = tuple(func(args[0].detach(), *args[1:], **kwargs).shape)
        elif func is F.scaled_dot_product_attention:
            shape = (len(tensors[0]), *[1] * (tensors[0].dim() - 1))
        else:
            shape = tuple(torch.broadcast_shapes(*(t.shape for t in tensors)))
        if not shape or shape[0] < self.samples or shape[0] % self.samples:
            return None
        if not all(t.dim() < len(shape) or (len(t) == 1 and shape[0] > 1) for t in tensors if id(t) in self.names):
            return None

        def grown(value: Any) -> Any:
            if not isinstance(value, Tensor) or id(value) not in self.names:
                return value
            inner = (
                *[1] * (len(shape) - 1 - value.dim()),
                *value.shape[value.dim() - min(value.dim(), len(shape) - 1) :],
            )
            leaf = value.detach().reshape(inner).expand(shape[0], *inner).requires_grad_()
            self.expanded.append((value, leaf))
            self._note(self.names[id(value)], func, shape[0] // self.samples)
            return leaf

        return tuple(grown(a) for a in args), {name: grown(a) for name, a in kwargs.items()}

    def _function_of_parameters(self, func: Callable, args: tuple, kwargs: dict, tensors: list[Tensor]) -> Any:
        result = func(*args, **kwargs)
        for one in _tensors((result,), {}):
            if one.requires_grad:
                self.sources.append(one)
                self.names[id(one)] = self._name(tensors)
                self._note(self.names[id(one)], func, 0)
            else:
                self.constants.add(one)
        return result


def _tensors(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among arguments, and in lists and tuples of arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (one for one in value if isinstance(one, Tensor))


# Images of the trial, an odd number: few axes that are not the batch have a multiple of it.
TRIED = 3
# Relative errors of the trial; a wrong rule is wrong by far more. float32 leaves 1e-5.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Trial:
    """Whether a batch of a network can go through `kept_pass`.

    refused: why it cannot, in words; None when it can. parameter: the one that is not covered, if that is why.
    uses: what the parameters are used for, in order; every later pass must do the same.
    """

    refused: str | None
    parameter: str | None = None
    uses: tuple[str, ...] = ()


def try_network(network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], image: Tensor, num_classes: int) -> Trial:
    """Whether a batch of `network`, in the mode it is in, can go through `kept_pass`.

    Tries what the modules do not tell: the loss of one random image must not depend on another, and what a pass keeps
    must be autograd's gradients. loss: (logits (b, C), labels (b,)) -> (b,). image: (1, ...), for its shape, type and
    place. Leaves network, loss and the generators as they are.
    """
    coupled = why_coupled(network)
    if coupled is not None:
        return Trial(coupled)
    state = random_state(image.device)
    before = {place: (b, None if b is None else b.clone()) for place, b in _buffers(network).items()}
    try:
        with torch.autocast(image.device.type, enabled=False):
            trial = _try_images(network, copy.deepcopy(loss), image, num_classes, state)
    except NotCoveredError as error:
        trial = Trial(str(error), error.parameter)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        trial = Trial(f"a trial failed ({str(error).strip().splitlines()[0]})")
    finally:
        set_random_state(state, image.device)
    changed = _put_back(network, before)
    return trial if changed is None else Trial(f"a forward pass changes the buffer {changed}")


def _buffers(network: nn.Module) -> dict[tuple[str, str], Tensor | None]:
    """All buffers, those that are None among them, by the names of the module and of the buffer in it."""
    return {(name, key): b for name, module in network.named_modules() for key, b in module._buffers.items()}


def _put_back(network: nn.Module, before: Mapping[tuple[str, str], tuple[Tensor | None, Tensor | None]]) -> str | None:
    """Give a network the buffers, with the values, that it had; the name of one that was changed, None without one."""
    changed = None
    for place, now in _buffers(network).items():
        buffer, value = before.get(place, (None, None))
        if now is buffer and (buffer is None or value is None or torch.equal(buffer, value)):
            continue
        changed = changed or ".".join(part for part in place if part)
        module = network.get_submodule(place[0])
        if place not in before:
            del module._buffers[place[1]]
            continue
        module._buffers[place[1]] = buffer
        if buffer is not None and value is not None:
            with torch.no_grad():
                buffer.copy_(value)
    return changed


def why_coupled(network: nn.Module) -> str | None:
    """What the modules tell: statistics of the batch, and forward passes that the backward pass runs again."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return f"{name} normalises with its batch, through which the samples couple"
    again = recomputes(network)
    return None if again is None else f"{again} goes forward again in the backward pass (gradient checkpointing)"


def recomputes(network: nn.Module) -> str | None:
    """The part of a network that says it recomputes activations in the backward pass, as timm and transformers do."""
    for name, module in network.named_modules():
        if any(getattr(module, switch, False) is True for switch in ("grad_checkpointing", "gradient_checkpointing")):
            return name or "the network"
    return None


def _try_images(
    network: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    image: Tensor,
    num_classes: int,
    state: Mapping[str, Tensor],
) -> Trial:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(image)

    images, labels = draw(TRIED, *image.shape[1:]), torch.arange(TRIED, device=image.device) % num_classes
    if image.is_contiguous(memory_format=torch.channels_last):
        images = images.contiguous(memory_format=torch.channels_last)
    if isinstance(loss, PerSampleLoss):
        loss.draw(TRIED)
    parameters = trainable_parameters(network)
    with torch.enable_grad():
        images.requires_grad_()
        losses = loss(network(images * 1), labels)  # the product: some networks overwrite what they are given
        of_samples = [
            torch.autograd.grad(one, [images, *parameters.values()], retain_graph=True, materialize_grads=True)
            for one in losses
        ]
    for i, (of_images, *_) in enumerate(of_samples):
        others = of_images[[j for j in range(TRIED) if j != i]]
        if others.abs().max() > 1e-6 * of_images.abs().max():
            return Trial("the loss of an image depends on the other images of its batch")
    if _moves_others(lambda given: loss(network(given), labels), images.detach(), losses.detach(), state):
        return Trial("the loss of an image depends on the other images of its batch")
    set_random_state(state, image.device)
    _, gradients = kept_pass(lambda: loss(network(images.detach()), labels), network, TRIED)
    weights, direction = draw(TRIED).abs(), [draw(*p.shape) for p in parameters.values()]
    exact = [list(gradients[1:]) for gradients in of_samples]
    weighted = dict(gradients.weighted(weights, list(parameters.values())))
    expected = [torch.tensordot(weights, torch.stack(of), 1) for of in zip(*exact, strict=True)]
    whole = torch.stack([g.norm() for g in expected]).norm()
    for i, (name, other) in enumerate(zip(parameters, expected, strict=True)):
        one = weighted[i]
        if (one - other).norm() > TOLERANCE * (other.norm() + 1e-2 * whole):
            return Trial(f"what is kept of {name} is not its gradient", name)
    error = gradients.tangents(parameters, direction) - torch.stack([_dot(of, direction) for of in exact])
    scale = torch.stack([_dot([g.abs() for g in of], [v.abs() for v in direction]) for of in exact])
    if (error.abs() > TOLERANCE * scale).any():
        return Trial("the tangents of what is kept are not autograd's")
    return Trial(None, uses=tuple(gradients.uses))


def _moves_others(
    losses_of: Callable[[Tensor], Tensor], images: Tensor, losses: Tensor, state: Mapping[str, Tensor]
) -> bool:
    """Whether another image in the place of one moves the losses of the rest, which gradients show only in part.

    A statistic that is a constant to autograd is one of the batch all the same.
    """
    for i in range(len(images)):
        others = [j for j in range(len(images)) if j != i]
        given = images.clone()
        given[i] = 3 * given[i].flip(-1)
        set_random_state(state, images.device)
        with torch.enable_grad():  # in the kernels of the other passes
            moved = losses_of(given).detach() - losses
        if not (moved[others].abs() <= 1e-5 * losses.abs().max()).all():
            return True
    return False


def _dot(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(ones, others, strict=True)]).sum()
