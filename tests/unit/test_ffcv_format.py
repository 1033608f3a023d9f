"""Writing .beton files: what is stored, what is refused, that it always ends, and that FFCV reads them."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.sources import ArraySplit, FileSplit
from loaders.stored.beton import Beton
from loaders.stored.encode import stored_sizes
from loaders.stored.ffcv_format import BetonEnd, FfcvOptions, page_of, places
from loaders.stored.image_check import check_images
from loaders.stored.piece_writer import write_split

RNG = np.random.default_rng(0)
BETON = ("ffcv",)


def in_memory(count: int, height: int = 8, width: int = 8) -> ArraySplit:
    pixels = RNG.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return ArraySplit.whole(pixels, RNG.integers(0, 10, count), origin="noise", provenance="noise")


def in_files(folder: Path, shapes: list[tuple[int, int]]) -> FileSplit:
    paths = []
    for i, shape in enumerate(shapes):
        paths.append(f"{i}.png")
        Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / paths[-1])
    return FileSplit(folder, paths, np.arange(len(paths)) % 3, "noise")


@dataclass(frozen=True)
class Trouble(ArraySplit):
    """Images in memory that pass the check; reading image `at` does something else."""

    at: int = 0
    what: str = ""

    def image(self, i: int) -> np.ndarray:
        if i == self.at:
            if self.what == "raise":
                raise RuntimeError("the disk went away")
            if self.what == "die":
                os.kill(os.getpid(), 9)
            time.sleep(600)
        return super().image(i)


def troubled(what: str, at: int = 120) -> Trouble:
    split = in_memory(250)
    return Trouble(split.pixels, split.labels, split.rows, split.origin, split.provenance, at, what)


@pytest.mark.parametrize("count", [1, 3, 431])
def test_raw_images_and_labels_come_back_in_split_order(tmp_path, count):
    split = in_memory(count)
    done = []
    assert write_split(tmp_path, "a", split, FfcvOptions(), BETON, advance=done.append) == []
    beton = Beton(tmp_path / "a.beton")
    assert len(beton) == sum(done) == count
    np.testing.assert_array_equal(beton.labels, split.labels)
    for i in range(count):
        np.testing.assert_array_equal(beton.image(i), split.image(i))
    assert (tmp_path / "a.beton").stat().st_size < 2 * 2**12 + count * (192 + 24 + 24)  # no page is left half empty
    assert [path.name for path in tmp_path.iterdir()] == ["a.beton"]


def test_several_workers_write_what_one_writes(tmp_path):
    split = in_memory(900, 64, 64)
    for workers in (1, 3):
        write_split(tmp_path, f"{workers}", split, FfcvOptions(num_workers=workers), BETON)
        beton = Beton(tmp_path / f"{workers}.beton")
        np.testing.assert_array_equal(beton.labels, split.labels)
        assert all((beton.image(i) == split.image(i)).all() for i in range(len(split)))


def test_jpeg_and_proportion_store_jpegs(tmp_path):
    smooth = np.tile(np.linspace(0, 255, 40).astype(np.uint8)[None, None, :, None], (60, 30, 1, 3))
    split = ArraySplit.whole(smooth, np.zeros(60), origin="ramp", provenance="ramp")
    write_split(tmp_path, "jpg", split, FfcvOptions("jpg", jpeg_quality=95), BETON)
    jpg = Beton(tmp_path / "jpg.beton")
    assert jpg.is_jpeg.all()
    assert np.abs(jpg.image(7).astype(int) - smooth[7]).mean() < 3
    write_split(tmp_path, "half", split, FfcvOptions("proportion"), BETON)
    assert 10 < Beton(tmp_path / "half.beton").is_jpeg.sum() < 50


def test_long_sides_become_exactly_the_maximal_resolution(tmp_path):
    split = in_files(tmp_path, [(30, 90), (90, 30), (64, 64), (20, 10), (1, 400), (47, 47)])
    write_split(tmp_path, "a", split, FfcvOptions(max_resolution=45), BETON)
    beton = Beton(tmp_path / "a.beton")
    shapes = list(zip(beton.heights.tolist(), beton.widths.tolist(), strict=True))
    assert shapes == [(15, 45), (45, 15), (45, 45), (20, 10), (1, 45), (45, 45)]
    np.testing.assert_array_equal(beton.image(3), split.image(3))
    assert abs(beton.image(2).mean() - split.image(2).mean()) < 2


def test_every_size_scales_to_the_maximal_resolution():
    sizes = np.stack(np.meshgrid(np.arange(1, 700, 7), np.arange(1, 700, 3)), axis=-1).reshape(-1, 2)
    stored = stored_sizes(sizes, 256)
    large = sizes.max(axis=1) > 256
    assert (stored[large].max(axis=1) == 256).all()
    assert (stored[~large] == sizes[~large]).all()
    assert stored.min() >= 1
    assert stored_sizes(sizes, None) is sizes


def test_bad_images_are_left_out_and_returned(tmp_path):
    split = in_files(tmp_path, [(5, 6)] * 70)
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "66.png").write_bytes((tmp_path / "66.png").read_bytes()[:60])
    done = []
    check = check_images(split, num_workers=2, advance=done.append)
    assert sum(done) == 70
    assert [(image.index, image.name) for image in check.bad] == [(i, str(tmp_path / f"{i}.png")) for i in (3, 66)]
    assert "empty" in str(check.bad[0])
    assert check.sizes[4].tolist() == [5, 6]

    skipped = write_split(tmp_path, "a", split, FfcvOptions(num_workers=2), BETON)
    assert [image.index for image in skipped] == [3, 66]
    beton = Beton(tmp_path / "a.beton")
    good = [i for i in range(70) if i not in (3, 66)]
    np.testing.assert_array_equal(beton.labels, split.labels[good])
    np.testing.assert_array_equal(beton.image(3), split.image(4))


def test_a_split_without_a_good_image_is_refused(tmp_path):
    split = in_files(tmp_path, [(5, 6)])
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images"):
        write_split(tmp_path, "a", split, FfcvOptions(), BETON)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("raise", r"noise\[120\]: the disk went away"),
        ("die", r"a process that decoded images was killed, most likely because memory ran out"),
        ("hang", r"no image was finished for 1.5 s"),
    ],
)
def test_a_stuck_process_is_ended_with_the_reason_and_leaves_nothing(tmp_path, no_shared_memory_left, what, reason):
    children, start = multiprocessing.active_children(), time.monotonic()
    timeout_s = 1.5 if what == "hang" else 60  # on a busy machine a worker may need more than 1.5 s to begin with
    with pytest.raises(ValueError, match=reason):
        write_split(tmp_path, "a", troubled(what), FfcvOptions(num_workers=2), BETON, timeout_s=timeout_s)
    assert time.monotonic() - start < 60
    assert list(tmp_path.iterdir()) == []
    assert multiprocessing.active_children() == children


def test_a_slow_chunk_is_not_taken_for_a_stuck_one(tmp_path):
    """One chunk takes 4 s, each of its images 0.2 s: slower than the limit, and yet it moves all the time."""
    split = SlowSplit(**vars(in_files(tmp_path, [(3, 3)] * 20)))
    shown = []
    assert not check_images(split, num_workers=1, advance=shown.append, timeout_s=1.5).bad
    assert sum(shown) == 20
    assert len(shown) > 5


def test_no_image_lies_on_two_pages_and_little_room_is_lost():
    draw = np.random.default_rng(1)
    for most in (20_000, 600_000, 30_000_000):
        sizes = draw.integers(1, most, 200).tolist()
        begin = int(draw.integers(2000, 10_000_000))
        found = places(begin, sizes)
        largest = page_of(max(sizes))
        assert largest & (largest - 1) == 0
        assert begin <= found[0]
        for at, size, following in zip(found, sizes, [*found[1:], None], strict=True):
            assert at // largest == (at + size - 1) // largest
            assert at // page_of(size) == (at + size - 1) // page_of(size)
            assert following is None or at + size <= following <= at + size + page_of(most)
    assert places(2**23 - 10, [10, 5, 2**23, 1]) == [2**23 - 10, 2**23, 2**24, 2**24 + 2**23]


def test_what_lies_behind_the_last_image_is_cut_off_and_written_over(tmp_path):
    end = BetonEnd.open(tmp_path / "a.beton", 100, 0)
    (first,) = end.append([b"one"])
    assert first % 4096 == 0
    end.append([b"lost", np.zeros((3, 3, 3), np.uint8).data])
    again = BetonEnd.open(tmp_path / "a.beton", 100, first + 3)
    assert (tmp_path / "a.beton").stat().st_size == first + 3
    assert again.append([b"two"]) == [first + 3]
    assert (tmp_path / "a.beton").read_bytes()[first:] == b"onetwo"


@pytest.mark.parametrize("os_cache", [True, False], ids=["mapped", "by pages"])
def test_ffcvs_own_loader_reads_the_file(tmp_path, os_cache):
    """Images of several sizes, and more than a page of them."""
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    split = in_memory(130, 160, 190)
    write_split(tmp_path, "a", split, FfcvOptions(num_workers=2), BETON)
    assert (tmp_path / "a.beton").stat().st_size > 2**23
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(
        str(tmp_path / "a.beton"),
        batch_size=13,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        os_cache=os_cache,
        pipelines=pipelines,
    )
    images, labels = zip(*((image.copy(), label.copy()) for image, label in loader), strict=True)
    np.testing.assert_array_equal(np.concatenate(images), split.pixels)
    np.testing.assert_array_equal(np.concatenate(labels)[:, 0], split.labels)


def test_a_dying_decoder_process_ends_the_check(tmp_path):
    split = KillerSplit(**vars(in_files(tmp_path, [(3, 3)] * 100)))
    with pytest.raises(ValueError, match="decoded images was killed, most likely because memory ran out"):
        check_images(split, num_workers=2)


def test_a_stuck_decoder_ends_the_check_with_the_reason(tmp_path):
    children, start = multiprocessing.active_children(), time.monotonic()
    split = StuckSplit(**vars(in_files(tmp_path, [(3, 3)] * 70)))
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"no image was finished for 0.5 s, from number 32 on: is the"):
            check_images(split, num_workers=workers, timeout_s=0.5)
    assert time.monotonic() - start < 60
    assert multiprocessing.active_children() == children


class StuckSplit(FileSplit):
    """Files behind a disk that stops to answer."""

    def contents(self, i: int) -> bytes:
        if i >= 40:
            time.sleep(600)
        return super().contents(i)


class SlowSplit(FileSplit):
    """Files that take a while."""

    def contents(self, i: int) -> bytes:
        time.sleep(0.2)
        return super().contents(i)


class KillerSplit(FileSplit):
    """Files whose decoding kills the process."""

    def contents(self, i: int) -> bytes:
        os.kill(os.getpid(), 9)
        raise AssertionError("unreachable")


def test_sides_that_ffcv_cannot_store_are_bad_images(tmp_path):
    Image.new("RGB", (70_000, 1)).save(tmp_path / "long.png")
    check = check_images(FileSplit(tmp_path, ["long.png"], np.zeros(1, dtype=np.int64), "x"))
    assert "no side may be longer than 65535" in check.bad[0].reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "smart"}, "unknown mode 'smart': allowed are jpg, proportion, raw"),
        ({"max_resolution": 0}, "max_resolution is 0"),
        ({"jpeg_quality": 101}, "1 to 100"),
        ({"num_workers": 0}, "at least 1"),
    ],
)
def test_impossible_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(FfcvOptions(), **change)
