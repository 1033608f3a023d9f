"""Folding BatchNorm: the same logits as the network's own eval pass, and a network that is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlt.autograd import FoldedForward
from fastlt.autograd.folded_batch_norm import fold
from fastlt.meta.class_accuracy import evaluation_mode
from fastlt.models import build_model

# Backbone, image size, and how many of its BatchNorms directly follow a convolution.
BACKBONES = [
    ("cifar_resnet32", 16, 31),
    ("resnet10", 32, 12),
    ("resnet18", 32, 20),
    ("mobilenetv3_small_100", 32, 34),
    ("densenet121", 32, 59),
    ("convnext_atto", 32, 0),
    ("vit_tiny_patch16_224", 32, 0),
]


def trained_a_little(model, shape):
    """Statistics and affine parameters that are not those of a new network; the convolutions get no special values."""
    with torch.no_grad():
        for _ in range(2):
            model(1 + 2 * torch.randn(shape, dtype=torch.float64))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-1, 1)
    return model


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("name", "size", "folds"), BACKBONES)
def test_equals_the_unfolded_pass_in_float64(name, size, folds, memory_format):
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, image_size=size).to(dtype=torch.float64, memory_format=memory_format)
    trained_a_little(model.train(), (4, 3, size, size))
    images = torch.randn(4, 3, size, size, dtype=torch.float64).contiguous(memory_format=memory_format)
    before = copy.deepcopy(model.state_dict())
    with evaluation_mode(model):
        forward = FoldedForward(model, images[:1])
        assert len(forward.pairs) == folds
        with forward.weights():
            assert relative_error(forward(images), model(images)) <= 1e-12
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


class Small(nn.Module):
    """conv-bn-relu, linear, bn."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.linear, self.norm1d = nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False)

    def forward(self, x):
        return self.norm1d(self.linear(F.relu(self.norm(self.conv(x)), inplace=True).mean((2, 3))))


class ReadTwice(Small):
    def forward(self, x):
        y = self.conv(x)
        return F.relu(self.norm(y) + y).mean((2, 3))


class Returned(Small):
    def forward(self, x):
        y = self.conv(x)
        self.norm(y)
        return y.mean((2, 3))


class Standardised(Small):
    """The weight is computed in the pass: a plan that kept it would be out of date after the next update."""

    def forward(self, x):
        return self.norm(F.conv2d(x, self.conv.weight / self.conv.weight.norm(), self.conv.bias)).mean((2, 3))


class BatchStatistics(Small):
    def forward(self, x):
        return F.batch_norm(self.conv(x), None, None, training=True).mean((2, 3))


class Sequence(Small):
    """BatchNorm's channels are the positions here, not the features that the linear layer makes."""

    def forward(self, x):
        return self.norm1d(self.linear(x[:, 0, :5, :4])).mean(2)


class OneConvolutionTwoNorms(Small):
    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def forward(self, x):
        return (self.norm(self.conv(x)) + self.other(self.conv(x + 1))).mean((2, 3))


@pytest.mark.parametrize(
    ("kind", "folds"),
    [(Small, 2), (ReadTwice, 0), (Returned, 0), (Standardised, 0), (BatchStatistics, 0), (Sequence, 0),
     (OneConvolutionTwoNorms, 2)],
)  # fmt: skip
def test_only_what_one_batchnorm_alone_reads_is_folded(kind, folds):
    torch.manual_seed(0)
    model = trained_a_little(kind().double().train(), (4, 3, 6, 6))
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    with evaluation_mode(model):
        forward = FoldedForward(model, images[:1])
        assert len(forward.pairs) == folds
        with forward.weights():
            assert relative_error(forward(images), model(images)) <= 1e-12


def test_folding_follows_the_live_parameters_and_statistics():
    torch.manual_seed(0)
    model, images = trained_a_little(Small().double().train(), (4, 3, 6, 6)), torch.randn(4, 3, 6, 6).double()
    with evaluation_mode(model):
        forward = FoldedForward(model, images[:1])
    trained_a_little(model, (4, 3, 6, 6))
    with torch.no_grad():
        model.conv.weight.mul_(1.5)
    with evaluation_mode(model), forward.weights():
        assert relative_error(forward(images), model(images)) <= 1e-12


def test_fold_is_the_affine_map_written_out():
    torch.manual_seed(0)
    model = trained_a_little(Small().double().train(), (4, 3, 6, 6))
    with evaluation_mode(model):
        forward = FoldedForward(model, torch.randn(1, 3, 6, 6).double())
    weight, bias = fold(forward.pairs)[0]
    conv, norm = model.conv, model.norm
    for channel in range(4):
        factor = norm.weight[channel] / (norm.running_var[channel] + norm.eps) ** 0.5
        assert torch.allclose(weight[channel], factor * conv.weight[channel])
        assert torch.isclose(
            bias[channel], factor * (conv.bias[channel] - norm.running_mean[channel]) + norm.bias[channel]
        )


class Changing(Small):
    """Takes another way through its layers from the second pass on."""

    way = 0

    def forward(self, x):
        self.way += 1
        y = self.conv(x)
        if self.way == 1:
            y = self.norm(y)
        return y.mean((2, 3)) if self.way < 3 else self.linear(y.mean((2, 3)))


def test_a_model_that_changes_its_ways_is_run_as_usual():
    model, images = trained_a_little(Small().double().train(), (4, 3, 6, 6)), torch.randn(4, 3, 6, 6).double()
    changing = Changing().double()
    changing.load_state_dict(model.state_dict())
    with evaluation_mode(changing):
        forward = FoldedForward(changing, images[:1])
        assert len(forward.pairs) == 1
        with forward.weights():
            result = forward(images)
        assert torch.equal(result, changing(images))
        assert forward.pairs == []


def test_an_exception_in_the_pass_leaves_everything_as_it_was():
    model, images = trained_a_little(Small().double().train(), (4, 3, 6, 6)), torch.randn(4, 3, 6, 6).double()
    before = copy.deepcopy(model.state_dict())
    with evaluation_mode(model):
        forward = FoldedForward(model, images[:1])
        expected = model(images)
    with pytest.raises(RuntimeError), evaluation_mode(model), forward.weights():
        forward(images[:, :2])
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with evaluation_mode(model):
        assert torch.equal(model(images), expected)
