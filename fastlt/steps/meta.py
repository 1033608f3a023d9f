"""What every meta-learned weighting shares: one forward of the batch, the lookahead, the meta loss, the tangent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlt import meta_gradient
from fastlt.recorded_forward import ForwardRecord, recordable
from fastlt.state import Batch
from fastlt.steps.base import Step, StepParts


def meta_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each meta image (m,): the meta set is balanced, so its loss carries no class prior."""
    return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels, reduction="none")


@dataclass(frozen=True)
class TrainingPass:
    """The one forward of a training batch, which lookahead, tangent and update share.

    images: augmented. labels, losses: (b,); the losses keep their graph.
    random_state: of the generators before the forward, for models that draw random numbers in it; else None.
    record: what the forward computed, for the tangent; None where it could not use it.
    """

    images: Tensor
    labels: Tensor
    losses: Tensor
    random_state: Mapping[str, Tensor] | None
    record: ForwardRecord | None = None


class MetaStep(Step):
    """A step whose sample weights are learned through the exact meta-gradient.

    The training batch goes forward once: the lookahead and the update are two backward passes through the same graph
    with different weights, so BatchNorm's running statistics move once. Lookahead, meta and tangent passes leave no
    trace in the model's buffers.
    """

    needs_meta_batch = True

    def __init__(self, parts: StepParts, options: Step.Options | None = None) -> None:
        super().__init__(parts, options)
        self.stochastic = meta_gradient.is_stochastic(parts.model)

    def training_pass(self, batch: Batch) -> TrainingPass:
        """Augment a batch and run it forward."""
        images = self.parts.augment(batch.images)
        random_state = meta_gradient.random_state(images.device) if self.stochastic else None
        if not self._records(images):
            return TrainingPass(images, batch.labels, self.losses(images, batch.labels), random_state)
        record = ForwardRecord()
        with record.recording():
            losses = self.losses(images, batch.labels)
        return TrainingPass(images, batch.labels, losses, random_state, record)

    def _records(self, images: Tensor) -> bool:
        """Not in mixed precision: activations in bfloat16 are too coarse for the tangent."""
        with self.parts.autocast():
            return recordable(images) and not torch.is_autocast_enabled(images.device.type)

    def per_sample_gradient(
        self, run: TrainingPass, weights: Tensor, meta_batch: Batch, lr: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """dL_meta/dw_i (b,) at phi - lr * grad (1/b) sum_i w_i l_i, and the meta loss there (0-d).

        weights: (b,), constant. lr: by default the current learning rate, alpha of Eq. 9. With several processes the
        lookahead and the meta loss are those of all their batches, and b is still this process's: the mean over
        processes of sums over these values is the derivative.
        """
        lr = self.lr if lr is None else lr
        parameters = meta_gradient.trainable_parameters(self.model)
        gradients = torch.autograd.grad(
            (weights * run.losses).mean(),
            list(parameters.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        self.reducer.mean_(gradients)
        ahead = meta_gradient.lookahead(parameters, gradients, lr)

        meta_images = self.parts.meta_augment(meta_batch.images)
        with self.parts.autocast():
            meta_losses = meta_gradient.functional_losses(
                self.model, meta_cross_entropy, meta_images, meta_batch.labels
            )
            meta_loss, direction = meta_gradient.mean_loss_gradient(meta_losses, ahead)
        self.reducer.mean_(direction)
        derivative = self._tangent(run, parameters, direction)
        if run.record is not None:
            run.record.clear()  # activations it holds would otherwise outlive the last backward pass's need of them
        return meta_gradient.weight_gradient(derivative, lr, len(run.labels)), meta_loss

    def _tangent(self, run: TrainingPass, parameters: meta_gradient.Tensors, direction: list[Tensor]) -> Tensor:
        # Outside autocast: a bfloat16 tangent was 4e-2 off, the float32 one 4e-7.
        losses = meta_gradient.functional_losses(self.model, self.loss, run.images, run.labels)
        if run.random_state is None:
            return meta_gradient.directional_derivative(losses, parameters, direction, run.record)
        with meta_gradient.replayed_randomness(run.random_state, run.images.device):
            return meta_gradient.directional_derivative(losses, parameters, direction, run.record)
