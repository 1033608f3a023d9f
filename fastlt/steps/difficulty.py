"""Difficulty-Net (WACV 2023): class weights from class accuracies, learned through the exact meta-gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlt import meta_gradient
from fastlt.difficulty import DRIVER_TARGETS, DifficultyNet, class_weights, difficulty_gradient_loss
from fastlt.names import pick
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import StepParts
from fastlt.steps.meta import MetaStep


class DifficultyStep(MetaStep):
    """Algorithm 1 of the supplement, one iteration; the inner loss is any per-sample loss ("Ours + Bal. Softmax")."""

    needs_accuracy = True

    @dataclass(frozen=True)
    class Options:
        """hidden: width H of Difficulty-Net, by default the rule of the supplement.
        lr, weight_decay: of Adam for theta (supplement, Sec. 1.2).
        driver_weight: lambda of Eq. 10. driver_target: relative or absolute, see `fastlt.difficulty.driver_target`.
        """

        hidden: int | None = None
        lr: float = 1e-3
        weight_decay: float = 1e-4
        driver_weight: float = 0.3
        driver_target: str = "relative"

        def __post_init__(self) -> None:
            pick("driver_target", self.driver_target, dict.fromkeys(DRIVER_TARGETS))
            for name in ("lr", "weight_decay", "driver_weight"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name} is {getattr(self, name)}: give a number >= 0")
            if self.hidden is not None and self.hidden < 1:
                raise ValueError(f"hidden is {self.hidden}: give a width >= 1, or leave it out for the paper's rule")

    def __init__(self, parts: StepParts, options: Options | None = None) -> None:
        super().__init__(parts, options)
        first = self.parameters[0]
        num_classes = parts.class_counts.num_classes
        self.net = DifficultyNet(num_classes, self.options.hidden).to(device=first.device, dtype=first.dtype)
        self.net_optimizer = torch.optim.Adam(
            self.net.parameters(), lr=self.options.lr, weight_decay=self.options.weight_decay, foreach=True
        )
        self.num_classes = num_classes

    def __call__(self, batch: Batch, meta_batch: Batch) -> StepOutput:
        accuracy = self.parts.class_accuracy.update(self.model).to(self.parameters[0].dtype)
        run = self.training_pass(batch)

        with torch.no_grad():
            weights = class_weights(self.net(accuracy))
        per_sample, meta_loss = self.per_sample_gradient(run, weights[run.labels], meta_batch)
        class_gradient = meta_gradient.sum_by_class(per_sample, run.labels, self.num_classes)
        self.reducer.mean_([class_gradient])
        driver = self._update_net(accuracy, class_gradient)

        with torch.no_grad():
            weights = class_weights(self.net(accuracy))
        objective = (weights[run.labels] * run.losses).mean()
        self.descend(objective)
        return StepOutput(
            objective.detach(),
            metrics={"meta_loss": meta_loss, "driver_loss": driver, "meta_grad_norm": class_gradient.norm()},
            per_class={"weight": weights, "meta_accuracy": accuracy},
        )

    def _update_net(self, accuracy: Tensor, class_gradient: Tensor) -> Tensor:
        """Eq. 10: one Adam step on theta. Returns the driver loss before it (0-d)."""
        scalar, driver = difficulty_gradient_loss(
            self.net, accuracy, class_gradient, self.options.driver_weight, self.options.driver_target
        )
        parameters = list(self.net.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(scalar, parameters), strict=True):
            parameter.grad = gradient
        self.net_optimizer.step()
        self.net_optimizer.zero_grad(set_to_none=True)
        return driver

    def state_dict(self) -> dict:
        return {
            **super().state_dict(),
            "net": self.net.state_dict(),
            "net_optimizer": self.net_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.net.load_state_dict(state["net"])
        self.net_optimizer.load_state_dict(state["net_optimizer"])
