"""What every backend promises: order, resuming, sharding, batches that last, an orderly end, and clear refusals."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_betons import EVERY_BACKEND, SmallDataset, mixed_shapes, needs_dali, write_small

from fastlt.state import Batch, upload
from loaders import factory
from loaders.factory import check_loader, choose_backend, make_loader
from loaders.order.crop import CropSpec
from loaders.order.plan import EpochPlan
from loaders.order.sampling import epoch_order
from loaders.readers import base_loader, free_memory, torch_loader, worker_watch
from loaders.readers.fork_server import fork_server
from loaders.readers.resident_loader import resident_bytes
from loaders.readers.two_views import TwoViewLoader
from loaders.stored.beton import Beton
from loaders.stored.damage import ReaderError
from loaders.stored.mapped_file import cut_short, map_file

COUNT = 53
every_backend = pytest.mark.parametrize("backend", EVERY_BACKEND)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> SmallDataset:
    return write_small(tmp_path_factory.mktemp("small") / "train.beton", [(16, 16)] * COUNT, "raw")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> SmallDataset:
    return write_small(tmp_path_factory.mktemp("mixed") / "train.beton", mixed_shapes(COUNT), "raw")


@pytest.fixture
def make(request):
    """make_loader with small defaults; closes what it made."""
    made = []

    def build(dataset: SmallDataset, backend: str, **changes):
        arguments = {"batch_size": 8, "device": "cpu", "train": True, "crop": CropSpec("none"), "num_workers": 1}
        made.append(make_loader(dataset, "train", backend=backend, **{**arguments, **changes}))
        return made[-1]

    yield build
    for loader in made:
        loader.close()


def indices(batches: list[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.index.tolist()]


@every_backend
def test_training_epochs_follow_epoch_order_in_full_batches(small, make, backend):
    loader = make(small, backend, seed=7)
    for epoch in (0, 1, 4):
        batches = list(loader.epoch(epoch))
        expected = epoch_order(small.split_labels, sampling="instance", seed=7, epoch=epoch)
        assert indices(batches) == expected[: COUNT // 8 * 8].tolist()
        assert [len(batch) for batch in batches] == [8] * len(loader)
    assert loader.backend == backend
    assert loader.num_samples == COUNT // 8 * 8


@every_backend
def test_batches_carry_the_images_and_labels_of_their_index(small, make, backend):
    for batch in make(small, backend).epoch(0):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (8, 3, 16, 16)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.index.dtype == torch.int64
        for image, label, i in zip(batch.images, batch.labels, batch.index, strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0), small.images[i])
            assert label == small.split_labels[i]


@every_backend
def test_class_balanced_sampling_repeats_images_in_every_backend_alike(small, make, backend):
    loader = make(small, backend, sampling="class_balanced", seed=3)
    expected = epoch_order(small.split_labels, sampling="class_balanced", seed=3, epoch=1)
    assert indices(list(loader.epoch(1))) == expected[: loader.num_samples].tolist()


@every_backend
@pytest.mark.parametrize("sampling", ["instance", "class_balanced"])
def test_a_part_of_the_classes_is_read_as_if_the_split_held_no_others(small, make, backend, sampling):
    labels = small.split_labels
    classes = np.arange(labels.max() + 1) < labels.max()
    members = np.flatnonzero(classes[labels])
    assert 0 < len(members) < COUNT
    loader = make(small, backend, sampling=sampling, seed=3, classes=classes, batch_size=4)
    batches = list(loader.epoch(1))
    expected = members[epoch_order(labels[members], sampling=sampling, seed=3, epoch=1)]
    assert indices(batches) == expected[: len(members) // 4 * 4].tolist()
    for batch in batches:
        for image, label, i in zip(batch.images, batch.labels, batch.index, strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0), small.images[i])
            assert label == labels[i]
    assert indices(list(loader.epoch(1, first_batch=2))) == expected[8 : len(members) // 4 * 4].tolist()
    with pytest.raises(ValueError, match=f"Use a batch size of at most {len(members)}"):
        make(small, backend, classes=classes, batch_size=len(members) + 1)


@every_backend
@pytest.mark.parametrize("crop", [CropSpec("none"), CropSpec("random_resized", 12)], ids=lambda crop: crop.kind)
def test_resuming_gives_the_batches_an_uninterrupted_epoch_would_have_had(small, make, backend, crop):
    whole = list(make(small, backend, crop=crop, seed=1).epoch(2))
    rest = list(make(small, backend, crop=crop, seed=1).epoch(2, first_batch=4))
    assert len(rest) == len(whole) - 4
    for resumed, original in zip(rest, whole[4:], strict=True):
        assert torch.equal(resumed.images, original.images)
        assert torch.equal(resumed.index, original.index)


@pytest.mark.parametrize("backend", [b for b in EVERY_BACKEND if b != "resident"])
def test_two_views_are_two_crops_of_the_same_images_and_resume(mixed, make, backend):
    arguments = {"crop": CropSpec("random_resized", 12), "seed": 1, "sampling": "class_aware_4"}
    alone = list(make(mixed, backend, **arguments).epoch(2))
    loader = TwoViewLoader(make(mixed, backend, **arguments), make(mixed, backend, **arguments, view=1))
    whole, rest = list(loader.epoch(2)), list(loader.epoch(2, first_batch=4))
    assert len(whole) == len(loader) == len(rest) + 4
    assert indices(whole) == indices(alone)
    for batch, same in zip(whole, alone, strict=True):
        assert torch.equal(batch.images, same.images)
        assert batch.second_crop.shape == batch.images.shape
        assert all((a != b).any() for a, b in zip(batch.images, batch.second_crop, strict=True))
    for resumed, original in zip(rest, whole[4:], strict=True):
        assert torch.equal(resumed.second_crop, original.second_crop)
    other = make(mixed, backend, **{**arguments, "crop": CropSpec("center", 12)})
    centre = {i: image for batch in other.epoch(2) for i, image in zip(batch.index.tolist(), batch.images, strict=True)}
    # Both show the image of their index: crops of one image are nearer to its centre than to another image's.
    for batch in whole:
        own = torch.stack([centre[i] for i in batch.index.tolist()]).float()
        views = (batch.images.float(), batch.second_crop.float())
        near = [(v - own).abs().mean() for v in views]
        far = [(v - own.roll(4, 0)).abs().mean() for v in views]
        assert near[0] < far[0]
        assert near[1] < far[1]
    loader.close()


@every_backend
def test_resuming_at_the_end_gives_nothing_and_beyond_it_is_refused(small, make, backend):
    loader = make(small, backend)
    assert list(loader.epoch(0, first_batch=len(loader))) == []
    with pytest.raises(ValueError, match="cannot resume at batch 7 of an epoch of 6"):
        loader.epoch(0, first_batch=7)


@every_backend
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_covers_each_image_exactly_once_over_the_ranks(small, make, backend, world_size):
    seen = []
    for rank in range(world_size):
        loader = make(small, backend, train=False, rank=rank, world_size=world_size)
        batches = list(loader.epoch(0))
        assert len(batches) == len(loader)
        assert sum(len(batch) for batch in batches) == loader.num_samples
        assert all(torch.equal(batch.labels, torch.from_numpy(small.split_labels)[batch.index]) for batch in batches)
        seen += indices(batches)
    assert sorted(seen) == list(range(COUNT))


def test_training_ranks_get_equally_many_full_batches_of_different_images(small, make):
    ranks = [list(make(small, "resident", rank=rank, world_size=3).epoch(0)) for rank in range(3)]
    assert [[len(batch) for batch in batches] for batches in ranks] == [[8, 8]] * 3
    seen = [i for batches in ranks for i in indices(batches)]
    assert len(set(seen)) == len(seen)


@every_backend
def test_kept_batches_stay_valid(small, make, backend):
    loader = make(small, backend, batch_size=2)
    kept = [(batch, batch.images.clone()) for epoch in range(2) for batch in loader.epoch(epoch)]
    assert len(kept) == 2 * (COUNT // 2)
    for batch, copy in kept:
        assert torch.equal(batch.images, copy)


@every_backend
def test_torch_keeps_its_thread_count_and_random_state(small, make, backend):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        state = torch.get_rng_state()
        assert len(list(make(small, backend).epoch(0))) == 6
        assert torch.get_num_threads() == threads + 1
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)


def test_two_ffcv_loaders_decode_side_by_side(small, mixed, make):
    workers = min(2, len(os.sched_getaffinity(0)))
    train = make(small, "ffcv", num_workers=workers)
    meta = make(mixed, "ffcv", num_workers=workers, crop=CropSpec("random_resized", 12))
    pairs = list(zip(train.epoch(0), meta.epoch(0), strict=True))
    assert len(pairs) == 6
    assert indices([a for a, _ in pairs]) == indices(list(make(small, "resident").epoch(0)))


@pytest.mark.parametrize("backend", ["ffcv", "torch"])
def test_an_abandoned_epoch_and_close_leave_no_thread_or_process(small, make, backend):
    threads, processes = threading.active_count(), len(multiprocessing.active_children())
    loader = make(small, backend, batch_size=1)
    for _ in loader.epoch(0):
        break
    again = iter(loader.epoch(1))
    next(again)
    loader.close()
    loader.close()
    assert list(again) == []
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (
        threading.active_count() > threads or len(multiprocessing.active_children()) > processes
    ):
        time.sleep(0.05)
    assert threading.active_count() <= threads
    assert len(multiprocessing.active_children()) <= processes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="parents are read from /proc")
def test_torchs_workers_are_not_forked_from_a_process_with_threads(small, make):
    """A thread that ends may hold a lock of OpenCV's at that moment, which a forked worker would wait for for ever."""
    loader = make(small, "torch", num_workers=2)
    next(loader.epoch(0))
    workers = loader._loader._iterator._workers
    assert len(workers) == 2
    for worker in workers:
        status = Path(f"/proc/{worker.pid}/status").read_text()
        assert f"PPid:\t{os.getpid()}\n" not in status


def test_an_error_in_ffcvs_thread_reaches_the_reader(small, make, monkeypatch):
    def fail(*_):
        raise KeyError("lost")

    loader = make(small, "ffcv")
    monkeypatch.setattr(loader, "_decode", fail)
    with pytest.raises(RuntimeError, match=r"train.beton: a decoding thread stopped with KeyError: 'lost'"):
        next(loader.epoch(0))


def test_a_stuck_ffcv_thread_is_reported(small, make, monkeypatch):
    from loaders import daemon_threads
    from loaders.readers import ffcv_loader

    release = threading.Event()
    loader = make(small, "ffcv")
    monkeypatch.setattr(ffcv_loader, "STALL_S", 0.3)
    monkeypatch.setattr(daemon_threads, "STOP_S", 0.3)
    monkeypatch.setattr(loader, "_decode", lambda *_: release.wait(30))
    with pytest.raises(RuntimeError, match=r"train.beton: no batch for 0"):
        next(loader.epoch(0))
    release.set()


@pytest.mark.parametrize("workers", [1, 3, 64])
def test_ffcvs_batches_do_not_depend_on_threads_or_on_how_much_is_decoded_in_one_go(mixed, make, monkeypatch, workers):
    from loaders.readers import ffcv_loader

    crop = CropSpec("random_resized", 12)
    expected = list(make(mixed, "torch", crop=crop, num_workers=0).epoch(3))
    for buffer, piece in ((1, 1), (3 * 12 * 12 * 20, 3 * 12 * 12 * 3), (1 << 22, 1 << 20)):
        monkeypatch.setattr(ffcv_loader, "BUFFER_BYTES", buffer)
        monkeypatch.setattr(ffcv_loader, "PIECE_BYTES", piece)
        got = list(make(mixed, "ffcv", crop=crop, num_workers=workers).epoch(3))
        assert [len(batch) for batch in got] == [8] * 6
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.index, other.index)
            assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize(
    ("backend", "error"), [("ffcv", RuntimeError), ("torch", ValueError), ("resident", ValueError)]
)
def test_a_damaged_jpeg_is_named(tmp_path, make, backend, error):
    dataset = write_small(tmp_path / "train.beton", mixed_shapes(8), "jpg")
    beton = Beton(dataset.path)
    start = int(beton.encoded(5).ctypes.data - beton.encoded(0).ctypes.data) + dataset.path.read_bytes().index(
        beton.encoded(0).tobytes()
    )
    with dataset.path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(200))
    with pytest.raises(error, match=r"train.beton, image 5: damaged JPEG"):
        list(make(dataset, backend, train=False, crop=CropSpec("center", 12)).epoch(0))


def test_auto_keeps_the_split_resident_when_it_fits_and_says_why(small, make, monkeypatch):
    fits = make(small, "auto")
    assert fits.backend == "resident"
    assert "0.0 MiB of pixels fits in" in fits.reason
    assert "40% of the memory free on cpu" in fits.reason

    monkeypatch.setattr(factory, "free_share", lambda device, processes: 2 * COUNT * 16 * 16 * 3)
    tight = make(small, "auto")
    assert tight.backend == "ffcv"
    assert "is more than 0.0 MiB, 40% of the memory free on cpu" in tight.reason


def test_memory_is_free_by_the_narrowest_control_group(tmp_path, monkeypatch):
    """Files that the kernel keeps in memory count as used there, and make room when it is needed."""
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    monkeypatch.setattr(free_memory, "OWN_GROUP", tmp_path / "own")
    everything = free_memory.free_bytes(torch.device("cpu"))
    (tmp_path / "own").write_text("1:name=systemd:/\n0::/job/step\n")

    def group(folder, limit, used, files):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {files - 100}\nactive_file 100\n")

    group(tmp_path / "job" / "step", "max", 5000, 4000)
    assert free_memory.free_bytes(torch.device("cpu")) == pytest.approx(everything, rel=0.2)
    group(tmp_path / "job", 9000, 8000, 6000)
    assert free_memory.free_bytes(torch.device("cpu")) == 7000
    (tmp_path / "job" / "memory.stat").unlink()
    assert free_memory.free_bytes(torch.device("cpu")) == 9000, "the limit, where nothing tells what is used"
    group(tmp_path, 6000, 5500, 1000)
    assert free_memory.free_bytes(torch.device("cpu")) == 1500


def test_processes_on_a_cpu_share_its_memory(small, make, monkeypatch):
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: int(COUNT * 16 * 16 * 3 / 0.4) + 3)
    assert make(small, "auto").backend == "resident"
    shared = make(small, "auto", world_size=2)
    assert shared.backend == "ffcv"
    assert "40% of the memory free on cpu for each of 2 processes" in shared.reason
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 2 * COUNT * 16 * 16 * 3 - 1)
    make(small, "resident", world_size=2)
    arguments = {"backend": "resident", "device": "cpu", "train": True, "crop": CropSpec("none")}
    assert check_loader(small, "train", **arguments) == ("resident", (16, 16))
    with pytest.raises(ValueError, match=r"its pixels take .* choose data.loader 'auto'"):
        check_loader(small, "train", **arguments, local_world_size=2)
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: COUNT * 16 * 16 * 3 - 1)
    with pytest.raises(ValueError, match=r"its pixels take .* choose data.loader 'auto'"):
        make(small, "resident")


def test_auto_knows_what_whole_images_of_many_sizes_take(mixed, monkeypatch):
    beton = Beton(mixed.path)
    plan = EpochPlan(beton.labels, beton.heights, beton.widths, CropSpec("random_resized", 12), 8, train=True)
    needed = sum(image.size for image in mixed.images)
    assert resident_bytes(plan.crop, plan.heights, plan.widths) == needed
    monkeypatch.setattr(factory, "RESIDENT_SHARE", 1.0)
    for free, expected in ((needed, "resident"), (needed - 1, "ffcv")):
        monkeypatch.setattr(factory, "free_share", lambda device, processes, free=free: free)
        assert choose_backend(plan, torch.device("cuda"))[0] == expected
    backend, reason = choose_backend(plan, torch.device("cpu"))
    assert (backend, "images differ in size" in reason) == ("ffcv", True)


def test_imagenet_lt_at_256_pixels_takes_23_gigabytes():
    side = np.full(115_846, 256)
    assert resident_bytes(CropSpec("random_resized", 224), side, side) == pytest.approx(22.8e9, rel=0.01)


def test_resident_leaves_random_crops_of_equal_images_to_the_device(small, mixed, make):
    crop = CropSpec("random_resized", 12)
    whole = make(small, "resident", crop=crop)
    assert not whole.crops
    assert next(whole.epoch(0)).images.shape[2:] == (16, 16)
    cut = make(mixed, "resident", crop=crop)
    assert cut.crops
    assert next(cut.epoch(0)).images.shape[2:] == (12, 12)


def test_resident_fills_from_shards_in_small_steps_as_from_a_beton(mixed, make, monkeypatch):
    from loaders.readers import ragged_pixels

    crop = CropSpec("random_resized", 12)
    whole = list(make(mixed, "resident", crop=crop).epoch(1))
    monkeypatch.setattr(ragged_pixels, "FILL_BYTES", 30_000)  # a few images
    shards = SmallDataset(mixed.path, mixed.images, mixed.split_labels, formats=("dali",))
    pieces = list(make(shards, "resident", crop=crop, num_workers=3).epoch(1))
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole, pieces, strict=True))


@needs_dali
@pytest.mark.parametrize("crop", [CropSpec("none"), CropSpec("random_resized", 12)])
def test_dali_keeps_no_tensors_of_many_images(tmp_path, make, monkeypatch, crop):
    from loaders.readers import dali_loader

    shapes = mixed_shapes(24) if crop.kind != "none" else [(16, 16)] * 24
    dataset = write_small(tmp_path / "train.beton", shapes, "jpg")
    kept = make(dataset, "dali", crop=crop)
    expected = [batch for epoch in (0, 1) for batch in kept.epoch(epoch)]
    monkeypatch.setattr(dali_loader, "KEPT_TENSORS", 23)
    loader = make(dataset, "dali", crop=crop)
    got = [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
    assert all(torch.equal(a.images, b.images) for a, b in zip(got, expected, strict=True))
    assert (len(kept._encoded._tensors), loader._encoded._tensors) == (24, [])


@needs_dali
def test_resident_jpeg_holds_the_files_and_needs_no_disk(tmp_path, make, monkeypatch):
    dataset = write_small(tmp_path / "train.beton", mixed_shapes(24), "jpg")
    crop = CropSpec("random_resized", 12)
    expected = list(make(dataset, "dali", crop=crop).epoch(1))
    for formats in (("ffcv", "dali"), ("dali",), ("ffcv",)):
        part = SmallDataset(dataset.path, dataset.images, dataset.split_labels, formats=formats)
        loader = make(part, "resident_jpeg", crop=crop)
        monkeypatch.setattr(type(loader.stored.stored), "encoded", None)  # nothing is read any more
        got = list(loader.epoch(1))
        monkeypatch.undo()
        assert all(torch.equal(a.images, b.images) for a, b in zip(got, expected, strict=True))
        assert loader.backend == "resident_jpeg"


@needs_dali
def test_resident_jpeg_refuses_raw_pixels_and_what_does_not_fit(small, make, monkeypatch):
    raw = SmallDataset(small.path, small.images, small.split_labels, formats=("ffcv",))
    with pytest.raises(ValueError, match=r"train.beton holds raw pixels, .* --format both, or with --mode jpg"):
        make(raw, "resident_jpeg")
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"0.0 MiB of memory are free: choose data.loader 'dali'"):
        make(small, "resident_jpeg")


@every_backend
def test_mistakes_are_refused_with_advice(small, mixed, make, backend, tmp_path):
    with pytest.raises(ValueError, match=r"batch size 54 .* Use a batch size of at most 53"):
        make(small, backend, batch_size=54)
    with pytest.raises(ValueError, match=r"batch size 20 on 3 process"):
        make(small, backend, batch_size=20, world_size=3)
    with pytest.raises(ValueError, match="batch size 0"):
        make(small, backend, batch_size=0)
    with pytest.raises(ValueError, match="needs images of one size"):
        make(mixed, backend)
    with pytest.raises(ValueError, match="use 'center' for evaluation"):
        make(small, backend, train=False, crop=CropSpec("random_resized", 12))
    other = SmallDataset(small.path, small.images, small.split_labels + 1)
    with pytest.raises(ValueError, match="disagree: convert the data set again"):
        make(other, backend)


def test_unknown_backends_and_impossible_worker_counts_are_refused(small, make):
    with pytest.raises(ValueError, match="did you mean 'ffcv'"):
        make(small, "fcv")
    with pytest.raises(ValueError, match=r"num_workers 0 for the 'ffcv' backend: give 1 or more"):
        make(small, "ffcv", num_workers=0)
    with pytest.raises(ValueError, match="num_workers -1"):
        make(small, "torch", num_workers=-1)


def test_evaluation_may_have_fewer_images_than_a_batch(small, make):
    (batch,) = make(small, "resident", train=False, batch_size=100).epoch(0)
    assert len(batch) == COUNT


def test_workers_share_the_cores_of_the_machine(monkeypatch):
    monkeypatch.setattr(base_loader, "available_cores", lambda: 8)
    assert [base_loader.default_workers(processes) for processes in (1, 3, 16)] == [8, 2, 1]


def test_what_goes_to_a_gpu_is_pinned_and_nobody_waits_for_it(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **how: calls.append((str(device), how)) or self)
    upload(torch.from_numpy(np.arange(6).reshape(2, 3).T), torch.device("cuda"))
    assert calls == ["pinned", ("cuda", {"non_blocking": True})]
    monkeypatch.undo()
    assert upload(torch.arange(3), torch.device("cpu")).tolist() == [0, 1, 2]


@pytest.fixture
def torch_worker(small, make):
    """A loader with one worker, of which the reader has had a batch, and that worker's process."""
    loader = make(small, "torch", num_workers=1, batch_size=2)
    epoch = loader.epoch(0)
    next(epoch)
    (worker,) = loader._watch._processes
    return epoch, worker


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, r"ended \(signal 9, SIGKILL; most likely memory ran out\). Use fewer workers than 1"),
        (signal.SIGSTOP, r"worker process \d+ is stopped \(SIGSTOP\). Start again"),
        (signal.SIGBUS, r"shared memory, /dev/shm, has no room .* make it larger \(docker run --shm-size"),
    ],
    ids=["killed", "stopped", "bus error"],
)
def test_a_torch_worker_that_is_lost_is_noticed_soon(torch_worker, number, message):
    epoch, worker = torch_worker
    os.kill(worker.pid, number)
    start = time.monotonic()
    with pytest.raises(ReaderError, match=message):
        list(epoch)
    assert time.monotonic() - start < 20  # 10 and the time that a busy machine needs
    worker.join(10)
    assert worker.exitcode == (-signal.SIGBUS if number == signal.SIGBUS else -signal.SIGKILL)


def test_only_files_that_are_read_are_named_as_cut_short(tmp_path):
    whole, cut = tmp_path / "whole.beton", tmp_path / "cut.beton"
    for path in (whole, cut):
        path.write_bytes(bytes(10_000))
    mapped = [map_file(path) for path in (whole, cut)]
    os.truncate(cut, 100)
    assert cut_short(whole) is None
    assert cut_short(tmp_path).startswith(f"{cut} was cut short")
    del mapped[1]
    assert cut_short(tmp_path) is None


def test_a_slow_worker_is_told_of_and_waited_for(small, make, capfd, monkeypatch):
    monkeypatch.setattr(worker_watch, "SLOW_S", 0.6)
    processes = [SimpleNamespace(pid=os.getpid(), sentinel=0, exitcode=None, kill=None)]
    watch = worker_watch.WorkerWatch(Path("there"), processes, patience_s=100)
    for _ in range(2):
        with watch.waiting():
            time.sleep(1.8)
    watch.close()
    told = [line for line in capfd.readouterr().err.splitlines() if "still waiting for images of there" in line]
    assert len(told) == 1, told
    assert f"worker {os.getpid()} " in told[0]


def test_a_folder_for_temporary_files_with_a_long_path_is_said(monkeypatch):
    """A socket's path has 107 bytes at most."""
    monkeypatch.setattr("multiprocessing.util.get_temp_dir", lambda: f"/tmp/{'long' * 20}/pymp-12345678")
    with pytest.raises(ReaderError, match=r"longlong, has too long a path .* set TMPDIR to a shorter one"):
        fork_server([])


def test_no_room_in_shared_memory_is_said_by_the_worker(small, monkeypatch):
    def full(images):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(torch_loader, "get_worker_info", lambda: SimpleNamespace(num_workers=3))
    batches = torch_loader._CroppedBatches(Beton(small.path), (16, 16))
    answer = batches[np.arange(2), np.array([[0, 0, 16, 16]] * 2, dtype=np.int32)]
    assert isinstance(answer, ReaderError)
    assert "for the batches of 3 workers" in str(answer)


ENDLESS = """
import sys
from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from small_betons import SmallDataset
from loaders.stored.beton import Beton

if __name__ == "__main__":
    backend, path = sys.argv[1:]
    labels = Beton(path).labels
    dataset = SmallDataset(Beton(path).path, [], labels, formats=("ffcv",))
    arguments = {"batch_size": 8, "device": "cpu", "train": True, "crop": CropSpec("none"), "num_workers": 2}
    loader = make_loader(dataset, "train", backend=backend, **arguments)
    for epoch in range(10**9):
        for batch in loader.epoch(epoch):
            print(batch.index[0].item(), flush=True)
"""


@pytest.fixture
def endless(small, tmp_path):
    """Starts a process that reads a copy of `small` for ever; returns it and the copy when it has had a batch."""
    started = []

    def start(backend: str) -> tuple[subprocess.Popen, Path]:
        path = Path(shutil.copy(small.path, tmp_path / "copy.beton"))
        (tmp_path / "endless.py").write_text(ENDLESS)
        root = Path(__file__).resolve().parents[2]
        where = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests' / 'parity'}"}
        words = [sys.executable, str(tmp_path / "endless.py"), backend, str(path)]
        process = subprocess.Popen(words, env=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline(), process.stderr.read()
        return process, path

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_file_that_is_cut_short_under_its_reader_ends_in_a_sentence(endless):
    process, path = endless("ffcv")
    os.truncate(path, 3000)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = error.strip().splitlines()
    assert line.startswith(f"fastlt: {path} was cut short while it was read: it has 3,000 bytes and had ")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are found in /proc")
def test_torchs_workers_end_with_a_killed_main_process(endless):
    process, _ = endless("torch")
    family = descendants(process.pid)
    assert len(family) >= 4  # two workers, the server that forked them, and multiprocessing's tracker of resources
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in family):
        time.sleep(0.1)
    assert [pid for pid in family if Path(f"/proc/{pid}").exists()] == []


def descendants(pid: int) -> list[int]:
    children = [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]
    return children + [below for child in children for below in descendants(child)]
