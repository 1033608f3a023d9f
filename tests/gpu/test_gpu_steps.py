"""Iterations on a GPU: none of them makes the host wait, captured or not, and a loaded state keeps it so."""

from __future__ import annotations

import functools
import io
from contextlib import nullcontext

import pytest
import torch
from on_gpu import DEVICE, no_waiting
from test_compiled import GRAPHED, batches, make_step

from fastlt.augment import build_augment
from fastlt.device.compiled import Compiler, make_sgd, ready
from fastlt.losses import build_loss
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.models import build_model
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts

pytestmark = pytest.mark.gpu

METHODS = {
    **{name: case[:3] for name, case in GRAPHED.items()},
    "cb_da": ("cb_da", "exact", {"from_epoch": 0}),
    "sample_difficulty": ("sample_difficulty", "exact", {}),
    "cdb-dynamic": ("cdb", "exact", {"tau": "dynamic"}),
}


def make(case, mode="none", drop_rate=0.0):
    method, refresh, options = METHODS[case]
    return make_step(method, Compiler(mode), drop_rate, refresh=refresh, device=DEVICE, **options)


def iterate(step, call, epochs):
    """Five iterations an epoch, each on other images: rolling accuracy's slices and an epoch's first pass included."""
    for epoch in epochs:
        step.start_epoch(epoch)
        for pair in PAIRS:
            output = call(*pair)
    return output


PAIRS = []


@pytest.fixture(autouse=True, scope="module")
def on_the_device():
    PAIRS.extend(batches(seed, DEVICE) for seed in range(5))
    yield
    PAIRS.clear()


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
@pytest.mark.parametrize("case", METHODS)
def test_an_iteration_does_not_wait_for_the_device(case, drop_rate):
    step = make(case, drop_rate=drop_rate)
    iterate(step, step, range(2))
    with no_waiting():
        output = iterate(step, step, range(2, 4))
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("case", METHODS)
def test_a_captured_iteration_does_not_wait_for_the_device(case):
    step = make(case, "cudagraph")
    call, reason = ready(step, *PAIRS[0])
    assert reason is None
    iterate(step, call, range(2))
    with no_waiting():
        output = iterate(step, call, range(2, 4))
    assert torch.isfinite(output.loss)


def test_slices_of_sizes_that_no_iteration_has_met_are_captured(monkeypatch):
    """12 images in 5 slices: of 2 and, first met while it is captured, of 3. cuDNN's search is on, as in training."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    step = make("difficulty-rolling", "cudagraph")
    step.parts.class_accuracy.window = 5
    call, reason = ready(step, *PAIRS[0])
    assert reason is None
    assert torch.isfinite(iterate(step, call, range(3)).loss)
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("mode", ["none", "cudagraph"])
def test_an_iteration_with_a_loaded_state_does_not_wait_for_the_device(mode):
    """As a run resumes: everything is loaded to the device, and Adam counts on the host."""
    step, file = make("difficulty-exact", mode), io.BytesIO()
    call, _ = ready(step, *PAIRS[0])
    iterate(step, call, range(1))
    torch.save(step.state_dict(), file)
    file.seek(0)
    state = torch.load(file, map_location=DEVICE, weights_only=True)
    other = make("difficulty-exact", mode)
    other.load_state_dict(state)
    call, reason = ready(other, *PAIRS[0])
    assert reason is None
    iterate(other, call, range(1, 2))
    with no_waiting():
        iterate(other, call, range(2, 3))


def test_a_captured_dropout_draws_anew_in_every_iteration():
    step = make("plain", "cudagraph", drop_rate=0.5)
    before = torch.cuda.get_rng_state()
    call, reason = ready(step, *PAIRS[0])
    assert reason is None
    assert torch.equal(torch.cuda.get_rng_state(), before)
    for group in step.optimizer.param_groups:
        group["lr"].zero_()
    flips, losses = step.parts.augment.state_dict(), []
    for _ in range(4):
        step.parts.augment.load_state_dict(flips)
        losses.append(call(*PAIRS[0]).loss.item())
    assert len(set(losses)) == 4


CLASSES = 10
COUNTS = ClassCounts(torch.arange(50, 0, -5).numpy(), tuple("abcdefghij"))


@pytest.mark.parametrize("mode", ["none", "cudagraph"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "size"), [("cifar_resnet32", 32), ("vit_tiny_patch16_224", 32)])
def test_real_networks_are_captured_and_do_not_wait_for_the_device(name, size, precision, mode):
    """Difficulty-Net with the augmentation of CIFAR; captured losses are those of ordinary iterations."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, size, size), dtype=torch.uint8, generator=draw).to(DEVICE)
    labels = (torch.arange(40) % CLASSES).to(DEVICE)
    batch, meta_batch = (Batch(images[part], labels[part], labels[part]) for part in (slice(0, 20), slice(20, 40)))
    autocast = functools.partial(torch.autocast, DEVICE.type, torch.bfloat16) if precision == "bf16" else nullcontext

    def build(mode):
        torch.manual_seed(0)
        model = build_model(name, num_classes=CLASSES, image_size=size)
        model = model.to(DEVICE, memory_format=torch.channels_last).train()
        specs = [{"random_crop": {"padding": 4}}, "flip", {"auto_augment": {"policy": "cifar10"}}]
        common = {"image_size": size, "mean": (0.5,) * 3, "std": (0.25,) * 3, "device": DEVICE}
        augment, meta_augment = (build_augment(specs, seed=seed, **common) for seed in (0, 1))
        parts = StepParts(
            model=model,
            loss=build_loss("balanced_softmax", COUNTS).to(DEVICE),
            optimizer=make_sgd([{"params": list(model.parameters())}], mode, 0.01, DEVICE, momentum=0.9),
            augment=augment,
            meta_augment=meta_augment,
            class_counts=COUNTS,
            class_accuracy=ClassAccuracy(images, labels, CLASSES, prepare=build_augment([], seed=2, **common)),
            autocast=autocast,
            compiler=Compiler(mode),
        )
        return STEPS["difficulty"](parts)

    step = build(mode)
    call, reason = ready(step, batch, meta_batch)
    assert reason is None
    losses = [call(batch, meta_batch).loss.clone() for _ in range(2)]
    with no_waiting():
        losses += [call(batch, meta_batch).loss.clone() for _ in range(2)]
    assert torch.isfinite(torch.stack(losses)).all()
    if mode == "cudagraph":
        plain = build("none")
        expected = [plain(batch, meta_batch).loss for _ in range(4)]
        rtol = 1e-3 if precision == "fp32" else 3e-2
        assert torch.allclose(torch.stack(losses), torch.stack(expected), rtol=rtol), (losses, expected)
