"""Activations that are released and recomputed: the same gradients, less in memory, nothing left behind."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlt.autograd import ForwardRecord, OverwrittenError, with_recompute
from fastlt.autograd.activations import Activation
from fastlt.autograd.modes import ActivationsByTensor
from fastlt.autograd.saved_tensors import RecomputeMode
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
def test_a_pass_with_recompute_has_the_same_gradient(name):
    parameters, losses = problem(name)
    value, expected = meta_gradient.mean_loss_gradient(losses, parameters)
    recompute_value, found = meta_gradient.mean_loss_gradient(with_recompute(losses), parameters)
    assert torch.equal(value, recompute_value)
    assert_close(found, expected)


def test_a_pass_with_recompute_holds_less_and_leaves_nothing_behind():
    parameters, losses = problem("cifar_resnet20")
    gc.collect()
    gc.disable()
    try:
        with RecomputeMode():
            mean = losses(parameters).mean()
        saved = [a for a in activations() if a.saved_for_backward]
        released = [a for a in saved if a.tensor is None]
        # All 9 ReLUs inside blocks, and of the 10 others every second one, but for shortcuts filled up with zeros.
        assert len(released) >= 9 + 3
        assert len(released) < len(saved)
        del saved, released
        torch.autograd.grad(mean, list(parameters.values()))
        del mean
        assert not activations(), "the graph, or the mode that saw it, is still referred to"
    finally:
        gc.enable()


@pytest.mark.parametrize("record_is_lean", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_released_record_gives_tangent_and_gradients(name, record_is_lean):
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
    record.release()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tangent = meta_gradient.directional_derivative(losses_of, parameters, direction, record)
    assert_close([tangent], [expected_tangent])
    record.clear()
    assert_close(gradient(), expected)
    assert_close(gradient(), expected)


def test_release_frees_memory_and_the_replay_holds_again_what_autograd_saved():
    parameters, losses_of = problem("cifar_resnet20")
    record = ForwardRecord(lean=True)
    with record.recording():
        losses = losses_of(parameters)
    recomputable = [a for _, a in record.recorded if a.recomputable()]
    saved = [a for a in recomputable if a.saved_for_backward]
    assert all(a.tensor is not None for a in saved)
    record.release()
    assert len(saved) > 12
    assert all(a.tensor is None for a in saved)
    direction = [torch.randn_like(p) for p in parameters.values()]
    meta_gradient.directional_derivative(losses_of, parameters, direction, record)
    assert all(a.tensor is not None for a in saved)
    unsaved = [a for a in recomputable if not a.saved_for_backward]
    assert unsaved
    assert all(a.tensor is None for a in unsaved)
    del losses


@pytest.mark.parametrize("lost", ["last", "middle"])
def test_gradients_survive_a_forward_pass_that_does_not_repeat_itself(lost):
    parameters, losses_of = problem("cifar_resnet20")
    _, expected = meta_gradient.mean_loss_gradient(losses_of, parameters)
    record = ForwardRecord(lean=True)
    with record.recording():
        losses = losses_of(parameters)
    record.release()
    record.recorded.pop(-1 if lost == "last" else len(record.recorded) // 2)
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


def test_what_is_overwritten_is_told_and_a_record_holds_it():
    torch.manual_seed(0)
    model = Overwriting().double()
    images, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 5
    parameters = meta_gradient.trainable_parameters(model)
    losses_of = meta_gradient.functional_losses(
        model, lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"), images, labels
    )
    _, expected = meta_gradient.mean_loss_gradient(losses_of, parameters)
    with pytest.raises(OverwrittenError, match="overwrites a tensor"):
        meta_gradient.mean_loss_gradient(with_recompute(losses_of), parameters)
    record = ForwardRecord(lean=True)
    with record.recording():
        losses = losses_of(parameters)
    record.release()
    assert_close(torch.autograd.grad(losses.mean(), list(parameters.values())), expected)


def test_a_saved_tensor_that_was_overwritten_is_an_error_as_in_autograd():
    weight = torch.randn(3, 3, 1, 1, requires_grad=True)
    with RecomputeMode():
        x = F.conv2d(torch.randn(2, 3, 4, 4), weight)
        y = F.relu(x)
        total = (y * y).sum()
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_an_activation_is_recomputed_from_the_value_that_was_read_not_from_the_one_written_over_it():
    """A held activation is overwritten by an operation without a rule, after another one has been computed from it."""
    torch.manual_seed(0)
    first, last = (torch.randn(4, 4, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale, shift = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    images = torch.randn(2, 4, 6, 6, dtype=torch.float64)

    def normalised(x):
        return F.batch_norm(x, None, None, scale, shift, True)

    def block(x):
        return F.relu(normalised(F.conv2d(x, first, padding=1)) + x, inplace=True)

    def loss(last):
        x = F.relu(normalised(F.conv2d(images, first, padding=1)))
        y = block(x)
        value = F.conv2d(normalised(y), last, padding=1).pow(2).mean()
        y.mul_(5)
        return value

    # The gradient in `last` needs the output of the BatchNorm behind the block, and nothing that was overwritten.
    (expected,) = torch.autograd.grad(loss(last), [last])
    (found,) = torch.autograd.grad(with_recompute(loss)(last), [last])
    assert_close([found], [expected])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(with_recompute(loss)(last), [first])


class CountedAdditions(TorchDispatchMode):
    """Counts sums of activations, by whether they overwrite."""

    def __init__(self):
        super().__init__()
        self.in_place = self.into_new_memory = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 4:
            self.in_place += func is torch.ops.aten.add_.Tensor
            self.into_new_memory += func is torch.ops.aten.add.Tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_a_sum_is_recomputed_in_the_memory_of_the_batch_norm_before_it(memory_format, monkeypatch):
    held, hold = [], Activation.hold

    def counted(activation, tensor):
        held.append(activation)
        hold(activation, tensor)

    parameters, losses = problem("cifar_resnet20", memory_format)
    values = list(parameters.values())
    value = losses(parameters).mean()
    with CountedAdditions() as plain:
        expected = torch.autograd.grad(value, values)
    with RecomputeMode():
        mean = losses(parameters).mean()
    monkeypatch.setattr(Activation, "hold", counted)
    with CountedAdditions() as additions:
        found = torch.autograd.grad(mean, values)
    assert_close(found, expected)
    # As in the test of what is held: 9 ReLUs inside blocks and the first one, every second of the sums.
    assert sum(len(a.operations) == 2 and a.operations[0].function is F.batch_norm for a in held) == 10
    sums = sum(a.operations[0].function is torch.Tensor.add for a in held)
    assert sums >= 3
    assert len(held) == 10 + sums
    assert additions.in_place - plain.in_place == sums
    assert additions.into_new_memory == plain.into_new_memory


def test_a_tensor_is_not_taken_for_one_that_is_gone():
    known, activation = ActivationsByTensor(), Activation()
    tensor = torch.ones(1)
    known.add(tensor, activation)
    assert known.get(tensor) is activation
    known.by_id[id(other := torch.ones(1))] = known.by_id.pop(id(tensor))
    assert known.get(other) is None
    assert known.get(torch.ones(1)) is None
