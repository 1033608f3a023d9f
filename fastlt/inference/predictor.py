"""A trained network in use: logits and predictions of images."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from fastlt.export.model_export import ExportedModel, export_model
from fastlt.export.options import ExportOptions, Precision
from fastlt.inference.evaluation import Evaluation, evaluation
from fastlt.inference.inputs import CutBatch, Unreadable, cut_batches, gathered, name_of
from fastlt.inference.labels import DataOptions, LabelledImages, class_labels, labelled_images
from fastlt.inference.predictions import Predictions
from fastlt.inference.priors import CarriedPrior, Prior, deployed_prior
from fastlt.inference.temperature import Temperature, fit_temperature
from fastlt.inference.transform import EvaluationTransform
from fastlt.meta.class_accuracy import evaluation_mode
from fastlt.models import Classifier
from fastlt.paths import as_path
from fastlt.run.shifted_crops import mean_logits
from fastlt.run.trained import TrainedRun
from fastlt.state import Batch, ClassCounts, upload
from loaders.cores import available_cores
from loaders.sources.messages import printable, some
from loaders.stored.progress import progress_bar

BATCH_SIZE = 128
ON_VALIDATION = "validation"


@dataclass(frozen=True)
class Coverage:
    """What abstaining below a threshold does to the validation images.

    coverage: share of them that are predicted. accuracy: top-1 among these, None when there are none.
    """

    threshold: float
    coverage: float
    accuracy: float | None


class Predictor:
    """A trained network with all that is needed to use it. Nothing in it is changed by use.

    model: images normalised float (N, 3, s, s) to logits (N, C), on `device`, in eval mode.
    counts: images of each class in the training set, with the class names. carried: the prior in the logits.
    transform: an image to what the network sees, (3, S, S). image_size: s; None is S. Where S is larger, logits are the
        mean over five crops, as in the test.
    autocast: makes the context of a forward pass, its precision.
    validation: gives the batches of the validation set, on `device`; None where there is none.
    trained: the run whose network it is, for `export`; None where it is of no run.
    notes: what the user should know, one line each.
    """

    def __init__(
        self,
        model: nn.Module,
        counts: ClassCounts,
        carried: CarriedPrior,
        transform: EvaluationTransform,
        device: torch.device,
        image_size: int | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        validation: Callable[[], Iterator[Batch]] | None = None,
        trained: TrainedRun | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.model, self.counts, self.carried, self.transform = model, counts, carried, transform
        self.device, self.autocast, self.notes = device, autocast, notes
        self.image_size = transform.size if image_size is None else image_size
        self._validation, self._trained = validation, trained
        self._validated: tuple[Tensor, Tensor] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """C class names, in the order of the logits."""
        return self.counts.names

    def predict(
        self,
        images: Any,
        top: int = 5,
        *,
        prior: Prior | None = None,
        temperature: float | str | None = None,
        abstain: float | None = None,
        batch_size: int = BATCH_SIZE,
        workers: int | None = None,
        progress: bool = False,
    ) -> Predictions:
        """The `top` most probable classes of each image, softmax(z / T - log b + log d).

        images: a path, a folder with all below it, the bytes of a file, an open file, an image of Pillow, a uint8 array
            (H, W, 3), (H, W) or (N, H, W, 3), a tensor uint8 (3, H, W) or (N, 3, H, W), or a list of any of these; or
            float (N, 3, S, S) from `transform`.
        prior: the class shares d where the images come from: "training", "uniform", a CSV or JSON file of counts, or
            counts by class name or in label order. None leaves the logits as they are. b is `carried`.
        temperature: T; "validation" fits it there (`fit_temperature`); None is 1.
        abstain: the network says nothing about an image whose largest probability is below this, in (0, 1].
        workers: threads that decode; None takes all cores. progress: whether a bar is shown.
        Images that cannot be read are in `unreadable` of the result; a ValueError when none could be read.
        """
        offset, divisor = self._correction(prior, temperature)
        threshold = checked_threshold(abstain)
        top = min(_at_least_one("top", top), len(self.classes))
        found = self._inputs(images)
        unreadable: list[Unreadable] = []
        places: list[np.ndarray] = []

        def highest() -> Iterator[tuple[Tensor, Tensor]]:
            for batch, logits in self._forward(self._network, found, batch_size, workers, progress):
                unreadable.extend(batch.unreadable)
                places.append(batch.positions)
                yield torch.log_softmax(logits / divisor + offset, dim=1).topk(top, dim=1)

        log_p, indices = (torch.cat(part).numpy() for part in zip(*_on_host(highest()), strict=True))
        positions = np.concatenate(places)
        assert len(positions) + len(unreadable) == len(found), (len(positions), len(unreadable), len(found))
        if not len(positions):
            raise ValueError(f"none of {len(unreadable)} images could be read: {_reasons(unreadable)}")
        return Predictions(
            classes=self.classes,
            sources=[None if isinstance(found, Tensor) else name_of(found[k]) for k in positions],
            positions=positions,
            indices=indices,
            probabilities=np.exp(log_p),
            threshold=threshold,
            unreadable=unreadable,
        )

    def logits(
        self, images: Any, *, batch_size: int = BATCH_SIZE, workers: int | None = None, progress: bool = False
    ) -> Tensor:
        """The logits as evaluation has them, float32 (N, C) on the host, neither adjusted nor divided.

        images: as in `predict`; ValueError when one of them cannot be read.
        """
        return self._of_all(self._network, images, batch_size, workers, progress)

    def features(
        self, images: Any, *, batch_size: int = BATCH_SIZE, workers: int | None = None, progress: bool = False
    ) -> Tensor:
        """The pooled features that the head gets, float32 (N, D) on the host; those of experts one after the other.

        images: as in `predict`; ValueError when one of them cannot be read. With five crops, the mean over them.
        """
        model = self.model
        if not isinstance(model, Classifier):
            raise ValueError(f"a {type(model).__name__} has no features: load the folder of a run")

        def pooled(inputs: Tensor) -> Tensor:
            if not len(inputs):  # none of a batch could be read
                return inputs.flatten(1)
            found = model.features(inputs)
            return found if found.ndim == 2 else found.transpose(0, 1).flatten(1)

        return self._of_all(partial(self._compute, pooled), images, batch_size, workers, progress)

    def evaluate(
        self,
        images: Any,
        labels: Sequence[str] | Sequence[int] | None = None,
        *,
        split: str | None = None,
        root: str | os.PathLike[str] | None = None,
        source: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        split_column: str | None = None,
        class_names: str | os.PathLike[str] | None = None,
        prior: Prior | None = None,
        temperature: float | str | None = None,
        batch_size: int = BATCH_SIZE,
        workers: int | None = None,
        progress: bool = False,
    ) -> Evaluation:
        """How well the network does on images whose classes are known.

        images: as in `predict`, with `labels`; or a data set in any form that `fastlt inspect` knows, whose classes are
            named as in `classes`: a folder with one folder a class, a table, tar files, …
        labels: the class of each image, by name or number.
        split, root, source, image_column, label_column, split_column, class_names: of a data set, see `DataOptions`.
        prior, temperature, workers, progress: as in `predict`.
        Images that cannot be read are left out, and named in the predictions. ValueError for unknown classes.
        """
        options = DataOptions(
            source=source,
            root=None if root is None else as_path(root),
            split=split,
            image_column=image_column,
            label_column=label_column,
            split_column=split_column,
            class_names=None if class_names is None else as_path(class_names),
        )
        if labels is None:
            measured = labelled_images(images, self.classes, options)
        elif options != DataOptions():
            raise ValueError("labels are given, and options of a data set: leave one of the two out")
        else:
            given = self._inputs(images)
            measured = LabelledImages(given, class_labels(labels, self.classes, len(given)))
        found = self.predict(
            measured.images,
            5,
            prior=prior,
            temperature=temperature,
            batch_size=batch_size,
            workers=workers,
            progress=progress,
        )
        return evaluation(found, measured.labels[found.positions], self.counts, measured.split)

    def fit_temperature(self, *, adjusted: bool = False) -> Temperature:
        """The temperature that fits the validation set best.

        adjusted: for logits whose prior is exchanged, as `predict` does with a `prior`: fitted on z / T - log b + log v
            with the class shares v of the validation set itself, so that T makes up for confidence alone.
        ValueError where the validation set is not there. The network sees it once for all calls.
        """
        logits, labels = self.validation()
        shares = torch.bincount(labels, minlength=len(self.classes)).double().numpy()
        return fit_temperature(logits, labels, self.carried.replaced_by(shares / shares.sum()) if adjusted else None)

    def coverage(
        self,
        thresholds: Sequence[float],
        *,
        prior: Prior | None = None,
        temperature: float | str | None = None,
    ) -> list[Coverage]:
        """How many validation images are predicted when the network abstains below each threshold, and how well.

        prior, temperature: as in `predict`. ValueError where the validation set is not there.
        """
        offset, divisor = self._correction(prior, temperature)
        logits, labels = self.validation()
        confidence, predicted = torch.softmax(logits / divisor + offset.cpu(), dim=1).max(1)
        right, rows = (predicted == labels).double(), []
        for threshold in thresholds:
            kept = confidence >= threshold
            accuracy = float(right[kept].mean()) if bool(kept.any()) else None
            rows.append(Coverage(threshold, float(kept.double().mean()), accuracy))
        return rows

    def validation(self) -> tuple[Tensor, Tensor]:
        """The logits float32 (N, C) and the labels int64 (N,) of the validation set, on the host, computed once."""
        if self._validation is None:
            raise ValueError("the validation set of this network is not known here: load the folder of its run")
        if self._validated is None:
            logits, labels = [], []
            for batch in self._validation():
                logits.append(self._network(self.transform.normalise(batch.images)).cpu())
                labels.append(batch.labels.cpu())
            self._validated = torch.cat(logits), torch.cat(labels)
        return self._validated

    def export(
        self,
        to: str,
        out: str | os.PathLike[str] | None = None,
        *,
        preprocess: bool = False,
        dynamic_size: bool = False,
        precision: Precision = "fp32",
        opset: int | None = None,
        images: Sequence[str | os.PathLike[str]] | None = None,
    ) -> ExportedModel:
        """Write the network in a form that other programs read, as `fastlt export` does, and check it.

        to: "timm", "onnx", "torch" or "torchscript". out: the file, or the folder of timm; None is in the folder of the
            run. images: files to check it by; None takes validation images.
        preprocess: it takes uint8 images and normalises them inside. dynamic_size: it takes images of any height and
            width. precision: of the weights, "fp32" or "fp16". opset: of ONNX.
        Returns the path and the largest difference of logits. ValueError for what cannot be written so, and when logits
        differ by more than 1e-4, or with "fp16" by more than 2 % of the largest one; nothing is left behind then.
        """
        if self._trained is None:
            raise ValueError("this network is of no run, and is not exported: load the folder of its run")
        cpu = torch.device("cpu")
        model = copy.deepcopy(self._trained.model).to(cpu)
        return export_model(
            [replace(self._trained, model=model, device=cpu)],
            to,
            None if out is None else as_path(out),
            options=ExportOptions(preprocess, dynamic_size, precision, opset),
            images=None if images is None else [*map(as_path, images)],
        )

    def _correction(self, prior: Prior | None, temperature: float | str | None) -> tuple[Tensor, float]:
        """What is added to logits that were divided by the temperature, float32 (C,) on the device, and that."""
        divisor = 1.0
        if temperature is not None:
            divisor = checked_temperature(temperature)
        deployed = None if prior is None else deployed_prior(prior, self.counts)
        if divisor == ON_VALIDATION:
            divisor = self.fit_temperature(adjusted=prior is not None).value
        offset = np.zeros(len(self.classes)) if deployed is None else self.carried.replaced_by(deployed)
        return torch.from_numpy(offset).float().to(self.device), float(divisor)

    def _inputs(self, images: Any) -> Tensor | list[Any]:
        """Float tensors from `transform` in one tensor, anything else as `gathered` has it."""
        if isinstance(images, list) and images and all(_is_float(image) for image in images):
            images = torch.stack(images)
        if not _is_float(images):
            found = gathered(images)
            if not found:
                raise ValueError("no images were given")
            return found
        tensor = images if images.ndim == 4 else images[None]
        shape = (3, self.transform.size, self.transform.size)
        if tuple(tensor.shape[1:]) != shape or not len(tensor):
            raise ValueError(
                f"a float tensor of shape {tuple(images.shape)}: give (N, {', '.join(map(str, shape))}) from "
                "`transform`, or pixels in uint8"
            )
        return tensor

    def _of_all(
        self, compute: Callable[[Tensor], Tensor], images: Any, batch_size: int, workers: int | None, progress: bool
    ) -> Tensor:
        """What `compute` makes of every image, on the host; ValueError when one of them cannot be read."""

        def batches() -> Iterator[tuple[Tensor]]:
            for batch, computed in self._forward(compute, self._inputs(images), batch_size, workers, progress):
                if batch.unreadable:
                    raise ValueError(f"an image could not be read: {_reasons(batch.unreadable)}")
                yield (computed,)

        return torch.cat([computed for (computed,) in _on_host(batches())])

    def _forward(
        self,
        compute: Callable[[Tensor], Tensor],
        images: Tensor | list[Any],
        batch_size: int,
        workers: int | None,
        progress: bool,
    ) -> Iterator[tuple[CutBatch, Tensor]]:
        """Each batch of the images, and what `compute` makes of it, on the device."""
        _at_least_one("batch_size", batch_size)
        with progress_bar("predict", len(images), progress) as advance:
            for batch, inputs in self._batches(images, batch_size, workers):
                yield batch, compute(inputs)
                advance(len(batch.positions) + len(batch.unreadable))

    def _network(self, inputs: Tensor) -> Tensor:
        """The logits of normalised images (n, 3, S, S), n >= 0: float32 (n, C), on the device."""
        if not len(inputs):
            return inputs.new_zeros(0, len(self.classes))
        return self._compute(self.model, inputs)

    def _compute(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """A function of images as evaluation calls it, the mean over five crops where the test had them: float32."""
        with evaluation_mode(self.model), self.autocast():
            return mean_logits(function, inputs, self.image_size).float()

    def _batches(
        self, images: Tensor | list[Any], batch_size: int, workers: int | None
    ) -> Iterator[tuple[CutBatch, Tensor]]:
        """Each batch and what the network takes of it, float32 (n, 3, S, S) on the device."""
        if isinstance(images, Tensor):
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size]
                ready = upload(part.float().contiguous(memory_format=torch.channels_last), self.device)
                yield CutBatch(np.arange(start, start + len(part)), np.empty(0, np.uint8), []), ready
            return
        threads = available_cores() if workers is None else _at_least_one("workers", workers)
        for batch in cut_batches(images, self.transform, batch_size, threads):
            pixels = upload(torch.from_numpy(batch.pixels), self.device).permute(0, 3, 1, 2)
            yield batch, self.transform.normalise(pixels)


def checked_threshold(abstain: float | None) -> float | None:
    """The threshold below which to abstain; ValueError out of (0, 1]."""
    if abstain is not None and not 0 < abstain <= 1:
        raise ValueError(f"abstain is {abstain}: give a probability above 0 up to 1")
    return abstain


def checked_temperature(temperature: float | str) -> float | str:
    """A number above 0, or "validation"; ValueError for anything else."""
    if temperature == ON_VALIDATION:
        return temperature
    try:
        value = float(temperature)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(f"temperature is {temperature!r}: give a number above 0, or {ON_VALIDATION!r}")
    return value


def _on_host(results: Iterable[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
    """Results of batches on the host, each fetched when the device has got the next batch to work on."""
    waiting: Sequence[Tensor] | None = None
    for result in results:
        if waiting is not None:
            yield [part.cpu() for part in waiting]
        waiting = result
    if waiting is not None:
        yield [part.cpu() for part in waiting]


def _at_least_one(what: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{what} is {number}: it must be at least 1")
    return number


def _is_float(image: Any) -> TypeGuard[Tensor]:
    return isinstance(image, Tensor) and image.is_floating_point()


def _reasons(unreadable: Sequence[Unreadable]) -> str:
    named = [f"image {u.position}" if u.source is None else printable(os.fsdecode(u.source)) for u in unreadable]
    return some([f"{name} ({u.reason})" for name, u in zip(named, unreadable, strict=True)])
