"""The diagonal preconditioner of an optimizer: what its own step would multiply a gradient by, beside its rate.

An adaptive optimizer divides by the root of a running mean of squared gradients, v_t, which holds the gradient of its
own step t already (Adam's Algorithm 1). So the preconditioner of a gradient g is

    P = 1 / (sqrt(v_hat) + eps),    v_hat from beta2 v_{t-1} + (1 - beta2) g^2, bias-corrected as the optimizer does,

and before the first step v_hat is g^2. With g in it, P g is as bounded as the optimizer's own step: with v_{t-1} alone
a parameter whose gradients had been near zero would be thrown far off. P is a constant: nothing is differentiated
in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.optim import NAdamW
from torch import Tensor

from fastlt.optim.factory import OPTIMIZERS, optimizer_class

# (group, state of the parameter, the gradient as the optimizer takes it) -> what its step divides by.
Denominator = Callable[[Mapping[str, Any], Mapping[str, Any], Tensor], Tensor]


def _adam(group: Mapping[str, Any], state: Mapping[str, Any], gradient: Tensor) -> Tensor:
    """sqrt(v / (1 - beta2^t)) + eps; with amsgrad the largest v so far."""
    squares = _mean_of_squares(gradient, state.get("exp_avg_sq"), group["betas"][1])
    if group.get("amsgrad") and "max_exp_avg_sq" in state:
        squares = torch.maximum(squares, state["max_exp_avg_sq"])
    correction = 1 - group["betas"][1] ** _step(state)
    return (squares / correction).sqrt_().add_(group["eps"])


def _adamax(group: Mapping[str, Any], state: Mapping[str, Any], gradient: Tensor) -> Tensor:
    """max(beta2 u, |g| + eps)."""
    size = gradient.abs().add_(group["eps"])
    return size if "exp_inf" not in state else torch.maximum(state["exp_inf"] * group["betas"][1], size)


def _rmsprop(group: Mapping[str, Any], state: Mapping[str, Any], gradient: Tensor) -> Tensor:
    """sqrt(v) + eps without a correction of its bias; centered takes the squared mean off."""
    alpha = group["alpha"]
    squares = _mean_of_squares(gradient, state.get("square_avg"), alpha)
    if group["centered"]:
        mean = gradient * (1 - alpha)
        mean = mean if "grad_avg" not in state else mean.add_(state["grad_avg"], alpha=alpha)
        squares = squares - mean.square()
    return squares.sqrt_().add_(group["eps"])


def _adagrad(group: Mapping[str, Any], state: Mapping[str, Any], gradient: Tensor) -> Tensor:
    """(sqrt(sum of squares) + eps) (1 + (t - 1) lr_decay)."""
    total = gradient.square()
    root = (total if "sum" not in state else total.add_(state["sum"])).sqrt_().add_(group["eps"])
    return root.mul_(1 + (_step(state) - 1) * group["lr_decay"])


def _mean_of_squares(gradient: Tensor, before: Tensor | None, beta: float) -> Tensor:
    squares = gradient.square().mul_(1 - beta)
    return squares if before is None else squares.add_(before, alpha=beta)


def _step(state: Mapping[str, Any]) -> Tensor | int:
    """The number of the step that is looked ahead, from 1; a tensor where the optimizer counts in one, never read."""
    return state["step"].double() + 1 if "step" in state else 1


# The optimizers that have a diagonal preconditioner. Not among them are those whose step is no diagonal times a
# gradient: LAMB's and LARS' norms of layers, Lion's sign, Muon's and Kron's matrices, factored second moments.
PRECONDITIONERS: dict[type[torch.optim.Optimizer], Denominator] = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.NAdam: _adam,
    NAdamW: _adam,
    torch.optim.Adamax: _adamax,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
}
PRECONDITIONED = tuple(name for name in OPTIMIZERS if optimizer_class(name) in PRECONDITIONERS)


@torch.no_grad()
def preconditioner(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """P of each parameter for its gradient, as the top of this file says; changes nothing and waits for nothing.

    gradients: those of the loss; weight decay that the optimizer adds to the gradient is added to them.
    """
    denominator = PRECONDITIONERS[type(optimizer)]
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    found = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        group = group_of[parameter]
        if group["weight_decay"] and not _decouples(optimizer, group):
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        found.append(denominator(group, optimizer.state.get(parameter, {}), gradient).reciprocal_())
    return found


def _decouples(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether weight decay goes past the gradient."""
    return isinstance(optimizer, (torch.optim.AdamW, NAdamW)) or bool(group.get("decoupled_weight_decay"))
