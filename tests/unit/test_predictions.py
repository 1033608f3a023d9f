"""What a run keeps of its predictions: the classes and probabilities that the metrics are made of, image by image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastlt.recipe import load_recipe
from fastlt.run.metrics import ECE_BINS, softmax_confidence
from fastlt.run.predictions import Predictions, read_predictions, top_predictions, write_predictions
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer
from loaders.stored.damage import DamageError

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"


def made_up(images, classes, seed=0):
    draw = np.random.default_rng(seed)
    probabilities = np.sort(draw.dirichlet(np.ones(5), images).astype(np.float32))[:, ::-1].copy()
    top = np.stack([draw.choice(classes, 5, replace=False) for _ in range(images)])
    return Predictions(np.arange(images), draw.integers(0, classes, images), top, probabilities)


def assert_same(one, other):
    for field in ("index", "labels", "classes", "probabilities"):
        a, b = getattr(one, field), getattr(other, field)
        assert a.dtype == b.dtype, field
        assert np.array_equal(a, b), field


def test_the_likeliest_classes_and_their_probabilities_are_those_of_a_float64_softmax():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    classes, probabilities = top_predictions(logits)
    expected = np.exp(logits.double().numpy())
    expected /= expected.sum(1, keepdims=True)
    order = np.argsort(-expected, axis=1)[:, :5]
    assert np.array_equal(classes.numpy(), order)
    assert probabilities.numpy() == pytest.approx(np.take_along_axis(expected, order, 1), rel=1e-5)


def test_the_first_class_is_the_one_that_metrics_count_also_where_logits_tie():
    logits = torch.randint(0, 3, (500, 7), generator=torch.Generator().manual_seed(1)).float()
    confidence, predicted = softmax_confidence(logits)
    classes, probabilities = top_predictions(logits)
    assert torch.equal(classes[:, 0], predicted)
    assert torch.equal(probabilities[:, 0], confidence)
    assert all(len(set(row)) == 5 for row in classes.tolist())
    assert torch.allclose(torch.softmax(logits, 1).gather(1, classes), probabilities, rtol=1e-5)


def test_fewer_than_five_classes_have_as_many_predictions():
    classes, probabilities = top_predictions(torch.tensor([[0.0, 2.0, 1.0]]))
    assert classes.tolist() == [[1, 2, 0]]
    assert probabilities.sum().item() == pytest.approx(1)


def test_parts_of_processes_become_one_in_the_order_of_the_split_and_without_duplicates():
    whole = made_up(11, 20)
    fields = [getattr(whole, name) for name in ("index", "labels", "classes", "probabilities")]
    rows = np.array([3, 4, 5, 0, 10, 9]), np.array([8, 7, 6, 5, 2, 1, 0])  # 0 and 5 are in both
    assert_same(Predictions.merged([tuple(field[part] for field in fields) for part in rows]), whole)


@pytest.mark.parametrize("classes", [20, 70_000])
def test_what_was_written_is_read(tmp_path, classes):
    splits = {"test": made_up(40, classes), "meta": made_up(7, classes, seed=1)}
    write_predictions(tmp_path / "predictions.npz", splits)
    found = read_predictions(tmp_path / "predictions.npz")
    for split, predictions in splits.items():
        assert_same(found[split], predictions)


def test_the_file_of_a_large_test_set_is_small(tmp_path):
    path = tmp_path / "predictions.npz"
    write_predictions(path, {"test": made_up(2443, 8142), "meta": made_up(10, 8142)})
    assert path.stat().st_size < 100_000  # 24,426 images: 1 MB


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "predictions.npz"
    write_predictions(path, {"test": made_up(40, 20), "meta": made_up(7, 20)})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError):
        read_predictions(path)


def test_a_run_keeps_predictions_from_which_its_metrics_follow(digits_words):
    trainer = Trainer(prepare(load_recipe(RECIPE, digits_words)))
    result = trainer.fit()
    found = read_predictions(trainer.folder / "predictions.npz")
    dataset = trainer.context.dataset
    for split, predictions in found.items():
        assert predictions.index.tolist() == list(range(len(dataset.labels(split))))
        assert np.array_equal(predictions.labels, dataset.labels(split))
    test = found["test"]
    assert test.right.mean() == result["top1"]
    assert (test.classes == test.labels[:, None]).any(axis=1).mean() == result["top5"]
    accuracy = [test.right[test.labels == c].mean() for c in range(10)]
    assert accuracy == result["per_class_accuracy"]
    bins = np.clip(np.ceil(test.confidence.astype(float) * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gaps = [abs(sum(test.confidence[bins == k].astype(float)) - test.right[bins == k].sum()) for k in range(ECE_BINS)]
    assert sum(gaps) / len(test) == pytest.approx(result["ece"], abs=1e-12)
    assert found["meta"].right.mean() == result["validation_top1"]


def test_a_run_that_goes_on_has_no_predictions_of_its_earlier_model(digits_words):
    trainer = Trainer(prepare(load_recipe(RECIPE, digits_words)))
    trainer.fit()
    longer = Trainer(prepare(load_recipe(RECIPE, [*digits_words, "stages.end_to_end.iterations=14"])))
    longer._iterate = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        longer.fit()
    assert not (trainer.folder / "predictions.npz").exists()
