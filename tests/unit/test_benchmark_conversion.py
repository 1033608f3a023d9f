"""`fastlt benchmark conversion`: pixels that are stored change nothing, a second encoding does."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from PIL import Image
from small_betons import smooth_images

from fastlt import cli
from loaders.stored.ffcv_format import FfcvOptions


def test_each_way_of_storing_is_compared_with_the_originals(tmp_path, monkeypatch, capsys):
    from fastlt.benchmarks import conversion

    ways = {"raw": FfcvOptions("raw"), "small": FfcvOptions("jpg", max_resolution=48, jpeg_quality=10)}
    monkeypatch.setattr(conversion, "WAYS", ways)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(smooth_images([(70, 90)] * 4, seed=1)):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t", pretrained=False).state_dict(), tmp_path / "weights.pth")
    words = ["--images", str(tmp_path / "images"), "--model", "resnet10t", "--weights", str(tmp_path / "weights.pth")]
    assert cli.main(["benchmark", "conversion", *words, "--size", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["size"]) == (4, 32)
    assert found["rows"]["raw"] == {"pixels": 0, "other_top1": 0, "probability": 0, "largest": 0}
    assert found["rows"]["small"]["pixels"] > 1
    assert found["rows"]["small"]["largest"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "resnet10q"], "resnet10q"),
        (["--weights", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--weights", "headless.pth"], "has no head for the 1000 classes of resnet10t"),
        (["--images", "."], "has no image"),
    ],
)
def test_what_cannot_be_compared_is_one_message(tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.fromarray(smooth_images([(40, 40)], seed=1)[0]).save("images/a.png")
    torch.save(timm.create_model("resnet10t", pretrained=False, num_classes=0).state_dict(), "headless.pth")
    words = ["--images", "images", "--model", "resnet10t", "--weights", "headless.pth"]
    if "--images" in more:
        (tmp_path / "images" / "a.png").unlink()
    assert cli.main(["benchmark", "conversion", *words, *more]) == 2
    assert message in capsys.readouterr().err


def test_cpu_time_is_compared_with_ffcvs_own_writer(tmp_path, monkeypatch, capsys):
    from fastlt.benchmarks import conversion

    monkeypatch.setattr(conversion, "CPU_WAYS", {"jpg, 40 px": FfcvOptions("jpg", max_resolution=40)})
    for i, image in enumerate(smooth_images([(70, 90)] * 4, seed=1)):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg")
    words = ["--images", str(tmp_path), "--cpu", "30", "--rounds", "2", "--workers", "2"]
    assert cli.main(["benchmark", "conversion", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = found["cpu_seconds"]["jpg, 40 px"]
    assert (found["images"], found["workers"]) == (30, 2)
    assert all(len(of_writer) == 2 and min(of_writer) > 0 for of_writer in row["rounds"].values())
    assert row["ratio"] == row["fastlt"] / row["ffcv"]


def test_a_conversion_that_fails_is_no_figure(tmp_path, monkeypatch):
    from fastlt.benchmarks import conversion

    monkeypatch.setattr(conversion, "_convert", lambda split, options: 1 / 0)
    Image.fromarray(smooth_images([(40, 40)], seed=1)[0]).save(tmp_path / "a.png")
    with pytest.raises(RuntimeError, match="a conversion as raw failed"):
        cli.main(["benchmark", "conversion", "--images", str(tmp_path), "--cpu", "2", "--rounds", "1", "--json"])


def test_one_of_the_two_measurements_is_asked_for(tmp_path, capsys):
    for words in ([], ["--cpu", "5", "--weights", "file"]):
        with pytest.raises(SystemExit):
            cli.main(["benchmark", "conversion", "--images", str(tmp_path), *words])
        assert "give --weights FILE or --cpu N" in capsys.readouterr().err
