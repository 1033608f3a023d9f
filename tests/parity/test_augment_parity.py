"""Every operation against torchvision's on the same image, and every policy's draws against torchvision's own."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from torchvision.transforms.autoaugment import AutoAugmentPolicy, _apply_op

from fastlt.augment import build_augment, colour, geometry, normalise, policies
from fastlt.augment.operations import ColorJitter, GaussianBlur, Grayscale, RandomResizedCrop, Shape, draw_boxes

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


def apply_one(images: torch.Tensor, name: str, magnitude: torch.Tensor, static: bool) -> torch.Tensor:
    operation = torch.full((len(images),), policies.NUMBER[name])
    plan = policies.plan_round(operation, magnitude.double(), *images.shape[2:], static)
    return policies.apply_round(images, plan)


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
    batch = images.repeat(len(magnitudes), 1, 1, 1)
    out = apply_one(batch, name, torch.tensor(magnitudes).repeat_interleave(len(images)), static)
    nearest = TF.InterpolationMode.NEAREST
    want = torch.cat([_apply_op(images, name, m, nearest, None) for m in magnitudes])
    if name in policies.AFFINE:
        # Bit-exact where torch's matrix product does not fuse its rounding; a fused one moves pixels that lie on a tie.
        assert (out == want).all(1).double().mean() >= 0.999
    else:
        assert torch.equal(out, want)


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
        out = apply_one(image[None], name, torch.tensor([magnitude]), static=False)[0]
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
    together = apply_one(images, name, torch.tensor(magnitudes), False)
    for n, magnitude in enumerate(magnitudes):
        assert torch.equal(together[n : n + 1], apply_one(images[:1], name, torch.tensor([magnitude]), False))


def test_a_round_gives_each_image_its_own_operation():
    images = images_of_many_kinds(24, 24).repeat_interleave(len(policies.NAMES), 0)
    operation = torch.arange(len(policies.NAMES)).repeat(8)
    magnitude = policies.magnitudes(10, 24, 24)[operation, 6]
    for static in (False, True):
        out = policies.apply_round(images, policies.plan_round(operation, magnitude, 24, 24, static))
        for n, name in enumerate(policies.NAMES):
            rows = slice(n, None, len(policies.NAMES))
            assert torch.equal(out[rows], apply_one(images[rows], name, magnitude[rows], False)), name


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


def as_outcomes(operation: torch.Tensor, magnitude: torch.Tensor) -> Counter:
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
    observed = as_outcomes(*policies.draw_auto_augment(policy, draws, 32, 40, generator))
    assert chi_square_is_plausible(observed, auto_augment_probabilities(POLICIES[policy], 32, 40), draws)


def test_the_chi_square_test_rejects_another_policy():
    draws = 60_000
    observed = as_outcomes(*policies.draw_auto_augment("cifar10", draws, 32, 32, torch.Generator().manual_seed(0)))
    expected = auto_augment_probabilities(AutoAugmentPolicy.CIFAR10, 32, 32)
    tilted = {key: p * (1.15 if n % 2 else 0.85) for n, (key, p) in enumerate(sorted(expected.items()))}
    assert not chi_square_is_plausible(observed, {k: p / sum(tilted.values()) for k, p in tilted.items()}, draws)


def test_rand_augment_draws_torchvisions_distribution():
    draws = 60_000
    generator = torch.Generator().manual_seed(0)
    observed = as_outcomes(*policies.draw_rand_augment(2, 9, 31, draws, 32, 32, generator))
    single: dict = Counter()
    space = T.RandAugment()._augmentation_space(31, (32, 32))
    for name, (values, signed) in space.items():
        size = float(values[9]) if values.ndim else 0.0
        for sign in (1, -1) if signed else (1,):
            single[name, round(sign * size, 4)] += (0.5 if signed else 1.0) / len(space)
    expected = {(a, b): p * q for a, p in single.items() for b, q in single.items()}
    assert chi_square_is_plausible(observed, expected, draws)


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
    operation, magnitude = policies.draw_auto_augment(policy, len(images), 32, 32, generator)
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
        for turn in draws.values():
            for name, drawn in turn.items():
                place = (drawn["rows"].index == n).nonzero().flatten().tolist()
                if place:
                    order.append(name)
                    image = adjust[name](image, float(drawn["factor"][place[0]]))
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
    chosen = draws["rows"].index
    assert abs(len(chosen) / 500 - 0.5) < 0.12
    left = torch.ones(500, dtype=torch.bool)
    left[chosen] = False
    assert torch.equal(out[left], images[left])
    assert draws["sigma"].min() >= 1
    assert draws["sigma"].max() < 2
    for place in (0, 7):
        row = chosen[place]
        assert torch.equal(out[row], colour.gaussian_blur(images[:1], draws["sigma"][place : place + 1], 6)[0])


def test_color_jitter_draws_factors_and_orders_uniformly():
    count = 24_000
    jitter = ColorJitter(0.4, 2.0, (0.7, 0.9), 0.2)
    draws = jitter.draw(Shape(count, 4, 4), torch.Generator().manual_seed(0))
    spans = {"brightness": (0.6, 1.4), "contrast": (0.0, 3.0), "saturation": (0.7, 0.9), "hue": (-0.2, 0.2)}
    orders = np.empty((count, 4), dtype=object)
    for turn, parts in draws.items():
        for name, drawn in parts.items():
            orders[drawn["rows"].index.numpy(), int(turn)] = name
    for name, (low, high) in spans.items():
        values = torch.cat([parts[name]["factor"] for parts in draws.values()])
        assert len(values) == count
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high >= values.max() > high - 0.01 * (high - low)
        assert abs(values.mean() - (low + high) / 2) < 4.5 * (high - low) / math.sqrt(12 * count)
    observed = Counter(map(tuple, orders.tolist()))
    assert len(observed) == 24
    assert chi_square_is_plausible(observed, dict.fromkeys(observed, 1 / 24), count)


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
