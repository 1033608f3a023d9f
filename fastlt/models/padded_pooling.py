"""A wrong gradient of torch's own that models in channels_last memory meet on GPUs, and how it is found out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_padded_pooling(model: nn.Module, device: torch.device) -> None:
    """ValueError when `model` pools averages over padded maps, in channels_last memory, where torch gets this wrong.

    On CUDA devices the gradient of such a pooling belonged to other pixels, without a word (found with torch 2.11;
    pytorch issue 188344). The device itself is asked: no list of versions has to be kept.
    """
    padded = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.AvgPool2d) and any(torch.as_tensor(module.padding).flatten())
    ]
    if padded and not _is_right(device):
        raise ValueError(
            f"{padded[0]} pools averages over padded maps, and torch {torch.__version__} computes their gradient "
            f"wrongly on {device} in channels_last memory: set channels_last: false, or take a newer torch"
        )


def _is_right(device: torch.device) -> bool:
    """Whether a small pooling has the same gradient in both memory formats."""
    one, other = (_gradient(device, layout) for layout in (torch.contiguous_format, torch.channels_last))
    return torch.allclose(one, other, atol=1e-6)


def _gradient(device: torch.device, memory_format: torch.memory_format) -> Tensor:
    images = torch.arange(32.0, device=device).view(1, 2, 4, 4).contiguous(memory_format=memory_format).requires_grad_()
    with torch.enable_grad():
        pooled = F.avg_pool2d(images, 3, stride=2, padding=1)
        weights = torch.arange(float(pooled.numel()), device=device).view(pooled.shape)
        return torch.autograd.grad((weights * pooled).sum(), images)[0]
