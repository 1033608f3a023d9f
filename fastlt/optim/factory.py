"""Optimizers by their names in timm's factory; SGD is torch's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers

from fastlt.device.compiled import capturable, capturable_options, is_captured, make_sgd
from fastlt.names import pick, shortened, unknown

# Of another package, with a Hessian of their own, or other names of SGD, whose momentum and nesterov are keys.
LEFT_OUT = ("bnb*", "fused*", "adahessian", "momentum", "nesterov", "nesterovw")
OPTIMIZERS: tuple[str, ...] = tuple(str(name) for name in list_optimizers(exclude_filters=list(LEFT_OUT)))
# Arguments that keys of a stage give, or that say how a step is computed and not what it is.
NOT_OPTIONS = (
    *("self", "params", "lr", "weight_decay", "momentum"),
    *("foreach", "fused", "capturable", "maximize", "differentiable"),
)
DEFAULT_MOMENTUM = 0.9


def optimizer_class(name: str) -> Any:
    """The class behind a name of `OPTIMIZERS`; ValueError for another name."""
    pick("optimizer", name, dict.fromkeys(OPTIMIZERS))
    return get_optimizer_class(name, bind_defaults=False)


def options_of(name: str) -> list[str]:
    """The names of the options that an optimizer takes beside the keys of a stage."""
    own = [p for p in inspect.signature(optimizer_class(name)).parameters if p not in NOT_OPTIONS]
    return [option for option in own if not (name == "sgd" and option == "nesterov")]


def check_optimizer(
    name: str,
    options: Mapping[str, Any],
    *,
    momentum: float = DEFAULT_MOMENTUM,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> None:
    """ValueError, which begins with the key, for what the optimizer `name` does not take.

    The values of its options are tried on a parameter of its own.
    """
    try:
        allowed = options_of(name)
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from None
    for option in options:
        if option not in allowed:
            there = f"optimizer_options.{option}"
            if not allowed:
                raise ValueError(f"{there}: {name} takes no options beside the keys of a stage; leave it out")
            raise ValueError(f"{there}: {unknown(f'option of optimizer {name}', option, allowed)}")
    if nesterov and name != "sgd":
        instead = "; it is optimizer_options.nesterov there" if "nesterov" in allowed else ""
        raise ValueError(f"nesterov: is true, which belongs to optimizer sgd, not to {name}{instead}")
    if momentum != DEFAULT_MOMENTUM and not takes_momentum(name):
        raise ValueError(
            f"momentum: is {momentum:g}, but {name} has none; leave it out, or set one of optimizer_options: "
            f"{', '.join(allowed) or 'none'}"
        )
    group = {"params": [torch.nn.Parameter(torch.zeros(1, 1))]}
    try:
        make_optimizer(
            name,
            [group],
            lr=0.1,
            device=torch.device("cpu"),
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            options=options,
        )
    except Exception as error:  # whatever an optimizer makes of a value that it does not allow
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"optimizer_options: {shortened(dict(options))} is refused by {name}: {reason}") from None


def takes_momentum(name: str) -> bool:
    """Whether an optimizer has the momentum that is a key of a stage."""
    return get_optimizer_info(name).has_momentum


def make_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    device: torch.device,
    mode: str = "none",
    momentum: float = DEFAULT_MOMENTUM,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer `name` for groups of parameters, as `check_optimizer` has allowed it.

    mode: of the `Compiler`; where iterations are captured, learning rates and counts of steps are on `device` if the
        optimizer can have them there.
    """
    more: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in (options or {}).items()}
    if name == "sgd":
        own = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        return make_sgd(groups, mode, lr, device, **own, **more)
    kind = optimizer_class(name)
    if is_captured(mode) and capturable(kind):
        # A tensor for each group: the optimizer would share one among them.
        groups = [{**group, "lr": torch.tensor(lr, device=device)} for group in groups]
        more |= capturable_options(kind, device)
    elif kind.__module__.startswith("torch.") and "foreach" in inspect.signature(kind).parameters:
        more["foreach"] = True
    return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, momentum=momentum, **more)
