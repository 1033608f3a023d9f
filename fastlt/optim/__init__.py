"""Optimizers of timm's factory, the groups of their parameters, and their preconditioners."""

from __future__ import annotations

from fastlt.optim.averaging import Ema
from fastlt.optim.clipping import Clip
from fastlt.optim.factory import OPTIMIZERS, check_optimizer, make_optimizer, optimizer_class
from fastlt.optim.groups import check_layer_decay, check_lr_factors, parameter_groups
from fastlt.optim.preconditioner import PRECONDITIONED, PRECONDITIONERS, preconditioner
from fastlt.optim.sharded_adam import ShardedAdam

__all__ = [
    "OPTIMIZERS",
    "PRECONDITIONED",
    "PRECONDITIONERS",
    "Clip",
    "Ema",
    "ShardedAdam",
    "check_layer_decay",
    "check_lr_factors",
    "check_optimizer",
    "make_optimizer",
    "optimizer_class",
    "parameter_groups",
    "preconditioner",
]
