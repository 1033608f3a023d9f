"""The metrics of an evaluation, against scikit-learn and against slow definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, top_k_accuracy_score

from fastlt.run.metrics import Metrics, confidence_bin
from fastlt.state import ClassCounts, ShotRanks


def counts(values) -> ClassCounts:
    return ClassCounts(np.array(values, dtype=np.int64), tuple(f"class {i}" for i in range(len(values))))


def random_evaluation(num_images: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % num_classes
    logits = torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(num_images), labels] += 1.5 * torch.rand(num_images, generator=generator)
    return logits, labels


def evaluate(logits, labels, num_classes, batch_size=64) -> Metrics:
    metrics = Metrics(num_classes)
    for start in range(0, len(labels), batch_size):
        metrics.update(logits[start : start + batch_size], labels[start : start + batch_size])
    return metrics


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name] == pytest.approx(expected[name], abs=1e-6), name


def slow_ece(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """sum_b |B_b|/n |acc(B_b) - conf(B_b)|, image by image (Guo et al. 2017, Eq. 3)."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    members: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for row, label in zip(p, labels, strict=True):
        for b in range(bins):
            if b / bins < row.max() <= (b + 1) / bins:
                members[b].append((row.max(), float(row.argmax() == label)))
    gaps = [abs(np.mean([c for c, _ in m]) - np.mean([h for _, h in m])) * len(m) for m in members if m]
    return sum(gaps) / len(labels)


def test_summary_equals_sklearn_and_slow_definitions():
    logits, labels = random_evaluation(400, 20)
    got = evaluate(logits, labels, 20).summary(counts([150] * 5 + [50] * 8 + [9] * 7))
    predicted = logits.argmax(1).numpy()
    y = labels.numpy()
    assert got["top1"] == pytest.approx(accuracy_score(y, predicted))
    assert got["top5"] == pytest.approx(top_k_accuracy_score(y, logits.numpy(), k=5))
    assert got["macro_f1"] == pytest.approx(f1_score(y, predicted, average="macro"))
    assert got["ece"] == pytest.approx(slow_ece(logits.double().numpy(), y), abs=1e-6)
    per_class = [np.mean(predicted[y == c] == c) for c in range(20)]
    assert got["per_class_accuracy"] == pytest.approx(per_class)
    for name, classes in {"many": range(5), "medium": range(5, 13), "few": range(13, 20)}.items():
        # On a balanced test set the mean over classes is the mean over images.
        assert got[name] == pytest.approx(np.mean(predicted[np.isin(y, classes)] == y[np.isin(y, classes)]))


def test_groups_are_means_over_classes_also_when_the_test_set_is_not_balanced():
    logits = torch.eye(3)[[0, 0, 0, 1, 1, 0]] * 5
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    got = evaluate(logits, labels, 3).summary(counts([500, 400, 300]))
    assert got["many"] == pytest.approx((1 + 1 + 0) / 3)
    assert got["top1"] == pytest.approx(4 / 6)
    assert got["medium"] is None
    assert got["few"] is None


def test_a_class_without_test_images_is_left_out():
    logits = torch.eye(3)[[0, 0, 2]] * 5
    labels = torch.tensor([0, 0, 1])
    got = evaluate(logits, labels, 3).summary(counts([500, 50, 5]))
    assert got["per_class_accuracy"] == [1.0, 0.0, None]
    assert got["few"] is None
    assert got["macro_f1"] == pytest.approx(f1_score(labels, [0, 0, 2], average="macro", labels=[0, 1]))


def test_fewer_than_five_classes():
    logits, labels = random_evaluation(30, 3)
    assert evaluate(logits, labels, 3).summary(counts([3, 2, 1]))["top5"] == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_perfect_and_confident_classifier(dtype):
    labels = torch.arange(12) % 6
    logits = (50 * torch.eye(6)[labels]).to(dtype)
    got = evaluate(logits, labels, 6).summary(counts([1, 2, 3, 4, 5, 6]))
    assert (got["top1"], got["top5"], got["macro_f1"]) == (1.0, 1.0, 1.0)
    assert got["ece"] == pytest.approx(0, abs=1e-6)


def test_a_confident_wrong_classifier_has_ece_one():
    labels = torch.zeros(4, dtype=torch.int64)
    got = evaluate(50 * torch.eye(2)[[1, 1, 1, 1]], labels, 2).summary(counts([2, 1]))
    assert got["ece"] == pytest.approx(1)
    assert got["macro_f1"] == 0


def test_bins_are_open_below_and_closed_above():
    values = torch.tensor([1e-9, 1 / 15, 1 / 15 + 1e-6, 0.5, 14 / 15, 14 / 15 + 1e-6, 1.0], dtype=torch.float64)
    assert confidence_bin(values).tolist() == [0, 0, 1, 7, 13, 14, 14]
    assert confidence_bin(torch.zeros(1)).tolist() == [0]


def test_batches_and_processes_add_up():
    logits, labels = random_evaluation(100, 7)
    one = evaluate(logits, labels, 7, batch_size=100)
    many = evaluate(logits, labels, 7, batch_size=9)
    torch.testing.assert_close(many.state, one.state)
    first, second = evaluate(logits[:31], labels[:31], 7), evaluate(logits[31:], labels[31:], 7)
    first.state += second.state
    class_counts = counts([70, 60, 50, 40, 30, 20, 10])
    assert_same(first.summary(class_counts), one.summary(class_counts))
    assert first.correct.sum() == (logits.argmax(1) == labels).sum()


def test_an_empty_evaluation_is_refused():
    with pytest.raises(ValueError, match="no image was evaluated"):
        Metrics(3).summary(counts([3, 2, 1]))


@pytest.mark.gpu
def test_update_does_not_wait_for_the_device():
    logits, labels = (t.cuda() for t in random_evaluation(100, 20))
    metrics = Metrics(20, device="cuda")
    metrics.update(logits, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.update(logits, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    class_counts = counts(range(20, 0, -1))
    # The same batch twice changes no fraction.
    expected = evaluate(logits.cpu(), labels.cpu(), 20).summary(class_counts)
    assert_same(metrics.summary(class_counts), expected)


def test_groups_by_rank_take_the_largest_classes_first_and_of_equal_ones_the_lower_label():
    counts = ClassCounts(np.array([5, 9, 9, 1, 9, 5]), tuple("abcdef"), ShotRanks((2, 3, 1)))
    groups = {name: np.flatnonzero(mask).tolist() for name, mask in counts.shot_masks().items()}
    assert groups == {"many": [1, 2], "medium": [0, 4, 5], "few": [3]}
