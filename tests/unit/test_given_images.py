"""What users hand to `predict`: every form of an image, every kind of file, and names of every sort."""

from __future__ import annotations

import io
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_inference import model, root, trainer  # noqa: F401  fixtures
from test_stored_pixels import photograph

from fastlt import cli
from loaders.sources.decode import decode_image

PIXELS = photograph(40, 56, 7)


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def files(folder: Path) -> dict[str, Path]:
    """A file of each kind that cameras, scanners and the web make, by its name."""
    image = Image.fromarray(PIXELS)
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257)
    frames = [image.convert("P"), Image.fromarray(255 - PIXELS).convert("P")]
    return {
        "JPEG": saved(folder / "a.jpg", image, quality=95),
        "progressive JPEG": saved(folder / "b.jpeg", image, quality=95, progressive=True),
        "turned JPEG": saved(folder / "c.jpg", image, quality=95, exif=turned),
        "gray JPEG": saved(folder / "d.jpg", image.convert("L"), quality=95),
        "CMYK JPEG": saved(folder / "e.jpg", image.convert("CMYK"), quality=95),
        "PNG": saved(folder / "f.png", image),
        "RGBA PNG": saved(folder / "g.png", image.convert("RGBA")),
        "gray PNG with alpha": saved(folder / "h.png", image.convert("LA")),
        "16-bit PNG": saved(folder / "i.png", deep),
        "palette PNG": saved(folder / "j.png", image.convert("P")),
        "black and white PNG": saved(folder / "k.png", image.convert("1")),
        "WebP": saved(folder / "l.webp", image, lossless=True),
        "GIF": saved(folder / "m.gif", frames[0], save_all=True, append_images=frames[1:]),
        "TIFF": saved(folder / "n.tif", image),
        "BMP": saved(folder / "o.bmp", image),
        "JPEG that is called PNG": saved(folder / "p.png", image, format="JPEG"),
    }


def test_every_kind_of_file_has_the_pixels_of_the_converter(model, tmp_path):  # noqa: F811
    """Of a run on images stored raw, which are Pillow's pixels; turned by EXIF, and of an animation the first frame."""
    found = files(tmp_path)
    logits = model.logits([*found.values()])
    decoded = {kind: decode_image(path) for kind, path in found.items()}
    for kind, pixels in decoded.items():
        assert pixels.shape == ((56, 40, 3) if kind == "turned JPEG" else (40, 56, 3)), kind
    assert torch.equal(model.logits([*decoded.values()]), logits)
    for kind in ("PNG", "RGBA PNG", "WebP", "TIFF", "BMP"):
        assert np.array_equal(decoded[kind], PIXELS), kind
    assert np.array_equal(decoded["16-bit PNG"][:, :, 1], PIXELS[:, :, 0])


def test_bytes_open_files_and_images_of_pillow_are_the_file(model, tmp_path):  # noqa: F811
    for kind, path in files(tmp_path).items():
        expected, data = model.logits(path), path.read_bytes()
        for form in (data, bytearray(data), io.BytesIO(data), Image.open(path), str(path)):
            assert torch.equal(model.logits(form), expected), (kind, type(form))
        with path.open("rb") as file:
            assert torch.equal(model.logits(file), expected), kind


def test_bytes_of_jpeg_files_are_decoded_as_evaluation_decodes_files(model, tmp_path):  # noqa: F811
    """Where the data set was stored as JPEG, by another function than Pillow's."""
    from dataclasses import replace

    from fastlt.inference import Predictor

    transform = replace(model.transform, storage=replace(model.transform.storage, keeps_jpeg=True, max_resolution=None))
    kept = Predictor(model.model, model.counts, model.carried, transform, model.device)
    path = saved(tmp_path / "a.jpg", Image.fromarray(PIXELS), quality=95)
    assert torch.equal(kept.logits(path.read_bytes()), kept.logits(path))
    assert not torch.equal(kept.logits(decode_image(path)), kept.logits(path))


def test_one_opened_image_many_times(model, tmp_path, monkeypatch):  # noqa: F811
    """Pillow reads its file when it is first looked at, which several threads would do."""
    path, threads = saved(tmp_path / "a.png", Image.fromarray(PIXELS)), []
    with Image.open(path) as image:
        load = type(image).load
        with monkeypatch.context() as patch:
            patch.setattr(type(image), "load", lambda self: threads.append(threading.current_thread()) or load(self))
            assert not model.predict([image] * 64, workers=8).unreadable
    assert threads[0] is threading.main_thread()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    threads.clear()
    with Image.open(path) as image, monkeypatch.context() as patch:
        patch.setattr(type(image), "load", lambda self: threads.append(threading.current_thread()) or load(self))
        unreadable = model.predict([image] * 8 + [PIXELS], workers=8).unreadable
    assert [one.position for one in unreadable] == list(range(8))
    assert {one.reason for one in unreadable} == {"damaged: image file is truncated"}
    assert set(threads) == {threading.main_thread()}, "two threads that read it at once see it whole now and then"


def test_warnings_of_others_stay_as_they_were(model, tmp_path):  # noqa: F811
    """Also when they became errors; Pillow warns of a palette with transparency."""
    image = Image.fromarray(PIXELS).convert("P")
    path = saved(tmp_path / "a.png", image, transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not model.predict([path] * 400, workers=8).unreadable
        with pytest.raises(UserWarning, match="of the user"):
            warnings.warn("of the user")


def test_a_list_mixes_all_forms_and_keeps_their_order(model, tmp_path):  # noqa: F811
    path = saved(tmp_path / "a.png", Image.fromarray(PIXELS))
    folder = tmp_path / "folder"
    folder.mkdir()
    for k in range(2):
        saved(folder / f"{k}.png", Image.fromarray(PIXELS[::-1].copy()))
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    forms = [path, str(path), PIXELS, tensor, Image.fromarray(PIXELS), path.read_bytes(), [folder], b"no image"]
    found = model.predict(forms, batch_size=3)
    assert found.sources == (str(path), str(path), None, None, None, None, *(str(folder / f"{k}.png") for k in (0, 1)))
    assert found.positions.tolist() == [*range(8)]
    assert np.unique(found.probabilities[:6], axis=0).shape[0] == 1
    (bad,) = found.unreadable
    assert (bad.position, bad.source, bad.called) == (8, None, "8")
    assert bad.reason.startswith("not an image")
    assert "8,,," in found.to_csv()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 6, 4), np.uint8), r"shape \(5, 6, 4\): give uint8 pixels, RGB \(H, W, 3\) or gray"),
        (np.zeros((3, 5, 6), np.uint8), r"shape \(3, 5, 6\): give uint8 pixels"),
        (np.zeros((5, 6, 3), np.uint16), "type uint16"),
        (torch.zeros(1, 5, 6, dtype=torch.uint8), r"shape \(1, 5, 6\): give pixels"),
        (io.StringIO("text"), "read as str: open images with mode 'rb'"),
        (None, "images of type NoneType"),
    ],
)
def test_pixels_of_another_form_are_refused_with_what_is_right(model, image, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        model.predict(image)


NAMES = (
    "with space.png",
    "two\nlines.png",
    "ünïcödé 图.png",
    "-dash.png",
    "@at.png",
    "~tilde.png",
    "a'b\"c.png",
    b"caf\xe9.png",
)


def test_names_of_every_sort_are_read_and_told(model, tmp_path):  # noqa: F811
    image = io.BytesIO()
    Image.fromarray(PIXELS).save(image, "PNG")
    for name in NAMES:
        (tmp_path / os.fsdecode(name)).write_bytes(image.getvalue())
    found = model.predict(tmp_path)
    assert sorted(found.sources) == sorted(str(tmp_path / os.fsdecode(name)) for name in NAMES)
    assert all("\n" not in str(one) for one in found)
    found.to_csv().encode()
    called = [one.called for one in found]
    assert f"{tmp_path}/caf\\xe9.png" in called


def test_files_that_are_no_images_are_told_and_stop_no_others(model, tmp_path):  # noqa: F811
    saved(tmp_path / "good.png", Image.fromarray(PIXELS))
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "cut.jpg").write_bytes(saved(tmp_path / "x.jpg", Image.fromarray(PIXELS)).read_bytes()[:400])
    (tmp_path / "x.jpg").unlink()
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    found = model.predict(tmp_path)
    assert found.sources == (str(tmp_path / "good.png"),)
    reasons = {Path(one.called).name: one.reason for one in found.unreadable}
    assert reasons["empty.jpg"] == "the file is empty (0 bytes)"
    assert reasons["text.jpg"].startswith("not an image in a known format")
    assert reasons["cut.jpg"].startswith("damaged")
    assert reasons["broken.jpg"] == "no such file"
    assert "loop.jpg" in reasons
    assert reasons["pipe.jpg"].startswith("not a file")


def test_the_command_takes_names_of_every_sort(model, trainer, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        saved(tmp_path / os.fsdecode(name), Image.fromarray(PIXELS), format="PNG")
    words = [os.fsdecode(name) for name in NAMES if not os.fsdecode(name).startswith(("-", "@", "~"))]
    words += ["./-dash.png", "./@at.png", "./~tilde.png"]
    assert cli.main(["predict", str(trainer.folder), *words, "--quiet", "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == len(NAMES)
    (tmp_path / "empty").mkdir()
    assert cli.main(["predict", str(trainer.folder), "empty", "--quiet"]) == 2
    assert "empty holds no images" in capsys.readouterr().err
