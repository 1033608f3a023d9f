"""Descent on the mean of a per-sample loss."""

from __future__ import annotations

from fastlt.state import Batch, StepOutput
from fastlt.steps.base import Step
from fastlt.steps.needs import Allows


class PlainStep(Step):
    """SGD on (1/b) sum_i l_i: cross-entropy, balanced softmax and every other row that is only a loss.

    A loss that averages by its weights (LDAM's re-weighting) does so here.
    """

    allows = Allows(compilation=True, experts=True, accumulation=True)

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        inputs, labels = self.parts.augment(batch.images), batch.labels
        return StepOutput(self.minimise(inputs, labels, lambda losses, part: self.mean_loss(losses, labels)))
