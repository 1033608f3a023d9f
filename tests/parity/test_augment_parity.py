"""Every operation against torchvision's on the same image, and every policy's draws against torchvision's own."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from torchvision.transforms.autoaugment import AutoAugmentPolicy, _apply_op

from fastlt.augment import build_augment, colour, constants, geometry, normalise, policies
from fastlt.augment.operations import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    RandomRotation,
    Shape,
    draw_boxes,
)

SIZES = [(32, 32), (8, 8), (33, 47), (2, 3)]
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
POLICIES = {
    "cifar10": AutoAugmentPolicy.CIFAR10,
    "imagenet": AutoAugmentPolicy.IMAGENET,
    "svhn": AutoAugmentPolicy.SVHN,
}


def images_of_many_kinds(height: int, width: int) -> torch.Tensor:
    """uint8 (8, 3, H, W): noise, smooth, few values, narrow range, flat, black, white, and grey pixels."""
    generator = torch.Generator().manual_seed(height * 100 + width)
    noise = torch.randint(0, 256, (3, height, width), generator=generator)
    ramp = (torch.arange(height * width).view(height, width) * 255 // (height * width)).expand(3, -1, -1)
    shift = torch.tensor([0, 40, 90]).view(3, 1, 1)
    kinds = [
        noise,
        (ramp + shift) % 256,
        noise // 64 * 64,
        noise // 8 + 100,
        (shift + 77).expand(3, height, width),
        noise * 0,
        noise * 0 + 255,
        noise[:1].expand(3, -1, -1),
    ]
    return torch.stack([kind.to(torch.uint8) for kind in kinds])


def apply_each(images: torch.Tensor, entries: list[tuple[str, float]], static: bool) -> torch.Tensor:
    """Every image by its own operation and magnitude."""
    menu = policies.Menu(entries, *images.shape[2:])
    return policies.apply_rounds(
        images, [menu], policies.plan_rounds([menu], torch.arange(len(images)).view(-1, 1), static)
    )


def apply_one(images: torch.Tensor, name: str, magnitudes: list[float], static: bool) -> torch.Tensor:
    """All images by one operation at each of the magnitudes, one magnitude after the other."""
    menu = policies.Menu([(name, magnitude) for magnitude in magnitudes], *images.shape[2:])
    choice = torch.arange(len(magnitudes)).repeat_interleave(len(images)).view(-1, 1)
    batch = images.repeat(len(magnitudes), 1, 1, 1)
    return policies.apply_rounds(batch, [menu], policies.plan_rounds([menu], choice, static))


def signed_magnitudes(name: str, height: int, width: int) -> list[float]:
    """Every magnitude either policy can use: torchvision's own tables for 10 and 31 bins, with both signs."""
    spaces = [T.AutoAugment()._augmentation_space(10, (height, width))]
    spaces.append(T.RandAugment()._augmentation_space(31, (height, width)))
    found = []
    for space in spaces:
        values, signed = space.get(name, (torch.tensor(0.0), False))
        for value in values.reshape(-1).tolist():
            found += [float(value), -float(value)] if signed else [float(value)]
    return found


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", policies.NAMES)
def test_each_operation_at_each_magnitude_equals_torchvision(name, height, width, static):
    images = images_of_many_kinds(height, width)
    magnitudes = signed_magnitudes(name, height, width)
    out = apply_one(images, name, magnitudes, static)
    nearest = TF.InterpolationMode.NEAREST
    want = torch.cat([_apply_op(images, name, m, nearest, None) for m in magnitudes])
    if name in policies.AFFINE:
        # Bit-exact where torch's matrix product does not fuse its rounding; a fused one moves pixels that lie on a tie.
        assert (out == want).all(1).double().mean() >= 0.999
    else:
        assert torch.equal(out, want)


def slow_affine(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(C, H, W) by an inverse map of six numbers, pixel by pixel, every step rounded to float32 as torchvision's."""
    height, width = image.shape[1:]
    f = np.float32
    a, b, tx = (f(f(value) / f(0.5 * width)) for value in matrix[:3])
    c, d, ty = (f(f(value) / f(0.5 * height)) for value in matrix[3:])
    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            x, y = f(j - (width - 1) / 2), f(i - (height - 1) / 2)
            column = np.rint(f(f(f(f(f(x * a) + f(y * b)) + tx) + f(1)) * f(width / 2)) - f(0.5))
            row = np.rint(f(f(f(f(f(x * c) + f(y * d)) + ty) + f(1)) * f(height / 2)) - f(0.5))
            if 0 <= column < width and 0 <= row < height:
                out[:, i, j] = image[:, int(row), int(column)]
    return out


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (2, 3)])
@pytest.mark.parametrize("name", policies.AFFINE)
def test_affine_maps_round_in_the_order_that_is_stated(name, height, width):
    image = images_of_many_kinds(height, width)[:1]
    magnitudes = sorted(set(signed_magnitudes(name, height, width)))[:: 1 if height < 32 else 5]
    operation = torch.full((len(magnitudes),), policies.NUMBER[name])
    matrices = policies.affine_matrices(operation, torch.tensor(magnitudes).double(), height, width)
    want = np.stack([slow_affine(image[0].numpy(), matrix) for matrix in matrices.numpy()])
    for static in (False, True):
        np.testing.assert_array_equal(apply_one(image, name, magnitudes, static).numpy(), want)


def distance_from_tie(matrix: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """How far each pixel's exact source is from halfway between two pixels, in either direction: float64 (H, W)."""
    a, b, tx, c, d, ty = matrix.tolist()
    x, y = (torch.arange(side).double() - (side - 1) / 2 for side in (width, height))
    column, row = a * x + b * y[:, None] + tx + (width - 1) / 2, c * x + d * y[:, None] + ty + (height - 1) / 2
    return torch.minimum(*((place - place.floor() - 0.5).abs() for place in (column, row)))


@pytest.mark.parametrize(("height", "width"), [(224, 224), (375, 500)])
@pytest.mark.parametrize("name", policies.AFFINE)
def test_large_images_move_as_torchvisions_but_for_pixels_on_a_tie(name, height, width):
    """The bounds that `geometry.affine` states; any other pixel would show, since all neighbours differ in noise."""
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    most = 0.012 if name.startswith("Shear") else 1e-4 if name == "Rotate" else 0
    for magnitude in signed_magnitudes(name, height, width):
        out = apply_one(image[None], name, [magnitude], static=False)[0]
        differs = (out != _apply_op(image, name, magnitude, TF.InterpolationMode.NEAREST, None)).any(0)
        assert differs.double().mean() <= most, magnitude
        if differs.any():
            number = torch.tensor([policies.NUMBER[name]])
            (matrix,) = policies.affine_matrices(number, torch.tensor([magnitude]).double(), height, width)
            assert distance_from_tie(matrix, height, width)[differs].max() < 1e-4, magnitude


@pytest.mark.parametrize("name", policies.NAMES)
def test_images_of_one_batch_keep_their_own_magnitudes(name):
    magnitudes = signed_magnitudes(name, 16, 16)
    images = images_of_many_kinds(16, 16)[:1].repeat(len(magnitudes), 1, 1, 1)
    together = apply_each(images, [(name, magnitude) for magnitude in magnitudes], False)
    for n, magnitude in enumerate(magnitudes):
        assert torch.equal(together[n : n + 1], apply_one(images[:1], name, [magnitude], False))


@pytest.mark.parametrize(("height", "width"), [(24, 24), (9, 14), (2, 5)])
@pytest.mark.parametrize("static", [False, True])
def test_a_round_gives_each_image_its_own_operation(static, height, width):
    kinds = images_of_many_kinds(height, width)
    strength = policies.magnitudes(10, height, width)[:, 6].tolist()
    entries = [(name, sign * m) for name, m in zip(policies.NAMES, strength, strict=True) for sign in (1, -1)]
    entries = [(name, m) for name, m in entries if m >= 0 or name in policies.SIGNED]
    order = torch.randperm(8 * len(entries), generator=torch.Generator().manual_seed(0)).tolist()
    images = kinds.repeat(len(entries), 1, 1, 1)[order]
    before = images.clone()
    out = apply_each(images, [entries[place // 8] for place in order], static)
    assert torch.equal(images, before)
    for n, place in enumerate(order):
        alone = apply_one(kinds[place % 8][None], *[(name, [m]) for name, m in entries][place // 8], False)
        assert torch.equal(out[n], alone[0]), entries[place // 8]


@pytest.mark.parametrize("policy", [*POLICIES, "rand_augment"])
def test_rounds_follow_each_other_as_if_each_were_alone(policy):
    """On a CPU a round leaves the images in its own order, and the next one and the result count on it."""
    menus = policies.auto_augment_menus(policy, 16, 16) if policy in POLICIES else None
    menus = menus or (policies.rand_augment_menu(9, 31, 16, 16),) * 3
    generator = torch.Generator().manual_seed(0)
    images = images_of_many_kinds(16, 16).repeat(10, 1, 1, 1)
    choice = torch.stack([torch.randint(len(m.work), (80,), generator=generator) for m in menus], dim=1)
    want = images
    for turn, menu in enumerate(menus):
        picked = zip(menu.operation[choice[:, turn]].tolist(), menu.magnitude[choice[:, turn]].tolist(), strict=True)
        each = zip(want, picked, strict=True)
        want = torch.cat([apply_one(image[None], policies.NAMES[n], [m], False) for image, (n, m) in each])
    for static in (False, True):
        assert torch.equal(policies.apply_rounds(images, menus, policies.plan_rounds(menus, choice, static)), want)


def test_the_histogram_is_spread_in_whole_numbers(monkeypatch):
    """Counts of the largest value around every border of the step, with float32 and, as for huge images, float64."""
    generator = torch.Generator().manual_seed(0)
    for pixels in (254, 255, 256, 509, 510, 511, 3000, 20_011):
        for most in (1, pixels - 511, pixels - 510, pixels - 509, pixels - 255, pixels - 254, pixels):
            if not 1 <= most <= pixels:
                continue
            rest = torch.randint(0, 200, (pixels - most,), generator=generator)
            image = torch.cat([torch.full((most,), 200), rest]).to(torch.uint8).expand(1, 3, 1, pixels)
            histogram = torch.bincount(image[0, 0, 0].long(), minlength=256).tolist()
            step, want = (pixels - most) // 255, []
            for level in range(256):
                spread = min((sum(histogram[:level]) + step // 2) // step, 255) if step else level
                want.append(spread)
            want = torch.tensor(want)[image.long()].to(torch.uint8)
            for dtype in (torch.float32, torch.float64):
                monkeypatch.setattr(constants, "KEPT", {})
                monkeypatch.setattr(colour, "whole_numbers", lambda largest, dtype=dtype: dtype)
                assert torch.equal(apply_one(image, "Equalize", [0.0], True), want), (pixels, most)


def test_pooling_sums_the_nine_pixels_that_a_cpu_adds():
    images = images_of_many_kinds(13, 9).float()
    assert torch.equal(F.avg_pool2d(images, 3, stride=1, divisor_override=1), colour.sums_of_nine(images))


@pytest.mark.parametrize("pixels", [1024, 50_176, 3 * 7 * 11, 65_793])
def test_a_mean_in_float32_is_the_one_in_float64_rounded(pixels):
    """As the quotient of whole numbers has to be: float64 has more than twice float32's digits and two."""
    total = torch.randint(0, 255 * pixels + 1, (200_000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(total.float() / pixels, (total.double() / pixels).float())


@pytest.mark.parametrize("bins", [10, 31])
def test_magnitude_tables_equal_torchvisions(bins):
    ours = policies.magnitudes(bins, 24, 40)
    theirs = T.AutoAugment()._augmentation_space(bins, (24, 40))
    for name, (values, signed) in theirs.items():
        want = values.double().expand(bins)
        assert torch.equal(ours[policies.NUMBER[name]], want), name
        assert signed == (name in policies.SIGNED), name


@pytest.mark.parametrize("policy", POLICIES)
def test_policy_tables_equal_torchvisions(policy):
    theirs = T.AutoAugment(POLICIES[policy]).policies
    ours = policies.parse_policy(policies.POLICIES[policy])
    assert [[(name, p, place or 0) for name, p, place in pair] for pair in theirs] == [list(pair) for pair in ours]


def test_rand_augment_chooses_among_torchvisions_operations():
    assert set(policies.RAND_AUGMENT) == set(T.RandAugment()._augmentation_space(31, (32, 32)))


def chi_square_is_plausible(observed: Counter, expected: dict, draws: int) -> bool:
    """True when `observed` counts fit the probabilities `expected`, within 4.5 standard deviations of chi-square."""
    assert set(observed) <= {key for key, p in expected.items() if p > 0}
    cells = [(observed[key], p * draws) for key, p in expected.items() if p > 0]
    statistic, freedom = sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1
    return statistic < freedom + 4.5 * math.sqrt(2 * freedom)


def drawn(menus: tuple[policies.Menu, ...], choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The operations as places in NAMES and their magnitudes, (N, rounds) each."""
    picked = [(menu.operation[c], menu.magnitude[c]) for menu, c in zip(menus, choice.unbind(1), strict=True)]
    return tuple(torch.stack(parts, dim=1) for parts in zip(*picked, strict=True))


def as_outcomes(menus: tuple[policies.Menu, ...], choice: torch.Tensor) -> Counter:
    operation, magnitude = drawn(menus, choice)
    rows = torch.cat([operation.double(), magnitude], dim=1).tolist()
    width = operation.shape[1]
    return Counter(tuple((policies.NAMES[int(row[k])], round(row[width + k], 4)) for k in range(width)) for row in rows)


def auto_augment_probabilities(policy: AutoAugmentPolicy, height: int, width: int) -> dict:
    """What torchvision's module does, as exact probabilities of pairs of (operation, signed magnitude)."""
    module = T.AutoAugment(policy)
    space = module._augmentation_space(10, (height, width))
    outcomes: dict = Counter()
    for pair in module.policies:
        steps = []
        for name, p, place in pair:
            values, signed = space[name]
            size = float(values[place]) if place is not None else 0.0
            signs = [(size, 0.5), (-size, 0.5)] if signed else [(size, 1.0)]
            steps.append([((name, round(s, 4)), p * q) for s, q in signs] + [(("Identity", 0.0), 1 - p)])
        for first, p in steps[0]:
            for second, q in steps[1]:
                outcomes[first, second] += p * q / len(module.policies)
    return outcomes


@pytest.mark.parametrize("policy", POLICIES)
def test_auto_augment_draws_torchvisions_distribution(policy):
    draws = 60_000
    generator = torch.Generator().manual_seed(0)
    menus = policies.auto_augment_menus(policy, 32, 40)
    observed = as_outcomes(menus, policies.draw_auto_augment(policy, draws, generator))
    assert chi_square_is_plausible(observed, auto_augment_probabilities(POLICIES[policy], 32, 40), draws)


def test_the_chi_square_test_rejects_another_policy():
    draws = 60_000
    menus = policies.auto_augment_menus("cifar10", 32, 32)
    observed = as_outcomes(menus, policies.draw_auto_augment("cifar10", draws, torch.Generator().manual_seed(0)))
    expected = auto_augment_probabilities(AutoAugmentPolicy.CIFAR10, 32, 32)
    tilted = {key: p * (1.15 if n % 2 else 0.85) for n, (key, p) in enumerate(sorted(expected.items()))}
    assert not chi_square_is_plausible(observed, {k: p / sum(tilted.values()) for k, p in tilted.items()}, draws)


def test_rand_augment_draws_torchvisions_distribution():
    draws = 60_000
    generator = torch.Generator().manual_seed(0)
    menus = (policies.rand_augment_menu(9, 31, 32, 32),) * 2
    observed = as_outcomes(menus, policies.draw_rand_augment(2, draws, generator))
    single: dict = Counter()
    space = T.RandAugment()._augmentation_space(31, (32, 32))
    for name, (values, signed) in space.items():
        size = float(values[9]) if values.ndim else 0.0
        for sign in (1, -1) if signed else (1,):
            single[name, round(sign * size, 4)] += (0.5 if signed else 1.0) / len(space)
    expected = {(a, b): p * q for a, p in single.items() for b, q in single.items()}
    assert chi_square_is_plausible(observed, expected, draws)


def test_seeds_draw_what_they_always_drew():
    """So that a run that was begun with an earlier version goes on with the same choices."""
    auto = policies.auto_augment_menus("cifar10", 32, 32)
    rand = (policies.rand_augment_menu(9, 31, 32, 32),) * 2
    first, second = (torch.Generator().manual_seed(0) for _ in range(2))
    got = {
        "auto": drawn(auto, policies.draw_auto_augment("cifar10", 8, first)),
        "rand": drawn(rand, policies.draw_rand_augment(2, 6, second)),
    }
    words = {
        policy: [
            ", ".join(f"{policies.NAMES[n]} {m:.3g}" for n, m in zip(*row, strict=True))
            for row in zip(operation.tolist(), magnitude.tolist(), strict=True)
        ]
        for policy, (operation, magnitude) in got.items()
    }
    assert words == {
        "auto": [
            "Identity 0, Identity 0",
            "Solarize 198, Identity 0",
            "Equalize 0, Equalize 0",
            "Color -0.7, TranslateX -12.9",
            "Brightness 0.6, Identity 0",
            "AutoContrast 0, Equalize 0",
            "Sharpness -0.1, Sharpness -0.3",
            "Identity 0, Identity 0",
        ],
        "rand": [
            "TranslateY 4.35, TranslateX -4.35",
            "Contrast 0.27, ShearY 0.09",
            "ShearX 0.09, Solarize 178",
            "Sharpness 0.27, TranslateX -4.35",
            "Equalize 0, Rotate -9",
            "Solarize 178, Identity 0",
        ],
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_auto_augment_equals_torchvision_given_its_draws(policy):
    images = images_of_many_kinds(32, 32).repeat(12, 1, 1, 1)
    augment = build_augment(
        [{"auto_augment": {"policy": policy}}], image_size=32, mean=MEAN, std=STD, seed=5, device="cpu"
    )
    state = augment.state_dict()
    out = augment(images)
    generator = torch.Generator()
    generator.set_state(state["generator"])
    choice = policies.draw_auto_augment(policy, len(images), generator)
    operation, magnitude = drawn(policies.auto_augment_menus(policy, 32, 32), choice)
    equal = []
    for n, image in enumerate(images):
        for number, size in zip(operation[n].tolist(), magnitude[n].tolist(), strict=True):
            image = _apply_op(image, policies.NAMES[number], size, TF.InterpolationMode.NEAREST, None)
        equal.append((normalise(image[None], MEAN, STD)[0] == out[n]).double().mean())
    assert torch.stack(equal).mean() >= 0.999


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (colour.adjust_brightness, TF.adjust_brightness, (0.0, 0.37, 1.0, 1.4, 3.0)),
        (colour.adjust_contrast, TF.adjust_contrast, (0.0, 0.37, 1.0, 1.4, 3.0)),
        (colour.saturate, TF.adjust_saturation, (0.0, 0.37, 1.0, 1.4, 3.0)),
        (colour.shift_hue, TF.adjust_hue, (-0.5, -0.1, 0.0, 0.037, 0.25, 0.5)),
    ],
)
def test_color_jitters_parts_equal_torchvision(ours, theirs, factors):
    images = images_of_many_kinds(32, 32)
    for factor in factors:
        out = ours(images, torch.full((len(images),), factor, dtype=torch.float64))
        assert torch.equal(out, theirs(images, factor)), factor


def test_color_jitter_applies_each_images_factors_in_its_order():
    images = images_of_many_kinds(16, 16).repeat(8, 1, 1, 1)
    jitter = ColorJitter(0.4, (0.5, 1.2), 0.4, 0.1)
    draws = jitter.draw(Shape(len(images), 16, 16), torch.Generator().manual_seed(0))
    out = jitter.apply(images, draws)
    adjust = {
        "brightness": TF.adjust_brightness,
        "contrast": TF.adjust_contrast,
        "saturation": TF.adjust_saturation,
        "hue": TF.adjust_hue,
    }
    orders = set()
    for n, image in enumerate(images):
        order = []
        for turn in draws:
            for name, drawn in turn.items():
                place = (drawn.rows.chosen == n).nonzero().flatten().tolist()
                if place:
                    order.append(name)
                    image = adjust[name](image, float(drawn.amount[place[0]]))
        assert sorted(order) == sorted(adjust)
        orders.add(tuple(order))
        assert torch.equal(out[n], image)
    assert len(orders) > 15


@pytest.mark.parametrize("static", [False, True])
def test_color_jitter_leaves_the_share_of_images_alone_that_p_says(static):
    images = images_of_many_kinds(16, 16)[:2].repeat(1000, 1, 1, 1)
    jitter = ColorJitter(brightness=(0.3, 0.5), hue=(0.2, 0.4), p=0.8)
    out = jitter.apply(images, jitter.draw(Shape(len(images), 16, 16, static), torch.Generator().manual_seed(0)))
    changed = (out != images).flatten(1).any(1)
    assert abs(changed.double().mean() - 0.8) < 0.05
    always = ColorJitter(brightness=(0.3, 0.5), hue=(0.2, 0.4))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    want = always.apply(images, always.draw(Shape(len(images), 16, 16, static), generators[0]))
    assert torch.equal(out[changed], want[changed])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_grayscale_equals_torchvision(height, width):
    images = images_of_many_kinds(height, width)
    operation = Grayscale(1.0)
    out = operation.apply(images, operation.draw(Shape(len(images), height, width), torch.Generator()))
    assert torch.equal(out, TF.rgb_to_grayscale(images, num_output_channels=3))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (33, 47)])
def test_gaussian_blur_equals_torchvision(height, width):
    images = images_of_many_kinds(height, width)
    sigma = torch.linspace(0.1, 2.0, len(images), dtype=torch.float64)
    radius = min(6, height - 1)
    out = colour.gaussian_blur(images, sigma, 6)
    side = 2 * radius + 1
    want = torch.stack([TF.gaussian_blur(i, [side, side], [float(s)] * 2) for i, s in zip(images, sigma, strict=True)])
    # The order of the sums differs, so a value that falls between two levels may become either.
    assert (out.int() - want.int()).abs().max() <= 1
    assert (out == want).double().mean() >= 0.999


def test_gaussian_blur_blurs_the_chosen_images_by_their_own_sigma():
    images = images_of_many_kinds(32, 32)[:1].repeat(500, 1, 1, 1)
    operation = GaussianBlur(0.5, (1.0, 2.0))
    draws = operation.draw(Shape(len(images), 32, 32), torch.Generator().manual_seed(0))
    out = operation.apply(images, draws)
    chosen = draws.rows.chosen
    assert abs(len(chosen) / 500 - 0.5) < 0.12
    left = torch.ones(500, dtype=torch.bool)
    left[chosen] = False
    assert torch.equal(out[left], images[left])
    assert draws.amount.min() >= 1
    assert draws.amount.max() < 2
    for place in (0, 7):
        row = chosen[place]
        assert torch.equal(out[row], colour.gaussian_blur(images[:1], draws.amount[place : place + 1], 6)[0])


def test_color_jitter_draws_factors_and_orders_uniformly():
    count = 24_000
    jitter = ColorJitter(0.4, 2.0, (0.7, 0.9), 0.2)
    draws = jitter.draw(Shape(count, 4, 4), torch.Generator().manual_seed(0))
    spans = {"brightness": (0.6, 1.4), "contrast": (0.0, 3.0), "saturation": (0.7, 0.9), "hue": (-0.2, 0.2)}
    orders = np.empty((count, 4), dtype=object)
    for turn, parts in enumerate(draws):
        for name, drawn in parts.items():
            orders[drawn.rows.chosen.numpy(), turn] = name
    for name, (low, high) in spans.items():
        values = torch.cat([parts[name].amount for parts in draws])
        assert len(values) == count
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high >= values.max() > high - 0.01 * (high - low)
        assert abs(values.mean() - (low + high) / 2) < 4.5 * (high - low) / math.sqrt(12 * count)
    observed = Counter(map(tuple, orders.tolist()))
    assert len(observed) == 24
    assert chi_square_is_plausible(observed, dict.fromkeys(observed, 1 / 24), count)


@pytest.mark.parametrize(("reflect", "padding"), [(4, 4), (4, 0), (7, 1)])
def test_crops_over_a_mirrored_border_are_those_of_torchvision(reflect, padding):
    """All places of a square of 8 pixels, in images of 8 x 8."""
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded = TF.pad(TF.pad(images, reflect, padding_mode="reflect"), padding)
    operation = RandomCrop(8, padding=padding, reflect=reflect)
    places = 2 * (reflect + padding) + 1
    rows, columns = (c.flatten() for c in torch.meshgrid(torch.arange(places), torch.arange(places), indexing="ij"))
    out = operation.apply(images.expand(len(rows), 3, 8, 8), rows * padded.shape[3] + columns)
    for crop, row, column in zip(out, rows.tolist(), columns.tolist(), strict=True):
        assert torch.equal(crop, padded[0, :, row : row + 8, column : column + 8])
    drawn = operation.draw(Shape(5000, 8, 8), torch.Generator().manual_seed(1))
    assert set((rows * padded.shape[3] + columns).tolist()) == set(drawn.tolist())


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (40, 56, 24), (100, 70, 16), (8, 8, 20)])
def test_resized_crop_equals_torchvision_given_the_box(height, width, size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (48, 3, height, width), dtype=torch.uint8, generator=generator)
    boxes = draw_boxes(Shape(48, height, width), (0.05, 1.0), (0.5, 2.0), generator)
    out = geometry.resized_crop(images, boxes, size).int()
    want = torch.stack(
        [
            TF.resized_crop(image, *box, [size, size], antialias=True)
            for image, box in zip(images, boxes.tolist(), strict=True)
        ]
    ).int()
    # Both round a float32 sum once; sums taken in another order differ by a level where one lies near a half.
    assert (out - want).abs().max() <= 1
    assert (out == want).double().mean() > 0.999


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [(32, 32, (0.08, 1.0), (3 / 4, 4 / 3)), (20, 60, (0.3, 1.0), (0.9, 1.1)), (60, 20, (0.9, 1.0), (0.9, 1.1))],
)
def test_boxes_follow_torchvisions_distribution(height, width, scale, ratio):
    count = 6000
    ours = draw_boxes(Shape(count, height, width), scale, ratio, torch.Generator().manual_seed(1)).double()
    assert (ours[:, 0] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] >= 0).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        theirs = torch.tensor(
            [T.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
        ).double()
    for column in range(4):
        values = torch.cat([ours[:, column], theirs[:, column]]).unique()
        cdf = [
            torch.searchsorted(v[:, column].sort().values.contiguous(), values, right=True) / count
            for v in (ours, theirs)
        ]
        # Two-sample Kolmogorov-Smirnov at a level of about 1e-4; the seeds are fixed.
        assert (cdf[0] - cdf[1]).abs().max() < 2.2 * math.sqrt(2 / count)


def test_random_resized_crop_uses_the_recipes_size():
    operation = RandomResizedCrop(24)
    images = images_of_many_kinds(32, 40)
    draws = operation.draw(Shape(8, 32, 40), torch.Generator().manual_seed(0))
    assert operation.apply(images, draws).shape == (8, 3, 24, 24)
    assert operation.output_size(32, 40) == (24, 24)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_rotation_equals_torchvision_at_each_angle(interpolation, height, width):
    images = images_of_many_kinds(height, width)
    degrees = [-15.0, -7.3, 0.0, 1e-3, 4.9, 15.0, 90.0, 133.7]
    draws = geometry.rotate(torch.tensor(degrees, dtype=torch.float64)).float()
    out = RandomRotation(180, interpolation).apply(images, draws)
    for image, angle, got in zip(images, degrees, out, strict=True):
        want = TF.rotate(image, angle, interpolation=TF.InterpolationMode(interpolation))
        assert torch.equal(got, want), angle


def test_rotation_angles_are_uniform_in_their_range():
    draws = RandomRotation(15).draw(Shape(20_000, 32, 32), torch.Generator().manual_seed(0))
    degrees = torch.rad2deg(torch.atan2(draws[:, 3], draws[:, 0]))
    assert degrees.abs().max() <= 15.001
    assert torch.histc(degrees, 10, -15, 15).sub(2000).abs().max() < 4 * 2000**0.5


def test_rand_augment_by_levels_has_the_releases_strength_and_probability():
    """Magnitude 10 of 10 levels is full strength, and each operation happens with probability 0.5."""
    operation = RandAugment(num_ops=2, magnitude=10, levels=10, probability=0.5)
    menu = operation.menus(32, 32)[0]
    strength = {
        policies.NAMES[n]: m for n, m in zip(menu.operation.tolist(), menu.magnitude.tolist(), strict=True) if m > 0
    }
    assert strength["Rotate"] == pytest.approx(30)
    assert strength["ShearX"] == pytest.approx(0.3)
    choice = operation.choose(40_000, torch.Generator().manual_seed(0))
    identity = (menu.operation[choice] == policies.NUMBER["Identity"]).double().mean().item()
    assert identity == pytest.approx(0.5 + 0.5 / len(policies.RAND_AUGMENT), abs=0.01)
