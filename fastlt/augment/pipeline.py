"""From a recipe's list of augmentations to one callable: uint8 images in, normalised floats out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlt.augment.constants import kept
from fastlt.augment.draws import HeldDraws, upload_draws
from fastlt.augment.operations import (
    AutoAugment,
    ColorJitter,
    Cutout,
    Flip,
    GaussianBlur,
    Grayscale,
    Operation,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    RandomRotation,
    Shape,
)
from fastlt.names import pick, unknown

# Each operation has draws of its own kind, which no one type of a table or a list can say.
AUGMENTATIONS: dict[str, type[Operation[Any]]] = {
    "random_crop": RandomCrop,
    "random_resized_crop": RandomResizedCrop,
    "random_rotation": RandomRotation,
    "flip": Flip,
    "color_jitter": ColorJitter,
    "grayscale": Grayscale,
    "gaussian_blur": GaussianBlur,
    "auto_augment": AutoAugment,
    "rand_augment": RandAugment,
    "cutout": Cutout,
}


def normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(images / 255 - mean) / std, in channels_last memory: all that evaluation does to images.

    images: uint8 (N, 3, H, W), not changed. mean, std: one number a channel, for pixels in 0..1. Computed in float32,
    returned in `dtype` (N, 3, H, W).
    """
    n, channels, height, width = images.shape
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), width, images.device)
    if images.device.type == "cpu" and images.is_contiguous():
        # Half the time of a copy to channels_last, whose innermost loop is over three channels.
        images = torch.stack(images.unbind(1), dim=3).permute(0, 3, 1, 2)
    out = images.to(torch.float32, memory_format=torch.channels_last).permute(0, 2, 3, 1).contiguous()
    # Whole rows of pixels against whole rows of constants: broadcasting three channels is 4 to 7 times slower on a CPU.
    out.view(n, height, width * channels).mul_(scale).add_(shift)
    return out.to(dtype).permute(0, 3, 1, 2)


@kept
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """float32 (3 * width,) each."""
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
    shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
    scale, shift = (value.to(device=device, dtype=torch.float32).repeat(width) for value in (scale, shift))
    return scale, shift


class Augment:
    """A chain of augmentations with its own random state; call it on a batch.

    Operations run in the order of the recipe on uint8 images; then images are normalised; then come the operations on
    normalised images (cutout), which is why they may only stand last. A batch's random choices are drawn on the host
    (`draw`), the work is done on the images' device (`apply`) with no wait for it. On a CPU images are grouped by
    operation; on other devices all shapes are static. Both give the same pixels from the same draws.

    mean, std: one number a channel, for pixels in 0..1. seed: of the chain's own generator.
    """

    def __init__(
        self,
        operations: Sequence[Operation[Any]],
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.operations = tuple(operations)
        self.mean, self.std = tuple(mean), tuple(std)
        self.device = torch.device(device)
        self.static = self.device.type != "cpu"
        self.generator = torch.Generator().manual_seed(seed)
        self.held: HeldDraws | None = None

    def hold(self, images: Tensor) -> None:
        """Draw for a batch as large as `images`, into memory that stays the same; from now on calls use what it holds.

        So what was captured in a graph can be replayed with other draws. Sets `static`, which that needs.
        images: as in a call, on the device.
        """
        self.static = True
        draws = self.draw(*images.shape[:1], *images.shape[2:])
        if self.held is None:
            self.held = HeldDraws(draws, images.device)
            self(images)  # makes the constants, which no capture can
        else:
            self.held.overwrite(draws)

    def release(self) -> None:
        """Undo `hold`: calls draw for themselves again."""
        self.held, self.static = None, self.device.type != "cpu"

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """images: uint8 (N, 3, H, W), not changed. Returns normalised `dtype` (N, 3, h, w) in channels_last memory."""
        draws = self.draw(*images.shape[:1], *images.shape[2:]) if self.held is None else self.held.draws
        return self.apply(images, draws, dtype)

    def draw(self, count: int, height: int, width: int) -> list[object]:
        """The random choices for a batch of `count` images, on the host, one entry an operation. Moves the state on."""
        draws: list[object] = []
        for operation in self.operations:
            draws.append(operation.draw(Shape(count, height, width, self.static), self.generator))
            height, width = operation.output_size(height, width)
        return draws

    def apply(self, images: Tensor, draws: Sequence[object], dtype: torch.dtype = torch.float32) -> Tensor:
        """The same as a call, with choices made by `draw`; leaves the state alone."""
        assert images.dtype == torch.uint8, images.dtype
        assert images.shape[1:2] == (3,), images.shape
        steps = [
            (operation, upload_draws(drawn, images.device))
            for operation, drawn in zip(self.operations, draws, strict=True)
        ]
        on_bytes = [step for step in steps if not step[0].normalised]
        if on_bytes:
            # Planes are what the operations gather from and sum over; channels_last would cost each of them a copy.
            images = images.contiguous()
        for operation, drawn in on_bytes:
            images = operation.apply(images, drawn)
        out = normalise(images, self.mean, self.std, dtype)
        for operation, drawn in steps[len(on_bytes) :]:
            out = operation.apply(out, drawn)
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next batch depends on: the generator's state, uint8."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.generator.set_state(state["generator"].cpu())

    def __repr__(self) -> str:
        return f"Augment({', '.join(map(repr, self.operations)) or 'normalise only'})"


class Unchanged(Augment):
    """Gives a batch as it is: where a frozen network has been shown the augmented images before."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__((), (0.0,) * 3, (1.0,) * 3, 0, device)

    def apply(self, images: Tensor, draws: Sequence[object], dtype: torch.dtype = torch.float32) -> Tensor:
        return images.to(dtype)


def build_augment(
    specs: Sequence[str | Mapping[str, Any]],
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    device: torch.device | str,
) -> Augment:
    """The Augment that a recipe's list asks for, e.g. ["flip", {"random_crop": {"padding": 4}}].

    It takes uint8 images (N, 3, H, W) on `device` to normalised float32 (N, 3, h, w), H and W without a crop.
    image_size: side of what crops cut. mean, std: one number a channel, for pixels in 0..1. seed: of the chain's own
    generator. An empty list only normalises. ValueError for unknown names or options and for values out of range.
    """
    check_mean(mean)
    check_std(std)
    return Augment(check_augment(specs, image_size), mean, std, seed, device)


def check_augment(specs: Sequence[str | Mapping[str, Any]], image_size: int) -> list[Operation[Any]]:
    """The operations that a recipe's list names, or the ValueError of `build_augment`: no data and no device needed."""
    if isinstance(specs, (str, Mapping)) or not isinstance(specs, Sequence):
        raise ValueError(f"augment is {specs!r}: it must be a list, such as [flip, {{random_crop: {{padding: 4}}}}]")
    operations = [_operation(spec, position, image_size) for position, spec in enumerate(specs)]
    for position, operation in enumerate(operations):
        if operation.normalised and not all(later.normalised for later in operations[position:]):
            name, _ = _name_and_options(specs[position], position)
            raise ValueError(
                f"augment[{position}] is {name}, which works after normalisation and so runs last; "
                "move it to the end of the list"
            )
    return operations


def _operation(spec: str | Mapping[str, Any], position: int, image_size: int) -> Operation[Any]:
    """One entry of the list as an operation."""
    name, options = _name_and_options(spec, position)
    if name in ("mixup", "cutmix"):
        raise ValueError(
            f"augment[{position}] is {name}, which mixes labels as well as images: it is what a stage does, "
            f"method: {name} with options: {{alpha: 1.0}}, and not in this list"
        )
    kind = pick("augmentation", name, AUGMENTATIONS)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    # The output size is the recipe's image_size, in one place for the whole run, not an option of the entry.
    given = {"image_size": image_size} if fields.pop("image_size", None) else {}
    for key in options:
        if key not in fields:
            raise ValueError(f"augment[{position}]: {unknown(f'option of {name}', key, fields)}")
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in options]
    if missing:
        raise ValueError(
            f"augment[{position}]: {name} needs {', '.join(missing)}, e.g. {{{name}: {{{missing[0]}: …}}}}"
        )
    return kind(**given, **options)


def _name_and_options(spec: str | Mapping[str, Any], position: int) -> tuple[str, Mapping[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise ValueError(
            f"augment[{position}] is {spec!r}: it must be a name, or one name with its options, such as "
            "{random_crop: {padding: 4}}"
        )
    ((name, options),) = spec.items()
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(
            f"augment[{position}].{name} is {options!r}: it must be a mapping of options, such as "
            "{random_crop: {padding: 4}}"
        )
    return name, options or {}


def output_size(operations: Sequence[Operation[Any]], height: int, width: int) -> tuple[int, int]:
    """(H, W) of what operations make of images of this size; ValueError when they are too small for one."""
    for operation in operations:
        height, width = operation.output_size(height, width)
    return height, width


def check_mean(mean: Sequence[float]) -> None:
    """ValueError unless these are three numbers in 0..1."""
    if len(mean) != 3 or not all(0 <= value <= 1 for value in mean):
        raise ValueError(f"mean is {list(mean)}: it must be three numbers in 0..1, one a channel (divide by 255?)")


def check_std(std: Sequence[float]) -> None:
    """ValueError unless these are three numbers above 0, up to 1."""
    if len(std) != 3 or not all(0 < value <= 1 for value in std):
        raise ValueError(
            f"std is {list(std)}: it must be three numbers above 0, up to 1, one a channel (divide by 255?)"
        )
