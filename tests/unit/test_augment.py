"""The chain: order, dtypes, memory, randomness, resuming, messages, and no wait for the device."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlt.augment.draws as draws_module
from fastlt.augment import (
    AUGMENTATIONS,
    Augment,
    build_augment,
    colour,
    constants,
    cutmix,
    geometry,
    mixup,
    normalise,
    output_size,
    policies,
)
from fastlt.augment.draws import Rows, Span

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
CHAINS = {
    "nothing": [],
    "crop_flip": [{"random_crop": {"padding": 4}}, "flip"],
    "crop_flip_cutout": [{"random_crop": {"padding": 2, "fill": 128}}, {"flip": {"p": 0.3}}, {"cutout": {"size": 6}}],
    "auto_augment": ["flip", {"auto_augment": {"policy": "cifar10"}}, {"cutout": {"size": 4, "p": 0.5}}],
    "imagenet": [
        "random_resized_crop",
        {"color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}},
        {"auto_augment": {"policy": "imagenet"}},
    ],
    "rand_augment": [{"rand_augment": {"num_ops": 3, "magnitude": 9}}],
    "simclr": [
        {"color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}},
        {"grayscale": {"p": 0.2}},
        {"gaussian_blur": {"p": 0.5}},
    ],
    "svhn": [{"auto_augment": {"policy": "svhn"}}],
    "reflected": [{"random_crop": {"reflect": 4, "padding": 4}}],
    "ride": [{"random_crop": {"padding": 4}}, "flip", {"random_rotation": {"degrees": 15}}],
    "rotation": [{"random_rotation": {"degrees": 180, "interpolation": "bilinear"}}],
    "release": [{"rand_augment": {"magnitude": 10, "levels": 10, "probability": 0.5}}],
}
# Operations whose result the host reads, or whose output's shape depends on values: each one waits for a GPU.
SYNCHRONISING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "repeat_interleave",
}


class NoSync(TorchDispatchMode):
    """Fails on an operation that would make the host wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in SYNCHRONISING, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{name} by a mask waits for the device"
        return function(*args, **(kwargs or {}))


def batch(count: int = 16, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return images.contiguous(memory_format=torch.channels_last)


def build(chain: str, seed: int = 1, image_size: int = 32) -> Augment:
    return build_augment(CHAINS[chain], image_size=image_size, mean=MEAN, std=STD, seed=seed, device="cpu")


def test_every_augmentation_is_in_a_chain():
    used = {entry if isinstance(entry, str) else next(iter(entry)) for chain in CHAINS.values() for entry in chain}
    missing = sorted(set(AUGMENTATIONS) - used)
    assert not missing, f"put into a chain of CHAINS: {', '.join(missing)}"


def test_normalise_equals_the_formula_in_float64():
    images = batch()
    mean, std = (np.asarray(v).reshape(3, 1, 1) for v in (MEAN, STD))
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(normalise(images, MEAN, STD, torch.float32).numpy(), expected, rtol=0, atol=1e-6)


def test_an_empty_list_only_normalises():
    images = batch()
    assert torch.equal(build("nothing")(images), normalise(images, MEAN, STD, torch.float32))


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "size"), [(5, 32), (1, 32), (3, 8)])
def test_output_is_channels_last_in_the_requested_dtype_and_the_input_is_left_alone(chain, dtype, count, size):
    images = batch(count, size)
    before = images.clone()
    out = build(chain, image_size=size)(images, dtype)
    assert out.dtype == dtype
    assert out.shape == (count, 3, size, size)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(out).all()
    assert torch.equal(images, before)


@pytest.mark.parametrize("chain", CHAINS)
def test_low_precision_is_the_float32_result_rounded_once(chain):
    images = batch()
    exact, low = build(chain)(images), build(chain)(images, torch.bfloat16)
    assert torch.equal(exact.to(torch.bfloat16), low)


@pytest.mark.parametrize("chain", CHAINS)
def test_memory_format_of_the_input_does_not_matter(chain):
    images = batch()
    assert torch.equal(build(chain)(images), build(chain)(images.contiguous()))


def test_the_seed_decides():
    images = batch()
    assert torch.equal(build("crop_flip_cutout")(images), build("crop_flip_cutout")(images))
    assert not torch.equal(build("crop_flip_cutout")(images), build("crop_flip_cutout", seed=2)(images))


def test_global_random_state_is_neither_read_nor_moved():
    augment, images = build("crop_flip_cutout"), batch()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = augment(images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(build("crop_flip_cutout")(images), first)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_restored_state_continues_exactly(chain):
    augment, images = build(chain), batch()
    augment(images)
    state = augment.state_dict()
    expected = [augment(images) for _ in range(3)]
    resumed = build(chain, seed=99)
    resumed.load_state_dict(state)
    for want in expected:
        assert torch.equal(resumed(images), want)


@pytest.mark.parametrize("chain", CHAINS)
def test_static_shapes_give_the_same_pixels_as_grouping(chain):
    grouped, static, images = build(chain), build(chain), batch(24)
    static.static = True
    for _ in range(3):
        assert torch.equal(grouped(images), static(images))


@pytest.mark.parametrize("chain", CHAINS)
def test_applying_static_draws_never_waits_for_the_device(chain):
    augment, images = build(chain), batch()
    augment.static = True
    augment(images)  # fills the cache of constants, once a run
    draws = augment.draw(16, 32, 32)
    with NoSync():
        augment.apply(images, draws)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixing_never_waits_for_the_device(mix):
    images, generator = torch.rand(8, 3, 16, 16), torch.Generator().manual_seed(0)
    with NoSync():
        mix(images, torch.arange(8), 1.0, generator)


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), torch.nonzero, lambda x: x[x > 0]])
def test_the_check_for_waiting_can_fail(wait):
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        wait(torch.rand(4))


@pytest.mark.parametrize("chain", CHAINS)
def test_a_gpu_would_see_only_its_own_tensors_and_no_shape_that_depends_on_them(chain, monkeypatch):
    """Fake CUDA tensors refuse what would mix devices, be read by the host, or have a shape that values decide."""
    monkeypatch.setattr(draws_module, "upload", lambda tensor, device: tensor.to(device))  # pinning has no fake version
    augment = build_augment(CHAINS[chain], image_size=32, mean=MEAN, std=STD, seed=0, device="cuda")
    assert augment.static
    draws = augment.draw(16, 40, 40)
    monkeypatch.setattr(constants, "KEPT", {})  # fakes are not for other tests
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = augment.apply(torch.empty(16, 3, 40, 40, dtype=torch.uint8, device="cuda"), draws, torch.bfloat16)
    assert out.device.type == "cuda"
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("chain", CHAINS)
def test_static_draws_have_the_same_shapes_in_every_batch(chain):
    augment = build(chain)
    augment.static = True

    def shapes(value):
        if isinstance(value, (list, tuple)):
            return [shapes(draws) for draws in value]
        if isinstance(value, dict):
            return {name: shapes(part) for name, part in value.items()}
        if isinstance(value, Rows):
            assert value.static
        if isinstance(value, Span) or not dataclasses.is_dataclass(value):
            return value.shape if isinstance(value, torch.Tensor) else value
        return [shapes(getattr(value, field.name)) for field in dataclasses.fields(value)]

    first = shapes(augment.draw(16, 32, 32))
    assert all(shapes(augment.draw(16, 32, 32)) == first for _ in range(5))


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ("flip", ["must be a list"]),
        (["flop"], ["augmentation 'flop'", "random_crop", "did you mean 'flip'"]),
        ([{"flip": {"P": 0.5}}], ["augment[0]", "option of flip 'P'"]),
        ([{"flip": {"p": 1.5}}], ["augment.flip.p", "1.5", "from 0 to 1"]),
        ([{"flip": 0.5}], ["augment[0].flip is 0.5", "mapping"]),
        (["flip", "random_crop"], ["augment[1]", "random_crop needs padding"]),
        ([{"random_crop": {"padding": -1}}], ["augment.random_crop.padding", "-1"]),
        ([{"random_crop": {"padding": 32}}], ["augment.random_crop.padding", "32", "from 0 to 31"]),
        ([{"random_crop": {"padding": 4, "reflect": 32}}], ["augment.random_crop.reflect", "32", "from 0 to 31"]),
        ([{"random_crop": {"padding": 4.5}}], ["augment.random_crop.padding", "4.5", "whole number"]),
        ([{"random_crop": {"padding": 4, "pading": 1}}], ["pading", "did you mean 'padding'"]),
        ([{"random_crop": {"padding": 4, "image_size": 8}}], ["option of random_crop 'image_size'"]),
        ([{"flip": {}, "cutout": {"size": 4}}], ["augment[0]", "one name"]),
        ([{"cutout": {"size": 4}}, "flip"], ["augment[0] is cutout", "end of the list"]),
        ([{"cutout": {"size": 0}}], ["augment.cutout.size", "0"]),
        (["auto_augment"], ["auto_augment needs policy"]),
        (
            [{"auto_augment": {"policy": "cifar"}}],
            ["auto_augment.policy 'cifar'", "imagenet", "did you mean 'cifar10'"],
        ),
        ([{"auto_augment": {"policy": 10}}], ["augment.auto_augment.policy is 10", "cifar10"]),
        ([{"rand_augment": {"magnitude": 31}}], ["augment.rand_augment.magnitude", "31", "from 0 to 30"]),
        ([{"rand_augment": {"num_ops": 0}}], ["augment.rand_augment.num_ops"]),
        ([{"random_resized_crop": {"scale": [0.5, 1.5]}}], ["augment.random_resized_crop.scale", "<= 1"]),
        ([{"random_resized_crop": {"ratio": 1.0}}], ["augment.random_resized_crop.ratio", "two numbers"]),
        (["color_jitter"], ["color_jitter", "does nothing"]),
        ([{"color_jitter": {"hue": 0.1, "p": 2}}], ["augment.color_jitter.p", "2", "from 0 to 1"]),
        (["grayscale"], ["grayscale needs p"]),
        ([{"grayscale": {"p": -1}}], ["augment.grayscale.p", "-1"]),
        ([{"gaussian_blur": {"p": 1, "sigma": [0, 2]}}], ["augment.gaussian_blur.sigma", "0.01 <= min"]),
        ([{"gaussian_blur": {"sigma": [0.1, 2]}}], ["gaussian_blur needs p"]),
        ([{"color_jitter": {"hue": 0.7}}], ["augment.color_jitter.hue", "0.7", "0.5"]),
        ([{"color_jitter": {"brightness": -0.1}}], ["augment.color_jitter.brightness", "-0.1"]),
        ([{"color_jitter": {"contrast": [1.2, 0.8]}}], ["augment.color_jitter.contrast", "min <= max"]),
    ],
)
def test_mistakes_are_named_with_advice(specs, words):
    with pytest.raises(ValueError, match="augment") as error:
        build_augment(specs, image_size=32, mean=MEAN, std=STD, seed=0, device="cpu")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("mean", "std"), [((125, 122, 113), STD), (MEAN, (0.2, 0.2)), (MEAN, (0, 0.2, 0.2))])
def test_statistics_must_be_in_units_of_one(mean, std):
    with pytest.raises(ValueError, match="three numbers"):
        build_augment([], image_size=32, mean=mean, std=std, seed=0, device="cpu")


@pytest.mark.parametrize(
    ("spec", "image_size", "message"),
    [
        ({"random_crop": {"padding": 2}}, 64, "images of 32x32 with padding 2 are smaller than image_size 64"),
    ],
)
def test_sizes_that_images_do_not_have_are_refused(spec, image_size, message):
    augment = build_augment([spec], image_size=image_size, mean=MEAN, std=STD, seed=0, device="cpu")
    with pytest.raises(ValueError, match=message):
        augment(batch())
    with pytest.raises(ValueError, match=message):
        output_size(augment.operations, 32, 32)


@pytest.mark.parametrize("chain", CHAINS)
def test_held_draws_are_those_of_a_call_and_stay_where_they_are(chain):
    holding, calling, images = build(chain), build(chain), batch()
    calling.static = True
    places = set()
    for _ in range(3):
        holding.hold(images)
        places.add(holding.held.block.data_ptr())
        assert torch.equal(holding(images), calling(images))
    assert len(places) == 1


@pytest.mark.parametrize("chain", CHAINS)
def test_a_graph_makes_no_constants(chain, monkeypatch):
    """They come from the host, which nothing that is captured may wait for."""
    monkeypatch.setattr(constants, "KEPT", {})
    augment, images = build(chain), batch()
    augment.hold(images)
    before = set(constants.KEPT)
    augment(images, torch.bfloat16)
    assert set(constants.KEPT) == before


def test_constants_made_in_inference_mode_serve_training(monkeypatch):
    monkeypatch.setattr(constants, "KEPT", {})
    policies.auto_augment_menus.cache_clear()
    augment, images = build("auto_augment"), batch()
    with torch.inference_mode():
        augment(images)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (weight * augment(images)).sum().backward()
    tensors = [t for made in constants.KEPT.values() for t in tree_leaves(made)]
    tensors += [t for menu in policies.auto_augment_menus("cifar10", 32, 32) for t in menu.on(images.device)]
    assert not any(tensor.is_inference() for tensor in tensors)


def test_held_draws_are_on_the_device_already_and_are_not_pinned():
    with FakeTensorMode():
        held = torch.empty(3, device="cuda:0")
        assert draws_module.upload(held, torch.device("cuda", 0)) is held


class NoDivisionByNumber(TorchDispatchMode):
    """Fails where a GPU would multiply by a number's rounded reciprocal."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.div:
            assert isinstance(args[1], torch.Tensor), "a division by a number"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["contrast_table", "equalized", "shift_hue", "rotate_nearest", "rotate_bilinear"])
def test_operations_whose_rounding_matters_divide_by_tensors(name):
    images, factor = batch(4, 9).contiguous(), torch.full((4,), 0.3, dtype=torch.float64)
    one = torch.ones(4, 1, dtype=torch.int64)
    work = {
        "contrast_table": lambda: colour.contrast_table(images, factor),
        "equalized": lambda: colour.equalized(colour.pixel_values(images), images.flatten(2).amax(2), one),
        "shift_hue": lambda: colour.shift_hue(images, factor),
        "rotate_nearest": lambda: geometry.rotate_nearest(images, geometry.rotate(factor).float()),
        "rotate_bilinear": lambda: geometry.rotate_bilinear(images, geometry.rotate(factor).float()),
    }
    with NoDivisionByNumber():
        work[name]()
