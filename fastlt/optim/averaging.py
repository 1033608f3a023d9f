"""The exponential moving average of a model's weights, timm's `ModelEmaV3`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from timm.utils import ModelEmaV3
from torch import nn

from fastlt.ranges import within


@dataclass(frozen=True)
class Ema:
    """A moving average of all weights and of BatchNorm's statistics, beside the raw weights.

    decay: what stays of the average in an iteration; the first iteration sets it to the weights.
    warmup: whether the decay grows to this value, as 1 - (1 + t)^(-2/3) in iteration t.
    select: whose model is the stage's, and decides which one is the best: ema, the average, or raw, the weights
        themselves.
    """

    decay: float = field(default=0.9998, metadata=within(0, 1, below=True))
    warmup: bool = False
    select: Literal["ema", "raw"] = "ema"

    @property
    def beside(self) -> str:
        """The weights that are not selected."""
        return "raw" if self.select == "ema" else "ema"

    def start(self, model: nn.Module) -> ModelEmaV3:
        """The average of a model that begins; `update(model, iteration)`, counted from 1, goes on with it in place."""
        return ModelEmaV3(model, decay=self.decay, use_warmup=self.warmup)
