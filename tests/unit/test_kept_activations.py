"""Activations that are let go and made again: the same gradients, less in memory, nothing left behind."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlt.autograd import cpu_kernels as fused_loops
from fastlt.autograd.record import ForwardRecord
from fastlt.autograd.saved_tensors import Activation, Known, LeanPass, OverwrittenError, lean
from fastlt.meta import gradient as meta_gradient
from fastlt.models import build_model

NETWORKS = ["cifar_resnet20", "resnet10", "resnet18", "mobilenetv3_small_100", "densenet121", "vit_tiny_patch16_224"]


def problem(name, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, image_size=32).double().to(memory_format=memory_format).train()
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=memory_format)
    labels = torch.arange(6) % 5

    def loss(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none")

    parameters = meta_gradient.trainable_parameters(model)
    return parameters, meta_gradient.functional_losses(model, loss, images, labels)


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-11 * b.norm() + 1e-15


def activations():
    """All that are alive, without the help of the garbage collector."""
    return [o for o in gc.get_objects() if type(o) is Activation]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_lean_pass_has_the_same_gradient(name):
    parameters, losses = problem(name)
    value, expected = meta_gradient.mean_loss_gradient(losses, parameters)
    lean_value, found = meta_gradient.mean_loss_gradient(lean(losses), parameters)
    assert torch.equal(value, lean_value)
    assert_close(found, expected)


def test_a_lean_pass_keeps_less_and_leaves_nothing_behind():
    parameters, losses = problem("cifar_resnet20")
    gc.collect()
    gc.disable()
    try:
        with LeanPass():
            mean = losses(parameters).mean()
        wanted = [a for a in activations() if a.wanted]
        let_go = [a for a in wanted if a.tensor is None]
        # All 9 ReLUs inside blocks, and of the 10 others every second one, but for shortcuts filled up with zeros.
        assert len(let_go) >= 9 + 3
        assert len(let_go) < len(wanted)
        del wanted, let_go
        torch.autograd.grad(mean, list(parameters.values()))
        del mean
        assert not activations(), "the graph, or what watched it, is still referred to"
    finally:
        gc.enable()


@pytest.mark.parametrize("record_is_lean", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_lightened_record_gives_tangent_and_gradients(name, record_is_lean):
    parameters, losses_of = problem(name)
    direction = [torch.randn_like(p) for p in parameters.values()]
    expected_tangent = meta_gradient.directional_derivative(losses_of, parameters, direction)
    _, expected = meta_gradient.mean_loss_gradient(losses_of, parameters)
    record = ForwardRecord(record_is_lean)
    with record.recording():
        losses = losses_of(parameters)

    def gradient():
        return torch.autograd.grad(
            losses.mean(), list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )

    assert_close(gradient(), expected)
    record.lighten()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tangent = meta_gradient.directional_derivative(losses_of, parameters, direction, record)
    assert_close([tangent], [expected_tangent])
    record.clear()
    assert_close(gradient(), expected)
    assert_close(gradient(), expected)


def test_a_lightened_record_lets_go_and_the_tangent_brings_back_what_autograd_wants():
    parameters, losses_of = problem("cifar_resnet20")
    record = ForwardRecord(lean=True)
    with record.recording():
        losses = losses_of(parameters)
    cheap = [call.activation for call in record.calls if call.activation.cheap() and call.activation.wanted]
    assert all(a.tensor is not None for a in cheap)
    record.lighten()
    assert len(cheap) > 12
    assert all(a.tensor is None for a in cheap)
    direction = [torch.randn_like(p) for p in parameters.values()]
    meta_gradient.directional_derivative(losses_of, parameters, direction, record)
    assert all(a.tensor is not None for a in cheap)
    unwanted = [call.activation for call in record.calls if call.activation.cheap() and not call.activation.wanted]
    assert unwanted
    assert all(a.tensor is None for a in unwanted)
    del losses


@pytest.mark.parametrize("lost", ["last", "middle"])
def test_gradients_survive_a_forward_pass_that_does_not_repeat_itself(lost):
    parameters, losses_of = problem("cifar_resnet20")
    _, expected = meta_gradient.mean_loss_gradient(losses_of, parameters)
    record = ForwardRecord(lean=True)
    with record.recording():
        losses = losses_of(parameters)
    record.lighten()
    record.calls.pop(-1 if lost == "last" else len(record.calls) // 2)
    direction = [torch.randn_like(p) for p in parameters.values()]
    with pytest.warns(UserWarning, match="does not do the same twice"):
        meta_gradient.directional_derivative(losses_of, parameters, direction, record)
    assert_close(torch.autograd.grad(losses.mean(), list(parameters.values())), expected)


class Overwriting(nn.Module):
    """Doubles both summands after the sum was taken, which autograd allows: one made from others, one a constant."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        constant = x.clone()
        made = self.bn(self.conv(x))
        y = F.relu(made + constant, inplace=True)
        square = y * y
        made.mul_(2)
        constant.mul_(2)
        return self.head((square + made * constant).mean((2, 3)))


def test_what_is_overwritten_is_told_and_a_record_keeps_it():
    torch.manual_seed(0)
    model = Overwriting().double()
    images, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 5
    parameters = meta_gradient.trainable_parameters(model)
    losses_of = meta_gradient.functional_losses(
        model, lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"), images, labels
    )
    _, expected = meta_gradient.mean_loss_gradient(losses_of, parameters)
    with pytest.raises(OverwrittenError, match="overwrites a tensor"):
        meta_gradient.mean_loss_gradient(lean(losses_of), parameters)
    record = ForwardRecord(lean=True)
    with record.recording():
        losses = losses_of(parameters)
    record.lighten()
    assert_close(torch.autograd.grad(losses.mean(), list(parameters.values())), expected)


def test_a_kept_tensor_that_was_overwritten_is_an_error_as_in_autograd():
    weight = torch.randn(3, 3, 1, 1, requires_grad=True)
    with LeanPass():
        x = F.conv2d(torch.randn(2, 3, 4, 4), weight)
        y = F.relu(x)
        total = (y * y).sum()
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_rectified_sum_is_made_again_without_the_batch_norm_before_it(monkeypatch):
    summands, again = [], fused_loops.rectified_batch_norm

    def counted(*args):
        summands.append(args[5] if len(args) > 5 else None)
        return again(*args)

    monkeypatch.setattr(fused_loops, "rectified_batch_norm", counted)
    parameters, losses = problem("cifar_resnet20", torch.channels_last)
    _, expected = meta_gradient.mean_loss_gradient(losses, parameters)
    _, found = meta_gradient.mean_loss_gradient(lean(losses), parameters)
    assert_close(found, expected)
    # As in the test of what is kept: 9 ReLUs inside blocks and the first one, every second of the sums.
    assert sum(s is None for s in summands) == 10
    assert sum(s is not None for s in summands) >= 3


def test_a_tensor_is_not_taken_for_one_that_is_gone():
    known, activation = Known(), Activation()
    tensor = torch.ones(1)
    known.add(tensor, activation)
    assert known.get(tensor) is activation
    known.by_id[id(other := torch.ones(1))] = known.by_id.pop(id(tensor))
    assert known.get(other) is None
    assert known.get(torch.ones(1)) is None
