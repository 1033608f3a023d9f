"""Models that torch would train with a wrong gradient are refused, and only these."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlt.models import build_model, check_padded_pooling, padded_pooling

CPU = torch.device("cpu")


@pytest.fixture
def wrong_gradient(monkeypatch):
    """As the kernel was: with the window of a pixel found as if there were no padding."""
    right = padded_pooling._gradient

    def gradient(device, memory_format):
        found = right(device, memory_format)
        return found.roll(1, 3) if memory_format == torch.channels_last else found

    monkeypatch.setattr(padded_pooling, "_gradient", gradient)


@pytest.mark.parametrize("padding", [1, (0, 1)])
def test_a_padded_pooling_is_refused_where_its_gradient_is_wrong(wrong_gradient, padding):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 1, padding))
    with pytest.raises(ValueError, match=r"1 pools averages over padded maps.*set channels_last: false"):
        check_padded_pooling(model, CPU)


@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "cifar_resnet8"])
def test_models_without_one_are_not(wrong_gradient, name):
    check_padded_pooling(build_model(name, num_classes=5), CPU)


def test_where_the_gradient_is_right_nothing_is_refused():
    check_padded_pooling(nn.AvgPool2d(3, 1, 1), CPU)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_that_is_tried_is_that_of_the_definition(memory_format):
    """A pixel gets a ninth of the weight of every window that it lies in."""
    weights, window = torch.arange(8.0).view(2, 1, 2, 2), torch.full((1, 1, 3, 3), 1 / 9)
    expected = F.conv_transpose2d(weights, window, stride=2, padding=1, output_padding=1).view(1, 2, 4, 4)
    assert torch.allclose(padded_pooling._gradient(CPU, memory_format), expected)


@pytest.mark.gpu
def test_a_gpu_is_asked_and_answers_for_itself():
    device = torch.device("cuda")
    images = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(0))

    def gradient(device, memory_format):
        leaf = images.detach().to(device, memory_format=memory_format).requires_grad_()
        F.avg_pool2d(leaf, 3, stride=2, padding=1).square().sum().backward()
        return leaf.grad.cpu()

    exact = gradient(CPU, torch.contiguous_format)
    assert torch.allclose(gradient(device, torch.contiguous_format), exact, atol=1e-5)
    assert padded_pooling._is_right(device) == torch.allclose(gradient(device, torch.channels_last), exact, atol=1e-5)
