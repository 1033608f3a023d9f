"""AdaptFormer: a bottleneck beside the MLP of every transformer block."""

from __future__ import annotations

import math

import torch
from timm.models.eva import EvaBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from timm.models.vision_transformer_relpos import RelPosBlock
from torch import Tensor, nn

# Blocks whose second half is x + drop_path2(scale * mlp(norm2(x))), where the scale may be absent.
PRE_NORM = (Block, RelPosBlock, SwinTransformerBlock, EvaBlock)


class Bottleneck(nn.Module):
    """s * up(dropout(relu(down(norm(x))))): x (..., width) to the same shape, 0 at first.

    As in LIFT (Shi et al., ICML 2024): a LayerNorm of its own; down is drawn as by Kaiming for a = sqrt(5); up and the
    biases are 0; s is learned and starts at 1.
    """

    def __init__(self, width: int, bottleneck: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, bottleneck)
        self.act = nn.ReLU()
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.up = nn.Linear(bottleneck, width)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.kaiming_normal_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.dropout(self.act(self.down(self.norm(x)))))


class ParallelMlp(nn.Module):
    """scale * mlp(norm(x)) + adapter(x): the second half of a block without its residual, with a bottleneck."""

    gamma: nn.Parameter | None

    def __init__(
        self, norm: nn.Module, mlp: nn.Module, scale: nn.Module, gamma: nn.Parameter | None, adapter: Bottleneck
    ) -> None:
        super().__init__()
        self.norm, self.mlp, self.scale, self.adapter = norm, mlp, scale, adapter
        self.register_parameter("gamma", gamma)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale(self.mlp(self.norm(x)))
        return (y if self.gamma is None else self.gamma * y) + self.adapter(x)


def bottleneck_for(num_classes: int, layers: int) -> int:
    """2^floor(log2(C / (2 * layers))), at least 1: LIFT's bottleneck for C classes."""
    return 2 ** max(0, math.floor(math.log2(num_classes / (2 * layers))))


def adaptable_blocks(backbone: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a backbone that take a bottleneck beside their MLP, by name."""
    return {name: block for name, block in backbone.named_modules() if isinstance(block, PRE_NORM)}


def insert_bottleneck(block: nn.Module, bottleneck: int, dropout: float) -> None:
    """Put a bottleneck beside the MLP of a block, in place. `norm2`, the MLP and its scale become parts of `mlp`."""
    norm, mlp = block.get_submodule("norm2"), block.get_submodule("mlp")
    scale, gamma = getattr(block, "ls2", nn.Identity()), getattr(block, "gamma_2", None)
    like = next(norm.parameters())
    adapter = Bottleneck(like.numel(), bottleneck, dropout).to(device=like.device, dtype=like.dtype)
    block.mlp = ParallelMlp(norm, mlp, scale, gamma, adapter)
    block.norm2 = nn.Identity()
    if hasattr(block, "ls2"):
        block.ls2 = nn.Identity()
    if gamma is not None:
        block.register_parameter("gamma_2", None)
