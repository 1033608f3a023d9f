"""The learning rate at the positions that the settings name."""

from __future__ import annotations

import pytest

from fastlt.run.schedule import learning_rate


def cifar(position):
    """The CIFAR100-LT schedule of the supplement, Sec. 1.2."""
    return learning_rate(
        position, length=12800, lr=0.2, schedule="multistep", warmup=400, warmup_from=0.1, milestones=[6400, 9600]
    )


@pytest.mark.parametrize(
    ("position", "expected"),
    [(0, 0.1), (200, 0.15), (400, 0.2), (6399, 0.2), (6400, 0.02), (9599, 0.02), (9600, 0.002), (12799, 0.002)],
)
def test_cifar_schedule(position, expected):
    assert cifar(position) == pytest.approx(expected)


def test_cosine_goes_from_lr_through_half_to_zero():
    values = [learning_rate(p, length=10, lr=0.4, schedule="cosine") for p in (0, 5, 10)]
    assert values == pytest.approx([0.4, 0.2, 0.0])


def test_cosine_starts_after_the_warmup():
    assert learning_rate(2, length=10, lr=0.4, schedule="cosine", warmup=2) == pytest.approx(0.4)
    assert learning_rate(1, length=10, lr=0.4, schedule="cosine", warmup=2) == pytest.approx(0.2)


def test_constant_stays():
    assert {learning_rate(p, length=9, lr=0.3, schedule="constant") for p in range(9)} == {0.3}
