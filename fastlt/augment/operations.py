"""The augmentations a recipe can name: each draws its choices on the host, then applies them on the device.

An operation is a frozen dataclass whose fields are the recipe's options. `draw` gives host tensors with one row an
image; `apply` is a pure function of the images and those draws, on the device. The shapes in `draw` depend on nothing
random when `static` is set, so that the applied work can be captured once and replayed with other draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastlt.augment import geometry
from fastlt.augment.cutout import cutout
from fastlt.augment.draws import Draws, Rows, chance, integers


@dataclass(frozen=True)
class Shape:
    """What an operation has to know to draw: images in the batch, their sides, and whether shapes must be static."""

    count: int
    height: int
    width: int
    static: bool = False


class Operation(Protocol):
    """One entry of AUGMENTATIONS."""

    def draw(self, shape: Shape, generator: torch.Generator) -> Draws: ...

    def apply(self, images: Tensor, draws: Draws) -> Tensor: ...

    def output_size(self, height: int, width: int) -> tuple[int, int]: ...


class SameSize:
    """An operation that keeps the images' size."""

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width


@dataclass(frozen=True)
class RandomCrop:
    """Pad by `padding` pixels of the value `fill`, then cut a square of the recipe's image size at a uniform place."""

    image_size: int
    padding: int
    fill: int = 0

    def __post_init__(self) -> None:
        require_integer("random_crop", "padding", self.padding, 0, 1 << 16)
        require_integer("random_crop", "fill", self.fill, 0, 255)

    def draw(self, shape: Shape, generator: torch.Generator) -> Draws:
        room_y = shape.height + 2 * self.padding - self.image_size
        room_x = shape.width + 2 * self.padding - self.image_size
        if min(room_y, room_x) < 0:
            raise ValueError(
                f"random_crop: images of {shape.height}x{shape.width} with padding {self.padding} are smaller than "
                f"image_size {self.image_size}; raise padding, lower image_size, or use random_resized_crop"
            )
        return {
            "top": integers(shape.count, room_y + 1, generator),
            "left": integers(shape.count, room_x + 1, generator),
        }

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        padded = geometry.pad(images, self.padding, self.fill)
        return geometry.crop(padded, draws["top"], draws["left"], self.image_size)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return self.image_size, self.image_size


@dataclass(frozen=True)
class Flip(SameSize):
    """Mirror each image left to right with probability `p`."""

    p: float = 0.5

    def __post_init__(self) -> None:
        require_number("flip", "p", self.p, 0, 1)

    def draw(self, shape: Shape, generator: torch.Generator) -> Draws:
        return {"rows": Rows.of(chance(shape.count, self.p, generator), shape.static)}

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        rows = draws["rows"]
        return rows.put(images, geometry.flip(rows.take(images)))


@dataclass(frozen=True)
class Cutout(SameSize):
    """Hide a square of side `size` in each image with probability `p`; runs after normalisation (see `cutout`)."""

    size: int
    p: float = 1.0

    def __post_init__(self) -> None:
        require_integer("cutout", "size", self.size, 1, 1 << 16)
        require_number("cutout", "p", self.p, 0, 1)

    def draw(self, shape: Shape, generator: torch.Generator) -> Draws:
        draws = {
            "top": integers(shape.count, shape.height, generator) - self.size // 2,
            "left": integers(shape.count, shape.width, generator) - self.size // 2,
        }
        return draws if self.p == 1 else {**draws, "chosen": chance(shape.count, self.p, generator)}

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        return cutout(images, draws["top"], draws["left"], self.size, draws.get("chosen"))


def require_number(name: str, option: str, value: object, low: float, high: float) -> None:
    """ValueError unless `value` is a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"augment.{name}.{option} is {value!r}: it must be a number from {low} to {high}")


def require_integer(name: str, option: str, value: object, low: int, high: int) -> None:
    """ValueError unless `value` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"augment.{name}.{option} is {value!r}: it must be a whole number from {low} to {high}")


def require_range(name: str, option: str, value: object, low: float, high: float) -> tuple[float, float]:
    """`value` as (min, max); ValueError unless it is two numbers with low <= min <= max <= high."""
    numbers = isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)
    if not numbers or not low <= value[0] <= value[1] <= high:
        raise ValueError(
            f"augment.{name}.{option} is {value!r}: it must be two numbers [min, max], {low} <= min <= max <= {high}"
        )
    return float(value[0]), float(value[1])
