"""Augmentation on a GPU: a CPU's pixels from the same draws, no wait for the device, and calls that graphs replay."""

from __future__ import annotations

import pytest
import torch
from on_gpu import DEVICE, no_waiting
from test_augment import CHAINS, MEAN, STD, batch
from test_augment_parity import images_of_many_kinds, signed_magnitudes

from fastlt.augment import build_augment, policies
from fastlt.augment.draws import upload_draws
from fastlt.device.replay import CudaCapture

pytestmark = pytest.mark.gpu

# Matrix products of float32, whose order of summation differs: what is resized or blurred, and then rounded to a whole
# level, is a level off where it lay on the border between two.
ROUNDED = {
    "resized_crop": ["random_resized_crop"],
    "gaussian_blur": [{"gaussian_blur": {"p": 0.8}}],
    "simclr": CHAINS["simclr"],  # ends with the blur
}
MAX_LEVELS, MEAN_LEVELS = 1, 0.01
# Nothing is summed in these, or whole numbers only.
EXACT = {
    **{name: specs for name, specs in CHAINS.items() if name not in ("imagenet", "simclr")},
    "imagenet policy": [{"auto_augment": {"policy": "imagenet"}}],
    "color_jitter": [{"color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}}],
    "grayscale": [{"grayscale": {"p": 0.5}}],
    "cutout": [{"cutout": {"size": 7, "p": 0.5}}],
    "rand_augment 30": [{"rand_augment": {"num_ops": 2, "magnitude": 30}}],
}


def build(specs, device=DEVICE):
    return build_augment(specs, image_size=32, mean=MEAN, std=STD, seed=3, device=device)


def levels(normalised):
    """Normalised images back as numbers on 0..255."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return 255 * (normalised.cpu() * std + mean)


def one_operation(images, name, magnitudes):
    """All images by this operation of the policies at each of the magnitudes, one magnitude after the other."""
    menu = policies.Menu([(name, magnitude) for magnitude in magnitudes], *images.shape[2:])
    choice = torch.arange(len(magnitudes)).repeat_interleave(len(images)).view(-1, 1)
    plan = upload_draws(policies.plan_rounds([menu], choice, True), images.device)
    return policies.apply_rounds(images.repeat(len(magnitudes), 1, 1, 1), [menu], plan)


def assert_same(chain, got, expected):
    """Bit for bit, but for chains with matrix products, whose rounding another stream's kernels may change."""
    if chain in ("imagenet", "simclr"):
        assert (levels(got) - levels(expected)).abs().mean() <= 0.1
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("height", "width", "kinds"), [(32, 32, 8), (33, 47, 8), (7, 5, 8), (150, 224, 1)])
@pytest.mark.parametrize("name", policies.NAMES)
def test_each_operation_at_each_magnitude_gives_a_cpus_pixels(name, height, width, kinds):
    images = images_of_many_kinds(height, width)[:kinds]
    magnitudes = signed_magnitudes(name, height, width)[:: 1 if kinds == 8 else 7]
    got, expected = (one_operation(images.to(device), name, magnitudes).cpu() for device in (DEVICE, "cpu"))
    assert torch.equal(got, expected), f"{(got != expected).double().mean():.2e} of the values differ"


@pytest.mark.parametrize("chain", EXACT)
def test_chains_give_a_cpus_pixels(chain):
    ours, cpus = build(EXACT[chain]), build(EXACT[chain], "cpu")
    for seed in range(2):
        images = batch(32, seed=seed)
        got, expected = ours(images.to(DEVICE)), cpus(images)
        assert got.stride() == expected.stride()
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("chain", ROUNDED)
def test_what_is_resized_or_blurred_is_a_level_off_at_most(chain):
    ours, cpus = build(ROUNDED[chain]), build(ROUNDED[chain], "cpu")
    for seed in range(2):
        images = batch(32, seed=seed)
        error = (levels(ours(images.to(DEVICE))) - levels(cpus(images))).abs()
        assert error.max() <= MAX_LEVELS + 1e-3
        assert error.mean() <= MEAN_LEVELS


def test_colours_after_a_resized_crop_stay_near_a_cpus():
    """A level more or less before a posterisation or an equalisation can be many behind it, in few pixels."""
    ours, cpus = build(CHAINS["imagenet"]), build(CHAINS["imagenet"], "cpu")
    images = batch(64)
    assert (levels(ours(images.to(DEVICE))) - levels(cpus(images))).abs().mean() <= 0.1


@pytest.mark.parametrize("chain", CHAINS)
def test_a_call_does_not_wait_for_the_device(chain):
    augment, images = build(CHAINS[chain]), batch(16).to(DEVICE)
    for _ in range(2):
        augment(images)
    with no_waiting():
        augment(images)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_restored_state_gives_the_same_again(chain):
    augment, images = build(CHAINS[chain]), batch(16).to(DEVICE)
    augment(images)
    state = augment.state_dict()
    first, second = augment(images), augment(images)
    other = build(CHAINS[chain])
    other.load_state_dict(state)
    assert torch.equal(other(images), first)
    assert torch.equal(other(images), second)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_captured_chain_replays_with_new_draws(chain):
    augment, eager = build(CHAINS[chain]), build(CHAINS[chain])
    images = batch(16).to(DEVICE)
    expected = [eager(images) for _ in range(3)]
    augment.hold(images)
    assert_same(chain, augment(images), expected[0])
    replay, got = CudaCapture()(lambda: augment(images))
    for one in expected[1:]:
        augment.hold(images)
        replay()
        assert_same(chain, got, one)
    with no_waiting():
        augment.hold(images)
        replay()
