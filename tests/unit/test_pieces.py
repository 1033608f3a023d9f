"""What an interrupted conversion has finished: it is taken over where it serves, and only there; nothing twice."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_betons import smooth_images

from loaders.sources import ArraySplit, FileSplit, Source, open_source
from loaders.stored import convert as convert_module
from loaders.stored import encode, image_check, piece_writer
from loaders.stored.convert import convert
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.pieces import PieceStore
from loaders.stored.verify import verify

COUNTS = {"train": 23, "meta": 5, "test": 7}
BOTH = ("ffcv", "dali")
SMALL = FfcvOptions("jpg", max_resolution=32, num_workers=1)


@dataclass(frozen=True)
class Failing(FileSplit):
    """Files on a disk that goes away at image `at`."""

    at: int = 10**9

    def contents(self, i: int) -> bytes:
        if i == self.at:
            raise RuntimeError("the disk went away")
        return super().contents(i)


@pytest.fixture
def root(tmp_path) -> Path:
    """JPEG files of several sizes, some of which need scaling to 32 px: two classes in a list for each split."""
    draw = np.random.default_rng(0)
    for split, count in COUNTS.items():
        shapes = [(int(draw.integers(20, 60)), int(draw.integers(20, 60))) for _ in range(count)]
        lines = []
        for i, image in enumerate(smooth_images(shapes, seed=count)):
            (tmp_path / split).mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / split / f"{i}.jpg", quality=90)
            lines.append(f"{split}/{i}.jpg {i % 2}\n")
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    return tmp_path


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Some pieces and shards, of few images."""
    monkeypatch.setattr(piece_writer, "PIECE_IMAGES", 4)
    monkeypatch.setattr(piece_writer, "shard_size", lambda count, at_least: 6)


def source_of(root: Path, at: int = 10**9) -> Source:
    lists = {f"{split}_list": root / f"{split}.txt" for split in COUNTS}
    source = open_source("list_file", root=root, **lists)
    splits = {name: Failing(**vars(split)) for name, split in source.splits.items()}
    splits["train"] = replace(splits["train"], at=at)
    return Source(source.name, source.class_names, splits, source.candidates)


def converted(source: Source, out: Path, options=SMALL, formats=BOTH, **more) -> ConvertedDataset:
    return convert(source, out, options=options, request={}, formats=formats, progress=False, **more)


def interrupted(root: Path, out: Path, at: int = 14, **more) -> None:
    """A conversion that fails at image `at` of train."""
    with pytest.raises(ValueError, match=r"14.jpg: the disk went away\n\d+ finished images are kept in .*--restart"):
        converted(source_of(root, at), out, **more)
    assert not out.exists()


def same(one: ConvertedDataset, other: ConvertedDataset) -> bool:
    return one.identity() == other.identity() and verify(one, progress=False) == []


def log_calls(monkeypatch, path: Path) -> None:
    """Each decoding of a file appends a line to `path`, in whichever process."""

    def logged(function):
        def call(data, *arguments):
            with path.open("a") as file:
                file.write(f"{len(data)} {hash(bytes(data))}\n")
            return function(data, *arguments)

        return call

    from loaders.stored import ffcv_kernels

    monkeypatch.setattr(encode, "decode_bytes", logged(encode.decode_bytes))
    monkeypatch.setattr(image_check, "decode_bytes", logged(image_check.decode_bytes))
    monkeypatch.setattr(ffcv_kernels, "decode_jpeg", logged(ffcv_kernels.decode_jpeg))


def counted(path: Path) -> Counter[str]:
    return Counter(path.read_text().splitlines()) if path.exists() else Counter()


@pytest.mark.parametrize(
    ("options", "formats"),
    [(SMALL, BOTH), (FfcvOptions("jpg", num_workers=2), BOTH), (FfcvOptions(num_workers=2), ("ffcv",))],
    ids=["scaled, both", "jpg, both", "raw"],
)
def test_every_image_is_decoded_once(root, tmp_path, monkeypatch, options, formats):
    log_calls(monkeypatch, tmp_path / "log")
    converted(source_of(root), tmp_path / "out", options, formats)
    assert set(counted(tmp_path / "log").values()) == {1}
    assert len(counted(tmp_path / "log")) == sum(COUNTS.values())


@pytest.mark.parametrize("formats", [("ffcv",), ("dali",), BOTH], ids=" and ".join)
def test_the_same_conversion_goes_on_and_ends_as_if_it_had_not_been_interrupted(root, tmp_path, monkeypatch, formats):
    reference = converted(source_of(root), tmp_path / "reference", formats=formats)
    interrupted(root, tmp_path / "out", formats=formats)
    kept = sum(len(piece["names"]) for piece in records(tmp_path / "out.partial"))
    assert 12 <= kept < sum(COUNTS.values())
    log_calls(monkeypatch, tmp_path / "log")
    said = []
    made = converted(source_of(root), tmp_path / "out", formats=formats, say=said.append)
    assert said == [f"{kept} of {sum(COUNTS.values())} images are taken over from an interrupted conversion"]
    assert len(counted(tmp_path / "log")) == sum(COUNTS.values()) - kept
    assert same(made, reference)
    assert made.manifest["kept_files"] == reference.manifest["kept_files"]
    assert not (tmp_path / "out.partial").exists()
    if "dali" in formats:
        shards = sorted((tmp_path / "reference" / "dali").glob("*-0*"))
        assert all((made.root / "dali" / path.name).read_bytes() == path.read_bytes() for path in shards)


def records(partial: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((partial / "pieces").glob("*.json"))]


@pytest.mark.parametrize("failing", ["finish_split", "content_sha256", "write_durably", "publish"])
def test_what_is_stored_is_not_stored_again_wherever_the_end_was_interrupted(root, tmp_path, monkeypatch, failing):
    reference = converted(source_of(root), tmp_path / "reference")

    def interrupt(*arguments, **more):
        raise KeyboardInterrupt

    calls = []
    real = getattr(convert_module, failing)
    with monkeypatch.context() as patched:
        # The second time, where it is called for each split: half of the ends have been made.
        patched.setattr(
            convert_module, failing, lambda *a, **k: interrupt() if calls or failing in ("write_durably", "publish")
            else (calls.append(1), real(*a, **k))[1],
        )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            converted(source_of(root), tmp_path / "out")
    log_calls(monkeypatch, tmp_path / "log")
    made = converted(source_of(root), tmp_path / "out")
    assert counted(tmp_path / "log") == Counter()
    assert same(made, reference)


def test_killed_when_the_folder_has_its_name_the_rest_is_removed(root, tmp_path, monkeypatch):
    from loaders.stored import atomic_folder

    def interrupt(path, **more):
        if path.name == "pieces":
            os._exit(9)
        remove(path, **more)

    remove = atomic_folder.shutil.rmtree
    child = os.fork()
    if not child:
        monkeypatch.setattr(atomic_folder.shutil, "rmtree", interrupt)
        converted(source_of(root), tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert verify(ConvertedDataset.open(tmp_path / "out"), progress=False) == []
    assert (tmp_path / "out.partial").exists()
    atomic_folder.remove_published(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_what_has_changed_since_is_converted_anew(root, tmp_path):
    """A file with other pixels, one that is gone from the list, one that is new, and labels that are others."""
    interrupted(root, tmp_path / "out")
    Image.fromarray(smooth_images([(41, 22)], seed=9)[0]).save(root / "train" / "2.jpg")
    Image.fromarray(smooth_images([(25, 26)], seed=10)[0]).save(root / "train" / "new.jpg")
    lines = (root / "train.txt").read_text().splitlines()
    lines = [f"train/{i}.jpg {1 - i % 2}" for i in range(5)] + ["train/new.jpg 1"] + lines[6:]
    (root / "train.txt").write_text("\n".join(lines) + "\n")
    said = []
    made = converted(source_of(root), tmp_path / "out", say=said.append)
    assert "others are not what they were, or not asked for" in said[0]
    assert same(made, converted(source_of(root), tmp_path / "reference"))


@pytest.mark.parametrize("formats", [("ffcv",), ("dali",)], ids=["ffcv", "dali"])
def test_damaged_pieces_are_made_again(root, tmp_path, formats):
    reference = converted(source_of(root), tmp_path / "reference", formats=formats)
    interrupted(root, tmp_path / "out", formats=formats)
    partial = tmp_path / "out.partial"
    before = sum(len(piece["names"]) for piece in records(partial))
    row = records(partial)[1]["rows"][2]
    if formats == ("ffcv",):
        path, place = partial / "converted" / "train.beton", row[8]
    else:
        path, place = partial / "pieces" / "000000001.tar", row[10]
    data = bytearray(path.read_bytes())
    data[place + 40] ^= 1
    path.write_bytes(data)
    first = sorted((partial / "pieces").glob("*.json"))[0]
    first.write_text(first.read_text()[:-30])
    said = []
    made = converted(source_of(root), tmp_path / "out", formats=formats, say=said.append)
    lost = 8 if formats == ("ffcv",) else 12
    assert said[0].startswith(f"{before - lost} of {sum(COUNTS.values())} images are taken over")
    assert same(made, reference)


def test_a_conversion_of_another_kind_is_refused_and_may_begin_anew(root, tmp_path):
    interrupted(root, tmp_path / "out")
    kept = records(tmp_path / "out.partial")
    for options, formats, difference in (
        (FfcvOptions("jpg", max_resolution=48, num_workers=1), BOTH, "max_resolution is 32, not 48"),
        (SMALL, ("dali",), r"formats is \['dali', 'ffcv'\], not \['dali'\]"),
    ):
        with pytest.raises(ValueError, match=rf"out.partial holds an unfinished .* kind: {difference}. .*--restart"):
            converted(source_of(root), tmp_path / "out", options, formats)
    moved = root.with_name("moved")
    root.rename(moved)
    try:
        with pytest.raises(ValueError, match=r"root is '.*', not '.*moved'"):
            converted(source_of(moved), moved / "out")
    finally:
        moved.rename(root)
    assert records(tmp_path / "out.partial") == kept
    other = FfcvOptions("jpg", max_resolution=48, num_workers=1)
    said = []
    made = converted(source_of(root), tmp_path / "out", other, restart=True, say=said.append)
    assert said == []
    assert same(made, converted(source_of(root), tmp_path / "reference", other))


def test_bad_images_are_refused_and_what_is_finished_serves_the_next_command(root, tmp_path, monkeypatch):
    whole = (root / "train" / "3.jpg").read_bytes()
    for path in ("train/3.jpg", "train/20.jpg", "meta/1.jpg"):
        (root / path).write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"(?s)3 of 35 images cannot be converted.*35 finished images are kept"):
        converted(source_of(root), tmp_path / "out")
    log_calls(monkeypatch, tmp_path / "log")
    with pytest.raises(ValueError, match=r"3 of 35 images cannot be converted"):
        converted(source_of(root), tmp_path / "out")
    assert counted(tmp_path / "log") == Counter()
    (root / "train" / "3.jpg").write_bytes(whole)
    skipped = converted(source_of(root), tmp_path / "out", on_error="skip")
    assert sum(counted(tmp_path / "log").values()) == 1
    reference = converted(source_of(root), tmp_path / "reference", on_error="skip")
    assert same(skipped, reference)
    for path in (tmp_path / "reference" / "dali").glob("*-0*"):
        assert (skipped.root / "dali" / path.name).read_bytes() == path.read_bytes()
    assert (skipped.root / "skipped.txt").read_text() == (reference.root / "skipped.txt").read_text()


def test_skipping_stores_what_a_conversion_of_the_good_images_alone_stores(root, tmp_path, monkeypatch):
    """The splits are drawn: which image is where follows from which are good, and images move between splits."""
    lines = (root / "train.txt").read_text() + (root / "meta.txt").read_text() + (root / "test.txt").read_text()
    (root / "all.txt").write_text(lines)

    def source() -> Source:
        lists = {"train_list": root / "all.txt"}
        return open_source("list_file", root=root, **lists, split=(0.5, 0.2, 0.3), imbalance_factor=1.5)

    bad = ["train/1.jpg", "train/8.jpg", "test/2.jpg", "meta/4.jpg", "train/22.jpg"]
    for path in bad:
        (root / path).write_bytes(b"\xff\xd8 damaged " + path.encode())
    log_calls(monkeypatch, tmp_path / "log")
    skipped = converted(source(), tmp_path / "skipped", on_error="skip")
    assert counted(tmp_path / "log").most_common(1)[0][1] <= 2  # those that have moved
    (root / "all.txt").write_text("".join(line for line in lines.splitlines(True) if line.split()[0] not in bad))
    good = converted(source(), tmp_path / "good")
    assert same(skipped, good)
    assert (skipped.root / "images.tsv").read_text() == (good.root / "images.tsv").read_text()
    names = [line.split("\t")[1] for line in (skipped.root / "skipped.txt").read_text().splitlines()]
    assert sorted(names) == sorted(str(root / path) for path in bad)


@pytest.mark.parametrize("replaced", [False, True], ids=["the same files", "replaced files"])
@pytest.mark.parametrize("failing", ["finish_split", "_describe"])
@pytest.mark.parametrize(
    ("options", "formats"),
    [(SMALL, ("dali",)), (SMALL, BOTH), (FfcvOptions(num_workers=1), ("ffcv",))],
    ids=["dali", "both", "raw"],
)
def test_a_conversion_that_skips_goes_on_to_the_same_end(
    root, tmp_path, monkeypatch, options, formats, failing, replaced
):
    """The second phase has stored images of groups in which the first one does not look for them."""
    lines = (root / "train.txt").read_text() + (root / "meta.txt").read_text() + (root / "test.txt").read_text()
    (root / "all.txt").write_text(lines)
    for path in ("train/1.jpg", "train/8.jpg", "test/2.jpg", "meta/4.jpg", "train/22.jpg"):
        (root / path).write_bytes(b"\xff\xd8 damaged " + path.encode())

    def make(out: Path) -> ConvertedDataset:
        drawn = {"split": (0.5, 0.2, 0.3), "imbalance_factor": 1.5}
        source = open_source("list_file", root=root, train_list=root / "all.txt", **drawn)
        return converted(source, out, options, formats, on_error="skip")

    def interrupt(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(convert_module, failing, interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out")
    if replaced:
        for i in range(2, 20, 3):
            Image.fromarray(smooth_images([(31, 22 + i)], seed=i)[0]).save(root / "train" / f"{i}.jpg")
    assert same(make(tmp_path / "out"), make(tmp_path / "reference"))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_file_that_changes_while_others_are_skipped_is_seen(root, tmp_path, monkeypatch, damaged):
    (root / "train" / "3.jpg").write_bytes(b"damaged")

    def replace_file(*arguments):
        if damaged:
            (root / "train" / "5.jpg").write_bytes(b"damaged, too")
        else:
            Image.fromarray(smooth_images([(31, 22)], seed=9)[0]).save(root / "train" / "5.jpg")
        return choose(*arguments)

    choose = convert_module._choose
    with monkeypatch.context() as patched:
        patched.setattr(convert_module, "_choose", replace_file)
        if damaged:
            with pytest.raises(ValueError, match=r"(?s)cannot be converted.*train/5.jpg"):
                converted(source_of(root), tmp_path / "out", on_error="skip")
            return
        made = converted(source_of(root), tmp_path / "out", on_error="skip")
    assert same(made, converted(source_of(root), tmp_path / "reference", on_error="skip"))


def test_many_pieces_are_dropped_in_two_listings(tmp_path, monkeypatch):
    store = PieceStore(tmp_path, SMALL, BOTH, {})
    store.begin()
    for number in range(9):
        for name in (f"{number:09d}.4.json", f"{number:09d}.tar"):
            (store.pieces / name).touch()
    listings = []
    glob = Path.glob
    with monkeypatch.context() as patched:
        patched.setattr(Path, "glob", lambda *arguments: (listings.append(arguments), glob(*arguments))[1])
        store.drop(range(7))
        store.drop([])
    assert len(listings) == 2
    left = sorted(path.name for path in store.pieces.iterdir())
    assert left == ["000000007.4.json", "000000007.tar", "000000008.4.json", "000000008.tar"]


def test_images_in_memory_are_taken_over_by_their_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)

    def source(pixels: np.ndarray) -> Source:
        whole = ArraySplit.whole(pixels, np.arange(40) % 2, origin="noise", provenance="noise")
        splits = {"train": whole.subset(np.arange(20)), "meta": whole.subset(np.arange(20, 30))}
        return Source("noise", ("a", "b"), {**splits, "test": whole.subset(np.arange(30, 40))})

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(convert_module, "finish_split", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            converted(source(pixels), tmp_path / "out", FfcvOptions(num_workers=1), ("ffcv",))
    changed = pixels.copy()
    changed[25] = 7
    said = []
    made = converted(source(changed), tmp_path / "out", FfcvOptions(num_workers=1), ("ffcv",), say=said.append)
    assert said[0].startswith("39 of 40 images are taken over")
    np.testing.assert_array_equal(made.stored("meta", "ffcv").image(5), changed[25])


def test_two_lines_with_one_file_get_an_image_each(root, tmp_path):
    lines = (root / "train.txt").read_text()
    (root / "train.txt").write_text(lines + "train/1.jpg 1\ntrain/1.jpg 1\n")
    lists = {f"{split}_list": root / f"{split}.txt" for split in COUNTS}

    def source() -> Source:
        return open_source("list_file", root=root, **lists, allow_duplicates=True)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(convert_module, "publish", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            converted(source(), tmp_path / "out", allow_duplicates=True)
    (root / "train.txt").write_text("train/1.jpg 1\n" + lines + "train/1.jpg 1\n")
    made = converted(source(), tmp_path / "out", allow_duplicates=True)
    assert same(made, converted(source(), tmp_path / "reference", allow_duplicates=True))
