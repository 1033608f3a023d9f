"""Class priors: the one that a trained network's logits carry, and another one put in its place.

A network that was trained on classes with the shares b_c learns logits z_c = log p(x|c) + log b_c, up to a constant
that all classes share. Where it is used, classes have other shares d_c, and the logits to use are post-hoc adjusted
(Menon et al. 2021):

    z_c - log b_c + log d_c

b is rarely the training set's pi alone: class-balanced sampling makes it uniform, balanced softmax takes log pi out of
z by itself, and class weights w_c multiply it, w_c pi_c. `carried_prior` follows a recipe through its stages. A loss
says its factor in `PerSampleLoss.log_prior_factor`, a method its part in `Step.logits_prior`, and both say what they
assume.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlt.losses import build_loss
from fastlt.names import nearest, shortened
from fastlt.recipe import Recipe, StageRecipe
from fastlt.state import ClassCounts
from fastlt.steps import STEPS
from loaders.order.sampling import class_shares

Prior = str | Path | Mapping[str, float] | Sequence[float] | np.ndarray
NAMED = ("training", "uniform")
SHOWN = 5  # class names in a message


@dataclass(frozen=True)
class CarriedPrior:
    """The class prior in the logits of a network.

    shares: b, float64 (C,), sum 1; 0 for classes that the network does not know.
    assumptions: what was taken for granted, a sentence each; empty where b follows from losses and methods.
    """

    shares: np.ndarray
    assumptions: tuple[str, ...] = ()

    def replaced_by(self, deployed: np.ndarray) -> np.ndarray:
        """log d - log b, float64 (C,): what is added to logits for classes with the shares d (C,).

        -inf for a class that does not occur there; else 0 for one that the network does not know, whose logit is -inf.
        """
        known = self.shares > 0
        log_carried = np.log(self.shares, out=np.zeros_like(self.shares), where=known)
        log_deployed = np.log(deployed, out=np.full_like(self.shares, -np.inf), where=deployed > 0)
        return np.where(known | (deployed == 0), log_deployed - log_carried, 0.0)


def carried_prior(
    recipe: Recipe, counts: ClassCounts, class_weights: Sequence[float] | None = None, iteration: int | None = None
) -> CarriedPrior:
    """The prior in the logits of the model that a run ends with.

    class_weights: (C,), those that were logged last, for methods that have some. iteration: of the last stage, where
    the model was saved; None is its end.
    """
    line = recipe.lineage(list(recipe.stages.values())[-1])
    assumptions: list[str] = []
    last = True
    for stage in reversed(line):
        prior = STEPS[stage.method].logits_prior
        assumptions += [prior.assumption] if prior.assumption else []
        if prior.origin == "uniform":
            return CarriedPrior(np.full(counts.num_classes, 1 / counts.num_classes), tuple(assumptions))
        if prior.origin != "before":
            weights = class_weights if prior.origin == "weighted" and last else None
            return _of_stage(stage, counts, weights, iteration if last else None, assumptions)
        last = False
    assumptions.append(f"{recipe.model.checkpoint}, whose head the run kept, was trained on images drawn as these are")
    return CarriedPrior(counts.counts / counts.counts.sum(), tuple(assumptions))


def _of_stage(
    stage: StageRecipe,
    counts: ClassCounts,
    class_weights: Sequence[float] | None,
    iteration: int | None,
    assumptions: list[str],
) -> CarriedPrior:
    trained = counts.counts if stage.classes == "all" else counts.counts * counts.shot_masks()[stage.classes]
    loss = build_loss(stage.loss, counts, **stage.loss_options)
    per_epoch = max(1, int(trained.sum()) // stage.batch_size)
    if iteration is None:
        iteration = stage.length * (per_epoch if stage.epochs is not None else 1)
    loss.on_epoch(max(0, iteration - 1) // per_epoch)
    if loss.prior_assumption:
        assumptions.append(loss.prior_assumption)
    shares = class_shares(trained, stage.sampling)
    factor = loss.log_prior_factor()
    if factor is None and loss.corrects_prior:
        assumptions.append(f"{stage.loss}, which does not say its factor, is taken to have removed class frequencies")
        shares = class_shares(trained, "class_balanced")
    elif factor is not None:
        shares = shares * np.exp(factor.double().numpy())
    if class_weights is not None:
        weights = np.asarray(class_weights, dtype=np.float64)
        if not weights.all():
            # One iteration without a class does not take it out of a network that was trained on it before.
            assumptions.append("classes whose last weight is 0 are taken to have the smallest weight of the others")
            positive = weights[weights > 0]
            weights = np.where(weights > 0, weights, positive.min() if positive.size else 1.0)
        shares = shares * weights
    return CarriedPrior(shares / shares.sum(), tuple(assumptions))


def deployed_prior(prior: Prior, counts: ClassCounts) -> np.ndarray:
    """d, float64 (C,), sum 1.

    prior: training, uniform, a CSV or JSON file of the counts of each class, or such counts by class name or in label
    order. ValueError for anything else, for a class that is missing or unknown, and for counts that are no counts.
    """
    if isinstance(prior, str) and prior in NAMED:
        shares = counts.counts.astype(np.float64) if prior == "training" else np.ones(counts.num_classes)
        return shares / shares.sum()
    if isinstance(prior, str | Path):
        return read_shares(Path(prior), counts.names)
    if isinstance(prior, Mapping):
        return _shares(prior.items(), counts.names, "prior")
    values = np.asarray(prior, dtype=np.float64)
    if values.shape != (counts.num_classes,):
        raise ValueError(f"prior has the shape {values.shape}: give one count for each of {counts.num_classes} classes")
    return _shares(zip(counts.names, values.tolist(), strict=True), counts.names, "prior")


def read_shares(path: Path, names: Sequence[str]) -> np.ndarray:
    """The shares of classes by a file of their counts, float64 (C,), sum 1.

    JSON: one object, {"class": count}. CSV: lines `class,count`; a first line whose second column is no number is a
    head. ValueError as `deployed_prior`, with the path.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"prior {path}: no such file; allowed are {', '.join(NAMED)} and a file of counts") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8: give a CSV or JSON file of `class,count`") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    rows = _json_rows(path, text) if path.suffix.lower() == ".json" else _csv_rows(path, text)
    return _shares(rows, names, str(path))


def _json_rows(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        found = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(row, tuple) for row in found):
        raise ValueError(f'{path} holds no JSON object: write {{"class": count, ...}}')
    return found


def _csv_rows(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        rows = [row for row in csv.reader(text.splitlines()) if row]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV ({error}); write lines of `class,count`") from None
    if rows and len(rows[0]) == 2 and _number(rows[0][1]) is None:
        rows = rows[1:]
    wrong = next((row for row in rows if len(row) != 2), None)
    if wrong is not None:
        raise ValueError(f"{path}: {shortened(','.join(wrong))} has {len(wrong)} columns; write lines of `class,count`")
    return [(name, count) for name, count in rows]


def _number(value: object) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)  # pyright: ignore[reportArgumentType]  # TypeError
    except (TypeError, ValueError, OverflowError):
        return None


def _shares(rows: Iterable[tuple[str, Any]], names: Sequence[str], where: str) -> np.ndarray:
    place = {name: label for label, name in enumerate(names)}
    found: dict[str, float] = {}
    for name, value in rows:
        count = _number(value)
        if name not in place:
            guess = nearest(str(name), names)
            hint = f"; did you mean {guess!r}?" if guess else ""
            raise ValueError(f"{where}: {shortened(name)} is no class of this network{hint}")
        if name in found:
            raise ValueError(f"{where} has the class {shortened(name)} twice: give it once")
        if count is None or not 0 <= count < np.inf:
            raise ValueError(
                f"{where}: the count of {shortened(name)} is {shortened(value)}: give a number of at least 0"
            )
        found[name] = count
    missing = [name for name in names if name not in found]
    if missing:
        some = ", ".join(missing[:SHOWN]) + (", …" if len(missing) > SHOWN else "")
        raise ValueError(
            f"{where} lacks {len(missing)} of {len(names)} classes ({some}): give 0 to those that do not occur"
        )
    shares = np.array([found[name] for name in names])
    if not shares.sum():
        raise ValueError(f"{where}: every count is 0, so that nothing could be predicted")
    return shares / shares.sum()
