"""Run folders that no training made: numbers drawn at random, in files that are written as a run writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fastlt.recipe import load_recipe
from fastlt.run.class_history import ClassHistory
from fastlt.run.folder import class_history_file, log_file, predictions_file, recipe_file, result_file
from fastlt.run.metrics import ECE_BINS
from fastlt.run.predictions import Predictions, write_predictions
from fastlt.state import ClassCounts

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"


def long_tail(classes: int, largest: int = 1000, smallest: int = 2) -> np.ndarray:
    """Training images of each class, int64 (C,), in an order that is not that of their number."""
    counts = np.geomspace(largest, smallest, classes).round().astype(np.int64)
    return np.random.default_rng(7).permutation(counts)


def predictions(counts: np.ndarray, images: int, seed: int) -> Predictions:
    """Of a test set with as many images of each class, likelier right the more training images a class has."""
    draw, classes = np.random.default_rng(seed), len(counts)
    labels = np.arange(images) % classes
    top = draw.integers(0, classes, (images, 5))
    chance = 0.15 + 0.8 * np.log(counts[labels]) / np.log(counts.max())
    right = draw.random(images) < chance
    # Mistakes go to few classes, the larger ones.
    large = np.argsort(-counts)[: max(2, classes // 4)]
    top[~right, 0] = draw.choice(large, (~right).sum())
    top[right, 0] = labels[right]
    confidence = np.clip(draw.beta(5, 2, images), 0.2, 1)
    rest = np.sort(draw.dirichlet(np.ones(4), images))[:, ::-1] * (1 - confidence)[:, None] * 0.9
    probabilities = np.column_stack([confidence, rest]).astype(np.float32)
    return Predictions(np.arange(images), labels, top, probabilities)


def metrics(found: Predictions, counts: ClassCounts) -> dict:
    """Those of a result, from predictions."""
    total = np.bincount(found.labels, minlength=counts.num_classes)
    accuracy = np.bincount(found.labels, found.right, counts.num_classes) / np.maximum(total, 1)
    bins = np.clip(np.ceil(found.confidence.astype(float) * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gap = np.bincount(bins, found.confidence.astype(float) - found.right, ECE_BINS)
    shots = {k: float(accuracy[mask].mean()) if mask.any() else None for k, mask in counts.shot_masks().items()}
    hit = (found.classes == found.labels[:, None]).any(axis=1)
    return {
        "top1": float(found.right.mean()),
        "top5": float(hit.mean()),
        **shots,
        "macro_f1": float(accuracy.mean()),
        "ece": float(np.abs(gap).sum() / len(found)),
        "per_class_accuracy": accuracy.tolist(),
    }


def write_run(
    runs: Path,
    name: str,
    counts: np.ndarray,
    *words: str,
    seed: int = 0,
    images: int = 600,
    validations: int = 12,
    class_names: list[str] | None = None,
    finished: bool = True,
    weights: bool = True,
) -> Path:
    """The folder of a run; without `weights` its method learns none."""
    recipe = load_recipe(RECIPE, [f"name={name}-{seed}", f"seed={seed}", f"runs={runs}", *words])
    folder, classes = recipe.folder, len(counts)
    folder.mkdir(parents=True)
    recipe_file(folder).write_text(recipe.to_yaml())
    names = class_names or [f"species number {c}" for c in range(classes)]
    of_classes = ClassCounts(counts, tuple(names), recipe.data.shots)
    tested = predictions(counts, images, seed)
    measured = metrics(tested, of_classes)
    draw = np.random.default_rng(100 + seed)

    lines, history = [], ClassHistory(class_history_file(folder), enabled=True)
    history.open(0)
    accuracy = np.array(measured["per_class_accuracy"])
    for k in range(1, validations + 1):
        done, iteration = k / validations, 50 * k
        for i in range(iteration - 40, iteration + 1, 10):
            loss = float(3 * np.exp(-3 * i / (50 * validations)) + 0.05 * draw.random())
            line = {"loss": loss, "lr": 0.1 * (1 - i / (50 * validations)), "img_s": 5000.0, "data_wait_share": 0.02}
            lines.append({"kind": "train", "iteration": i, "stage": "end_to_end", **line})
        numbers = {k: v if v is None or isinstance(v, list) else v * done for k, v in measured.items()}
        numbers.pop("per_class_accuracy")
        lines.append({"kind": "evaluation", "iteration": iteration, "stage": "end_to_end", "split": "meta", **numbers})
        now = np.clip(accuracy * done + 0.05 * draw.standard_normal(classes), 0, 1)
        difficulty = np.clip(1 - now, 0.02, 0.98)
        learned = {"difficulty": difficulty, "weight": difficulty * classes / difficulty.sum(), "meta_accuracy": now}
        history.write(iteration, "end_to_end", {"accuracy": now, **(learned if weights else {})})
    history.close()
    log_file(folder).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not finished:
        return folder
    write_predictions(predictions_file(folder), {"test": tested, "meta": predictions(counts, classes, 50 + seed)})
    result = {
        "name": recipe.name,
        **measured,
        "select": "last",
        "selected_iteration": 50 * validations,
        "validation_top1": measured["top1"],
        "class_names": names,
        "class_counts": counts.tolist(),
        "class_weights": None,
        "seed": seed,
        "device": "cpu",
        "processes": 1,
        "iterations": 50 * validations,
        "train_s": 31.5 + seed,
        "img_s": 5000.0 + 20 * seed,
        "data_wait_share": 0.03,
        "aside_s": {"validating": 1.5, "saving": 0.4, "testing": 0.3},
    }
    result_file(folder).write_text(json.dumps(result))
    return folder
