"""Class-wise difficulty-balanced loss (CDB-CE): weights straight from the accuracy, without a meta-gradient."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlt.ranges import above
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import Step, StepOptions, StepParts
from fastlt.steps.needs import Allows, LogitsPrior, Needs


def dynamic_tau(accuracy: Tensor) -> Tensor:
    """tau = 2 * sigmoid(max A / (min A + 0.01) - 1): 1 when all classes are alike, towards 2 as they part. 0-d.

    So in CDB's release for ImageNet, and in a function of Difficulty-Net's that nothing calls there. CDB for CIFAR, and
    the loss that Difficulty-Net's release trains with, have sigmoid(max A / (min A + 0.01)).
    """
    return 2 * torch.sigmoid(accuracy.max() / (accuracy.min() + 0.01) - 1)


def cdb_weights(accuracy: Tensor, tau: float | Tensor) -> Tensor:
    """w_c = C * (1 - A_c)^tau / sum_k (1 - A_k)^tau: (C,) with mean 1; uniform once every accuracy is 1."""
    powered = (1 - accuracy).clamp_min(0) ** tau
    total = powered.sum()
    return torch.where(total > 0, powered * (len(accuracy) / total.clamp_min(1e-12)), torch.ones_like(powered))


@dataclass(frozen=True)
class CdbOptions(StepOptions):
    """Options of method cdb.

    tau: the focusing exponent, a positive number, or dynamic, which follows from the accuracies.
    """

    tau: float | str = field(default=1.0, metadata=above(0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.tau, str) and self.tau != "dynamic":
            raise ValueError(f'tau is {self.tau!r}: give a number > 0, or "dynamic"')


class CdbStep(Step[CdbOptions]):
    """SGD on (1/b) sum_i w_{y_i} l_i with CDB weights; A comes from the validation set, usually once an epoch.

    With A once an epoch the weights are uniform until the first epoch has been trained, as in the authors' code: a
    network that has learned nothing calls every image by one class, which would have weight 0 for that whole epoch.
    """

    needs = Needs(class_accuracy=True)
    allows = Allows(compilation=True, accumulation=True)
    logits_prior = LogitsPrior("weighted", "class weights, which change while a model is trained, count as logged last")

    Options = CdbOptions

    def __init__(self, parts: StepParts, options: CdbOptions | None = None) -> None:
        super().__init__(parts, options)
        self.untrained = False

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        self.untrained = epoch == 0 and self.class_accuracy.refresh == "epoch"

    def variant(self) -> Hashable:
        return self.untrained, super().variant()

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        accuracy = self.class_accuracy.update(self.model)
        tau = dynamic_tau(accuracy) if isinstance(self.options.tau, str) else self.options.tau
        weights = torch.ones_like(accuracy) if self.untrained else cdb_weights(accuracy, tau)
        inputs, labels = self.parts.augment(batch.images), batch.labels
        objective = self.minimise(inputs, labels, lambda losses, part: (weights[labels[part]] * losses).mean())
        return StepOutput(objective, per_class={"weight": weights, "meta_accuracy": accuracy})

    def state_dict(self) -> dict:
        return {**super().state_dict(), "untrained": self.untrained}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.untrained = state["untrained"]
