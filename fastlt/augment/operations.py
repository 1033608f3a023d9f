"""The augmentations a recipe can name: each draws its choices on the host, then applies them on the device.

An operation is a frozen dataclass whose fields are the recipe's options. `draw` gives host tensors with one row an
image; `apply` is a pure function of the images and those draws, on the device. The shapes in `draw` depend on nothing
random when `static` is set, so that the applied work can be captured once and replayed with other draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal

import torch
from torch import Tensor

from fastlt.augment import colour, geometry, policies
from fastlt.augment.cutout import cutout
from fastlt.augment.draws import DrawsT, Rows, chance, integers, uniform
from fastlt.names import pick


@dataclass(frozen=True)
class Shape:
    """What an operation has to know to draw: images in the batch, their sides, and whether shapes must be static."""

    count: int
    height: int
    width: int
    static: bool = False


@dataclass(frozen=True)
class Operation(Generic[DrawsT]):
    """The base of an augmentation, generic in what it draws: tensors with one row an image, see `map_tensors`.

    normalised: whether it works on normalised floats, at the end of the list; others work on uint8 images.
    """

    normalised: ClassVar[bool] = False

    def draw(self, shape: Shape, generator: torch.Generator) -> DrawsT:
        """The random choices for a batch, on the host."""
        raise NotImplementedError

    def apply(self, images: Tensor, draws: DrawsT) -> Tensor:
        """images: (N, 3, H, W), on the device of `draws`. Returns (N, 3, h, w) of the same type, see `output_size`."""
        raise NotImplementedError

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of images of this size afterwards, here the same; ValueError when they are too small for it."""
        return height, width


@dataclass(frozen=True)
class RandomCrop(Operation[Tensor]):
    """Pad by `padding` pixels of the value `fill`, then cut a square of the recipe's image size at a uniform place.

    reflect: pixels of a border that is mirrored at the image's edge, inside of the padding.
    """

    image_size: int
    padding: int
    fill: int = 0
    reflect: int = 0

    def __post_init__(self) -> None:
        # From image_size on, some crops would show nothing of the image.
        require_integer("random_crop", "padding", self.padding, 0, self.image_size - 1)
        require_integer("random_crop", "fill", self.fill, 0, 255)
        require_integer("random_crop", "reflect", self.reflect, 0, self.image_size - 1)

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        room_y, room_x = self._room(shape.height, shape.width)
        top, left = integers(shape.count, room_y + 1, generator), integers(shape.count, room_x + 1, generator)
        # The place of the square's upper left pixel in the padded image.
        return top * (shape.width + 2 * (self.reflect + self.padding)) + left

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        whole = geometry.reflect(images, self.reflect) if self.reflect else images
        padded = geometry.pad(whole, self.padding, self.fill)
        return geometry.crop(padded, draws, self.image_size)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        self._room(height, width)
        return self.image_size, self.image_size

    def _room(self, height: int, width: int) -> tuple[int, int]:
        """How far down and to the right the square can start; ValueError when it does not fit."""
        room_y, room_x = (side + 2 * (self.reflect + self.padding) - self.image_size for side in (height, width))
        if min(height, width) <= self.reflect:
            raise ValueError(f"random_crop: images of {height}x{width} have no {self.reflect} pixels to reflect")
        if min(room_y, room_x) < 0:
            raise ValueError(
                f"random_crop: images of {height}x{width} with padding {self.padding} are smaller than "
                f"image_size {self.image_size}; raise padding, lower image_size, or use random_resized_crop"
            )
        return room_y, room_x


@dataclass(frozen=True)
class Flip(Operation[Rows]):
    """Mirror each image left to right with probability `p`."""

    p: float = 0.5

    def __post_init__(self) -> None:
        require_number("flip", "p", self.p, 0, 1)

    def draw(self, shape: Shape, generator: torch.Generator) -> Rows:
        return Rows.of(chance(shape.count, self.p, generator), shape.static)

    def apply(self, images: Tensor, draws: Rows) -> Tensor:
        return draws.put(images, geometry.flip(draws.take(images)))


@dataclass(frozen=True)
class RandomRotation(Operation[Tensor]):
    """Rotate each image about its centre by an angle uniform in -degrees..degrees; corners from outside are 0.

    interpolation: nearest or bilinear, each with the pixels of torchvision's rotation of that image.
    """

    degrees: float
    interpolation: Literal["nearest", "bilinear"] = "nearest"

    def __post_init__(self) -> None:
        require_number("random_rotation", "degrees", self.degrees, 0, 180)
        pick("augment.random_rotation.interpolation", self.interpolation, geometry.ROTATIONS)

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        """Inverse maps, float32 (N, 6), see `geometry.rotate`."""
        return geometry.rotate(uniform(shape.count, -self.degrees, self.degrees, generator)).float()

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        return geometry.ROTATIONS[self.interpolation](images, draws)


@dataclass(frozen=True)
class Cutout(Operation[Tensor]):
    """Hide a square of side `size` in each image with probability `p`; runs after normalisation (see `cutout`)."""

    normalised: ClassVar[bool] = True

    size: int
    p: float = 1.0

    def __post_init__(self) -> None:
        require_integer("cutout", "size", self.size, 1, 1 << 16)
        require_number("cutout", "p", self.p, 0, 1)

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        centre = torch.stack([integers(shape.count, side, generator) for side in (shape.height, shape.width)])
        if self.p < 1:
            centre[:, ~chance(shape.count, self.p, generator)] = max(shape.height, shape.width)
        return centre

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        return cutout(images, draws, self.size)


@dataclass(frozen=True)
class RandomResizedCrop(Operation[Tensor]):
    """Cut a box of random area and shape, resize it to the recipe's image size (antialiased bilinear).

    scale: range of the box's share of the image's area. ratio: range of its width over its height, uniform in the log.
    Boxes are drawn as torchvision draws them: ten tries, then the largest central box within `ratio`.
    """

    image_size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", require_range("random_resized_crop", "scale", self.scale, 1e-6, 1))
        object.__setattr__(self, "ratio", require_range("random_resized_crop", "ratio", self.ratio, 1e-3, 1e3))

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        return draw_boxes(shape, self.scale, self.ratio, generator)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        return geometry.resized_crop(images, draws, self.image_size)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return self.image_size, self.image_size


TRIES = 10


def draw_boxes(
    shape: Shape, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Boxes (top, left, height, width) of RandomResizedCrop: int64 (count, 4)."""
    n, full_height, full_width = shape.count, shape.height, shape.width
    area = full_height * full_width * uniform(n * TRIES, *scale, generator).view(n, TRIES)
    aspect = uniform(n * TRIES, math.log(ratio[0]), math.log(ratio[1]), generator).view(n, TRIES).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width > 0) & (width <= full_width) & (height > 0) & (height <= full_height)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    central_height, central_width = _central_box(full_height, full_width, ratio)
    height = torch.where(found, height.gather(1, first).squeeze(1), central_height)
    width = torch.where(found, width.gather(1, first).squeeze(1), central_width)
    room_y, room_x = full_height - height, full_width - width
    top, left = (uniform(n, 0, 1, generator) * (room + 1) for room in (room_y, room_x))
    top = torch.where(found, top.floor(), torch.floor(room_y / 2))
    left = torch.where(found, left.floor(), torch.floor(room_x / 2))
    return torch.stack((top, left, height, width), dim=1).long()


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """(height, width) of the largest box whose shape is within `ratio`."""
    if width / height < ratio[0]:
        return round(width / ratio[0]), width
    if width / height > ratio[1]:
        return height, round(height * ratio[1])
    return height, width


@dataclass(frozen=True)
class Changed:
    """The images that one function changes, and by how much.

    amount: float64 (K,) of the K rows; (N,) where the shape is static, see `Rows`.
    """

    rows: Rows
    amount: Tensor


@dataclass(frozen=True)
class ColorJitter(Operation[list[dict[str, Changed]]]):
    """Brightness, contrast, saturation and hue by random factors, in an order of its own for each image.

    p: probability that an image is changed at all. Each other option is a number s, for factors in [max(0, 1 - s),
    1 + s] (hue: shifts in [-s, s]), or a range [min, max]; 0 leaves that property alone. The meaning is torchvision's
    ColorJitter, called on each image.
    """

    brightness: float | tuple[float, float] = 0
    contrast: float | tuple[float, float] = 0
    saturation: float | tuple[float, float] = 0
    hue: float | tuple[float, float] = 0
    p: float = 1.0

    def __post_init__(self) -> None:
        require_number("color_jitter", "p", self.p, 0, 1)
        for name, (_, centre, low, high) in JITTER.items():
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                span = require_range("color_jitter", name, value, low, high)
            else:
                require_number("color_jitter", name, value, 0, high)
                span = (max(low, centre - value), centre + value)
            object.__setattr__(self, name, span)
        if not self.active:
            raise ValueError(
                "augment.color_jitter with all four options 0 does nothing: give brightness, contrast, …, or drop it"
            )

    @property
    def active(self) -> list[str]:
        """The properties that change."""
        return [name for name, (_, centre, *_) in JITTER.items() if getattr(self, name) != (centre, centre)]

    def draw(self, shape: Shape, generator: torch.Generator) -> list[dict[str, Changed]]:
        """For each turn the images that change by each property: together every image once a turn, or in none."""
        names = self.active
        order = torch.rand(shape.count, len(names), generator=generator).argsort(dim=1)
        ranges: dict[str, tuple[float, float]] = {name: getattr(self, name) for name in names}
        factors = {name: uniform(shape.count, *ranges[name], generator) for name in names}
        if self.p < 1:
            # No turn of an image that is left alone: places beyond the last.
            order[~chance(shape.count, self.p, generator)] = len(names)
        turns: list[dict[str, Changed]] = []
        for turn in range(len(names)):
            rows = {name: Rows.of(order[:, turn] == place, shape.static) for place, name in enumerate(names)}
            turns.append({name: Changed(rows[name], rows[name].take(factors[name])) for name in names})
        return turns

    def apply(self, images: Tensor, draws: list[dict[str, Changed]]) -> Tensor:
        for turn in draws:
            before = images
            for name, changed in turn.items():
                rows = changed.rows
                if not rows.empty:
                    adjust, *_ = JITTER[name]
                    images = rows.put(images, adjust(rows.take(before), changed.amount))
        return images


# The function of images and factors, the factor that changes nothing, and the range allowed.
JITTER: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float, float]] = {
    "brightness": (colour.adjust_brightness, 1.0, 0.0, 1e3),
    "contrast": (colour.adjust_contrast, 1.0, 0.0, 1e3),
    "saturation": (colour.saturate, 1.0, 0.0, 1e3),
    "hue": (colour.shift_hue, 0.0, -0.5, 0.5),
}


@dataclass(frozen=True)
class Grayscale(Operation[Rows]):
    """Make each image grey, in all three channels, with probability `p`."""

    p: float

    def __post_init__(self) -> None:
        require_number("grayscale", "p", self.p, 0, 1)

    def draw(self, shape: Shape, generator: torch.Generator) -> Rows:
        return Rows.of(chance(shape.count, self.p, generator), shape.static)

    def apply(self, images: Tensor, draws: Rows) -> Tensor:
        return draws.put(images, colour.grey(draws.take(images)).expand(-1, 3, -1, -1))


@dataclass(frozen=True)
class GaussianBlur(Operation[Changed]):
    """Blur each image with probability `p` by a Gaussian whose standard deviation, in pixels, is uniform in `sigma`.

    The Gaussian is cut off at three of the largest standard deviation. SimCLR's range is [0.1, 2].
    """

    p: float
    sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        require_number("gaussian_blur", "p", self.p, 0, 1)
        object.__setattr__(self, "sigma", require_range("gaussian_blur", "sigma", self.sigma, 1e-2, 1e3))

    def draw(self, shape: Shape, generator: torch.Generator) -> Changed:
        rows = Rows.of(chance(shape.count, self.p, generator), shape.static)
        return Changed(rows, rows.take(uniform(shape.count, *self.sigma, generator)))

    def apply(self, images: Tensor, draws: Changed) -> Tensor:
        if draws.rows.empty:
            return images
        blurred = colour.gaussian_blur(draws.rows.take(images), draws.amount, math.ceil(3 * self.sigma[1]))
        return draws.rows.put(images, blurred)


@dataclass(frozen=True)
class Policy(Operation[policies.Plan]):
    """The base of AutoAugment and RandAugment: rounds of one operation an image, drawn by `choose` from their menus."""

    def menus(self, height: int, width: int) -> tuple[policies.Menu, ...]:
        """The menu of each round, for images of this size."""
        raise NotImplementedError

    def choose(self, count: int, generator: torch.Generator) -> Tensor:
        """int64 (count, rounds): what each image gets, as places in the rounds' menus."""
        raise NotImplementedError

    def draw(self, shape: Shape, generator: torch.Generator) -> policies.Plan:
        choice = self.choose(shape.count, generator)
        return policies.plan_rounds(self.menus(shape.height, shape.width), choice, shape.static)

    def apply(self, images: Tensor, draws: policies.Plan) -> Tensor:
        height, width = images.shape[2:]
        return policies.apply_rounds(images, self.menus(height, width), draws)


@dataclass(frozen=True)
class AutoAugment(Policy):
    """AutoAugment with the policy found for CIFAR-10, ImageNet or SVHN: a random one of 25 pairs of operations."""

    policy: str

    def __post_init__(self) -> None:
        if not isinstance(self.policy, str):
            raise ValueError(
                f"augment.auto_augment.policy is {self.policy!r}: it must be one of {', '.join(policies.POLICIES)}"
            )
        pick("augment.auto_augment.policy", self.policy, policies.POLICIES)

    def menus(self, height: int, width: int) -> tuple[policies.Menu, ...]:
        return policies.auto_augment_menus(self.policy, height, width)

    def choose(self, count: int, generator: torch.Generator) -> Tensor:
        return policies.draw_auto_augment(self.policy, count, generator)


@dataclass(frozen=True)
class RandAugment(Policy):
    """RandAugment: `num_ops` operations, each uniform over fourteen, all at the place `magnitude` of the bins.

    num_magnitude_bins: places from no change to full strength (rotation by 30 degrees); torchvision has 31.
    levels: in place of bins, as the releases of Difficulty-Net and PaCo count: magnitude / levels of full strength.
    probability: of each operation to be applied; torchvision's is 1, those releases' 0.5.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31
    levels: int | None = None
    probability: float = 1.0

    def __post_init__(self) -> None:
        require_integer("rand_augment", "num_ops", self.num_ops, 1, 16)
        require_integer("rand_augment", "num_magnitude_bins", self.num_magnitude_bins, 2, 1000)
        if self.levels is not None:
            require_integer("rand_augment", "levels", self.levels, 1, 1000)
        require_integer("rand_augment", "magnitude", self.magnitude, 0, self.bins - 1)
        require_number("rand_augment", "probability", self.probability, 0, 1)

    @property
    def bins(self) -> int:
        """Places of the magnitude, from no change to full strength."""
        return self.num_magnitude_bins if self.levels is None else self.levels + 1

    def menus(self, height: int, width: int) -> tuple[policies.Menu, ...]:
        return (policies.rand_augment_menu(self.magnitude, self.bins, height, width),) * self.num_ops

    def choose(self, count: int, generator: torch.Generator) -> Tensor:
        return policies.draw_rand_augment(self.num_ops, count, generator, self.probability)


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
    if isinstance(value, (list, tuple)) and len(value) == 2:
        first, second = value
        if isinstance(first, (int, float)) and isinstance(second, (int, float)) and low <= first <= second <= high:
            return float(first), float(second)
    raise ValueError(
        f"augment.{name}.{option} is {value!r}: it must be two numbers [min, max], {low} <= min <= max <= {high}"
    )
