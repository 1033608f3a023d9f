"""Where images come from: odd image files, CIFAR in each published form, digits, image folders and list files."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import tarfile
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.sources import duplicates, open_labelled, open_source
from loaders.sources.cifar import CIFAR10, CIFAR100, load_pickle, open_cifar, open_whole_cifar, read_cifar
from loaders.sources.decode import MAX_PIXELS, decode_image, plain_jpeg
from loaders.sources.image_folder import _images, _Unread, files_below
from loaders.sources.list_file import read_list
from loaders.stored.image_check import check_images

RNG = np.random.default_rng(0)
GRADIENT = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))
COLOUR = np.stack([GRADIENT, GRADIENT[:, ::-1], np.full_like(GRADIENT, 60)], axis=2)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


# --- odd image files


def test_plain_images_are_what_was_saved(tmp_path):
    np.testing.assert_array_equal(decode_image(save(tmp_path / "a.png", COLOUR)), COLOUR)
    for name in ("a.jpg", "a.webp"):
        decoded = decode_image(save(tmp_path / name, COLOUR, quality=95))
        assert decoded.dtype == np.uint8
        assert np.abs(decoded.astype(int) - COLOUR).mean() < 3


def test_grayscale_is_repeated_over_the_channels(tmp_path):
    decoded = decode_image(save(tmp_path / "gray.png", GRADIENT))
    np.testing.assert_array_equal(decoded, np.repeat(GRADIENT[:, :, None], 3, axis=2))
    bilevel = decode_image(save(tmp_path / "one.png", GRADIENT, mode="1"))
    assert set(np.unique(bilevel)) == {0, 255}


@pytest.mark.parametrize("name", ["gray16.png", "gray16.tif", "gray16.pgm"])
def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path, name):
    deep = np.linspace(0, 65535, 32 * 48).astype(np.uint16).reshape(32, 48)
    decoded = decode_image(save(tmp_path / name, deep))
    np.testing.assert_array_equal(decoded[:, :, 0], np.rint(deep / 257).astype(np.uint8))
    assert (decoded == decoded[:, :, :1]).all()


def test_sixteen_bit_colour_is_scaled(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "rgb16.png"
    cv2.imwrite(str(path), COLOUR[:, :, ::-1].astype(np.uint16) * 257)
    assert np.abs(decode_image(path).astype(int) - COLOUR).max() <= 1


def test_images_whose_white_is_unknown_are_errors(tmp_path):
    with pytest.raises(ValueError, match="floating-point"):
        decode_image(save(tmp_path / "float.tif", GRADIENT.astype(np.float32) / 255))
    with pytest.raises(ValueError, match="32-bit"):
        decode_image(save(tmp_path / "deep.tif", GRADIENT.astype(np.int32) * 100_000))


def test_cmyk_keeps_its_colours(tmp_path):
    red = np.zeros((16, 16, 3), dtype=np.uint8)
    red[:, :, 0] = 250
    decoded = decode_image(save(tmp_path / "cmyk.jpg", red, mode="CMYK", quality=95))
    assert np.abs(decoded.astype(int) - red).mean() < 6
    assert plain_jpeg((tmp_path / "cmyk.jpg").read_bytes()) is None


def test_alpha_is_dropped_and_palettes_are_looked_up(tmp_path):
    rgba = np.dstack([COLOUR, np.zeros_like(GRADIENT)])
    np.testing.assert_array_equal(decode_image(save(tmp_path / "alpha.png", rgba)), COLOUR)
    gray_alpha = Image.merge("LA", [Image.fromarray(GRADIENT), Image.fromarray(GRADIENT)])
    gray_alpha.save(tmp_path / "la.png")
    np.testing.assert_array_equal(decode_image(tmp_path / "la.png")[:, :, 1], GRADIENT)
    palette = Image.fromarray(COLOUR // 128 * 200).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "p.png", transparency=0)
    np.testing.assert_array_equal(decode_image(tmp_path / "p.png"), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # Where the EXIF standard puts the stored first row and first column in the upright image.
    upright = {
        1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
        5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: lambda x: np.rot90(x, 1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "turned.png", COLOUR, exif=exif)
    np.testing.assert_array_equal(decode_image(path), upright[orientation](COLOUR))
    jpeg = save(tmp_path / "turned.jpg", COLOUR, exif=exif)
    assert (plain_jpeg(jpeg.read_bytes()) is None) == (orientation != 1)


def test_the_content_decides_and_not_the_extension(tmp_path):
    path = save(tmp_path / "really.png", COLOUR, format="PNG").rename(tmp_path / "lies.JPEG")
    np.testing.assert_array_equal(decode_image(path), COLOUR)
    assert plain_jpeg(path.read_bytes()) is None


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), value, dtype=np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (decode_image(tmp_path / "a.gif") == 10).all()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".bmp", ".webp", ".tif"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files_are_errors(tmp_path, suffix, share):
    path = save(tmp_path / f"a{suffix}", RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"damaged|not an image"):
        decode_image(path)


def test_files_that_are_no_images_are_errors(tmp_path):
    for content, reason in ((b"", "empty"), (b"hello, world", "not an image"), (b"\xff\xd8\xff\xe0", "not an image")):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            decode_image(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="no such file"):
        decode_image(tmp_path / "absent.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for a writer
    for name in ("folder.jpg", "pipe.jpg"):
        with pytest.raises(ValueError, match="not a file"):
            decode_image(tmp_path / name)
    with pytest.raises(ValueError, match="File name too long"):
        decode_image(tmp_path / ("a" * 300 + ".jpg"))


@pytest.mark.parametrize("thumbnail", [False, True])
def test_a_jpeg_whose_end_was_overwritten_is_an_error(tmp_path, thumbnail):
    """Zeros, as an interrupted download leaves them, can stand for the rest of a picture: Pillow takes them."""
    inner = io.BytesIO()
    Image.fromarray(COLOUR).save(inner, "JPEG")
    exif = b"Exif\0\0" + inner.getvalue() if thumbnail else b""
    path = save(tmp_path / "a.jpg", RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), exif=exif)
    whole = path.read_bytes()
    path.write_bytes(whole[:-900] + bytes(20_000))
    with Image.open(path) as image:
        image.load()
    with pytest.raises(ValueError, match="no end-of-image marker"):
        decode_image(path)
    path.write_bytes(whole + b"what some cameras append")
    assert decode_image(path).shape == (64, 64, 3)


def test_a_file_that_claims_too_many_pixels_is_an_error(tmp_path):
    path = save(tmp_path / "bomb.bmp", COLOUR)
    data = bytearray(path.read_bytes())
    data[18:26] = struct.pack("<ii", 20_000, MAX_PIXELS // 20_000 + 1)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"more pixels|are more than"):
        decode_image(path)


def test_untouched_jpeg_bytes_are_given_where_they_are_the_image(tmp_path):
    path = save(tmp_path / "a.jpg", COLOUR)
    assert plain_jpeg(path.read_bytes()) == path.read_bytes()


# --- CIFAR

SMALL10 = replace(CIFAR10, num_train=50 * 20, num_test=40)
SMALL100 = replace(CIFAR100, num_train=1200, num_test=200)


def cifar_records(spec) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random images for each of a data set's files, labels in turn: {"train_or_test file index": (pixels, labels)}."""
    rng = np.random.default_rng(3)
    files = spec.forms[0].train_files
    sizes = {name: spec.num_train // len(files) for name in files} | {spec.forms[0].test_files[0]: spec.num_test}
    return {
        name: (rng.integers(0, 256, (n, 3072), dtype=np.uint8), np.arange(n) % spec.num_classes)
        for name, n in sizes.items()
    }


def write_pickles(folder: Path, spec, protocol: int = 2, as_bytes: bool = True) -> Path:
    folder.mkdir(parents=True)
    key = (lambda text: text.encode()) if as_bytes else (lambda text: text)
    for name, (pixels, labels) in cifar_records(spec).items():
        batch = {key("data"): pixels, key(spec.label_key): labels.tolist(), key("batch_label"): key("x")}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    names = {key(spec.names_key): [key(f"class {c}") for c in range(spec.num_classes)]}
    (folder / spec.forms[0].names_file).write_bytes(pickle.dumps(names, protocol=protocol))
    return folder


def write_binary(folder: Path, spec) -> Path:
    folder.mkdir(parents=True)
    for name, (pixels, labels) in cifar_records(spec).items():
        prefix = np.zeros((len(labels), spec.label_bytes), dtype=np.uint8)
        prefix[:, -1] = labels
        (folder / f"{name}.bin").write_bytes(np.hstack([prefix, pixels]).tobytes())
    (folder / spec.forms[1].names_file).write_text("".join(f"class {c}\n" for c in range(spec.num_classes)) + "\n")
    return folder


@pytest.mark.parametrize("spec", [SMALL10, SMALL100], ids=["cifar10", "cifar100"])
def test_every_published_form_gives_the_same_images(tmp_path, spec):
    expected = cifar_records(spec)
    pixels = np.concatenate([expected[name][0] for name in spec.forms[0].train_files])
    roots = []
    for number, (protocol, as_bytes) in enumerate([(2, True), (2, False), (5, True)]):
        write_pickles(tmp_path / str(number) / spec.forms[0].folder, spec, protocol, as_bytes)
        roots.append(tmp_path / str(number))
    roots.append(write_binary(tmp_path / "bin" / spec.forms[1].folder, spec))  # the folder itself as root
    for number, form in enumerate(spec.forms):
        root = tmp_path / f"tar{number}"
        root.mkdir()
        with tarfile.open(root / form.archive, "w:gz") as tar:
            tar.add((roots[0] / form.folder) if number == 0 else roots[3], form.folder)
        roots += [root, root / form.archive]
    for root in roots:
        train, test, names = read_cifar(spec, root, download=False)
        np.testing.assert_array_equal(train.pixels, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        assert train.labels.tolist() == np.concatenate([expected[n][1] for n in spec.forms[0].train_files]).tolist()
        assert len(test) == spec.num_test
        assert names == tuple(f"class {c}" for c in range(spec.num_classes))
    whole = open_whole_cifar(spec, roots[0], download=False)
    assert {name: len(split) for name, split in whole.splits.items()} == {"train": len(train), "test": len(test)}


def test_pickles_of_python_2_and_of_old_numpy_are_read():
    """Protocol 2 as Python 2 wrote it: byte strings as text, arrays through numpy.core.multiarray."""
    text = lambda s: b"U" + bytes([len(s)]) + s.encode("latin1")  # noqa: E731  (opcode SHORT_BINSTRING)
    dtype = (
        b"cnumpy\ndtype\n"
        + text("u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text("|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R(K\x01K\x03\x85"
    array += dtype + b"\x89" + text("\x01\x80\xff") + b"tb"
    content = load_pickle(
        b"\x80\x02}(" + text("data") + array + text("label_names") + b"](" + text("cat") + b"euu.".replace(b"uu", b"u"),
        "x",
    )
    assert content["data"].tolist() == [1, 128, 255]
    assert content["label_names"] == ["cat"]
    renamed = array.replace(b"numpy.core", b"numpy._core")
    assert load_pickle(b"\x80\x02}(" + text("data") + renamed + b"u.", "x")["data"].tolist() == [1, 128, 255]


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_that_would_run_code_is_refused(capsys):
    with pytest.raises(ValueError, match=r"asks for (builtins|__builtin__).print"):
        load_pickle(pickle.dumps({b"data": Evil()}, protocol=2), "batch")
    for payload in (b"cos\nsystem\n(S'true'\ntR.", b"c_codecs\nencode\n(Vx\nVzip\ntR."):
        with pytest.raises(ValueError, match=r"not allowed|asks for"):
            load_pickle(payload, "batch")
    with pytest.raises(ValueError, match="holds a list"):
        load_pickle(pickle.dumps([1]), "batch")
    assert capsys.readouterr().out == ""


def test_absent_incomplete_and_damaged_archives_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"not under .*cifar-10-python.tar.gz .* put|put cifar-10-python.tar.gz"):
        read_cifar(SMALL10, tmp_path, download=False)
    folder = write_pickles(tmp_path / "cifar-10-batches-py", SMALL10)
    (folder / "data_batch_3").rename(folder / "data_batch_9")
    with pytest.raises(ValueError, match="incomplete: data_batch_3 missing"):
        read_cifar(SMALL10, tmp_path, download=False)
    (folder / "data_batch_9").rename(folder / "data_batch_3")
    whole = (folder / "data_batch_3").read_bytes()
    (folder / "data_batch_3").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="data_batch_3 cannot be read"):
        read_cifar(SMALL10, tmp_path, download=False)
    (folder / "data_batch_3").write_bytes(whole)
    with pytest.raises(ValueError, match=r"holds 1,000 train images, cifar10 has 50,000"):
        read_cifar(replace(SMALL10, num_train=50_000), tmp_path, download=False)

    archive = tmp_path / "tar" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz is damaged .* download it again"):
        read_cifar(SMALL10, archive.parent, download=False)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / "test_batch", "cifar-10-batches-py/test_batch")
    with pytest.raises(ValueError, match="does not hold data_batch_1"):
        read_cifar(SMALL10, archive.parent, download=False)
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(ValueError, match="is damaged"):
        read_cifar(SMALL10, archive.parent, download=False)


def test_wrong_records_are_refused(tmp_path):
    folder = write_binary(tmp_path / "cifar-10-batches-bin", SMALL10)
    path = folder / "data_batch_1.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="not a multiple of 3073"):
        read_cifar(SMALL10, tmp_path, download=False)
    path.write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(ValueError, match="labels 0 to 11, cifar10 has 0 to 9"):
        read_cifar(SMALL10, tmp_path, download=False)

    fine_only = write_pickles(tmp_path / "p" / "cifar-100-python", SMALL100)
    batch = pickle.loads((fine_only / "train").read_bytes())
    del batch[b"fine_labels"]
    (fine_only / "train").write_bytes(pickle.dumps(batch))
    with pytest.raises(ValueError, match="no 'fine_labels' entry"):
        read_cifar(SMALL100, tmp_path / "p", download=False)


def test_a_failed_download_says_where_the_files_belong(tmp_path, monkeypatch):
    import torchvision.datasets

    def offline(root, download):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(ValueError, match=r"put cifar-10-python.tar.gz .* download failed: network is unreachable"):
        read_cifar(SMALL10, tmp_path, download=True)


def test_cifar_is_cut_by_both_conventions(tmp_path):
    write_binary(tmp_path / "cifar-10-batches-bin", SMALL10)
    options = {"imbalance_factor": 9, "meta_per_class": 10, "download": False}
    for convention, n_max, shared in (("paper", 90, False), ("ldam", 100, True)):
        source = open_cifar(SMALL10, tmp_path, convention=convention, **options)
        train, meta = source.splits["train"], source.splits["meta"]
        counts = np.bincount(train.labels)
        assert (counts[0], counts[-1]) == (n_max, n_max // 9)
        assert np.bincount(meta.labels).tolist() == [10] * 10
        assert bool(set(train.rows.tolist()) & set(meta.rows.tolist())) == shared
        assert convention in train.provenance
        assert train.name(3) == f"train[{train.rows[3]}]"
        np.testing.assert_array_equal(train.image(3), train.pixels[train.rows[3]])


def test_real_cifar10(real_data):
    root = real_data("cifar-10-batches-py").parent
    train, test, names = read_cifar(CIFAR10, root, download=False)
    assert (len(train), len(test), names[3]) == (50_000, 10_000, "cat")
    assert np.bincount(train.labels).tolist() == [5000] * 10


# --- digits


def test_digits_hold_out_a_balanced_test_and_meta_set():
    source = open_source("digits", imbalance_factor=20, split_seed=1)
    train, meta, test = (source.splits[name] for name in ("train", "meta", "test"))
    assert np.bincount(test.labels).tolist() == [40] * 10
    assert np.bincount(meta.labels).tolist() == [10] * 10
    counts = np.bincount(train.labels)
    assert counts[0] / counts[-1] >= 20
    assert (np.diff(counts) <= 0).all()
    rows = [set(split.rows.tolist()) for split in (train, meta, test)]
    assert sum(map(len, rows)) == len(set.union(*rows))
    assert (train.pixels.min(), train.pixels.max(), train.image(0).shape) == (0, 255, (8, 8, 3))

    again = open_source("digits", imbalance_factor=20, split_seed=1)
    np.testing.assert_array_equal(again.splits["test"].rows, test.rows)
    other = open_source("digits", imbalance_factor=20, split_seed=2)
    assert set(other.splits["test"].rows.tolist()) != rows[2]
    assert sum(len(split) for split in open_source("digits").splits.values()) == 1797


# --- image folders


def make_folder(root: Path, splits: dict[str, dict[str, int]]) -> Path:
    for split, classes in splits.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                save(folder / f"{i:03d}.{'PNG' if i % 2 else 'png'}", np.full((4, 5, 3), i, dtype=np.uint8))
            (folder / "notes.txt").write_text("not an image")
    return root


def test_a_folder_with_three_splits(tmp_path):
    root = make_folder(tmp_path, {"train": {"b": 5, "a c": 4}, "val": {"b": 3, "a c": 3}, "test": {"b": 2, "a c": 1}})
    source = open_source("image_folder", root=root, meta_per_class=2)
    assert source.class_names == ("a c", "b")
    assert {name: np.bincount(split.labels).tolist() for name, split in source.splits.items()} == {
        "train": [4, 5],
        "meta": [2, 2],
        "test": [1, 2],
    }
    assert source.splits["meta"].name(1) == str(root / "val" / "a c" / "001.PNG")
    assert (source.splits["train"].image(2) == 2).all()
    assert source.splits["train"].subset(np.array([4, 0])).name(0).endswith("train/b/000.png")


@pytest.mark.parametrize("test_folder", ["test", "val"])
def test_without_a_meta_folder_images_are_held_out_of_train(tmp_path, test_folder):
    root = make_folder(tmp_path, {"train": {"a": 30, "b": 30}, test_folder: {"a": 2, "b": 2}})
    source = open_source("image_folder", root=root, meta_per_class=10, imbalance_factor=4)
    assert np.bincount(source.splits["train"].labels).tolist() == [20, 5]
    assert [Path(path).stem for path in source.splits["meta"].paths[:2]] == ["020", "021"]
    assert source.splits["test"].paths[0].startswith(test_folder)
    with pytest.raises(ValueError, match="holding 30 out"):
        open_source("image_folder", root=root, meta_per_class=30)


def test_images_by_another_name_and_broken_links_are_not_passed_over(tmp_path):
    root = make_folder(tmp_path, {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    a = root / "train" / "a"
    save(a / "x.png", COLOUR).rename(a / "x")
    save(a / "y.jpg", COLOUR).rename(a / "y.dat")
    (a / "z.avif").write_bytes(b"\0\0\0\x20ftypavif" + bytes(100))
    (a / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (a / "sound.wav").write_bytes(b"RIFF\0\0\0\0WAVEfmt ")
    os.mkfifo(a / "pipe")
    split = open_source("image_folder", root=root, meta_per_class=1).splits["train"]
    of_a = [Path(path).name for path in split.paths if "/a/" in path]
    assert of_a == ["000.png", "001.PNG", "gone.jpg", "x", "y.dat"]  # z.avif, the last by name, is held out
    bad = [(Path(image.name).name, image.reason) for image in check_images(split, num_workers=1).bad]
    assert bad == [("gone.jpg", "no such file")]


def test_a_folder_that_is_there_twice_has_the_name_that_is_no_link(tmp_path):
    """Of several links the first in order has the files, however the file system lists them."""
    outside = tmp_path / "outside"
    for path in (tmp_path / "root" / "train" / "a" / "sub" / "m" / "x.png", outside / "y.png"):
        path.parent.mkdir(parents=True)
        path.touch()
    a = tmp_path / "root" / "train" / "a"
    for name, target in [("z", outside), ("p", outside), ("k", outside), ("sub/a", a / "sub" / "m"), ("b", a / "sub")]:
        (a / name).symlink_to(target)
    found = [str(path.relative_to(a)) for path, _ in files_below(a, print)]
    assert found == ["sub/m/x.png", "k/y.png"]


def test_linked_folders_are_walked_once_and_unreadable_ones_are_refused(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "root", {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    (tmp_path / "more" / "deep").mkdir(parents=True)
    save(tmp_path / "more" / "deep" / "z.png", COLOUR)
    (root / "train" / "a" / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(root / "train" / "a")
    split = open_source("image_folder", root=root, meta_per_class=1).splits["train"]
    assert [path for path in split.paths if "/a/" in path] == ["train/a/000.png", "train/a/001.PNG"]
    assert (
        open_source("image_folder", root=root, meta_per_class=1).splits["meta"].paths[0].endswith("linked/deep/z.png")
    )

    def denied(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ValueError, match=r"a cannot be read \(Permission denied\): its images would be left out"):
        _images(root / "train" / "a", _Unread(root))


def test_hidden_and_system_files_are_passed_over_at_every_depth(tmp_path):
    root = make_folder(tmp_path, {"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 1}})
    plain = open_source("image_folder", root=root, meta_per_class=1)
    assert plain.notes == (f"{root}: not read are 4 files that are no images of a class (4 .txt)",)
    hidden = (".ipynb_checkpoints", ".thumbnails", "@eaDir/000.png", "deep/__MACOSX", "#recycle", "lost+found")
    for folder in hidden:
        (root / "train" / "a" / folder).mkdir(parents=True)
        save(root / "train" / "a" / folder / "x.png", COLOUR)
    for folder in ("train/.class", "train/__MACOSX", "test/.ipynb_checkpoints", "__MACOSX", ".git"):
        (root / folder).mkdir()
        save(root / folder / "x.png", COLOUR)
    for name in ("._000.png", ".x.png", "Thumbs.db", "desktop.ini", ".DS_Store"):
        (root / "train" / "b" / name).write_bytes(b"\0\5\x16\7")
    source = open_source("image_folder", root=root, meta_per_class=1)
    assert source.class_names == plain.class_names == ("a", "b")
    assert source.listing_sha256() == plain.listing_sha256()
    assert "11 hidden or system files and folders (test/.ipynb_checkpoints, train/.class, " in source.notes[0]


def test_folders_and_kinds_of_files_that_are_not_read_are_named(tmp_path):
    root = make_folder(tmp_path, {"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 1}, "extra": {"a": 1}, "Val": {}})
    (root / "Val").mkdir()
    (root / "labels.csv").touch()
    save(root / "train" / "loose.png", COLOUR)
    (root / "train" / "a" / "film.mp4").write_bytes(b"film")
    assert open_source("image_folder", root=root, meta_per_class=1).notes == (
        f"{root}: not read are 2 folders beside the splits (Val, extra); 7 files that are no images of a class "
        f"(4 .txt, 1 directly in {root.name}, 1 directly in train, 1 .mp4)",
    )


@pytest.mark.parametrize("name", ["val", "valid", "validation", "meta"])
def test_each_usual_name_of_the_validation_folder_is_taken(tmp_path, name):
    root = make_folder(tmp_path, {"train": {"a": 4, "b": 4}, "test": {"a": 1, "b": 1}, name: {"a": 3, "b": 3}})
    source = open_source("image_folder", root=root, meta_per_class=2)
    assert [len(source.splits[split]) for split in ("train", "meta", "test")] == [8, 4, 2]
    assert source.splits["meta"].paths[0] == f"{name}/a/000.png"
    (root / ("val" if name != "val" else "valid")).mkdir()
    with pytest.raises(ValueError, match=r"has '\w+' and '\w+', and one folder can be the validation set: put"):
        open_source("image_folder", root=root, meta_per_class=2)


def test_a_file_in_two_folders_by_links_is_refused(tmp_path):
    root = make_folder(tmp_path, {"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 1}})
    os.link(root / "train" / "a" / "002.png", root / "train" / "a" / "again.png")  # in its class: an image twice
    assert len(open_source("image_folder", root=root, meta_per_class=1).splits["train"]) == 5
    (root / "val").symlink_to(root / "test")
    with pytest.raises(ValueError, match=r"2 images are in both .*val and .*test|2 images are in both .*test and"):
        open_source("image_folder", root=root, meta_per_class=1)
    assert len(open_source("image_folder", root=root, meta_per_class=1, allow_duplicates=True).splits["meta"]) == 2
    (root / "val").unlink()
    (root / "train" / "b" / "x.png").symlink_to(root / "train" / "a" / "000.png")
    with pytest.raises(ValueError, match=r"1 images are one file in two classes, by links: train/a/000.png and"):
        open_source("image_folder", root=root, meta_per_class=1)


def test_names_that_are_not_utf8_are_spelled_with_backslashes(tmp_path):
    root = make_folder(tmp_path, {"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 1}})
    for split in ("train", "test"):
        os.rename(os.fsencode(root / split / "b"), os.fsencode(root / split) + b"/caf\xe9")
    source = open_source("image_folder", root=root, meta_per_class=1)
    assert source.class_names == ("a", r"caf\xe9")
    assert source.splits["test"].image(1).shape == (4, 5, 3)
    for split in ("train", "test"):
        (root / split / r"caf\xe9").mkdir()
        save(root / split / r"caf\xe9" / "x.png", COLOUR)
    with pytest.raises(ValueError, match=r"1 class names are spelled alike: caf\\xe9. Rename one"):
        open_source("image_folder", root=root, meta_per_class=1)


def test_classes_of_another_unicode_form_are_named_as_such(tmp_path):
    names = {form: unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")}
    root = make_folder(tmp_path, {"train": {names["NFC"]: 3, "b": 3}, "test": {names["NFD"]: 1, "b": 1}})
    with pytest.raises(ValueError, match="but are of another Unicode form"):
        open_source("image_folder", root=root, meta_per_class=1)


def test_folders_that_do_not_fit_together_are_refused(tmp_path):
    root = make_folder(tmp_path, {"train": {"a": 3, "b": 3}, "test": {"a": 1}})
    assert np.bincount(open_source("image_folder", root=root, meta_per_class=1).splits["test"].labels).tolist() == [1]
    make_folder(tmp_path, {"val": {"a": 1, "b": 1, "zebra": 1}})
    (tmp_path / "test" / "b").mkdir()
    save(tmp_path / "test" / "b" / "x.png", COLOUR)
    with pytest.raises(ValueError, match=r"1 classes that .*train has not: zebra"):
        open_source("image_folder", root=root, meta_per_class=1)
    with pytest.raises(ValueError, match="holds 2 classes, num_classes says 3"):
        open_source("image_folder", root=root, num_classes=3)
    (tmp_path / "train").rename(tmp_path / "Training")
    with pytest.raises(ValueError, match=r"no folder 'train' \(it has 'Training': rename that\)"):
        open_source("image_folder", root=tmp_path)
    (tmp_path / "Training").rename(tmp_path / "tests")
    with pytest.raises(ValueError, match="no folder 'train' beside val and test"):
        open_source("image_folder", root=tmp_path)
    (make_folder(tmp_path / "empty", {"train": {"a": 1, "b": 1}}) / "train" / "c").mkdir()
    with pytest.raises(ValueError, match=r"train has no images of 1 of 3 classes: c"):
        open_source("image_folder", root=tmp_path / "empty")


# --- list files


@pytest.fixture
def lists(tmp_path):
    """Images below images/, and lists of train (6 and 4 a class), meta (3) and test (1)."""
    for split, counts in (("train", (6, 4)), ("meta", (3, 3)), ("test", (1, 1))):
        lines = []
        for label, count in enumerate(counts):
            folder = tmp_path / "images" / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                save(folder / f"{i} of it.png", np.full((2, 2, 3), i, dtype=np.uint8))
                lines.append(f"{split}/class {label}/{i} of it.png {label}\n")
        (tmp_path / f"{split}.txt").write_text("".join(lines) + "\n")
    return tmp_path


def open_lists(folder: Path, *, root: str = "images", meta: bool = True, **changes):
    paths = {f"{split}_list": folder / f"{split}.txt" for split in ("train", "meta", "test")[:: 1 if meta else 2]}
    return open_source("list_file", root=folder / root, **{**paths, "meta_per_class": 2, **changes})


def test_lists_with_spaces_in_their_paths(lists):
    source = open_lists(lists)
    assert source.class_names == ("class 0", "class 1")
    assert {name: np.bincount(split.labels).tolist() for name, split in source.splits.items()} == {
        "train": [6, 4],
        "meta": [2, 2],
        "test": [1, 1],
    }
    assert source.splits["meta"].paths == [f"meta/class {c}/{i} of it.png" for c in (0, 1) for i in (0, 1)]
    assert (source.splits["train"].image(5) == 5).all()


def test_without_a_meta_list_images_are_held_out_of_train(lists):
    source = open_lists(lists, meta=False)
    assert np.bincount(source.splits["train"].labels).tolist() == [4, 2]
    assert source.splits["meta"].paths[0] == "train/class 0/4 of it.png"


def test_a_higher_imbalance_takes_prefixes_of_each_class(lists):
    source = open_lists(lists, imbalance_factor=3)
    assert source.splits["train"].paths == [f"train/class 0/{i} of it.png" for i in range(6)] + [
        f"train/class 1/{i} of it.png" for i in range(2)
    ]


def test_malformed_lists_are_refused_with_line_numbers(lists):
    path = lists / "train.txt"
    for content, message in (
        ("a.png 0\nb.png\n\nc.png -1\n", r"2 lines are not .*: line 2: 'b.png'; line 4: 'c.png -1'$"),
        ("\n", "lists no images"),
        (f"{'x' * 5000} zero\n", r"line 1: 'x{80} … \(5,005 letters\) … x{35} zero'"),
        (f"a.jpg {'9' * 5000}\n", r"line 1: 'a.jpg 9{74} … \(5,006 letters\) … 9{40}'"),
        ("a.jpg 99999999999999999999\nb.jpg 3\n", r"1 lines are not `relative/path label` .*: line 1: 'a.jpg 9999"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_list(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_list(lists / "absent.txt")
    path.write_bytes(b"\xef\xbb\xbfa.png\t0\r\nb.png   1\r\n")
    assert (read_list(path).paths, read_list(path).lines.tolist()) == (["a.png", "b.png"], [1, 2])


def test_lists_of_other_encodings_name_the_bytes_of_a_file(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("caf\u00e9/1.jpg 0\n".encode("latin1"))
    assert os.fsencode(read_list(path).paths[0]) == b"caf\xe9/1.jpg"
    path.write_text("caf\u00e9/1.jpg 0\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"list.txt is UTF-16 text: save it as UTF-8"):
        read_list(path)
    path.write_bytes(b"\x89PNG\0\0 0\n")
    with pytest.raises(ValueError, match=r"list.txt is no text: give a file of"):
        read_list(path)
    with pytest.raises(ValueError, match="is a folder: give a file of"):
        read_list(tmp_path)
    path.write_bytes("a\u2028b.jpg 0\r\nc.jpg 1\r\n".encode())
    assert read_list(path).paths == ["a\u2028b.jpg", "c.jpg"]


def test_labels_that_do_not_fit_are_refused(lists):
    with pytest.raises(ValueError, match="has label 1, but num_classes is 1"):
        open_lists(lists, num_classes=1)
    with pytest.raises(ValueError, match=r"train.txt has no image of 1 of 3 classes .*: 2"):
        open_lists(lists, num_classes=3)
    (lists / "test.txt").write_text("test/class 0/0 of it.png 2\n")
    with pytest.raises(ValueError, match="has no image of 1 of 3"):
        open_lists(lists)
    (lists / "test.txt").write_text("test/class 0/0 of it.png 0\n")
    assert np.bincount(open_lists(lists).splits["test"].labels, minlength=2).tolist() == [1, 0]
    with pytest.raises(ValueError, match="needs --train-list: a file of"):
        open_source("list_file", root=lists)


def test_labels_from_one_are_told_from_gaps(lists):
    for split in ("train", "meta", "test"):
        path = lists / f"{split}.txt"
        path.write_text(path.read_text().replace(".png 1", ".png 2").replace(".png 0", ".png 1"))
    with pytest.raises(ValueError, match=r"train.txt has no image of 1 of 3 classes .*: subtract 1 from each label$"):
        open_lists(lists)
    with pytest.raises(ValueError, match=r"has label 2, but num_classes is 2.*: subtract 1 from each label$"):
        open_lists(lists, num_classes=2)
    (lists / "train.txt").write_text((lists / "train.txt").read_text().replace(".png 2", ".png 3"))
    with pytest.raises(ValueError, match=r"has no image of 2 of 4 classes .*: 0; 2$"):
        open_lists(lists)


def test_an_image_in_two_lists_is_refused(lists):
    (lists / "test.txt").write_text((lists / "meta.txt").read_text())
    with pytest.raises(ValueError, match=r"6 images are in both .*meta.txt and .*test.txt"):
        open_lists(lists)


OTHER_SPELLINGS = {
    "the same": lambda path: path,
    "a dot": lambda path: f"./{path}",
    "two slashes": lambda path: path.replace("/", "//", 1),
    "a way back": lambda path: f"train/../{path}",
    "absolute": lambda path: f"{{images}}/{path}",
    "a link": lambda path: "link.png",
    "a linked folder": lambda path: f"linked/{path}",
    "a hard link": lambda path: "hard.png",
}


@pytest.mark.parametrize("spelling", OTHER_SPELLINGS)
@pytest.mark.parametrize("what", ["two splits", "two labels", "one label"])
def test_one_file_is_listed_once_however_it_is_spelled(lists, spelling, what):
    images = lists / "images"
    path = f"{'test' if what == 'two splits' else 'train'}/class 0/0 of it.png"
    (images / "link.png").symlink_to(images / path)
    (images / "linked").symlink_to(images)
    os.link(images / path, images / "hard.png")
    line = f"{OTHER_SPELLINGS[spelling](path).format(images=images)} {1 if what == 'two labels' else 0}\n"
    before = open_lists(lists).class_names
    with (lists / "train.txt").open("a") as file:
        file.write(line)
    message = {
        "two splits": r"1 images are in both .*train.txt and .*test.txt, .*: line 12: .*and line 1: test/class 0/0 of",
        "two labels": r"1 images of .*train.txt are listed under two labels: line 1: train/class 0/0 of it.png and",
        "one label": r"1 images of .*train.txt are listed more than once: line 1: train/class 0/0 of it.png and l",
    }[what]
    with pytest.raises(ValueError, match=message):
        open_lists(lists)
    source = open_lists(lists, allow_duplicates=True)
    assert source.class_names == before == ("class 0", "class 1")
    assert len(source.splits["train"]) == 11


def test_files_that_a_file_system_cannot_tell_apart_are_not_taken_for_one(lists, monkeypatch):
    """Some file systems give all files of a folder one number when it is listed."""
    monkeypatch.setattr(duplicates, "_number", lambda entry, device: 7)
    assert len(open_lists(lists).splits["train"]) == 10


def test_other_spellings_of_a_folder_are_the_same_class(lists):
    path = lists / "train.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([f"./{lines[0]}", lines[1].replace("/", "//"), *lines[2:]]))
    assert open_lists(lists).class_names == ("class 0", "class 1")


def test_missing_files_are_counted_and_the_right_root_is_suggested(lists):
    (lists / "images" / "train" / "class 1" / "2 of it.png").unlink()
    with pytest.raises(
        ValueError, match=r"1 of 10 files of .*train.txt do not exist under .*: line 9: train/class 1/2 of it.png"
    ):
        open_lists(lists)
    with pytest.raises(ValueError, match=r"10 of 10 .*17 of 18 .* are found if you give .*/images as root"):
        open_lists(lists, root=".")
    text = (lists / "train.txt").read_text()
    (lists / "train.txt").write_text(text.replace("train/", "data_256/a/train/"))
    with pytest.raises(ValueError, match=r"9 of 10 that were tried are found if you remove 'data_256/a/' from"):
        open_lists(lists)
    (lists / "train.txt").write_text(text.replace("of it", "of them"))
    with pytest.raises(ValueError, match="Is root the folder"):
        open_lists(lists)


MENDS = {
    "a slash": (lambda line: f"/{line}", "remove the '/' that the lines begin with"),
    "a prefix": (lambda line: f"./data/a/{line}", "remove 'data/a/' from the front of the lines"),
    "an absolute prefix": (lambda line: f"/data/a/{line}", "remove '/data/a/' from the front of the lines"),
    "backslashes": (lambda line: line.replace("/", "\\"), r"write '/' for '\' in the paths"),
    "a drive": (
        lambda line: "C:\\a\\" + line.replace("/", "\\"),
        r"write '/' for '\' in the paths and remove 'C:/a/' from the front of the lines",
    ),
    "comma and space": (lambda line: line.replace("png ", "png, "), "remove the ',' before the label"),
    "comma": (lambda line: line.replace("png ", "png,"), "put a space for the ',' before the label"),
    "semicolon": (lambda line: line.replace("png ", "png;"), "put a space for the ';' before the label"),
    "tab and comma": (lambda line: line.replace("png ", "png,\t"), "remove the ',' before the label"),
    "quotes": (lambda line: f'"{line}'.replace("png ", 'png" '), "remove the quotes around the paths"),
    "csv": (
        lambda line: f'"{line}'.replace("png ", 'png",'),
        "put a space for the ',' before the label and remove the quotes around the paths",
    ),
    "label first": (lambda line: f"{line[-1]} {line[:-2]}", "put the label behind the path"),
    "label first, comma": (
        lambda line: f"{line[-1]},{line[:-2]}",
        "put the label behind the path, with a space for the ','",
    ),
    "another ending": (lambda line: line.replace(".png", ".PNG"), "write the ending '.png', as the files have it"),
    "no ending": (lambda line: line.replace(".png", ""), "write the ending '.png', as the files have it"),
}


@pytest.mark.parametrize("kind", MENDS)
def test_advice_for_a_list_fits_its_cause(lists, kind):
    change, advice = MENDS[kind]
    for split in ("train", "meta", "test"):
        path = lists / f"{split}.txt"
        path.write_text("".join(f"{change(line)}\n" for line in path.read_text().split("\n") if line))
    with pytest.raises(ValueError, match=r"\. They are found if you (.*)$") as refused:
        open_lists(lists)
    assert str(refused.value).endswith(f". They are found if you {advice}")
    shutil.rmtree(lists / "images")  # no advice that was not tried
    (lists / "images").mkdir()
    with pytest.raises(ValueError, match=r"lines are not|Is root the folder") as refused:
        open_lists(lists)
    assert "found if" not in str(refused.value)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_unicode_forms_are_told_apart_and_not_changed(lists, forms):
    listed, on_disk = (unicodedata.normalize(form, "caf\u00e9") for form in forms)
    (lists / "images" / "train" / "class 0").rename(lists / "images" / "train" / on_disk)
    text = (lists / "train.txt").read_text()
    (lists / "train.txt").write_text(text.replace("train/class 0", f"train/{listed}"))
    with pytest.raises(ValueError, match=rf"if you write the names in Unicode form {forms[1]}, as the files"):
        open_lists(lists)
    (lists / "train.txt").write_text(text.replace("train/class 0", f"train/{on_disk}"))
    assert open_lists(lists).class_names[0] == on_disk


def test_a_header_is_named(lists):
    path = lists / "train.txt"
    path.write_text("path label\n" + path.read_text())
    with pytest.raises(ValueError, match=r"line 1: 'path label'\. They are found if you remove line 1, a header$"):
        open_lists(lists)
    path.write_text(path.read_text().replace("path label", "path,label").replace(".png ", ".png,"))
    with pytest.raises(ValueError, match=r"found if you remove line 1, a header and put a space for the ',' before"):
        open_lists(lists)


def test_a_root_one_folder_too_deep_is_named_and_no_advice_leads_astray(lists):
    with pytest.raises(ValueError, match=r"They are found if you give .*/images as root$"):
        open_lists(lists, root="images/train")
    path = lists / "train.txt"
    path.write_text(path.read_text().replace("train/", ""))
    with pytest.raises(ValueError, match=r"They are under .*/images, and other lines are under .*/images/train: let"):
        open_lists(lists, root="images/train")


def test_a_list_of_another_encoding_whose_files_are_utf8(lists):
    (lists / "images" / "train" / "class 0").rename(lists / "images" / "train" / "caf\u00e9")
    path = lists / "train.txt"
    path.write_bytes(path.read_text().replace("class 0", "caf\u00e9").encode("latin1"))
    with pytest.raises(ValueError, match=r"line 1: train/caf\\xe9/0 of it.png.* found if you save the list as UTF-8"):
        open_lists(lists)


def test_a_path_of_5000_letters_is_shortened_and_its_line_named(lists):
    for path, where in (("x" * 5000 + "/1.png", "line 11: x"), ("y/" * 2500 + "1.png", "line 11: y/y")):
        text = (lists / "train.txt").read_text()
        (lists / "train.txt").write_text(text.strip() + f"\n{path} 0\n")
        with pytest.raises(ValueError, match=rf"1 of 11 files of .*train.txt do not exist.*: {where}") as refused:
            open_lists(lists)
        assert "letters" in str(refused.value)
        assert len(str(refused.value)) < 1000
        (lists / "train.txt").write_text(text)


def test_a_folder_that_cannot_be_read_is_not_called_missing(lists, monkeypatch):
    scan = os.scandir

    def denied(folder):
        if str(folder).endswith("class 1"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ValueError, match=r"class 1 cannot be read \(Permission denied\)"):
        open_lists(lists)


def test_classes_without_a_folder_of_their_own_are_numbered(lists):
    for split in ("train", "meta", "test"):
        path = lists / f"{split}.txt"
        path.write_text(
            path.read_text()
            .replace(f"{split}/class 0/0 of it.png 0", f"{split}/class 1/0 of it.png 0")
            .replace(f"{split}/class 1/0 of it.png 1", f"{split}/class 0/0 of it.png 1")
        )
    assert open_lists(lists, meta=False, meta_per_class=1).class_names == ("0", "1")


def test_real_lists(real_data):
    folder = real_data("lists")
    train = read_list(folder / "Places_LT_train.txt")
    counts = np.bincount(train.classes)
    assert (len(train.paths), len(counts), counts.max(), counts.min()) == (62_500, 365, 4980, 5)
    assert len(read_list(folder / "ImageNet_LT_val.txt").paths) == 20_000
    prefixed = read_list(folder / "oltr_prefix" / "Places_LT_val.txt")
    plain = read_list(folder / "Places_LT_val.txt")
    assert [Path(path).name for path in prefixed.paths] == [Path(path).name for path in plain.paths]
    with pytest.raises(ValueError, match="62,500 of 62,500 files"):
        open_source(
            "list_file",
            root=folder,
            **{
                f"{s}_list": folder / f"Places_LT_{v}.txt"
                for s, v in (("train", "train"), ("meta", "val"), ("test", "test"))
            },
        )


def test_real_odd_images(real_data):
    paths = sorted(path for path in real_data("imagenet_samples").iterdir() if path.suffix.lower() in (".jpeg", ".jpg"))
    assert len(paths) >= 100
    for path in paths[:40]:
        decoded = decode_image(path)
        with Image.open(path) as image:
            assert decoded.shape == (image.height, image.width, 3)
            np.testing.assert_array_equal(decoded, np.asarray(image.convert("RGB")))


# --- open_source


def test_wrong_arguments_are_refused_with_advice(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        open_source("cifar-10")
    with pytest.raises(ValueError, match="needs a root"):
        open_source("image_folder")
    with pytest.raises(ValueError, match="does not exist"):
        open_source("cifar10", root=tmp_path / "absent", download=False)
    for factor in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="imbalance_factor"):
            open_source("digits", imbalance_factor=factor)
    with pytest.raises(ValueError, match="meta_per_class is 0"):
        open_source("digits", meta_per_class=0)
    with pytest.raises(ValueError, match="digits has 10 classes, num_classes says 11"):
        open_source("digits", num_classes=11)
    with pytest.raises(ValueError, match="leaves the last of 10 classes"):
        open_source("digits", imbalance_factor=5000)


def test_what_every_run_cuts_for_itself_is_measured_whole():
    """Its own cut is that of other runs: their training images would be called a test."""
    source = open_labelled("digits")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 1797}
