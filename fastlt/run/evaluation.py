"""Passes over whole splits: the scores of the model, and the training images that a method asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fastlt.losses.base import log_prior
from fastlt.meta.class_accuracy import evaluation_mode
from fastlt.models import Classifier
from fastlt.run.context import RunContext
from fastlt.run.loading import normaliser, open_evaluation_loader
from fastlt.run.metrics import Metrics
from fastlt.run.predictions import PredictionRecorder, Predictions
from fastlt.run.shifted_crops import mean_logits
from fastlt.state import Batch
from fastlt.steps import Step
from loaders.protocol import BatchLoader


def prefixed(name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics under names of their own, such as adjusted_top1; those of single classes are left out."""
    return {f"{name}_{key}": value for key, value in metrics.items() if key != "per_class_accuracy"}


class Evaluation:
    """Passes over this process's share of a split, in order and cropped as for evaluation.

    Loaders are kept for the whole run: opening one again at every evaluation would cost more than the images do.

    waited: what to do around the wait for each batch, see `Stopping.waited`.
    """

    def __init__(self, context: RunContext, waited: Callable[[Iterator[Batch]], Iterator[Batch]] = iter) -> None:
        self.context, self.waited = context, waited
        self.normalise = normaliser(context)
        self.loaders: dict[str, BatchLoader] = {}

    def evaluate(
        self,
        model: Classifier,
        split: str,
        recorder: PredictionRecorder | None = None,
        *,
        adjustment: float | None = None,
    ) -> dict[str, Any]:
        """Metrics of a model on "meta" (validation) or "test", over all processes.

        adjustment: tau; metrics of z - tau log pi stand beside those of the logits z then, `prefixed` by adjusted
            (Menon et al. 2021, Eq. 9).
        recorder: is given this process's predictions, those of z.
        Every process ends with the mean of the model's buffers.
        """
        reducer, counts = self.context.reducer, self.context.counts
        # Each process has seen its own share of the batches.
        reducer.mean_([b for b in model.moving_buffers().values() if b.is_floating_point()])
        metrics = Metrics(counts.num_classes, device=self.context.device)
        adjusted = Metrics(counts.num_classes, device=self.context.device)
        shift = log_prior(counts).to(self.context.device) * (adjustment or 0.0)
        counters = model.counters()
        for counter in counters.values():
            counter.zero_()
        size = self.context.recipe.data.image_size if self.context.features is None else 1
        with evaluation_mode(model), self.context.autocast():
            for batch in self._batches(split):
                logits = mean_logits(model, self.normalise(batch.images), size)
                metrics.update(logits, batch.labels)
                if recorder is not None:
                    recorder.add(logits, batch.labels, batch.index)
                if adjustment is not None:
                    adjusted.update(logits - shift, batch.labels)
        counted = [counter.double() for counter in counters.values()]
        reducer.sum_([metrics.state, *counted])
        more = {}
        if adjustment is not None:
            reducer.sum_([adjusted.state])
            more = prefixed("adjusted", adjusted.summary(counts))
        means = {name: (total / images).item() for name, (total, images) in zip(counters, counted, strict=True)}
        return {**metrics.summary(counts), **more, **means}

    def predict(
        self, model: Classifier, split: str, adjustment: float | None = None
    ) -> tuple[dict[str, Any], Predictions]:
        """As `evaluate`, with what every process then has: the predictions for all images of the split."""
        recorder = PredictionRecorder()
        metrics = self.evaluate(model, split, recorder, adjustment=adjustment)
        return metrics, Predictions.merged(gather_object(recorder.parts()))

    def training_images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The training set, see `StepParts`."""
        for batch in self._batches("train"):
            yield self.normalise(batch.images), batch.labels

    def class_means(self, model: Classifier) -> Tensor:
        """The mean feature of every class over the training set, in eval mode: float64 (C, D). Closes the loader."""
        like, head = next(model.head.parameters()), model.head
        # float64, so that neither their number nor the order of the additions shows in a float32 mean.
        sums = torch.zeros(head.out_features, head.in_features, dtype=torch.float64, device=like.device)
        counts = sums.new_zeros(len(sums), 1)
        with evaluation_mode(model), self.context.autocast():
            for images, labels in self.training_images():
                sums.index_add_(0, labels, model.features(images).double())
                counts.index_add_(0, labels, counts.new_ones(len(labels), 1))
        self.context.reducer.sum_([sums, counts])
        self.loaders.pop("train").close()
        return sums / counts

    def first_pass(self, step: Step) -> None:
        """Show a step the training images, before the first iteration of its stage."""
        with evaluation_mode(step.model), self.context.autocast():
            step.first_pass(self._batches("train"), self.normalise)
        self.loaders.pop("train").close()

    def close(self) -> None:
        """Close the loaders."""
        for loader in self.loaders.values():
            loader.close()

    def _batches(self, split: str) -> Iterator[Batch]:
        if split not in self.loaders:
            self.loaders[split] = open_evaluation_loader(self.context, split)
        return self.waited(self.loaders[split].epoch(0))
