"""AutoAugment (Cubuk et al., arXiv 1805.09501) and RandAugment (Cubuk et al., arXiv 1909.13719), one batch at a time.

A policy is a few rounds; in a round every image gets one of the entries of a `Menu`: an operation with its magnitude.
There are few of them, so where each pixel comes from and what each value becomes is computed for every entry once, and
a batch only picks. The fifteen operations are three kinds of work: affine maps (one gather), tables of values
(another), and blends with a grey or a blurred image.

On a CPU a round puts the images into the order of their work, so that each kind takes a slice of them and leaves the
others alone. Where shapes are static, each kind takes all images, with parameters that change nothing, bit by bit, of
those that it is not for: a source of each pixel that is the pixel, a table of each level that is the level, sums with
0, products with 1. So no work has to be put together with what was there before.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlt.augment import colour, geometry
from fastlt.augment.constants import kept
from fastlt.augment.draws import Span, integers

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


# The kinds of work, in the order in which a round puts the images on a CPU, so that what shares a step are neighbours.
ORDER: tuple[str, ...] = (
    "Sharpness",
    "Color",
    "Contrast",
    "fixed table",
    "AutoContrast",
    "Equalize",
    "affine",
    "Identity",
)
# Each step of a round: the first and the last kind of work that takes it.
SPANS = {
    "affine": ("affine", "affine"),
    "grey": ("Color", "Contrast"),
    "table": ("Contrast", "Equalize"),
    "contrast": ("Contrast", "Contrast"),
    "extremes": ("AutoContrast", "Equalize"),
    "stretch": ("AutoContrast", "AutoContrast"),
    "equalize": ("Equalize", "Equalize"),
    "blend": ("Sharpness", "Color"),
    "saturate": ("Color", "Color"),
    "sharpen": ("Sharpness", "Sharpness"),
}
FIXED = ("Brightness", "Posterize", "Solarize", "Invert")


@dataclass(frozen=True)
class Spans:
    """The images that take each step of a round, see SPANS."""

    affine: Span
    grey: Span
    table: Span
    contrast: Span
    extremes: Span
    stretch: Span
    equalize: Span
    blend: Span
    saturate: Span
    sharpen: Span


@dataclass(frozen=True)
class Round:
    """What each image of a batch gets in one round.

    places: int64 (4, N), shares: float32 (4, N): of each image's entry, see `Menu`.
    order: int64 (N,), where the round before has left the images that this round puts in the order of their work; None
        where shapes are static: the images stay where they are.
    """

    places: Tensor
    shares: Tensor
    spans: Spans
    order: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """The rounds of a policy for one batch.

    restore: int64 (N,), where the last round has left each image; None where shapes are static.
    """

    rounds: tuple[Round, ...]
    restore: Tensor | None = None


class Menu:
    """What a round chooses from: operations with their magnitudes, for images of one size. On the host.

    operation: int64 (entries,), places in NAMES. magnitude: float64 (entries,), with their signs.
    work: int64 (entries,), places in ORDER.
    places: int64 (4, entries): in `sources`, in `tables`, and what `colour.stretch` and `colour.equalized` take last.
    shares: float32 (4, entries): of the mean level for Contrast; in a blend, of the image, its grey and its blurred
        version.
    sources: int64 (maps, H * W), see `geometry.affine_sources`; the first leaves each pixel where it is.
    tables: float32 (tables, 3, 256), what of them does not depend on the image; the first leaves each level as it is.
    static_spans: all images for the steps that some entry takes, none for the others.
    """

    def __init__(self, entries: Sequence[tuple[str, float]], height: int, width: int) -> None:
        names = [name for name, _ in entries]
        works = [_work(name, height, width) for name in names]
        self.operation = torch.tensor([NUMBER[name] for name in names])
        self.magnitude = torch.tensor([magnitude for _, magnitude in entries], dtype=torch.float64)
        self.work = torch.tensor([ORDER.index(work) for work in works])

        def are(*kinds: str) -> Tensor:
            return torch.tensor([work in kinds for work in works])

        moved, tabled = are("affine"), are("Contrast", "fixed table")
        self.places = torch.stack(
            [_numbered(moved), _numbered(tabled), are("AutoContrast").long(), 256 * (~are("Equalize")).long()]
        )
        factor = 1 + self.magnitude
        rest = 1 - factor
        image = torch.where(are("Color", "Sharpness"), factor, 1.0)
        shares = [rest * are("Contrast"), image, rest * are("Color"), rest * are("Sharpness")]
        self.shares = torch.stack(shares).to(torch.float32)
        maps = affine_matrices(self.operation[moved], self.magnitude[moved], height, width)
        stays = torch.arange(height * width).view(1, -1)
        self.sources = torch.cat([stays, geometry.affine_sources(maps, height, width)])
        tables = [fixed_table(name, magnitude) for (name, magnitude), has in zip(entries, tabled, strict=True) if has]
        self.tables = torch.cat([fixed_table("Identity", 0.0), *tables]).repeat(1, 3, 1)
        taken = {step: set(works) & set(ORDER[ORDER.index(a) : ORDER.index(b) + 1]) for step, (a, b) in SPANS.items()}
        self.static_spans = Spans(**{step: Span() if kinds else Span((0, 0)) for step, kinds in taken.items()})

    def pick(self, choice: Tensor, spans: Spans, order: Tensor | None = None) -> Round:
        """A round of this menu. choice: int64 (N,), which entry each image gets, in the round's order."""
        return Round(self.places[:, choice], self.shares[:, choice], spans, order)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`sources` and `tables` on a device, where they stay."""
        return (self.sources, self.tables) if device.type == "cpu" else _copied(self, device)


@kept
def _copied(menu: Menu, device: torch.device) -> tuple[Tensor, Tensor]:
    """A menu's sources and tables on a device other than the host."""
    return menu.sources.to(device), menu.tables.to(device)


def _work(name: str, height: int, width: int) -> str:
    """The kind of work, of ORDER, that an operation of NAMES is."""
    if name == "Sharpness" and min(height, width) <= 2:
        return "Identity"
    return "affine" if name in AFFINE else "fixed table" if name in FIXED else name


def _numbered(chosen: Tensor) -> Tensor:
    """1, 2, … where `chosen`, bool (entries,), and 0 elsewhere: int64."""
    return chosen.cumsum(0) * chosen


def fixed_table(name: str, magnitude: float) -> Tensor:
    """float32 (1, 1, 256): what an operation makes of each level, or the part of it that no image changes."""
    host = torch.device("cpu")
    if name in ("Brightness", "Contrast"):
        return colour.brightness_table(torch.tensor([1 + magnitude], dtype=torch.float64))
    if name == "Posterize":
        return colour.posterize_table(int(magnitude), host)
    if name == "Solarize":
        return colour.solarize_table(magnitude, host)
    return 255 - colour.levels(host) if name == "Invert" else colour.levels(host)


@functools.cache
@torch.inference_mode(False)
def auto_augment_menus(policy: str, height: int, width: int) -> tuple[Menu, ...]:
    """What the two operations of AutoAugment are chosen from. Never dropped, as all that a captured graph reads."""
    strength = magnitudes(AUTO_AUGMENT_BINS, height, width)
    return tuple(
        Menu([(name, sign * float(strength[NUMBER[name], place])) for name, place, sign in entries], height, width)
        for entries in auto_augment_entries(policy)[0]
    )


@functools.cache
@torch.inference_mode(False)
def auto_augment_entries(policy: str) -> tuple[list[list[tuple[str, int, int]]], Tensor, Tensor]:
    """The entries of the two menus, as operation, magnitude's place and sign; and how a pair of the policy uses them.

    The first entry of each is Identity. Then the entry of each pair's operations, without and with the minus sign:
    int64 (100,), at 4 * pair + 2 * turn + minus; and their probabilities float64 (25, 2).
    """
    pairs = parse_policy(POLICIES[policy])
    entries = [[("Identity", 0, 1)], [("Identity", 0, 1)]]
    numbers = []
    for pair in pairs:
        for menu, (name, _, place) in zip(entries, pair, strict=True):
            for sign in (1, -1 if name in SIGNED else 1):
                if (name, place, sign) not in menu:
                    menu.append((name, place, sign))
                numbers.append(menu.index((name, place, sign)))
    probability = torch.tensor([[p for _, p, _ in pair] for pair in pairs], dtype=torch.float64)
    return entries, torch.tensor(numbers), probability


def draw_auto_augment(policy: str, count: int, generator: torch.Generator) -> Tensor:
    """int64 (count, 2): what each image gets, as places in the policy's two menus."""
    _, numbers, probability = auto_augment_entries(policy)
    pair = integers(count, len(probability), generator)
    happens = torch.rand(count, 2, generator=generator, dtype=torch.float64) < probability[pair]
    # Half of the magnitudes negative, for operations that have a direction.
    minus = torch.randint(2, (count, 2), generator=generator)
    return numbers[4 * pair.view(-1, 1) + 2 * torch.arange(2) + minus] * happens


@functools.cache
@torch.inference_mode(False)
def rand_augment_menu(magnitude: int, bins: int, height: int, width: int) -> Menu:
    """What each operation of RandAugment is chosen from: two entries each, without and with the minus sign."""
    strength = magnitudes(bins, height, width)[:, magnitude]
    signs = [(name, sign) for name in RAND_AUGMENT for sign in (1, -1 if name in SIGNED else 1)]
    return Menu([(name, sign * float(strength[NUMBER[name]])) for name, sign in signs], height, width)


def draw_rand_augment(num_ops: int, count: int, generator: torch.Generator, probability: float = 1.0) -> Tensor:
    """int64 (count, num_ops): what each image gets, as places in the menu.

    probability: of each operation to be applied; the others are Identity.
    """
    operation = torch.randint(len(RAND_AUGMENT), (count, num_ops), generator=generator)
    choice = 2 * operation + torch.randint(2, (count, num_ops), generator=generator)
    if probability == 1:
        return choice
    happens = torch.rand(count, num_ops, generator=generator, dtype=torch.float64) < probability
    return torch.where(happens, choice, 2 * RAND_AUGMENT.index("Identity"))


def plan_rounds(menus: Sequence[Menu], choice: Tensor, static: bool) -> Plan:
    """What `apply_rounds` needs, on the host. choice: int64 (N, rounds), places in each round's menu."""
    if static:
        return Plan(tuple(menu.pick(choice[:, turn], menu.static_spans) for turn, menu in enumerate(menus)))
    rounds: list[Round] = []
    places = None
    for turn, menu in enumerate(menus):
        work = menu.work[choice[:, turn]]
        order = work.argsort(stable=True)
        ends = torch.bincount(work, minlength=len(ORDER)).cumsum(0).tolist()
        starts = dict(zip(ORDER, [0, *ends], strict=False))
        stops = dict(zip(ORDER, ends, strict=True))
        spans = Spans(**{step: Span((starts[first], stops[last])) for step, (first, last) in SPANS.items()})
        # Images lie as the round before has left them.
        rounds.append(menu.pick(choice[:, turn][order], spans, order if places is None else places[order]))
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return Plan(tuple(rounds), places)


def affine_matrices(operation: Tensor, magnitude: Tensor, height: int, width: int) -> Tensor:
    """Inverse maps, float64 (N, 6). operation: int64 (N,), places in NAMES of affine ones. magnitude: float64 (N,)."""
    kinds = torch.stack(
        [
            geometry.shear_x(magnitude, height),
            geometry.shear_y(magnitude, width),
            geometry.translate_x(magnitude),
            geometry.translate_y(magnitude),
            geometry.rotate(magnitude),
        ]
    )
    return kinds[operation - NUMBER[AFFINE[0]], torch.arange(len(operation))]


def apply_rounds(images: Tensor, menus: Sequence[Menu], plan: Plan) -> Tensor:
    """Each image by what `plan_rounds` planned for it. images: uint8 (N, 3, H, W), not changed. Returns new ones."""
    for menu, planned in zip(menus, plan.rounds, strict=True):
        images = _apply_round(images, menu, planned)
    return images if plan.restore is None else images.index_select(0, plan.restore)


def _apply_round(images: Tensor, menu: Menu, plan: Round) -> Tensor:
    """One round; where shapes are not static it leaves the images in the order of its plan."""
    spans, (source, *_) = plan.spans, plan.places
    out = images if plan.order is None else images.index_select(0, plan.order)
    if not spans.affine.empty:
        sources, _ = menu.on(images.device)
        moved = geometry.move(spans.affine.take(out), sources.index_select(0, spans.affine.take(source)))
        out = spans.affine.put(out, moved)
    grey = None if spans.grey.empty else colour.luma(spans.grey.take(out))
    if not spans.table.empty:
        chosen = spans.table.take(out)
        values = colour.pixel_values(chosen)
        tables = _tables(chosen, values, grey, menu, plan)
        out = spans.table.put(out, colour.apply_tables(chosen, tables, values))
    if not spans.blend.empty:
        out = spans.blend.put(out, _blended(spans.blend.take(out).to(torch.float32), grey, plan))
    return out.to(torch.uint8)


def _tables(images: Tensor, values: Tensor, grey: Tensor | None, menu: Menu, plan: Round) -> Tensor:
    """float32 (K, 3, 256), not yet clamped: the table of each image of the span "table".

    images: uint8 (K, 3, H, W), of that span. values: `colour.pixel_values` of them. grey: `colour.luma` of the span
    "grey"; None where that is empty.
    """
    spans, (_, number, *_) = plan.spans, plan.places
    _, tables = menu.on(images.device)
    out = tables.index_select(0, spans.table.take(number))
    if not spans.contrast.empty:
        assert grey is not None, "contrast is a part of grey"
        share = spans.contrast.take(plan.shares[0].view(-1, 1, 1))
        mean = colour.mean_level(spans.contrast.within(spans.grey).take(grey))
        spans.contrast.within(spans.table).take(out).add_(share * mean)
    if not spans.extremes.empty:
        _stretch_and_equalize(out, images, values, plan)
    return out


def _stretch_and_equalize(tables: Tensor, images: Tensor, values: Tensor, plan: Round) -> None:
    """AutoContrast and Equalize, which look at each channel's extremes; changes `tables`, see `_tables`, in place."""
    spans, (_, _, stretched, left) = plan.spans, plan.places
    flat = spans.extremes.within(spans.table).take(images).flatten(2)
    low, high = flat.amin(2), flat.amax(2)
    if not spans.stretch.empty:
        among = spans.stretch.within(spans.extremes)
        chosen = spans.stretch.take(stretched).view(-1, 1)
        less, times = colour.stretch(among.take(low), among.take(high), chosen)
        spans.stretch.within(spans.table).take(tables).sub_(less).mul_(times)
    if not spans.equalize.empty:
        rows = spans.equalize.within(spans.table)
        highest = spans.equalize.within(spans.extremes).take(high)
        added, stays = colour.equalized(rows.take(values), highest, spans.equalize.take(left).view(-1, 1))
        levels = rows.take(tables)
        torch.addcmul(added, levels, stays, out=levels)


def _blended(pixels: Tensor, grey: Tensor | None, plan: Round) -> Tensor:
    """float32 (K, 3, H, W), clamped: the images of the span "blend". pixels: these, float32. grey: see `_tables`."""
    spans, (_, image, of_grey, of_blurred) = plan.spans, plan.shares.unsqueeze(2).unsqueeze(3).unsqueeze(4)
    out = pixels * spans.blend.take(image)
    if not spans.saturate.empty:
        assert grey is not None, "saturate is a part of grey"
        among = spans.saturate.within(spans.grey).take(grey)
        spans.saturate.within(spans.blend).take(out).add_(spans.saturate.take(of_grey) * among)
    if not spans.sharpen.empty:
        rows = spans.sharpen.within(spans.blend)
        rows.take(out).add_(colour.blurred(rows.take(pixels)).mul_(spans.sharpen.take(of_blurred)))
    return out.clamp_(0, 255)
