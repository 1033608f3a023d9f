"""The command line of tools/convert_dataset.py: what it makes, what it says, and with which exit code it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastlt import cli
from fastlt.commands import signals
from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.manifest import file_checksums
from loaders.stored.progress import total_progress

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "convert_dataset.py"


def convert(*words: object) -> int:
    """The exit code of `python tools/convert_dataset.py words`, in this process."""
    return cli.main(["convert", *map(str, words)], prog="convert_dataset.py")


def run(*words: object, code: int = 0) -> None:
    assert convert(*words) == code


def verify(folder: Path, code: int = 0) -> None:
    assert cli.main(["verify", str(folder), "--quiet"]) == code


def usage_error(capsys, *words: object) -> str:
    """The message of a command line that argparse refuses."""
    with pytest.raises(SystemExit) as stopped:
        convert(*words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "digits"
    run("digits", "--out", out, "--imbalance", 20, "--quiet")
    return out


@pytest.fixture
def folder(tmp_path) -> Path:
    """An image folder with three noisy classes, 12 train and 3 test images each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 3)):
        for name in ("ant", "bee", "cow"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i:02d}.jpg")
    return tmp_path / "images"


def test_the_same_command_again_has_nothing_to_do(digits, capsys):
    before = (digits / "manifest.json").stat()
    run("digits", "--out", digits, "--imbalance", 20, "--workers", 1)
    assert "already holds this data set: nothing to do" in capsys.readouterr().out
    assert (digits / "manifest.json").stat() == before


def test_another_data_set_is_not_overwritten_unasked(digits, capsys):
    run("digits", "--out", digits, "--imbalance", 10, code=2)
    assert "holds another data set: imbalance_factor is 20.0, not 10.0; give another" in capsys.readouterr().err
    assert ConvertedDataset.open(digits).class_counts().counts[0] == 128


def test_verify_says_so_and_finds_damage(digits, tmp_path, capsys):
    verify(digits)
    assert "every checksum holds, and all 931 images decode" in capsys.readouterr().out
    copy = Path(shutil.copytree(digits, tmp_path / "copy"))
    with (copy / "meta.beton").open("r+b") as file:
        file.seek(2**13)
        file.write(b"damage")
    verify(copy, code=1)
    assert "meta.beton: its sha256" in capsys.readouterr().err
    (copy / "meta.beton").unlink()
    verify(copy, code=1)
    assert "meta.beton is missing" in capsys.readouterr().err
    (copy / "manifest.json").write_text("{")
    verify(copy, code=1)
    assert "manifest.json is not a manifest" in capsys.readouterr().err
    verify(tmp_path, code=2)
    assert "not a converted data set" in capsys.readouterr().err


def test_nothing_is_converted_into_the_folder_of_the_images(folder, capsys):
    for out in (folder, folder / "out"):
        words = ["--out", out, "--overwrite"] if out == folder else ["--out", out]
        run("image_folder", "--root", folder, *words, "--meta-per-class", 4, "--quiet", code=2)
    assert f"{folder / 'out'} lies in {folder}, the folder of the images, where a folder is a class" in (
        capsys.readouterr().err
    )
    assert sorted(path.name for path in folder.iterdir()) == ["test", "train"]


@pytest.mark.filterwarnings("error::tqdm.TqdmWarning")
def test_the_bar_of_a_conversion_ends_at_its_end():
    """Its parts are added up with rounding; tqdm warns of more than the whole."""
    for count in (1, 3, 7, 192):
        with total_progress(count, enabled=True) as bar:
            for share in (0.9, 0.07, 0.03):
                advance = bar.phase("part", share, 10)
                for _ in range(10):
                    advance(1)
                bar._bar.refresh()


def test_an_image_folder_is_converted_scaled_and_overwritten(folder, tmp_path, capsys):
    words = ["image_folder", "--root", folder, "--out", tmp_path / "out", "--meta-per-class", 4, "--quiet"]
    run(*words, "--imbalance", 4, "--mode", "jpg", "--max-resolution", 32)
    out = capsys.readouterr().out
    assert "train: 14 images of " in out
    assert "3 classes of 8 to 2 training images" in out
    dataset = ConvertedDataset.open(tmp_path / "out")
    assert dataset.class_names == ("ant", "bee", "cow")
    assert max(dataset.manifest["splits"]["train"]["image_size"]["max"]) == 32
    run(*words, "--overwrite")
    assert not ConvertedDataset.open(tmp_path / "out").manifest["splits"]["train"]["image_size"]["same"]
    verify(tmp_path / "out")


def test_other_images_under_the_same_options_are_not_taken_for_the_converted_ones(folder, tmp_path, capsys):
    words = ["image_folder", "--out", tmp_path / "out", "--meta-per-class", 4, "--quiet", "--root"]
    run(*words, folder)
    folder.rename(tmp_path / "moved")
    run(*words, tmp_path / "moved")
    assert capsys.readouterr().out.endswith("already holds this data set: nothing to do\n")
    run(*words, folder)  # the images may be gone after the conversion
    assert "nothing to do (though the images are not as they were: root " in capsys.readouterr().out
    run(*words, folder, "--num-classes", 5, code=2)
    assert "--num-classes is 5, and" in capsys.readouterr().err
    (tmp_path / "moved" / "train" / "ant" / "11.jpg").rename(tmp_path / "moved" / "train" / "ant" / "12.jpg")
    run(*words, tmp_path / "moved", code=2)
    assert "was made from other images than" in capsys.readouterr().err


def test_bad_images_stop_or_are_skipped(folder, tmp_path, capsys):
    bad = folder / "train" / "bee" / "05.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    words = ["image_folder", "--root", folder, "--out", tmp_path / "out", "--meta-per-class", 4, "--quiet"]
    run(*words, code=2)
    error = capsys.readouterr().err
    assert "1 of 45 images cannot be converted" in error
    assert str(bad) in error
    assert not (tmp_path / "out").exists()
    run(*words, "--on-error", "skip")
    assert "1 images could not be decoded" in capsys.readouterr().out
    assert str(bad) in (tmp_path / "out" / "skipped.txt").read_text()
    assert ConvertedDataset.open(tmp_path / "out").class_counts().counts.tolist() == [8, 7, 8]


def test_what_is_damaged_is_left_out_before_the_splits_are_chosen(folder, tmp_path):
    """The meta set has its three images a class, and the tail its length, as long as there are good images."""
    shutil.copytree(folder / "test", folder / "val")
    for path in sorted((folder / "val").glob("*/*.jpg")):
        path.write_bytes(path.read_bytes() + b"of val")  # behind the end of a JPEG nothing is read
        (path.parent / f"{path.stem}-first.jpg").write_bytes(b"damaged")
    for path in sorted((folder / "train" / "cow").iterdir())[:2]:
        path.write_bytes(b"damaged")
    words = ["image_folder", "--root", folder, "--meta-per-class", 3, "--on-error", "skip", "--quiet", "--workers", 2]
    run(*words, "--out", tmp_path / "out", "--imbalance", 5)
    made = ConvertedDataset.open(tmp_path / "out")
    assert made.class_counts().counts.tolist() == [12, 5, 2]
    assert np.bincount(made.labels("meta")).tolist() == [3, 3, 3]
    assert len((tmp_path / "out" / "skipped.txt").read_text().splitlines()) == 11
    assert (made.manifest["skipped"], made.manifest["splits"]["meta"]["skipped"]) == (11, 9)
    run(*words, "--out", tmp_path / "out", "--imbalance", 5)  # the same command again: nothing to do
    shutil.rmtree(folder / "val")
    run(*words, "--out", tmp_path / "held")
    held = ConvertedDataset.open(tmp_path / "held")
    assert held.class_counts().counts.tolist() == [9, 9, 7]
    assert np.bincount(held.labels("meta")).tolist() == [3, 3, 3]
    for path in sorted((folder / "train" / "bee").iterdir()):
        path.write_bytes(b"damaged")
    run(*words, "--out", tmp_path / "none", code=2)


def test_skipping_changes_nothing_where_nothing_is_damaged(folder, tmp_path):
    words = ["image_folder", "--root", folder, "--meta-per-class", 3, "--imbalance", 3, "--quiet", "--workers", 2]
    run(*words, "--out", tmp_path / "stop")
    run(*words, "--out", tmp_path / "skip", "--on-error", "skip")
    stop, skip = (ConvertedDataset.open(tmp_path / name).manifest for name in ("stop", "skip"))
    for manifest in (stop, skip):  # FFCV's processes lay the images out in any order; `contents` is of the images
        del manifest["manifest_sha256"], manifest["files"]
    assert stop == skip


def test_copies_in_two_splits_are_refused_and_those_in_one_are_named(folder, tmp_path, capsys):
    shutil.copy(folder / "train" / "ant" / "03.jpg", folder / "train" / "ant" / "03 again.jpg")
    shutil.copy(folder / "train" / "bee" / "04.jpg", folder / "train" / "cow" / "04 of bee.jpg")
    words = ["image_folder", "--root", folder, "--out", tmp_path / "out", "--meta-per-class", 2, "--quiet"]
    run(*words)
    out = capsys.readouterr().out
    assert "files of equal contents: 1 under two labels, 1 under one label: " in out
    assert f"under two labels train {folder / 'train' / 'bee' / '04.jpg'} train" in out
    made = ConvertedDataset.open(tmp_path / "out")
    assert made.manifest["duplicates"] == {"two_splits": 0, "two_labels": 1, "one_label": 1}
    assert made.class_counts().counts.tolist() == [11, 10, 11]

    shutil.copy(folder / "test" / "cow" / "01.jpg", folder / "train" / "cow" / "00 copy.jpg")
    words[4] = tmp_path / "other"
    run(*words, code=2)
    assert (
        f"1 files of equal contents are in both the train split and the test split, so accuracies would be too high: "
        f"{folder}/train/cow/00 copy.jpg and {folder}/test/cow/01.jpg. Take them out"
    ) in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    run(*words, "--allow-duplicates")
    assert "files of equal contents: 1 in two splits, 1 under two labels, 1 under one label" in capsys.readouterr().out
    lines = (tmp_path / "other" / "duplicates.txt").read_text().splitlines()
    assert lines[0].split("\t") == [
        "in two splits",
        *("train", str(folder / "train" / "cow" / "00 copy.jpg")),
        *("test", str(folder / "test" / "cow" / "01.jpg")),
    ]
    assert len(lines) == 3


def test_names_that_are_not_utf8_are_converted_and_written(folder, tmp_path, capfd):
    for split in ("train", "test"):
        os.rename(folder / split / "bee", os.fsencode(folder / split) + b"/caf\xe9")
    bad = os.fsencode(folder) + b"/train/caf\xe9/b\xe4d.jpg"
    Path(os.fsdecode(bad)).write_bytes(b"damaged")
    odd = os.fsencode(folder.parent) + b"/im\xe4ges"
    os.rename(folder, odd)
    words = ["image_folder", "--root", os.fsdecode(odd), "--out", tmp_path / "out", "--meta-per-class", 2, "--quiet"]
    run(*words, "--format", "both", code=2)
    run(*words, "--format", "both", "--on-error", "skip")
    assert r"all that is not held out of" in capfd.readouterr().out
    made = ConvertedDataset.open(tmp_path / "out")
    assert made.class_names == ("ant", r"caf\xe9", "cow")
    assert r"im\xe4ges/train" in made.manifest["splits"]["train"]["provenance"]
    assert os.fsencode(odd) + b"/train/caf\xe9/b\xe4d.jpg" in (tmp_path / "out" / "skipped.txt").read_bytes()
    verify(tmp_path / "out")


def test_progress_is_shown_with_a_rate(folder, tmp_path, capsys):
    run("image_folder", "--root", folder, "--out", tmp_path / "out", "--meta-per-class", 4)
    error = capsys.readouterr().err
    assert "convert: images: " in error
    assert "convert: checksums: 100%" in error
    assert "45/45 img" in error
    assert "left, " in error
    assert "img/s" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digitz", "--out", "x"], "did you mean 'digits'"),
        ([], "the following arguments are required: SOURCE, --out"),
        (["digits"], "the following arguments are required: --out"),
        (["digits", "--out", "x", "--train-list", "y"], "--train-list is for list_file and table and coco only"),
        (["image_folder", "--out", "x", "--convention", "ldam"], "--convention is for cifar10 and cifar100 only"),
        (["digits", "--out", "x", "--imbalance", "ten"], "--imbalance: 'ten' is not a number from 1 (balanced) on"),
        (["digits", "--out", "x", "--imbalance", "0.5"], "--imbalance: '0.5' is not a number from 1 (balanced) on"),
        (["digits", "--out", "x", "--imbalance", "nan"], "--imbalance: 'nan' is not"),
        (["digits", "--out", "x", "--workers", "0"], "--workers: '0' is not a whole number from 1 to 1024"),
        (["digits", "--out", "x", "--meta-per-class", "2.5"], "--meta-per-class: '2.5' is not a whole number from 1"),
        (
            ["digits", "--out", "x", "--jpeg-quality", "101"],
            "--jpeg-quality: '101' is not a whole number from 1 to 100",
        ),
        (["digits", "--out", "x", "--jpeg-quality", "90"], "has no meaning for raw pixels: add --mode jpg"),
        (
            ["digits", "--out", "x", "--mode", "proportion", "--format", "both"],
            "is for --format ffcv only, not for both",
        ),
        (["digits", "--out", "x", "--root", "y"], "--root is for cifar10 and cifar100 and image_folder and list_file"),
        (["image_folder", "--out", "x", "--no-download"], "--no-download is for cifar10 and cifar100 only"),
        (["cifar10", "--out", "x"], "cifar10 needs --root DIR: the folder that holds its images"),
        (
            ["digits", "--out", "x", "--allow-duplicates"],
            "--allow-duplicates is for image_folder and list_file and table",
        ),
        (["digits", "--out", "x", "--mode", "smart"], "argument --mode: invalid choice: 'smart'"),
        (["digits", "--out", "x", "--format", "tar"], "argument --format: invalid choice"),
    ],
)
def test_command_lines_that_make_no_sense(capsys, words, message):
    assert message in usage_error(capsys, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits", "--imbalance", "1000"], "it can be at most 128"),
        (["digits", "--meta-per-class", "500"], "digits has room for 1 to"),
        (["image_folder", "--root", "absent"], "does not exist"),
        (["list_file", "--root", "."], "list_file needs --train-list: a file of"),
        (["cifar10", "--root", ".", "--no-download"], "put cifar-10-python.tar.gz"),
    ],
)
def test_bad_input_is_one_message_before_any_work(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    run(*words, "--out", "x", code=2)
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("convert_dataset.py: error: ")
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_usage_error_does_not_wait_for_torch(tmp_path):
    """Nothing heavy may be imported to refuse a command line or a missing folder."""
    script = (
        "import sys; from fastlt import cli\n"
        f"words = ['image_folder', '--root', {str(tmp_path / 'absent')!r}, '--out', 'x']\n"
        "assert cli.main(['convert', *words]) == 2\n"
        "print(sorted({'torch', 'ffcv', 'sklearn', 'torchvision', 'numba', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("how", "when"),
    [
        (signal.SIGKILL, ".lock"),
        (signal.SIGKILL, "pieces/*.json"),
        (signal.SIGINT, "pieces/*.json"),
        (signal.SIGTERM, "pieces/*.json"),
        (signal.SIGTERM, ".lock"),
    ],
    ids=["killed at the start", "killed", "interrupted", "terminated", "terminated at the start"],
)
def test_an_interrupted_conversion_leaves_nothing_that_opens_and_the_same_command_goes_on(
    tmp_path, no_shared_memory_left, capsys, how, when
):
    """Ended when a file `when` appears: its processes end, too, and the same command then succeeds."""
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    for split, count in (("train", 60), ("test", 2)):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels[0, 0] = i, ord(name), len(split)  # no two are equal
                Image.fromarray(pixels).save(folder / f"{i}.bmp")
    words = ["image_folder", "--root", tmp_path / "images", "--out", tmp_path / "out", "--meta-per-class", 2]
    words = [str(word) for word in [*words, "--workers", 2, "--quiet"]]
    process = subprocess.Popen([sys.executable, str(TOOL), *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any((tmp_path / "out.partial").glob(when)) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(how)
    error = process.communicate(timeout=60)[1]
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how)
    kept = sum(int(path.name.split(".")[1]) for path in (tmp_path / "out.partial" / "pieces").glob("*.json"))
    if how != signal.SIGKILL:
        told = f"{kept:,} finished images are kept in {tmp_path / 'out.partial'}: the same command goes on from there"
        assert told in error or (kept == 0 and "nothing was left behind" in error)
        assert (tmp_path / "out.partial").exists() == (kept > 0)
    run(*words)
    taken = f"{kept} of 124 images are taken over from an interrupted conversion\n"
    assert (taken in capsys.readouterr().out) == (kept > 0)
    assert kept > 0 or when == ".lock"
    assert ConvertedDataset.open(tmp_path / "out").class_counts().counts.tolist() == [58, 58]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGTERM, signals.Terminated), (signal.SIGINT, KeyboardInterrupt)],
    ids=["terminated", "interrupted"],
)
def test_a_signal_in_a_finaliser_is_not_lost(capsys, number, expected):
    class Finalised:
        def __del__(self):
            signal.raise_signal(number)

    def work():
        Finalised()  # gone at once; Python drops what its finaliser raises
        time.sleep(30)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGALRM)]
    with pytest.raises(expected), signals.ended_by_signals():
        work()
    assert capsys.readouterr().err == ""
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGALRM)] == handlers
    time.sleep(2 * signals.AGAIN_S)  # nothing comes after it


def test_an_interrupted_checksum_does_not_wait_for_the_end_of_a_large_file(tmp_path):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 34)  # without blocks on the disk; half a minute of hashing
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()
    start = time.monotonic()
    with pytest.raises(signals.Terminated), signals.ended_by_signals():
        file_checksums([large, large])
    assert time.monotonic() - start < 10


def test_real_cifar10_by_both_conventions(real_data, tmp_path):
    root = real_data("cifar-10-batches-py").parent
    for convention, total in (("ldam", 12_406), ("paper", 12_380)):
        out = tmp_path / convention
        run("cifar10", "--root", root, "--out", out, "--imbalance", 100, "--convention", convention, "--quiet")
        dataset = ConvertedDataset.open(out)
        assert dataset.class_counts().counts.sum() == total
        assert dataset.manifest["splits"]["test"]["image_size"]["max"] == [32, 32]
        verify(out)


def test_real_list_files(real_data, tmp_path):
    root = real_data("tiny100_lt")
    lists = [word for split in ("train", "meta", "test") for word in (f"--{split}-list", root / f"{split}.txt")]
    words = ["--imbalance", 100, "--out", tmp_path / "out", "--format", "both", "--quiet"]
    run("list_file", "--root", root / "images", *lists, *words)
    dataset = ConvertedDataset.open(tmp_path / "out")
    counts = dataset.class_counts().counts
    assert (counts.sum(), counts[0], counts[-1]) == (10_626, 490, 4)
    verify(tmp_path / "out")
    crop = CropSpec("center", 56)
    batches = {}
    for backend in ("resident", "torch", "ffcv"):
        loader = make_loader(dataset, "meta", backend=backend, batch_size=250, device="cpu", train=False, crop=crop)
        batches[backend] = list(loader.epoch(0))
        loader.close()
    labels = torch.cat([batch.labels for batch in batches["torch"]])
    assert torch.bincount(labels).tolist() == [10] * 100
    for backend, of_backend in batches.items():
        for a, b in zip(of_backend, batches["torch"], strict=True):
            assert torch.equal(a.images, b.images), backend
            assert torch.equal(a.index, b.index), backend
