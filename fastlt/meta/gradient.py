"""The exact meta-gradient at first-order cost: lookahead, and dL_meta/dw by one forward-mode derivative.

A meta-learned weighting takes one plain SGD step that depends on the weights w (Eq. 9 of Difficulty-Net),

    phi_hat(w) = phi - lr * grad_phi (1/b) sum_i w_i l_i(phi),

and asks how the meta loss at phi_hat changes with w (Eq. 10). By the chain rule, with v = grad L_meta(phi_hat),

    dL_meta/dw_i = -(lr/b) <grad_phi l_i(phi), v> = -(lr/b) * d/de l_i(phi + e v) at e = 0,

so all b derivatives are a single Jacobian-vector product. Nothing is differentiated twice: no `create_graph`, no
second-order graph, and BatchNorm in training mode, through which the samples of a batch couple, is handled exactly.

Where the step is lr * P * grad with a constant diagonal P (the preconditioner of an adaptive optimizer, rates by
layer), the derivative is -(lr/b) <grad_phi l_i(phi), P v>: `scaled` takes the gradient to P grad and v to P v.

Every function here is pure: parameters and buffers are passed in and left as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlt.autograd import ForwardChangedError, ForwardRecord, TangentMode
from fastlt.device.distributed import Reducer
from fastlt.device.gradients import mean_gradients

Tensors = dict[str, Tensor]
Buffers = dict[str, Tensor | None]  # None: one that a first pass makes
# A diagonal matrix over parameters: a tensor or a number for each.
Diagonal = list[Tensor] | list[float]
# Per-sample losses (b,) as a function of the parameters; it must not write to anything that outlives the call.
LossOfParameters = Callable[[Tensors], Tensor]
# The gradient of a value (0-d) in leaves, one tensor each, as `mean_gradients` takes it.
Differentiate = Callable[[Tensor, list[Tensor]], list[Tensor]]
OF_THIS_PROCESS: Differentiate = partial(mean_gradients, Reducer())


def trainable_parameters(model: nn.Module) -> Tensors:
    """The model's parameters that require a gradient, by name (the tensors themselves, not copies)."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def losses_at(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], overwrites: bool = False
) -> Callable[..., Tensor]:
    """The per-sample losses of `model` as a function of all that they depend on.

    The function takes (parameters, constants, buffers, images, labels), the first three by name, and returns (b,). It
    runs the model in the mode it is in, on copies of the buffers: BatchNorm normalises with the batch in training mode,
    and its running statistics stay as they are. overwrites: whether the model does so with its input, and gets a copy.
    """

    def losses(parameters: Tensors, constants: Tensors, buffers: Buffers, images: Tensor, labels: Tensor) -> Tensor:
        # Cloned on every call: forward-mode derivatives refuse the in-place update of a buffer they did not create.
        copies: dict[str, Any] = {name: None if b is None else b.clone() for name, b in buffers.items()}
        given = images.clone() if overwrites else images
        logits = torch.func.functional_call(model, {**copies, **constants, **parameters}, (given,))
        return loss(logits, labels)

    return losses


def tangents_at(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], overwrites: bool = False
) -> Callable[..., Tensor]:
    """The derivative of `losses_at` in the parameters along a direction, by a Jacobian-vector product.

    The function takes (parameters, direction, constants, buffers, images, labels) and returns (b,).
    """
    losses = losses_at(model, loss, overwrites)

    def tangents(parameters: Tensors, direction: Tensors, *rest: Any) -> Tensor:
        return torch.func.jvp(lambda p: losses(p, *rest), (parameters,), (direction,))[1]

    return tangents


def what_stays(
    model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor | None] = MappingProxyType({})
) -> tuple[Tensors, Buffers]:
    """The (constants, buffers) of `losses_at` for a model of which `parameters` are varied; tensors, not copies.

    buffers: in place of the model's own, by name.
    """
    constants = {name: p.detach() for name, p in model.named_parameters() if name not in parameters}
    return constants, {**dict(model.named_buffers()), **buffers}


def functional_losses(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    buffers: Mapping[str, Tensor | None] = MappingProxyType({}),
    overwrites: bool = False,
) -> LossOfParameters:
    """The per-sample losses of `model` on one batch as a function of its parameters, or of some of them.

    Parameters that it is not given are constants; otherwise see `losses_at`. buffers: see `what_stays`.
    """
    losses = losses_at(model, loss, overwrites)
    return lambda parameters: losses(parameters, *what_stays(model, parameters, buffers), images, labels)


def lookahead(parameters: Tensors, gradients: Sequence[Tensor], lr: float | Tensor) -> Tensors:
    """Eq. 9: one plain SGD step, without momentum or weight decay, into new leaf tensors.

    gradients: in the order of `parameters`, each of its parameter's shape.
    """
    with torch.no_grad():
        old = [p.detach() for p in parameters.values()]
        if isinstance(lr, Tensor):
            # As `alpha` a tensor would be read by the host.
            stepped = torch._foreach_sub(old, torch._foreach_mul(list(gradients), lr))
        else:
            stepped = torch._foreach_add(old, list(gradients), alpha=-lr)
    return {name: p.requires_grad_() for name, p in zip(parameters, stepped, strict=True)}


def scaled(tensors: list[Tensor], diagonal: Diagonal | None) -> list[Tensor]:
    """P times a gradient or a direction, parameter by parameter; the same list where P is None, the identity."""
    if diagonal is None:
        return tensors
    return list(torch._foreach_mul(tensors, diagonal))  # pyright: ignore[reportPrivateImportUsage]  # public all the same


def mean_loss_gradient(
    losses: LossOfParameters, parameters: Tensors, differentiate: Differentiate = OF_THIS_PROCESS
) -> tuple[Tensor, list[Tensor]]:
    """The mean loss at `parameters` (0-d, detached) and its gradient there, one tensor a parameter.

    differentiate: takes the gradient of the mean loss, by default that of this process alone.
    """
    with torch.enable_grad():
        value = losses(parameters).mean()
        gradients = differentiate(value, list(parameters.values()))
    return value.detach(), gradients


def directional_derivative(
    losses: LossOfParameters, parameters: Tensors, direction: Sequence[Tensor], record: ForwardRecord | None = None
) -> Tensor:
    """d/de losses(parameters + e * direction) at e = 0, for all samples at once: (b,), in the losses' dtype.

    record: of a pass `losses(parameters)` that was made before; its activations are used instead of new ones, in its
    types. A pass that cannot be repeated gives a warning and a Jacobian-vector product without it.
    """

    def tangents(primals: Tensors, unit: Tensors) -> Tensor:
        replayed = None if record is None else _tangent_of_record(losses, primals, unit, record)
        if replayed is not None:
            return replayed
        with TangentMode():
            return _tangent_along(losses, primals, unit)

    return along_unit_direction(tangents, parameters, direction)


def along_unit_direction(
    tangents: Callable[[Tensors, Tensors], Tensor], parameters: Tensors, direction: Sequence[Tensor]
) -> Tensor:
    """`tangents` of (detached parameters, direction) by way of a direction of unit norm: (b,). A zero gives zeros.

    Late in training the meta-gradient is small, and products of small tangents lose their low bits first.
    """
    with torch.no_grad():
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(direction))))
        scale = torch.where(norm > 0, norm, torch.ones_like(norm))
        unit = dict(zip(parameters, torch._foreach_div(list(direction), scale), strict=True))
        # Fused attention kernels have no forward-mode derivative; the plain matrix products are the same function.
        with sdpa_kernel(SDPBackend.MATH):
            return tangents({name: p.detach() for name, p in parameters.items()}, unit) * norm


def _tangent_along(losses: LossOfParameters, parameters: Tensors, direction: Tensors) -> Tensor:
    """d/de losses(parameters + e * direction) at e = 0, (b,); parameters: detached."""
    with forward_ad.dual_level(), torch.enable_grad():
        values = losses({name: forward_ad.make_dual(p, direction[name]) for name, p in parameters.items()})
        primal, tangent = forward_ad.unpack_dual(values)
        return torch.zeros_like(primal) if tangent is None else tangent


def _tangent_of_record(
    losses: LossOfParameters, parameters: Tensors, direction: Tensors, record: ForwardRecord
) -> Tensor | None:
    """`_tangent_along` from a recorded pass, or None, with a warning, when the pass does not repeat itself."""
    device = next(iter(parameters.values())).device
    state = random_state(device)

    def repeated(duals: Tensors) -> Tensor:
        with record.replaying():
            return losses(duals)

    try:
        return _tangent_along(repeated, parameters, direction)
    except ForwardChangedError as change:
        warnings.warn(
            f"the model does not do the same twice on one batch ({change}); its forward pass is computed again for the "
            "meta-gradient, which takes longer and is as exact",
            stacklevel=3,
        )
        set_random_state(state, device)
        return None


def weight_gradient(derivative: Tensor, lr: float | Tensor, batch_size: int) -> Tensor:
    """dL_meta/dw_i = -(lr / b) * derivative_i for the weights of the samples of one batch: (b,)."""
    return derivative * (-lr / batch_size)


def sum_by_class(per_sample: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sum of (b,) values over the samples of each class: (C,), zero for a class that is not in the batch."""
    return per_sample.new_zeros(num_classes).index_add_(0, labels, per_sample)


def is_stochastic(model: nn.Module) -> bool:
    """Whether a forward pass in training mode draws random numbers (dropout, stochastic depth)."""

    def drops(module: nn.Module) -> bool:
        rates = [getattr(module, "drop_rate", 0), getattr(module, "drop_prob", 0)]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates.append(module.p)
        if isinstance(module, nn.MultiheadAttention):
            rates.append(module.dropout)
        return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)

    return any(drops(module) for module in model.modules())


def draws_in_attention(model: nn.Module) -> bool:
    """Whether a network drops attention weights in training: torch's layer by a number, timm's by a module."""
    return any(
        (isinstance(m, nn.MultiheadAttention) and m.dropout > 0)
        or (isinstance(drop := getattr(m, "attn_drop", None), nn.Dropout) and drop.p > 0)
        for m in model.modules()
    )


def repeatable_attention(drops: bool, device: torch.device) -> AbstractContextManager[object]:
    """Inside, attention with dropout draws what the tangent's pass draws from the same state.

    That pass has matrix products for attention, and fused kernels of a GPU draw in another order. drops: see
    `draws_in_attention`.
    """
    return sdpa_kernel(SDPBackend.MATH) if drops and device.type == "cuda" else nullcontext()


def random_state(device: torch.device) -> Mapping[str, Tensor]:
    """The state of the default generators that a forward pass on `device` draws from.

    Empty while a CUDA graph is captured: nothing that draws is, and the generators may not be asked then.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return {}
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


@contextmanager
def replayed_randomness(state: Mapping[str, Tensor], device: torch.device):
    """Inside, the default generators start from `state`; afterwards they go on from where they stood before.

    The tangent belongs to the same function as the forward pass it differentiates only if both drop the same units.
    """
    now = random_state(device)
    try:
        set_random_state(state, device)
        yield
    finally:
        set_random_state(now, device)


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put a `random_state` back."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
