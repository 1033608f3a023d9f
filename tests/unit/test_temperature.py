"""The temperature of the smallest negative log-likelihood, against a search over a grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastlt.inference.temperature import HIGHEST, LOWEST, fit_temperature


def sample(scale: float, offset: np.ndarray, count: int = 3000, classes: int = 5):
    """Logits that are `scale` times too large for labels drawn from softmax(z + offset)."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(count, classes)) * 2
    p = np.exp(z + offset)
    p /= p.sum(1, keepdims=True)
    labels = np.array([rng.choice(classes, p=row) for row in p])
    return z * scale, labels


def nll(z: np.ndarray, labels: np.ndarray, offset: np.ndarray, temperature: float) -> float:
    """One image at a time, as it is written."""
    total = 0.0
    for row, y in zip(z / temperature + offset, labels, strict=True):
        total += math.log(sum(math.exp(v - row[y]) for v in row))
    return total / len(labels)


def ece(z: np.ndarray, labels: np.ndarray, offset: np.ndarray, temperature: float) -> float:
    p = np.exp(z / temperature + offset)
    p /= p.sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == labels
    bins = np.ceil(confidence * 15) - 1
    return sum(abs(confidence[bins == b].sum() - right[bins == b].sum()) for b in range(15)) / len(labels)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("offset", [None, np.array([0.0, 1.0, -1.0, 0.5, 2.0])], ids=["plain", "adjusted"])
def test_it_is_the_best_of_a_grid_and_undoes_the_scale(scale, offset):
    shift = np.zeros(5) if offset is None else offset
    z, labels = sample(scale, shift)
    found = fit_temperature(torch.from_numpy(z), torch.from_numpy(labels), offset)
    assert found.value == pytest.approx(scale, rel=0.1)
    assert found.images == len(labels)
    some = slice(0, 400)
    small = fit_temperature(torch.from_numpy(z[some]), torch.from_numpy(labels[some]), offset)
    best = nll(z[some], labels[some], shift, small.value)
    assert small.nll_after == pytest.approx(best, rel=1e-9)
    assert small.nll_before == pytest.approx(nll(z[some], labels[some], shift, 1.0), rel=1e-9)
    for factor in (0.9, 0.999, 1.001, 1.1):
        assert nll(z[some], labels[some], shift, small.value * factor) > best
    assert found.ece_before == pytest.approx(ece(z, labels, shift, 1.0), abs=1e-9)
    assert found.ece_after == pytest.approx(ece(z, labels, shift, found.value), abs=1e-9)
    if scale != 1.0:
        assert found.ece_after < found.ece_before / 2
    assert f"{found.value:.3g}" in str(found)


def test_float32_logits_and_impossible_classes_are_taken():
    z, labels = sample(2.0, np.zeros(5))
    wide = np.concatenate([z, np.full((len(z), 1), -np.inf)], axis=1)
    one = fit_temperature(torch.from_numpy(z), torch.from_numpy(labels))
    other = fit_temperature(torch.from_numpy(wide).float(), torch.from_numpy(labels))
    assert other.value == pytest.approx(one.value, rel=1e-5)
    with pytest.raises(ValueError, match="cannot predict"):
        fit_temperature(torch.from_numpy(wide), torch.from_numpy(np.where(labels == 0, 5, labels)))


def test_images_that_determine_no_temperature_end_at_the_bound():
    right = torch.eye(4).repeat(5, 1)
    labels = torch.arange(4).repeat(5)
    found = fit_temperature(right, labels)
    assert (found.value, found.at_bound) == (LOWEST, True)
    assert "do not determine" in str(found)
    assert fit_temperature(right, (labels + 1) % 4).value == HIGHEST
    assert fit_temperature(300 * right, labels).at_bound
