"""Models that torch would train with a wrong gradient are refused, and only these."""

from __future__ import annotations

import pytest
import torch
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


@pytest.mark.gpu
def test_a_gpu_is_asked_and_answers_for_itself():
    device = torch.device("cuda")
    exact = padded_pooling._gradient(CPU, torch.contiguous_format)
    assert torch.allclose(padded_pooling._gradient(device, torch.contiguous_format).cpu(), exact, atol=1e-6)
    is_right = torch.allclose(padded_pooling._gradient(device, torch.channels_last).cpu(), exact, atol=1e-6)
    assert padded_pooling._is_right(device) == is_right
