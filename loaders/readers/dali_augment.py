"""DALI's own automatic augmentation, done in its pipeline right after the crop: an opt-in beside `fastlt.augment`.

It is drawn from DALI's generators and made of DALI's operations, which are not torchvision's bit by bit. Borders are
filled with black and pixels are not interpolated, as in `fastlt.augment`; so are the longest translations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from fastlt.names import pick, unknown

FILL = 0
MOST_TRANSLATION = 150 / 331
POLICIES = {"imagenet": "image_net", "cifar10": "reduced_cifar10", "svhn": "svhn"}  # ours: what DALI calls it


@dataclass(frozen=True)
class DaliAutoAugment:
    """AutoAugment with one of the published policies."""

    policy: str

    def __post_init__(self) -> None:
        if not isinstance(self.policy, str):
            raise ValueError(
                f"dali_augment.auto_augment.policy is {self.policy!r}: it must be one of {', '.join(POLICIES)}"
            )
        pick("dali_augment.auto_augment.policy", self.policy, POLICIES)

    def apply(self, images, shape: tuple[int, int], seed: int):
        """Adds it to the pipeline that is being defined; `images`: DALI's node of uint8 HWC images of this shape."""
        from nvidia.dali.auto_aug import auto_augment

        return auto_augment.auto_augment(
            images, POLICIES[self.policy], shape=shape, max_translate_rel=MOST_TRANSLATION, seed=seed, **_common()
        )


@dataclass(frozen=True)
class DaliRandAugment:
    """RandAugment: `num_ops` operations, all at the place `magnitude` of 31 bins."""

    num_ops: int = 2
    magnitude: int = 9

    def __post_init__(self) -> None:
        _check_integer("rand_augment", "num_ops", self.num_ops, 1, 16)
        _check_integer("rand_augment", "magnitude", self.magnitude, 0, 30)

    def apply(self, images, shape: tuple[int, int], seed: int):
        """See `DaliAutoAugment`."""
        from nvidia.dali.auto_aug import rand_augment

        return rand_augment.rand_augment(
            images,
            self.num_ops,
            self.magnitude,
            shape=shape,
            max_translate_rel=MOST_TRANSLATION,
            seed=seed,
            **_common(),
        )


@dataclass(frozen=True)
class DaliTrivialAugment:
    """TrivialAugment (Müller and Hutter, arXiv 2103.10158), the wide one: one operation at a random magnitude."""

    def apply(self, images, shape: tuple[int, int], seed: int):
        """See `DaliAutoAugment`; translations go up to 32 pixels, whatever the image's size, as in the paper."""
        from nvidia.dali.auto_aug import trivial_augment

        return trivial_augment.trivial_augment_wide(images, max_translate_abs=32, seed=seed, **_common())


DaliAugment = DaliAutoAugment | DaliRandAugment | DaliTrivialAugment
DALI_AUGMENTATIONS: dict[str, type[DaliAugment]] = {
    "auto_augment": DaliAutoAugment,
    "rand_augment": DaliRandAugment,
    "trivial_augment": DaliTrivialAugment,
}


def build_dali_augment(spec: str | Mapping) -> DaliAugment:
    """What a recipe's `data.dali_augment` names: a name, or one name with its options; ValueError with advice."""
    if isinstance(spec, str):
        spec = {spec: {}}
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise ValueError(
            f"dali_augment is {spec!r}: it must be one name of {', '.join(DALI_AUGMENTATIONS)}, or one with its "
            "options, such as {auto_augment: {policy: imagenet}}"
        )
    ((name, options),) = spec.items()
    kind = pick("dali_augment", name, DALI_AUGMENTATIONS)
    options = options or {}
    allowed = [field.name for field in fields(kind)]
    if not isinstance(options, Mapping) or set(options) - set(allowed):
        wrong = next(iter(set(options) - set(allowed))) if isinstance(options, Mapping) else options
        if not allowed:
            raise ValueError(f"dali_augment.{name} takes no options, {wrong!r} is one: leave it out")
        raise ValueError(unknown(f"option of dali_augment.{name}", str(wrong), allowed))
    try:
        return kind(**options)
    except TypeError:
        raise ValueError(
            f"dali_augment.{name} needs {', '.join(allowed)}, e.g. {{{name}: {{{allowed[0]}: …}}}}"
        ) from None


def _common() -> dict:
    from nvidia.dali import types

    return {"fill_value": FILL, "interp_type": types.DALIInterpType.INTERP_NN}


def _check_integer(name: str, option: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"dali_augment.{name}.{option} is {value!r}: it must be a whole number from {low} to {high}")
