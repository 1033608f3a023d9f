"""Difficulty-Net's arithmetic against the equations written out."""

from __future__ import annotations

import pytest
import torch

from fastlt.meta.difficulty import (
    DifficultyNet,
    class_weights,
    difficulty_gradient_loss,
    driver_loss,
    driver_target,
    hidden_width,
)
from fastlt.steps.cdb import CdbStep, cdb_weights, dynamic_tau


@pytest.mark.parametrize(
    ("num_classes", "hidden"), [(10, 16), (100, 128), (365, 512), (1000, 1024), (128, 256), (127, 128)]
)
def test_hidden_width_follows_the_rule_of_the_supplement(num_classes, hidden):
    assert hidden_width(num_classes) == hidden
    assert DifficultyNet(num_classes).layers[0].out_features == hidden


def test_class_weights_have_mean_one_and_keep_the_ratios():
    difficulty = torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64)
    weights = class_weights(difficulty)
    assert torch.isclose(weights.mean(), torch.ones((), dtype=torch.float64))
    assert torch.allclose(weights / weights[0], difficulty / difficulty[0])


def test_driver_targets():
    accuracy = torch.tensor([0.1, 0.3, 0.6])
    assert torch.allclose(driver_target(accuracy, "relative"), torch.tensor([0.9, 0.7, 0.4]))
    assert torch.allclose(driver_target(accuracy, "absolute"), torch.tensor([0.9, 0.7, 0.4]))
    doubled = 0.5 * accuracy
    assert torch.allclose(driver_target(doubled, "relative"), torch.tensor([0.9, 0.7, 0.4])), "only the shares count"
    assert torch.allclose(driver_target(doubled, "absolute"), torch.tensor([0.95, 0.85, 0.7]))


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_before_anything_is_learned_every_class_is_fully_difficult(kind):
    assert torch.equal(driver_target(torch.zeros(4), kind), torch.ones(4))


def test_driver_loss_is_the_mean_square():
    difficulty, accuracy = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    assert torch.isclose(driver_loss(difficulty, accuracy, "absolute"), torch.tensor(0.0625))


def test_gradient_loss_has_the_gradient_of_both_terms():
    torch.manual_seed(0)
    net, accuracy, meta = DifficultyNet(4).double(), torch.rand(4).double(), torch.randn(4).double()
    scalar, _ = difficulty_gradient_loss(net, accuracy, meta, 0.3, "relative")
    weights = class_weights(net(accuracy))
    expected = torch.autograd.grad(weights, list(net.parameters()), meta)
    driver = torch.autograd.grad(driver_loss(net(accuracy), accuracy, "relative"), list(net.parameters()))
    for got, w, d in zip(torch.autograd.grad(scalar, list(net.parameters())), expected, driver, strict=True):
        assert torch.allclose(got, w + 0.3 * d)


def test_cdb_weights_against_the_formula_and_at_their_end():
    accuracy = torch.tensor([0.9, 0.5, 0.0])
    for tau in (1.0, 2.0):
        powers = [(1 - a) ** tau for a in (0.9, 0.5, 0.0)]
        assert torch.allclose(cdb_weights(accuracy, tau), torch.tensor([3 * p / sum(powers) for p in powers]))
    assert torch.equal(cdb_weights(torch.ones(3), 1.0), torch.ones(3)), "all classes solved: uniform"
    assert torch.isclose(dynamic_tau(torch.full((3,), 0.5)), torch.tensor(1.0), atol=0.02)
    assert dynamic_tau(torch.tensor([0.9, 0.0])) > 1.99


@pytest.mark.parametrize("tau", [0, -1.0, "fast"])
def test_cdb_refuses_a_tau_that_means_nothing(tau):
    with pytest.raises(ValueError, match="tau"):
        CdbStep.Options(tau=tau)
