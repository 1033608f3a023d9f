"""Difficulty-Net (WACV 2023): class weights from class accuracies, learned through the exact meta-gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlt import meta_gradient
from fastlt.difficulty import DRIVER_TARGETS, DifficultyNet, class_weights, difficulty_gradient_loss
from fastlt.names import pick
from fastlt.state import Batch, StepOutput
from fastlt.steps.base import Step, StepParts


def meta_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each meta image (m,): the meta set is balanced, so its loss carries no class prior."""
    return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels, reduction="none")


class DifficultyStep(Step):
    """Algorithm 1 of the supplement, one iteration. The inner loss is any per-sample loss ("Ours + Bal. Softmax", ...).

    The training batch goes forward once: the lookahead (Eq. 9) and the update (Eq. 11) are two backward passes through
    the same graph with different weights, so BatchNorm's running statistics move once. Lookahead, meta and tangent
    passes leave no trace in the model's buffers.
    """

    needs_meta_batch = True
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
        self.stochastic = meta_gradient.is_stochastic(parts.model)

    def __call__(self, batch: Batch, meta_batch: Batch) -> StepOutput:
        accuracy = self.parts.class_accuracy.update(self.model).to(self.parameters[0].dtype)
        images, labels = self.parts.augment(batch.images), batch.labels
        random_state = meta_gradient.random_state(images.device) if self.stochastic else None
        losses = self.losses(images, labels)

        with torch.no_grad():
            weights = class_weights(self.net(accuracy))
        class_gradient, meta_loss = self._class_gradient(
            images, labels, losses, weights, meta_batch, random_state=random_state
        )
        driver = self._update_net(accuracy, class_gradient)

        with torch.no_grad():
            weights = class_weights(self.net(accuracy))
        objective = (weights[labels] * losses).mean()
        self.descend(objective)
        return StepOutput(
            objective.detach(),
            metrics={"meta_loss": meta_loss, "driver_loss": driver, "meta_grad_norm": class_gradient.norm()},
            per_class={"weight": weights, "meta_accuracy": accuracy},
        )

    def _class_gradient(
        self,
        images: Tensor,
        labels: Tensor,
        losses: Tensor,
        weights: Tensor,
        meta_batch: Batch,
        *,
        random_state: dict | None,
    ) -> tuple[Tensor, Tensor]:
        """dL_meta/dw (C,) at the lookahead of Eq. 9, and the meta loss there (0-d); `losses` keeps its graph."""
        parameters = meta_gradient.trainable_parameters(self.model)
        gradients = torch.autograd.grad(
            (weights[labels] * losses).mean(),
            list(parameters.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        self.reducer.mean_(gradients)
        ahead = meta_gradient.lookahead(parameters, gradients, self.lr)

        meta_images = self.parts.meta_augment(meta_batch.images)
        with self.parts.autocast():
            meta_losses = meta_gradient.functional_losses(
                self.model, meta_cross_entropy, meta_images, meta_batch.labels
            )
            meta_loss, direction = meta_gradient.mean_loss_gradient(meta_losses, ahead)
        self.reducer.mean_(direction)

        # Outside autocast: a bfloat16 tangent was 4e-2 off, the float32 one 4e-7.
        batch_losses = meta_gradient.functional_losses(self.model, self.loss, images, labels)
        if random_state is None:
            derivative = meta_gradient.directional_derivative(batch_losses, parameters, direction)
        else:
            with meta_gradient.replayed_randomness(random_state, images.device):
                derivative = meta_gradient.directional_derivative(batch_losses, parameters, direction)
        per_sample = meta_gradient.weight_gradient(derivative, self.lr, len(labels))
        class_gradient = meta_gradient.sum_by_class(per_sample, labels, self.num_classes)
        self.reducer.mean_([class_gradient])
        return class_gradient, meta_loss

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
