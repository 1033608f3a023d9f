"""Loaders that deliver to a GPU: a CPU's order and pixels, exact resuming, and batches that slow consumers can use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from on_gpu import DEVICE, no_waiting
from small_betons import DALI_BACKENDS, mixed_shapes, needs_dali, needs_ffcv, smooth_images, write_images

from loaders.factory import choose_backend, make_loader
from loaders.order.crop import CropSpec
from loaders.order.plan import EpochPlan
from loaders.readers import BACKENDS, free_memory
from loaders.readers.resident_loader import ResidentLoader, resident_bytes
from loaders.stored import SOURCE_FILES

pytestmark = pytest.mark.gpu

COUNT, SIZE = 53, 24
WHOLE, CENTER, RANDOM = CropSpec("none"), CropSpec("center", SIZE), CropSpec("random_resized", SIZE)
dali_backends = [pytest.param(backend, marks=[needs_ffcv, needs_dali]) for backend in DALI_BACKENDS]
# Those that need no package read a split in memory, the others what FFCV wrote.
READ_ANYTHING = [name for name, one in BACKENDS.items() if SOURCE_FILES in one.reads and name not in DALI_BACKENDS]
READ_BETONS = [name for name in BACKENDS if name not in (*READ_ANYTHING, *DALI_BACKENDS)]
EVERY = [*READ_ANYTHING, *(pytest.param(name, marks=needs_ffcv) for name in READ_BETONS), *dali_backends]
SHAPES = {"small": [(16, 16)] * COUNT, "mixed": mixed_shapes(COUNT)}

# In levels of 255, against the CPU's libjpeg-turbo: nvJPEG has another inverse DCT and rounds colours differently.
NVJPEG_MEAN, NVJPEG_WORST_IMAGE, NVJPEG_WORST_PIXEL = 1.5, 4.0, 48
# The resizing of cut-outs on the device, float32 as on the CPU in another order.
RESIZED_LEVELS = 2


@dataclass(frozen=True)
class HeldSplit:
    """A split in memory, which needs no package that writes files."""

    path: Path
    images: list[np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @property
    def heights(self) -> np.ndarray:
        return np.array([image.shape[0] for image in self.images])

    @property
    def widths(self) -> np.ndarray:
        return np.array([image.shape[1] for image in self.images])

    def image(self, i: int) -> np.ndarray:
        return self.images[i]


def held(shapes) -> HeldSplit:
    labels = np.random.default_rng(0).integers(0, 5, COUNT)
    return HeldSplit(Path("held"), smooth_images(SHAPES[shapes], 0), labels)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The data set of these shapes, stored as this mode, written once."""
    made = {}

    def write(shapes: str, mode: str):
        if (shapes, mode) not in made:
            folder = tmp_path_factory.mktemp(f"{shapes}_{mode}")
            made[shapes, mode] = write_images(folder / "train.beton", smooth_images(SHAPES[shapes], 0), mode)
        return made[shapes, mode]

    return write


@pytest.fixture
def make(written):
    """A loader of the small data sets on a device; closed afterwards."""
    loaders = []

    def build(backend, shapes="small", mode="raw", device=DEVICE, *, train=True, crop=WHOLE, batch_size=8, seed=1):
        common = {"device": device, "num_workers": 1}
        if mode == "raw" and backend in READ_ANYTHING:
            split = held(shapes)
            plan = EpochPlan(split.labels, split.heights, split.widths, crop, batch_size, train, seed=seed)
            loaders.append(BACKENDS[backend].load()(split, plan, **common))
        else:
            common |= {"train": train, "crop": crop, "batch_size": batch_size, "seed": seed}
            loaders.append(make_loader(written(shapes, mode), "train", backend=backend, **common))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def assert_same_batches(got, expected, *, most_levels=0):
    """Two lists of batches: one order, the same labels, and pixels that differ by so many levels at most."""
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        assert one.images.device.type == one.labels.device.type == one.index.device.type == DEVICE.type
        assert (one.images.dtype, one.labels.dtype, one.index.dtype) == (torch.uint8, torch.int64, torch.int64)
        assert one.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.index.cpu(), other.index.cpu())
        assert torch.equal(one.labels.cpu(), other.labels.cpu())
        assert differences(one, other).max() <= most_levels


def differences(one, other):
    """Levels between the pixels of two batches, int64 (N, 3, H, W)."""
    return (one.images.cpu().long() - other.images.cpu().long()).abs()


@pytest.mark.parametrize("backend", EVERY)
def test_evaluation_gives_the_cpus_images_in_its_order(make, backend):
    got, expected = (list(make(backend, device=device, train=False).epoch(0)) for device in (DEVICE, "cpu"))
    assert torch.cat([batch.index for batch in got]).tolist() == list(range(COUNT))
    assert_same_batches(got, expected)


@needs_ffcv
@pytest.mark.parametrize("backend", EVERY)
def test_evaluation_crops_give_the_cpus_pixels(make, backend):
    arguments = {"shapes": "mixed", "train": False, "crop": CENTER}
    got, expected = (list(make(backend, device=device, **arguments).epoch(0)) for device in (DEVICE, "cpu"))
    assert_same_batches(got, expected)


@pytest.mark.parametrize("backend", EVERY)
def test_training_epochs_give_the_cpus_images_and_labels(make, backend):
    loaders = [make(backend, device=device) for device in (DEVICE, "cpu")]
    for epoch in (0, 3):
        assert_same_batches(*(list(loader.epoch(epoch)) for loader in loaders))


@needs_ffcv
@pytest.mark.parametrize("backend", EVERY)
def test_random_crops_are_the_cpus(make, backend):
    """Decoded and cut on the host they are so bit for bit; cut on the device, up to the rounding of a sum."""
    got, expected = (list(make(backend, "mixed", device=d, crop=RANDOM).epoch(1)) for d in (DEVICE, "cpu"))
    most = {"resident": 1, **dict.fromkeys(DALI_BACKENDS, RESIZED_LEVELS)}
    assert_same_batches(got, expected, most_levels=most.get(backend, 0))


def test_resident_cuts_many_sizes_as_a_cpu_does(make):
    got, expected = (list(make("resident", "mixed", device=d, crop=RANDOM).epoch(1)) for d in (DEVICE, "cpu"))
    assert_same_batches(got, expected, most_levels=1)


@pytest.mark.parametrize("backend", dali_backends)
def test_jpegs_decoded_on_the_device_stay_within_the_stated_bound(make, backend):
    """nvJPEG against libjpeg-turbo; an image that was cut or ordered differently would be far off."""
    for train, crop in ((False, CENTER), (True, RANDOM)):
        arguments = {"shapes": "mixed", "mode": "jpg", "train": train, "crop": crop}
        pairs = zip(*(make(backend, device=d, **arguments).epoch(1) for d in (DEVICE, "cpu")), strict=True)
        error = torch.cat([differences(one, other) for one, other in pairs]).double()
        worst = error.mean(dim=(1, 2, 3)).max()
        print(f"{backend} {crop.kind}: mean {error.mean():.3f}, worst image {worst:.3f}, worst pixel {error.max():.0f}")
        assert error.mean() <= NVJPEG_MEAN
        assert worst <= NVJPEG_WORST_IMAGE
        assert error.max() <= NVJPEG_WORST_PIXEL


RESUMED = [
    ("resident", "small", "raw", WHOLE),
    ("resident", "mixed", "raw", RANDOM),
    ("torch", "small", "raw", WHOLE),
    pytest.param("ffcv", "mixed", "jpg", RANDOM, marks=needs_ffcv),
    pytest.param("dali", "mixed", "jpg", RANDOM, marks=[needs_ffcv, needs_dali]),
    pytest.param("resident_jpeg", "mixed", "jpg", RANDOM, marks=[needs_ffcv, needs_dali]),
]


@pytest.mark.parametrize(("backend", "shapes", "mode", "crop"), RESUMED)
def test_an_epoch_is_resumed_in_its_middle_exactly(make, backend, shapes, mode, crop):
    whole = list(make(backend, shapes, mode, crop=crop).epoch(2))
    loader = make(backend, shapes, mode, crop=crop)
    for _ in loader.epoch(2):
        break  # an epoch that is left leaves nothing behind
    assert_same_batches(list(loader.epoch(2, first_batch=4)), whole[4:])


SLEEP_CYCLES = 20_000_000  # 10 ms at 2 GHz: many times what the loader takes for a batch


@pytest.mark.parametrize("backend", EVERY)
def test_a_slow_stream_still_finds_its_batches(make, monkeypatch, backend):
    """The host runs ahead and lets each batch go; its memory must not be used again before the stream has read it."""
    if backend == "ffcv":
        from loaders.readers import ffcv_loader

        monkeypatch.setattr(ffcv_loader, "BUFFER_BYTES", 1)  # memory of its own for each batch
    expected = list(make(backend, device="cpu", batch_size=4).epoch(0))
    loader, stream, got = make(backend, batch_size=4), torch.cuda.Stream(), []
    for epoch in (1, 0):
        got.clear()
        with torch.cuda.stream(stream):
            for batch in loader.epoch(epoch):
                torch.cuda._sleep(SLEEP_CYCLES)
                got.append(type(batch)(*(tensor.clone() for tensor in (batch.images, batch.labels, batch.index))))
                del batch
    torch.cuda.synchronize()
    assert_same_batches(got, expected)


@pytest.mark.parametrize("backend", EVERY)
def test_kept_batches_stay_valid(make, backend):
    kept = [(batch, batch.images.clone()) for epoch in range(2) for batch in make(backend).epoch(epoch)]
    torch.cuda.synchronize()
    assert all(torch.equal(batch.images, copy) for batch, copy in kept)


@pytest.mark.parametrize("backend", ["resident", "torch", pytest.param("ffcv", marks=needs_ffcv)])
def test_batches_are_handed_over_without_waiting(make, backend):
    batches = make(backend, batch_size=4).epoch(0)
    for _ in range(3):
        next(batches)
    with no_waiting():
        for batch in batches:
            batch.images.float().mean()


def test_an_epoch_of_the_resident_loader_begins_without_waiting(make):
    """A meta set of one batch begins one with every iteration."""
    loader = make("resident", batch_size=4)
    list(loader.epoch(0))
    with no_waiting():
        for epoch in (1, 2):
            for batch in loader.epoch(epoch):
                batch.images.float().mean()


@pytest.mark.parametrize("backend", ["torch", pytest.param("ffcv", marks=needs_ffcv)])
def test_epochs_take_no_more_memory_than_the_first_ones(make, backend):
    loader, reserved = make(backend), []
    for epoch in range(8):
        for batch in loader.epoch(epoch):
            batch.images.float()
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] == reserved[-1]


def test_auto_keeps_what_fits_on_the_device_and_says_why(make, monkeypatch):
    split = held("mixed")
    plan = EpochPlan(split.labels, split.heights, split.widths, RANDOM, 8, train=True)
    backend, reason = choose_backend(plan, DEVICE)
    assert backend == "resident"
    assert "of pixels fits in" in reason
    assert f"40% of the memory free on {DEVICE}" in reason
    needed = resident_bytes(plan.crop, plan.heights, plan.widths)
    with monkeypatch.context() as patch:
        patch.setattr("loaders.factory.free_share", lambda device, processes: needed)
        assert choose_backend(plan, DEVICE)[0] == "ffcv"
    before = free_memory.free_bytes(DEVICE)
    assert needed < before <= torch.cuda.get_device_properties(DEVICE).total_memory
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match=f"its pixels take .* free on {DEVICE}: choose data.loader 'auto'"):
        ResidentLoader(split, plan, device=DEVICE, num_workers=1)


@needs_ffcv
def test_auto_makes_the_resident_loader(written):
    dataset = written("small", "raw")
    loader = make_loader(dataset, "train", backend="auto", batch_size=8, device=DEVICE, train=True, crop=WHOLE)
    assert loader.backend == "resident"
    assert "fits in" in loader.reason
    assert next(loader.epoch(0)).images.device.type == DEVICE.type
    loader.close()
