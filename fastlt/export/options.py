"""How a network is written for other programs, and by how much its logits may differ then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastlt.names import shortened
from fastlt.run.model_folder import LIMIT

Precision = Literal["fp32", "fp16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# Of the largest logit: 41 units of the last of half precision's 11 bits. The roundings of a network's layers add up to
# less, while a layer that overflows, or loses its small numbers, is far off.
HALF_LIMIT = 0.02
TIMM = "timm"


@dataclass(frozen=True)
class ExportOptions:
    """How a network is written.

    preprocess: it takes uint8 images and normalises them inside.
    dynamic_size: it takes images of any height and width, where the network can.
    precision: of the weights and of what is computed with them; images and logits are of the same type with each.
    opset: the version of ONNX's operators; None is the one that torch writes.
    """

    preprocess: bool = False
    dynamic_size: bool = False
    precision: Precision = "fp32"
    opset: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is {shortened(self.precision)}: allowed are {', '.join(get_args(Precision))}")
        if self.opset is not None and self.opset < 1:
            raise ValueError(f"opset is {self.opset}: it must be a version of ONNX's operators")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return DTYPES[self.precision]

    def check(self, to: str, *, several: bool) -> None:
        """ValueError for options that the form `to` has no use for. several: whether runs are put together."""
        if to != "onnx" and self.opset is not None:
            raise ValueError(f"opset is a version of ONNX's operators, and the form is {to}: leave it out")
        if to != TIMM:
            return
        if several:
            raise ValueError(
                f"the form {TIMM} is one network, and several runs are none; take onnx, torch or torchscript"
            )
        for given, why in (
            ("preprocess", "its config.json says how images are normalised"),
            ("dynamic_size", "its networks take other sizes where they can"),
        ):
            if getattr(self, given):
                raise ValueError(f"{given} is not for the form {TIMM}: {why}")
        if self.precision != "fp32":
            raise ValueError(f"precision is not for the form {TIMM}: cast its network with .half() where it is used")

    def allowed(self, logits: Tensor) -> float:
        """The largest difference from the trained model's `logits`, float32 (N, C), that an export may have."""
        if self.precision == "fp32":
            return LIMIT
        return HALF_LIMIT * logits[logits.isfinite()].abs().max().clamp_min(1.0).item()
