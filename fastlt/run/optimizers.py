"""The optimizer of a stage and its learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlt.models import Classifier
from fastlt.optim import make_optimizer, parameter_groups
from fastlt.recipe import StageRecipe
from fastlt.run.context import RunContext
from fastlt.run.schedule import learning_rate


def stage_optimizer(
    context: RunContext, stage: StageRecipe, model: Classifier, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimizer that the stage asks for. groups: of `Step.parameter_groups` of `model`."""
    return make_optimizer(
        stage.optimizer,
        parameter_groups(
            model,
            groups,
            weight_decay=stage.weight_decay,
            decay=stage.decay,
            layer_decay=stage.layer_decay,
            lr_factors=stage.lr_factors,
        ),
        lr=stage.lr,
        device=context.device,
        mode=context.compile,
        momentum=stage.momentum,
        nesterov=stage.nesterov,
        weight_decay=stage.weight_decay,
        options=stage.optimizer_options,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, stage: StageRecipe, position: float) -> None:
    """Give every group its rate at `position`, in the unit of the stage's length."""
    lr = learning_rate(
        position,
        length=stage.length,
        lr=stage.lr,
        schedule=stage.schedule,
        warmup=stage.warmup,
        warmup_from=stage.warmup_from,
        milestones=stage.milestones,
        gamma=stage.gamma,
        min_lr=stage.min_lr,
    )
    for group in optimizer.param_groups:
        value = lr * group.get("lr_factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)  # a captured iteration reads it there
        else:
            group["lr"] = value
