"""AutoAugment (Cubuk et al., arXiv 1805.09501) and RandAugment (Cubuk et al., arXiv 1909.13719), one batch at a time.

A policy is a few rounds; in a round every image gets one operation (or none) with a magnitude of its own. The fifteen
operations are four kinds of work: affine maps (one gather), tables of values (another), saturation and sharpness (two
blends). So a round costs four passes at most, over the images that want them, instead of one for each operation.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastlt.augment import colour, geometry
from fastlt.augment.draws import Draws, Rows, integers

AFFINE = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
TABLE = ("Brightness", "Contrast", "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert")
NAMES = ("Identity", *AFFINE, *TABLE, "Color", "Sharpness")
NUMBER = {name: number for number, name in enumerate(NAMES)}
SIGNED = (*AFFINE, "Brightness", "Color", "Contrast", "Sharpness")

# The policies of the paper's appendix, as torchvision has them: 25 pairs of "operation probability magnitude".
POLICIES = {
    "cifar10": """
        Invert .1 0, Contrast .2 6;      Rotate .7 2, TranslateX .3 9;     Sharpness .8 1, Sharpness .9 3
        ShearY .5 8, TranslateY .7 9;    AutoContrast .5 0, Equalize .9 0; ShearY .2 7, Posterize .3 7
        Color .4 3, Brightness .6 7;     Sharpness .3 9, Brightness .7 9;  Equalize .6 0, Equalize .5 0
        Contrast .6 7, Sharpness .6 5;   Color .7 7, TranslateX .5 8;      Equalize .3 0, AutoContrast .4 0
        TranslateY .4 3, Sharpness .2 6; Brightness .9 6, Color .2 8;      Solarize .5 2, Invert .0 0
        Equalize .2 0, AutoContrast .6 0; Equalize .2 0, Equalize .6 0;    Color .9 9, Equalize .6 0
        AutoContrast .8 0, Solarize .2 8; Brightness .1 3, Color .7 0;     Solarize .4 5, AutoContrast .9 0
        TranslateY .9 9, TranslateY .7 9; AutoContrast .9 0, Solarize .8 3; Equalize .8 0, Invert .1 0
        TranslateY .7 9, AutoContrast .9 0
    """,
    "imagenet": """
        Posterize .4 8, Rotate .6 9;     Solarize .6 5, AutoContrast .6 0; Equalize .8 0, Equalize .6 0
        Posterize .6 7, Posterize .6 6;  Equalize .4 0, Solarize .2 4;     Equalize .4 0, Rotate .8 8
        Solarize .6 3, Equalize .6 0;    Posterize .8 5, Equalize 1 0;     Rotate .2 3, Solarize .6 8
        Equalize .6 0, Posterize .4 6;   Rotate .8 8, Color .4 0;          Rotate .4 9, Equalize .6 0
        Equalize .0 0, Equalize .8 0;    Invert .6 0, Equalize 1 0;        Color .6 4, Contrast 1 8
        Rotate .8 8, Color 1 2;          Color .8 8, Solarize .8 7;        Sharpness .4 7, Invert .6 0
        ShearX .6 5, Equalize 1 0;       Color .4 0, Equalize .6 0;        Equalize .4 0, Solarize .2 4
        Solarize .6 5, AutoContrast .6 0; Invert .6 0, Equalize 1 0;       Color .6 4, Contrast 1 8
        Equalize .8 0, Equalize .6 0
    """,
    "svhn": """
        ShearX .9 4, Invert .2 0;        ShearY .9 8, Invert .7 0;         Equalize .6 0, Solarize .6 6
        Invert .9 0, Equalize .6 0;      Equalize .6 0, Rotate .9 3;       ShearX .9 4, AutoContrast .8 0
        ShearY .9 8, Invert .4 0;        ShearY .9 5, Solarize .2 6;       Invert .9 0, AutoContrast .8 0
        Equalize .6 0, Rotate .9 3;      ShearX .9 4, Solarize .3 3;       ShearY .8 8, Invert .7 0
        Equalize .9 0, TranslateY .6 6;  Invert .9 0, Equalize .6 0;       Contrast .3 3, Rotate .8 4
        Invert .8 0, TranslateY .0 2;    ShearY .7 6, Solarize .4 8;       Invert .6 0, Rotate .8 4
        ShearY .3 7, TranslateX .9 3;    ShearX .1 6, Invert .6 0;         Solarize .7 2, TranslateY .6 7
        ShearY .8 4, Invert .8 0;        ShearX .7 9, TranslateY .8 3;     ShearY .8 5, AutoContrast .7 0
        ShearX .7 2, Invert .1 0
    """,
}
AUTO_AUGMENT_BINS = 10
RAND_AUGMENT = tuple(name for name in NAMES if name != "Invert")


def parse_policy(text: str) -> list[list[tuple[str, float, int]]]:
    """A text of POLICIES as a list of pairs of (operation, probability, magnitude's place of ten)."""
    pairs = [pair for line in text.strip().splitlines() for pair in line.split(";")]
    words = [[entry.split() for entry in pair.split(",")] for pair in pairs]
    return [[(name, float(p), int(place)) for name, p, place in pair] for pair in words]


@functools.cache
def policy_tensors(policy: str) -> tuple[Tensor, Tensor, Tensor]:
    """(25, 2) each: operations as places in NAMES int64, probabilities float64, magnitudes' places int64."""
    pairs = parse_policy(POLICIES[policy])
    number = torch.tensor([[NUMBER[name] for name, _, _ in pair] for pair in pairs])
    probability = torch.tensor([[p for _, p, _ in pair] for pair in pairs], dtype=torch.float64)
    return number, probability, torch.tensor([[place for _, _, place in pair] for pair in pairs])


@functools.lru_cache(maxsize=64)
def magnitudes(bins: int, height: int, width: int) -> Tensor:
    """float64 (operations, bins): how strong each operation of NAMES is at each place, before a sign is drawn.

    Brightness, Color, Contrast and Sharpness hold the factor's distance from 1; Rotate degrees; Translate pixels;
    Posterize bits; Solarize the threshold. torchvision's tables, float32 as there, since Solarize compares with them.
    """

    def line(start: float, end: float) -> Tensor:
        return torch.linspace(start, end, bins)

    table = {
        "ShearX": line(0, 0.3),
        "ShearY": line(0, 0.3),
        "TranslateX": line(0, 150 / 331 * width),
        "TranslateY": line(0, 150 / 331 * height),
        "Rotate": line(0, 30),
        "Posterize": 8 - (torch.arange(bins) / ((bins - 1) / 4)).round(),
        "Solarize": line(255, 0),
    }
    table.update(dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), line(0, 0.9)))
    return torch.stack([table.get(name, torch.zeros(bins)) for name in NAMES]).double()


def draw_auto_augment(
    policy: str, count: int, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Operations int64 (count, 2) as places in NAMES, and magnitudes float64 (count, 2) with their signs."""
    number, probability, place = policy_tensors(policy)
    chosen = integers(count, len(number), generator)
    happens = torch.rand(count, 2, generator=generator, dtype=torch.float64) < probability[chosen]
    operation = torch.where(happens, number[chosen], NUMBER["Identity"])
    strength = magnitudes(AUTO_AUGMENT_BINS, height, width)[operation, place[chosen]]
    return operation, _with_sign(operation, strength, generator)


def draw_rand_augment(
    num_ops: int, magnitude: int, bins: int, count: int, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Operations int64 (count, num_ops) as places in NAMES, and magnitudes float64 (count, num_ops) with signs."""
    available = torch.tensor([NUMBER[name] for name in RAND_AUGMENT])
    operation = available[torch.randint(len(available), (count, num_ops), generator=generator)]
    strength = magnitudes(bins, height, width)[:, magnitude][operation]
    return operation, _with_sign(operation, strength, generator)


def _with_sign(operation: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the magnitudes negative, for operations that have a direction."""
    negative = torch.randint(2, operation.shape, generator=generator) == 1
    return torch.where(negative & members(SIGNED)[operation], -strength, strength)


@functools.cache
def members(names: tuple[str, ...]) -> Tensor:
    """bool (operations,): True at the places in NAMES of `names`."""
    return torch.tensor([name in names for name in NAMES])


def plan_round(operation: Tensor, magnitude: Tensor, height: int, width: int, static: bool) -> Draws:
    """What `apply_round` needs: which images each kind of work is for, and its parameters. On the host.

    operation: int64 (N,), places in NAMES. magnitude: float64 (N,), signed.
    """

    def rows(*names: str, among: Rows | None = None) -> Rows:
        chosen = members(names)[operation]
        return Rows.of(chosen if among is None else among.take(chosen), static)

    affine, table, saturate, sharpen = rows(*AFFINE), rows(*TABLE), rows("Color"), rows("Sharpness")
    plan = {
        "affine": affine,
        "matrices": affine_matrices(affine.take(operation), affine.take(magnitude), height, width),
        "table": table,
        "table_magnitude": table.take(magnitude),
        "saturate": saturate,
        "saturation": saturate.take(1 + magnitude),
        "sharpen": sharpen,
        "sharpness": sharpen.take(1 + magnitude),
    }
    # Within the images that get a table, which kind of table.
    return plan | {name: rows(name, among=table) for name in TABLE}


def affine_matrices(operation: Tensor, magnitude: Tensor, height: int, width: int) -> Tensor:
    """float64 (N, 6): each image's inverse map; of no meaning where the operation is not an affine one."""
    kinds = torch.stack(
        [
            geometry.shear_x(magnitude, height),
            geometry.shear_y(magnitude, width),
            geometry.translate_x(magnitude),
            geometry.translate_y(magnitude),
            geometry.rotate(magnitude),
        ]
    )
    which = (operation - NUMBER[AFFINE[0]]).clamp(0, len(AFFINE) - 1)
    return kinds[which, torch.arange(len(operation))]


def apply_round(images: Tensor, plan: Draws) -> Tensor:
    """Each image by its own operation and magnitude, as `plan_round` set them. images: uint8 (N, 3, H, W)."""
    out = images
    for rows, work in (
        (plan["affine"], lambda chosen: geometry.affine(chosen, plan["matrices"])),
        (plan["table"], lambda chosen: colour.apply_tables(chosen, tables(chosen, plan))),
        (plan["saturate"], lambda chosen: colour.saturate(chosen, plan["saturation"])),
        (plan["sharpen"], lambda chosen: colour.sharpen(chosen, plan["sharpness"])),
    ):
        if not rows.empty:
            out = rows.put(out, work(rows.take(images)))
    return out


def tables(images: Tensor, plan: Draws) -> Tensor:
    """uint8 (N, 3, 256): the table of each image that gets one, whatever kind it is."""
    magnitude, count, device = plan["table_magnitude"], images.shape[0], images.device
    out = colour.identity_table(count, device).contiguous()
    for name, make in (
        ("Brightness", lambda rows: colour.brightness_table(1 + rows.take(magnitude))),
        ("Contrast", lambda rows: colour.contrast_table(rows.take(images), 1 + rows.take(magnitude))),
        ("Posterize", lambda rows: colour.posterize_table(rows.take(magnitude))),
        ("Solarize", lambda rows: colour.solarize_table(rows.take(magnitude))),
        ("AutoContrast", lambda rows: colour.autocontrast_table(rows.take(images))),
        ("Equalize", lambda rows: colour.equalize_table(rows.take(images))),
        ("Invert", lambda rows: colour.invert_table(rows.take(magnitude).shape[0], device)),
    ):
        rows = plan[name]
        if not rows.empty:
            table = make(rows)
            out = rows.put(out, table.expand(-1, 3, -1))
    return out
