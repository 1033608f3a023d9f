"""WebDataset shards: what is stored for which image, what damage is found, and how the trainer asks for them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_betons import mixed_shapes, needs_dali, smooth_images, write_small

from fastlt import cli
from fastlt.recipe import load_recipe
from fastlt.run.dataset import ensure_converted
from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.sources import FileSplit, Source, open_source
from loaders.sources.cut import draw_order
from loaders.stored import dali_format, piece_writer
from loaders.stored.convert import convert
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.image_check import BadImage
from loaders.stored.manifest import file_sha256, sealed
from loaders.stored.piece_writer import write_split
from loaders.stored.tar_shards import TarShards, is_jpeg
from loaders.stored.verify import verify

ROOT = Path(__file__).resolve().parents[2]

LOSSLESS = FfcvOptions(num_workers=1)


def jpeg_files(folder: Path, shapes: list[tuple[int, int]], **arguments) -> FileSplit:
    """JPEG files of these sizes, classes 0 and 1 in turn."""
    folder.mkdir(parents=True)
    paths = [f"{i}.jpg" for i in range(len(shapes))]
    for path, image in zip(paths, smooth_images(shapes, seed=len(shapes)), strict=True):
        Image.fromarray(image).save(folder / path, quality=90, **arguments)
    return FileSplit(folder, paths, np.arange(len(paths)) % 2, "made for a test")


@pytest.fixture
def files(tmp_path) -> Source:
    """JPEGs of mixed sizes: 13 train, 4 meta and 5 test images of two classes."""
    counts = {"train": 13, "meta": 4, "test": 5}
    splits = {name: jpeg_files(tmp_path / name, mixed_shapes(count)) for name, count in counts.items()}
    return Source("image_folder", ("cat", "dog"), splits)


def write_shards(folder: Path, split: FileSplit, options: FfcvOptions, **arguments) -> tuple[list[BadImage], Path]:
    """Writes the shards of a split called "a"; the images that are bad, and the index."""
    return write_split(folder, "a", split, options, ("dali",), **arguments), folder / "dali" / "a.npz"


def shards_only(source: Source, out: Path, options: FfcvOptions = LOSSLESS) -> ConvertedDataset:
    return convert(source, out, options=options, request={}, formats=("dali",), progress=False)


def test_jpegs_keep_their_bytes_in_a_plain_tar(files, tmp_path):
    split = files.splits["train"]
    bad, index = write_shards(tmp_path / "out", split, LOSSLESS, shard_images=5)
    assert bad == []
    shards = TarShards(index)
    assert [tar.name for tar in shards.tars] == ["a-00000.tar", "a-00001.tar", "a-00002.tar"]
    np.testing.assert_array_equal(shards.labels, split.labels)
    assert len(shards) == 13
    read = {}
    for tar in shards.tars:
        with tarfile.open(tar) as archive:
            read |= {member.name: archive.extractfile(member).read() for member in archive}
    for i in range(13):
        assert shards.encoded(i).tobytes() == split.encoded(i) == read[f"{i:09d}.jpg"]
        assert read[f"{i:09d}.cls"] == str(split.labels[i]).encode()
        assert (shards.heights[i], shards.widths[i]) == split.image(i).shape[:2] == shards.image(i).shape[:2]
    assert all(shards.problems(k) == [] for k in range(3))
    assert shards.shape is None


def test_what_is_no_upright_rgb_jpeg_becomes_a_png_with_the_same_pixels(tmp_path):
    """A PNG, a 16-bit one, a CMYK JPEG, one turned by its EXIF block, and one with a flaw that libjpeg warns of."""
    split = jpeg_files(tmp_path / "images", [(20, 30)] * 5)
    folder = split.root
    pixels = np.asarray(Image.open(folder / "0.jpg"))
    Image.fromarray(pixels).save(folder / "0.jpg", format="PNG")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "1.jpg", format="PNG")
    Image.fromarray(pixels).convert("CMYK").save(folder / "2.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "3.jpg", exif=exif)
    flawed = (folder / "4.jpg").read_bytes()
    (folder / "4.jpg").write_bytes(flawed[:-2] + bytes(56) + flawed[-2:])
    shards = TarShards(write_shards(tmp_path / "out", split, LOSSLESS)[1])
    for i in range(5):
        assert not is_jpeg(shards.encoded(i))
        np.testing.assert_array_equal(shards.image(i), split.image(i))
    assert shards.image(3).shape == (30, 20, 3)


def test_scaled_images_are_written_anew_and_the_others_are_not(files, tmp_path):
    split = files.splits["train"]
    for mode, extension in (("raw", "png"), ("jpg", "jpg")):
        options = FfcvOptions(mode, max_resolution=80, num_workers=1)
        shards = TarShards(write_shards(tmp_path / mode, split, options)[1])
        with tarfile.open(shards.tars[0]) as archive:
            names = [name for name in archive.getnames() if not name.endswith(".cls")]
        for i, name in enumerate(names):
            small = max(split.image(i).shape) <= 80
            assert (shards.encoded(i).tobytes() == split.encoded(i)) == small
            assert name.split(".")[1] == ("jpg" if small else extension)
            assert max(shards.image(i).shape) == (max(split.image(i).shape) if small else 80)
        assert 0 < sum(max(split.image(i).shape) > 80 for i in range(13)) < 13


def test_equal_images_give_equal_shards_whatever_the_number_of_processes(files, tmp_path):
    for workers in (1, 2):
        options = FfcvOptions(num_workers=workers)
        write_shards(tmp_path / str(workers), files.splits["train"], options, shard_images=4)
    one, two = (sorted((tmp_path / str(workers) / "dali").iterdir()) for workers in (1, 2))
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) == 4 * 2 + 1
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True) if a.suffix != ".npz")


def test_a_split_never_has_more_shards_than_may_stay_mapped(files, tmp_path, monkeypatch):
    monkeypatch.setattr(dali_format, "SHARD_IMAGES", 1)
    monkeypatch.setattr(dali_format, "MOST_SHARDS", 3)
    _, index = write_shards(tmp_path / "out", files.splits["train"], LOSSLESS)
    assert len(TarShards(index).tars) == 3


def test_more_shards_than_a_process_may_usually_open(files, tmp_path):
    _, index = write_shards(tmp_path / "out", files.splits["train"], LOSSLESS, shard_images=1)
    code = (
        "import os, sys; from resource import *; from loaders.stored.tar_shards import TarShards\n"
        "used = max(map(int, os.listdir('/proc/self/fd')))\n"
        "setrlimit(RLIMIT_NOFILE, (used + 6, getrlimit(RLIMIT_NOFILE)[1]))\n"
        "print(len(TarShards(sys.argv[1]).tars))"
    )
    done = subprocess.run([sys.executable, "-c", code, index], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "13\n", done.stderr


@pytest.mark.parametrize(("on_error", "damaged"), [("stop", 0), ("skip", 0), ("skip", 3)])
def test_training_images_are_stored_in_a_random_order(tmp_path, monkeypatch, on_error, damaged):
    for split, count in (("train", 20), ("test", 4)):
        for name in ("cat", "dog"):
            jpeg_files(tmp_path / "images" / split / name, mixed_shapes(count, seed=len(split + name)))
    for path in sorted((tmp_path / "images" / "train" / "cat").iterdir())[:damaged]:
        path.write_bytes(b"damaged")
    source = open_source("image_folder", root=tmp_path / "images", meta_per_class=4)
    options = {"options": LOSSLESS, "request": {}, "formats": ("dali",), "progress": False, "on_error": on_error}
    options |= {"allow_duplicates": True}
    plain = convert(source, tmp_path / "plain", **options)
    stored = []
    write = piece_writer._write_pieces

    def noted(job, *arguments):
        stored.extend(len(positions) for _, positions, _ in job.todo)
        write(job, *arguments)

    monkeypatch.setattr(piece_writer, "_write_pieces", noted)
    shuffled = convert(source, tmp_path / "shuffled", **options, shuffle_seed=0, shard_images=5)
    assert verify(shuffled, num_workers=1, progress=False) == []
    lines = [line.split("\t") for line in (plain.root / "images.tsv").read_text().splitlines()]
    rows = draw_order([f"shuffle\0{path}" for split, _, path in lines if split == "train"], 0)
    assert damaged or sum(stored) == 48  # each image once
    twice = [(of.root / "duplicates.txt").read_text().splitlines() for of in (plain, shuffled)]
    assert len({frozenset(frozenset(line.split("\t")) for line in lines) for lines in twice}) == 1
    one, other = plain.stored("train", "dali"), shuffled.stored("train", "dali")
    assert [one.encoded(i).tobytes() for i in rows] == [other.encoded(i).tobytes() for i in range(len(rows))]
    np.testing.assert_array_equal(shuffled.labels("train"), plain.labels("train")[rows])
    assert len(other.tars) == -(-len(rows) // 5)
    np.testing.assert_array_equal(shuffled.labels("meta"), plain.labels("meta"))


@needs_dali
def test_dalis_own_reader_reads_the_shards_by_their_index(files, tmp_path):
    from nvidia.dali import Pipeline, fn

    split = files.splits["train"]
    tars = TarShards(write_shards(tmp_path / "out", split, LOSSLESS, shard_images=5)[1]).tars
    pipeline = Pipeline(batch_size=13, num_threads=1, device_id=None)
    with pipeline:
        indices = [str(tar.with_suffix(".idx")) for tar in tars]
        read = fn.readers.webdataset(paths=[str(tar) for tar in tars], index_paths=indices, ext=["jpg", "cls"])
        pipeline.set_outputs(*read)
    images, labels = pipeline.run()
    for i in range(13):
        assert np.asarray(images[i]).tobytes() == split.encoded(i)
        assert np.asarray(labels[i]).tobytes() == str(split.labels[i]).encode()


def test_a_data_set_of_shards_alone_opens_and_every_backend_but_ffcv_reads_it(files, tmp_path):
    dataset = shards_only(files, tmp_path / "out")
    assert dataset.formats == ("dali",)
    assert set(dataset.manifest["files"]) == {"images.tsv", "labels.npz"} | {
        f"dali/{split}{rest}" for split in files.splits for rest in (".npz", "-00000.tar", "-00000.idx")
    }
    assert verify(dataset, progress=False) == []
    arguments = {"batch_size": 4, "device": "cpu", "train": False, "crop": CropSpec("center", 24), "num_workers": 1}
    loaders = [make_loader(dataset, "train", backend=backend, **arguments) for backend in ("resident", "torch")]
    for one, other in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, torch.from_numpy(files.splits["train"].labels)[one.index])
    with pytest.raises(ValueError, match=r"was not converted to FFCV: make it with `.* --format both --overwrite`"):
        make_loader(dataset, "train", backend="ffcv", **arguments)
    loader = make_loader(dataset, "train", backend="auto", **arguments)
    assert loader.backend == "resident"


@needs_dali
def test_auto_takes_dali_only_where_there_is_nothing_else(files, tmp_path):
    arguments = {"backend": "auto", "batch_size": 4, "device": "cpu", "train": True, "num_workers": 1}
    arguments |= {"crop": CropSpec("random_resized", 24)}
    loader = make_loader(shards_only(files, tmp_path / "shards"), "train", **arguments)
    assert (loader.backend, loader.reason[:32]) == ("dali", "dali: images differ in size, and")
    both = convert(files, tmp_path / "both", options=LOSSLESS, request={}, formats=("ffcv", "dali"), progress=False)
    assert make_loader(both, "train", **arguments).backend == "ffcv"
    assert make_loader(both, "train", **{**arguments, "backend": "dali"}).backend == "dali"


def test_a_data_set_without_shards_says_how_to_get_them(digits, tmp_path):
    advice = r"not converted to DALI's shards: make it with `.* --format both --overwrite`"
    dataset = ConvertedDataset.open(digits)
    with pytest.raises(ValueError, match=advice):
        make_loader(dataset, "train", backend="dali", batch_size=4, device="cpu", train=True, crop=CropSpec("none"))
    data = replace(load_recipe(ROOT / "recipes" / "digits_lt.yaml").data, loader="dali")
    with pytest.raises(ValueError, match=r"(?s)data.loader is 'dali', but .* ffcv only.*--format both.*--overwrite"):
        ensure_converted(data, digits)
    ensure_converted(data, tmp_path / "new")
    assert ConvertedDataset.open(tmp_path / "new").formats == ("ffcv", "dali")


def test_damaged_and_missing_shards_are_refused_on_opening(files, tmp_path):
    dataset = shards_only(files, tmp_path / "out")
    tar = dataset.root / "dali" / "train-00000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a shard is cut short"):
        TarShards(dataset.shards("train"))
    with pytest.raises(ValueError, match=r"damaged: dali/train-00000.tar has [\d,]+ bytes"):
        ConvertedDataset.open(dataset.root)
    tar.unlink()
    with pytest.raises(ValueError, match=r"train-00000.tar is missing or empty"):
        TarShards(dataset.shards("train"))
    dataset.shards("train").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match=r"its index cannot be read"):
        TarShards(dataset.shards("train"))
    dataset.shards("train").unlink()
    with pytest.raises(ValueError, match=r"train.npz does not exist: convert the data set with --format dali"):
        TarShards(dataset.shards("train"))


def damage(dataset: ConvertedDataset, name: str, change) -> ConvertedDataset:
    """Change a file's bytes and the manifest with them, as if it had been written so."""
    path = dataset.root / name
    path.write_bytes(change(path.read_bytes()))
    manifest = json.loads((dataset.root / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (dataset.root / "manifest.json").write_text(sealed(manifest))
    return ConvertedDataset.open(dataset.root)


def test_verify_reads_the_shards_back(files, tmp_path):
    good = shards_only(files, tmp_path / "good")
    image = TarShards(good.shards("train")).encoded(7).tobytes()
    assert good.manifest["files"]["dali/train-00000.tar"]["sha256"] == file_sha256(good.root / "dali/train-00000.tar")

    def copy(name: str) -> ConvertedDataset:
        return ConvertedDataset.open(shutil.copytree(good.root, tmp_path / name))

    dataset = copy("bytes")
    dataset.shards("meta").write_bytes(bytes(dataset.shards("meta").stat().st_size))
    assert verify(dataset, progress=False)[0].startswith("dali/meta.npz: its sha256")

    def only_problem(dataset: ConvertedDataset) -> str:
        (problem,) = verify(dataset, progress=False)
        return problem

    name = "dali/train-00000.tar"
    zeros = image[:2] + bytes(len(image) - 2)
    problem = only_problem(damage(copy("image"), name, lambda b: b.replace(image, zeros)))
    assert "train-00000.tar, image 7: damaged JPEG data" in problem
    one, zero = b"1".ljust(512, b"\0"), b"0".ljust(512, b"\0")  # the first label that is 1 becomes 0
    problem = only_problem(damage(copy("label"), name, lambda b: b.replace(one, zero, 1)))
    assert "train-00000.tar: its members are not what train.npz says" in problem
    problem = only_problem(damage(copy("idx"), "dali/test-00000.idx", lambda b: b.replace(b"jpg", b"jpe", 1)))
    assert "test-00000.idx: DALI's index and test.npz disagree" in problem


def test_bad_images_are_left_out_of_the_shards(files, tmp_path):
    split = files.splits["train"]
    good = split.subset(np.array([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 12]))
    for i in (3, 11):
        (split.root / split.paths[i]).write_bytes(b"no image")
    bad, index = write_shards(tmp_path / "one", split, LOSSLESS, shard_images=4)
    assert [image.index for image in bad] == [3, 11]
    _, expected = write_shards(tmp_path / "other", good, LOSSLESS, shard_images=4)
    one, other = (sorted(path.parent.glob("*-0*")) for path in (index, expected))
    assert [path.name for path in one] == [path.name for path in other]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True))
    assert all(TarShards(index).problems(k) == [] for k in range(3))


def test_ffcvs_own_storage_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="mode 'proportion' is FFCV's own: the dali format takes raw or jpg"):
        shards_only(None, tmp_path / "out", FfcvOptions("proportion"))
    with pytest.raises(ValueError, match="did you mean 'dali'"):
        convert(None, tmp_path / "out", options=LOSSLESS, request={}, formats=("dalli",))
    with pytest.raises(ValueError, match="or both"):
        convert(None, tmp_path / "out", options=LOSSLESS, request={}, formats=())


def test_the_command_line_converts_to_either_format_or_both(tmp_path, capsys):
    def run(*words: object, code: int = 0) -> str:
        assert cli.main(["convert", *map(str, words)]) == code
        captured = capsys.readouterr()
        return captured.out + captured.err

    out = tmp_path / "digits"
    words = ["digits", "--out", out, "--quiet", "--workers", 1]
    assert "train: " in run(*words, "--format", "dali")
    assert "already holds this data set" in run(*words, "--format", "dali")
    assert "holds this data set as dali only" in run(*words, code=2)
    run(*words, "--format", "both", "--overwrite")
    assert "already holds this data set" in run(*words)
    assert cli.main(["verify", str(out), "--quiet"]) == 0
    assert "every checksum holds" in capsys.readouterr().out
    source = open_source("digits")
    for split in source.splits:
        shards = TarShards(ConvertedDataset.open(out).shards(split))
        assert all((shards.image(i) == source.splits[split].image(i)).all() for i in range(0, len(shards), 7))


@needs_dali
@pytest.mark.parametrize("crop", [CropSpec("none"), CropSpec("center", 12)], ids=lambda crop: crop.kind)
def test_a_damaged_image_in_a_shard_is_named_and_the_loader_goes_on(tmp_path, crop):
    dataset = write_small(tmp_path / "train.beton", [(40, 50)] * 24, "jpg")
    shards = TarShards(dataset.shards("train"))
    tar = shards.tars[0]
    image, whole = shards.encoded(13).tobytes(), tar.read_bytes()
    arguments = {"batch_size": 4, "device": "cpu", "train": False, "num_workers": 1, "crop": crop}
    loader = make_loader(dataset, "train", backend="dali", **arguments)
    before = list(loader.epoch(0))
    tar.write_bytes(whole.replace(image, image[:2] + bytes(len(image) - 2)))
    with pytest.raises(
        RuntimeError, match=r"train-00000.tar, image 13: damaged JPEG data .* convert the data set again"
    ):
        list(loader.epoch(0))
    tar.write_bytes(whole)
    assert all(torch.equal(a.images, b.images) for a, b in zip(before, loader.epoch(0), strict=True))
    loader.close()


@needs_dali
def test_a_failure_without_a_damaged_image_names_the_candidates(tmp_path, monkeypatch):
    from loaders.readers import dali_loader

    dataset = write_small(tmp_path / "train.beton", [(40, 50)] * 8, "jpg")
    arguments = {"batch_size": 2, "device": "cpu", "train": False, "num_workers": 1, "crop": CropSpec("none")}
    loader = make_loader(dataset, "train", backend="dali", **arguments)

    def fail(self):
        raise RuntimeError("Error in operator, encountered:\n\n out of luck\nmore")

    monkeypatch.setattr(dali_loader._Decoder, "_run_once", fail)
    with pytest.raises(RuntimeError, match=r"one of the images 0 to 5, .*\(out of luck\); the 'torch' backend"):
        next(loader.epoch(0))


@needs_dali
def test_dali_threads_end_with_the_loader(tmp_path):
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    dataset = write_small(tmp_path / "train.beton", [(40, 50)] * 24, "raw")
    before = threads()
    arguments = {"batch_size": 2, "device": "cpu", "train": True, "num_workers": 3, "crop": CropSpec("none")}
    loader = make_loader(dataset, "train", backend="dali", **arguments)
    running = loader.epoch(0)
    next(running)
    assert threads() > before
    loader.close()
    assert list(running) == []
    assert threads() <= before
    with pytest.raises(ValueError, match="num_workers 0 for the 'dali' backend: give 1 or more threads"):
        make_loader(dataset, "train", backend="dali", **{**arguments, "num_workers": 0})


def test_without_dali_the_backend_says_what_to_install(tmp_path, monkeypatch):
    dataset = write_small(tmp_path / "train.beton", [(8, 8)] * 4, "raw")
    monkeypatch.delitem(sys.modules, "loaders.readers.dali_loader", raising=False)
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"need NVIDIA DALI, .* install nvidia-dali-cuda130"):
        make_loader(dataset, "train", backend="dali", batch_size=2, device="cpu", train=True, crop=CropSpec("none"))
