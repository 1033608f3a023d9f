"""Converted data sets on disk: complete or refused, whatever happened to them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlt.recipe import load_recipe
from fastlt.run.dataset import ensure_converted
from loaders.sources import FileSplit, Source, open_source
from loaders.stored import convert as convert_module
from loaders.stored.atomic_folder import publish
from loaders.stored.beton import Beton
from loaders.stored.convert import conversion_request, convert, write_skipped
from loaders.stored.dali_format import ShardWriter
from loaders.stored.damage import DamageError
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.ffcv_format import BetonEnd, FfcvOptions
from loaders.stored.image_check import BadImage
from loaders.stored.manifest import SCHEMA, file_sha256, sealed
from loaders.stored.verify import verify

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = FfcvOptions(num_workers=2)
REQUEST = conversion_request("digits", imbalance_factor=20, options=OPTIONS)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> ConvertedDataset:
    source = open_source("digits", imbalance_factor=20)
    return convert(source, tmp_path_factory.mktemp("data") / "digits", options=OPTIONS, request=REQUEST, progress=False)


@pytest.fixture
def copy(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted.root, tmp_path / "copy"))


@pytest.fixture
def files(tmp_path) -> Source:
    """A source of image files: 6 train, 2 meta and 2 test images of two classes; two of train are damaged."""
    folder = tmp_path / "images"
    folder.mkdir()
    splits = {}
    for gray, (name, count) in zip((0, 100, 200), {"train": 6, "meta": 2, "test": 2}.items(), strict=True):
        paths = [f"{name}{i}.png" for i in range(count)]
        for i, path in enumerate(paths):
            Image.fromarray(np.full((6 + i, 9, 3), gray + i, dtype=np.uint8)).save(folder / path)
        splits[name] = FileSplit(folder, paths, np.arange(count) % 2, f"{name} of the test")
    (folder / "train2.png").write_bytes(b"")
    (folder / "train5.png").write_bytes(b"no image")
    return Source("image_folder", ("cat", "dog"), splits)


def edit(root: Path, **changes) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(sealed({**manifest, **changes}))


def test_what_was_converted_opens(converted):
    source = open_source("digits", imbalance_factor=20)
    opened = ConvertedDataset.open(str(converted.root))
    assert opened.class_names == tuple("0123456789")
    assert opened.num_classes == 10
    for name, split in source.splits.items():
        assert opened.labels(name).dtype == np.int64
        np.testing.assert_array_equal(opened.labels(name), split.labels)
        beton = Beton(opened.beton(name))
        np.testing.assert_array_equal(beton.labels, split.labels)
        assert all((beton.image(i) == split.image(i)).all() for i in range(len(split)))
        assert opened.manifest["splits"][name]["image_size"] == {"same": True, "min": [8, 8], "max": [8, 8]}
    counts = opened.class_counts((50, 10))
    np.testing.assert_array_equal(counts.counts, np.bincount(source.splits["train"].labels))
    assert (counts.names, counts.shots) == (opened.class_names, (50, 10))
    assert verify(opened, progress=False) == []
    with pytest.raises(ValueError, match="did you mean 'test'"):
        opened.labels("tests")


def test_the_manifest_says_what_is_inside(converted):
    manifest = converted.manifest
    assert manifest["schema"] == SCHEMA
    assert manifest["splits"]["test"] == {
        "count": 400,
        "class_counts": [40] * 10,
        "provenance": "scikit-learn load_digits, seed 0: 40 a class",
        "image_size": {"same": True, "min": [8, 8], "max": [8, 8]},
        "skipped": 0,
    }
    assert set(manifest["files"]) == {"labels.npz", "train.beton", "meta.beton", "test.beton"}
    assert manifest["formats"] == {"ffcv": {"mode": "raw", "max_resolution": None, "jpeg_quality": 90}}
    assert set(manifest["versions"]) >= {"python", "numpy", "pillow", "ffcv"}
    assert manifest["skipped"] == 0
    assert sorted(path.name for path in converted.root.iterdir()) == sorted([*manifest["files"], "manifest.json"])


def test_class_names_of_other_bytes_are_text(copy):
    """As an earlier version wrote them: no report could be written with them."""
    edit(copy, class_names=["caf\udce9", *"123456789"])
    assert ConvertedDataset.open(copy).class_names[:2] == (r"caf\xe9", "1")


def test_a_request_is_recognised(converted):
    assert converted.matches(REQUEST)
    assert converted.matches(conversion_request("digits", imbalance_factor=20.0, options=FfcvOptions(num_workers=7)))
    for other in (
        conversion_request("digits", imbalance_factor=10, options=OPTIONS),
        conversion_request("digits", imbalance_factor=20, options=FfcvOptions("jpg")),
        conversion_request("cifar10", imbalance_factor=20, options=OPTIONS),
    ):
        assert not converted.matches(other)
    one, other = (conversion_request("list_file", train_list=f"{folder}/a.txt", options=OPTIONS) for folder in "xy")
    assert one == other


def test_folders_that_are_no_data_set_are_refused_with_the_command(copy, tmp_path):
    with pytest.raises(ValueError, match=r"does not exist.*fastlt convert SOURCE --out .*nowhere"):
        ConvertedDataset.open(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, no folder, so there is no converted data set"):
        ConvertedDataset.open(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it is empty"):
        ConvertedDataset.open(tmp_path / "empty")
    (tmp_path / "empty" / "holiday.txt").touch()
    with pytest.raises(ValueError, match=r"not a converted data set, it has no manifest.json \(it holds holiday.txt\)"):
        ConvertedDataset.open(tmp_path / "empty")
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="unfinished or damaged"):
        ConvertedDataset.open(copy)


def test_damaged_data_sets_are_refused(copy):
    with (copy / "train.beton").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"damaged: train.beton has [\d,]+ bytes, its manifest says"):
        ConvertedDataset.open(copy)
    (copy / "train.beton").unlink()
    with pytest.raises(ValueError, match=r"damaged: train.beton is missing"):
        ConvertedDataset.open(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not a manifest"):
        ConvertedDataset.open(copy)


def test_other_schemas_are_refused(copy):
    edit(copy, schema=SCHEMA + 1)
    with pytest.raises(ValueError, match="update fastlt"):
        ConvertedDataset.open(copy)
    edit(copy, schema=0)
    with pytest.raises(ValueError, match="--overwrite"):
        ConvertedDataset.open(copy)


def test_another_format_only_is_said_to_lack_ffcv(copy):
    dataset = ConvertedDataset.open(copy)
    with pytest.raises(ValueError, match="was not converted to FFCV"):
        replace(dataset, manifest={**dataset.manifest, "formats": {"dali": {}}}).beton("train")


def test_verify_finds_a_changed_byte_and_disagreeing_labels(copy, converted):
    data = bytearray((copy / "test.beton").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "test.beton").write_bytes(data)
    problems = verify(ConvertedDataset.open(copy), progress=False)
    assert len(problems) == 1
    assert problems[0].startswith("test.beton: its sha256")

    shutil.copy(converted.root / "test.beton", copy / "test.beton")
    described = converted.manifest["splits"]
    edit(copy, splits={**described, "meta": {**described["meta"], "class_counts": [9, 11] + [10] * 8}})
    (problem,) = verify(ConvertedDataset.open(copy), progress=False)[:1]
    assert "labels.npz and manifest.json disagree on the class counts of 'meta'" in problem
    wrong = {**described["meta"], "image_size": {"same": True, "min": [9, 9], "max": [9, 9]}}
    edit(copy, splits={**described, "meta": wrong})
    (problem,) = verify(ConvertedDataset.open(copy), progress=False)
    assert "the image sizes in meta.beton and the manifest disagree" in problem


def test_verify_notices_an_edited_manifest(copy, converted):
    names = ["zero", *converted.class_names[1:]]
    (copy / "manifest.json").write_text(json.dumps({**converted.manifest, "class_names": names}))
    assert verify(ConvertedDataset.open(copy), progress=False) == [
        "manifest.json: its content is not what was written; it was edited or damaged"
    ]


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ({"files": []}, "'files'"),
        ({"request": 3}, "'request'"),
        ({"class_names": [1, 2]}, "the class names"),
        ({"class_names": list("01234")}, "the split 'train'"),
        ({"splits": {}}, "the split 'train'"),
        ({"formats": {}}, "formats, ffcv or dali"),
        ({"formats": {"dali": {}}}, "the file dali/train.npz"),
        ({"files": {"labels.npz": {"bytes": 5}}}, "the length and checksum of labels.npz"),
        ({"files": {}}, "the file labels.npz"),
    ],
)
def test_manifests_that_lack_something_are_damage(copy, change, lacking):
    edit(copy, **change)
    with pytest.raises(DamageError, match=rf"is damaged: manifest.json lacks {lacking}, or .* make it again with"):
        ConvertedDataset.open(copy)


def test_a_folder_that_may_not_be_read_is_said(copy, monkeypatch):
    def denied(path, **arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(DamageError, match=r"copy cannot be read: Permission denied \(.*manifest.json\)"):
        ConvertedDataset.open(copy)


def test_all_missing_files_are_named(copy):
    (copy / "train.beton").unlink()
    (copy / "meta.beton").write_bytes(b"")
    with pytest.raises(DamageError, match=r"meta.beton has 0 bytes, .*; train.beton is missing; make it again"):
        ConvertedDataset.open(copy)


def test_any_flipped_byte_of_the_labels_is_damage_and_nothing_else(copy):
    """Whatever the zip and npy readers raise for it; some bytes, a date for one, mean nothing to them."""
    whole = (copy / "labels.npz").read_bytes()
    labels = ConvertedDataset.open(copy).labels("train")
    damaged = 0
    for place in range(0, len(whole), 11):
        (copy / "labels.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            np.testing.assert_array_equal(ConvertedDataset.open(copy).labels("train"), labels)
        except DamageError:
            damaged += 1
    assert damaged > len(whole) / 11 * 0.8


def test_verify_decodes_every_jpeg(files, tmp_path):
    out = tmp_path / "out"
    dataset = convert(files, out, options=FfcvOptions("jpg"), request={}, on_error="skip", progress=False)
    assert verify(dataset, progress=False) == []
    beton = Beton(dataset.beton("test"))
    data = bytearray(dataset.beton("test").read_bytes())
    start = bytes(data).index(beton.encoded(1).tobytes())
    data[start : start + 20] = bytes(20)
    dataset.beton("test").write_bytes(data)
    described = {
        **dataset.manifest["files"],
        "test.beton": {"bytes": len(data), "sha256": file_sha256(dataset.beton("test"))},
    }
    edit(out, files=described)
    problems = verify(ConvertedDataset.open(out), progress=False)
    assert len(problems) == 1
    assert "test.beton, image 1: damaged" in problems[0]


def test_bad_images_stop_the_conversion_and_are_listed(files, tmp_path):
    with pytest.raises(
        ValueError, match=r"(?s)2 of 10 images .*skip:.*train2.png: the file is empty.*train5.png: not an"
    ):
        convert(files, tmp_path / "out", options=OPTIONS, request={}, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.partial"]


def test_bad_images_are_skipped_and_written_down(files, tmp_path):
    dataset = convert(files, tmp_path / "out", options=OPTIONS, request={}, on_error="skip", progress=False)
    assert dataset.labels("train").tolist() == [0, 1, 1, 0]
    assert dataset.manifest["skipped"] == dataset.manifest["splits"]["train"]["skipped"] == 2
    assert dataset.manifest["splits"]["train"]["image_size"] == {"same": False, "min": [6, 9], "max": [10, 9]}
    lines = (dataset.root / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines] == [
        ["train", str(tmp_path / f"images/train{i}.png")] for i in (2, 5)
    ]
    assert "skipped.txt" in dataset.manifest["files"]


def test_paths_of_any_bytes_are_written_down_in_one_line(tmp_path):
    bad = {"train": (BadImage(0, os.fsdecode(b"a\xff\n.jpg"), "damaged: \t"),), "meta": (), "test": ()}
    write_skipped(tmp_path / "skipped.txt", bad)
    assert (tmp_path / "skipped.txt").read_bytes() == b"train\ta\xff\\n.jpg\tdamaged: \\t\n"


def test_skipping_never_loses_a_class(files, tmp_path):
    for i in (1, 3):
        (tmp_path / "images" / f"train{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="'train' has no image of 1 of 2 classes that can be decoded: dog"):
        convert(files, tmp_path / "out", options=OPTIONS, request={}, on_error="skip", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="must be 'stop' or 'skip'"):
        convert(files, tmp_path / "out", options=OPTIONS, request={}, on_error="ignore")


@pytest.mark.parametrize("failing", ["store_images", "finish_split", "write_durably", "publish"])
def test_a_conversion_that_fails_keeps_what_is_finished_and_no_more(files, tmp_path, monkeypatch, failing):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(convert_module, failing, fail)
        with pytest.raises(KeyboardInterrupt):
            convert(files, tmp_path / "out", options=OPTIONS, request={}, on_error="skip", progress=False)
    kept = [] if failing == "store_images" else ["out.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", *kept]
    dataset = convert(files, tmp_path / "out", options=OPTIONS, request={}, on_error="skip", progress=False)
    assert verify(dataset, progress=False) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]


def test_what_no_record_tells_of_is_cleaned(files, tmp_path):
    stale = tmp_path / "out.partial"
    (stale / "folder").mkdir(parents=True)
    (stale / "conversion.json").write_text('{"source": "digits", "formats": [], "versions": {}}')
    (stale / "train.beton").write_bytes(b"half")
    (stale / "manifest.json").write_text("{}")
    dataset = convert(files, tmp_path / "out", options=OPTIONS, request={}, on_error="skip", progress=False)
    assert not stale.exists()
    assert not (dataset.root / "folder").exists()
    assert verify(dataset, progress=False) == []


def test_two_conversions_do_not_write_the_same_folder(files, tmp_path):
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another conversion is writing"):
            convert(files, tmp_path / "out", options=OPTIONS, request={}, on_error="skip", progress=False)
    assert (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("ending", ["finished", "failed"])
def test_a_run_waits_for_the_conversion_of_another(digits, tmp_path, capsys, monkeypatch, ending):
    """What the other has finished is taken; where it fails, this run converts."""
    data = load_recipe(ROOT / "recipes" / "digits_lt.yaml").data
    conversions = []
    monkeypatch.setattr("loaders.stored.convert.publish", lambda *args: (conversions.append(args[1]), publish(*args)))
    out, work = tmp_path / "out", tmp_path / "out.partial"
    work.mkdir()
    with (work / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = threading.Thread(target=ensure_converted, args=(data, out), daemon=True)
        run.start()
        deadline = time.monotonic() + 30
        told = ""
        while "waiting for another run to convert images" not in told and time.monotonic() < deadline:
            told += capsys.readouterr().err
            time.sleep(0.05)
        assert run.is_alive()
        if ending == "finished":
            shutil.copytree(digits, work / "converted")
            (work / "converted").rename(out)
            shutil.rmtree(work)
    run.join(60)
    assert told.count("waiting") == 1
    assert ConvertedDataset.open(out).matches(ConvertedDataset.open(digits).manifest["request"])
    assert conversions == ([] if ending == "finished" else [out])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_converted_data_sets_are_replaced_and_only_when_asked(files, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    options = {"options": OPTIONS, "on_error": "skip", "progress": False}
    convert(files, out, request={"a": 1}, **options)  # an empty folder is not in the way
    with pytest.raises(ValueError, match="already holds a converted data set"):
        convert(files, out, request={"a": 2}, **options)
    assert convert(files, out, request={"a": 2}, overwrite=True, **options).matches({"a": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]
    with pytest.raises(ValueError, match="is not a converted data set: give a folder that does not exist yet"):
        convert(files, tmp_path / "images", request={}, overwrite=True, **options)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="give a folder that does not"):
        convert(files, tmp_path / "file", request={}, overwrite=True, **options)
    with pytest.raises(ValueError, match="cannot write next to"):
        convert(files, tmp_path / "file" / "out", request={}, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("place", "name", "word"),
    [
        ("out.partial", "cat/1.jpg", "out.partial would be replaced, .* all that it holds: cat/1.jpg. Move it away"),
        ("out", "thesis.tex", "out would be replaced, .* all that it holds: manifest.json, thesis.tex. Move it"),
        ("mine", "sub/notes.txt", "mine would be replaced, .* all that it holds: sub/notes.txt. Move it"),
        ("mine.replaced", "notes.txt", "mine.replaced would be replaced, .* all that it holds: notes.txt. Move it"),
    ],
)
def test_files_of_others_are_never_deleted(files, tmp_path, copy, place, name, word):
    copy.rename(tmp_path / "mine")
    (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place / name).write_text("mine")
    if place == "out":
        (tmp_path / place / "manifest.json").write_text('{"name": "my web app"}')
    before = contents(tmp_path)
    out = tmp_path / place.split(".")[0]
    with pytest.raises(ValueError, match=word):
        convert(files, out, options=OPTIONS, request={}, overwrite=True, on_error="skip", progress=False)
    assert contents(tmp_path) == before


def test_what_lies_beside_a_new_data_set_stays(files, tmp_path, copy):
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "notes.txt").write_text("mine")
    convert(files, tmp_path / "out", options=OPTIONS, request={}, on_error="skip", progress=False)
    assert contents(tmp_path / "out.replaced") == {"notes.txt": b"mine"}
    # What a kill has left of a data set that was replaced is ours.
    copy.rename(tmp_path / "new.replaced")
    convert(files, tmp_path / "new", options=OPTIONS, request={}, on_error="skip", progress=False)
    assert not (tmp_path / "new.replaced").exists()


@pytest.mark.parametrize("folder", ["out", "out.partial/photos", "out.replaced"])
def test_a_source_in_a_folder_that_is_replaced_is_refused(files, tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    source = replace(files, splits={name: replace(of, root=tmp_path / folder) for name, of in files.splits.items()})
    word = rf"the images lie in .*{folder}, and a conversion to .*out replaces .*{folder.split('/')[0]}: give another"
    with pytest.raises(ValueError, match=word):
        convert(source, tmp_path / "out", options=OPTIONS, request={}, on_error="skip", progress=False)


def test_all_of_a_data_set_is_on_the_disk_before_it_has_its_name(files, tmp_path, monkeypatch):
    flushed, named = [], []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}").replace("out.partial/converted", "out"))
        named.append((tmp_path / "out").exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    convert(
        files, tmp_path / "out", options=OPTIONS, request={}, formats=("ffcv", "dali"), on_error="skip", progress=False
    )
    paths = {*map(str, (tmp_path / "out").rglob("*")), str(tmp_path / "out")}
    assert len(paths) > 10
    assert paths <= {path for path, late in zip(flushed, named, strict=True) if not late}
    assert (flushed[-1], named[-1]) == (str(tmp_path), True)


def test_a_link_to_an_empty_folder_is_followed(files, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "empty")
    options = {"options": OPTIONS, "on_error": "skip", "progress": False}
    convert(files, tmp_path / "out", request={}, **options)
    assert convert(files, tmp_path / "out", request={"a": 2}, overwrite=True, **options).matches({"a": 2})
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "empty" / "manifest.json").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["empty"]


def test_folders_that_cannot_be_replaced_are_refused_before_any_work(files, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "../here"):
        with pytest.raises(ValueError, match=r"here is the current folder: give a folder below it"):
            convert(None, out, options=OPTIONS, request={})
    with pytest.raises(ValueError, match="is a mount point: give a folder below it, such as /proc/converted"):
        convert(None, "/proc", options=OPTIONS, request={})


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", ["ffcv", "dali", "labels"])
def test_a_disk_that_becomes_full_is_said_with_its_place(files, tmp_path, monkeypatch, kind):
    """A process that writes images, one that writes shards, and this one: wherever the disk becomes full."""
    formats = ("dali",) if kind == "dali" else ("ffcv",)
    if kind == "ffcv":
        monkeypatch.setattr(BetonEnd, "append", full_disk)
    elif kind == "dali":
        monkeypatch.setattr(ShardWriter, "add", full_disk)
    else:
        monkeypatch.setattr(convert_module.np, "savez", full_disk)
    with pytest.raises(ValueError, match=rf"{tmp_path} has no space left for out: make room") as raised:
        convert(files, tmp_path / "out", options=OPTIONS, request={}, formats=formats, on_error="skip", progress=False)
    kept = kind == "labels"
    assert ("10 finished images are kept in" in str(raised.value)) == kept
    assert (tmp_path / "out.partial").exists() == kept
    assert not (tmp_path / "out").exists()


def test_a_file_that_becomes_too_large_is_said_with_the_remedy(files, tmp_path, monkeypatch):
    def too_large(*arguments):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(BetonEnd, "append", too_large)
    word = rf"a file of out is larger than the file system of {tmp_path}, or `ulimit -f`, allows: store less .*another"
    with pytest.raises(ValueError, match=word):
        convert(files, tmp_path / "out", options=OPTIONS, request={}, on_error="skip", progress=False)
    assert not (tmp_path / "out.partial").exists()


def test_a_full_disk_is_noticed_before_writing(files, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ValueError, match=r"need about 0.0 MiB as raw pixels .* set max_resolution"):
        convert(files, tmp_path / "out", options=OPTIONS, request={}, on_error="skip", progress=False)
