"""`fastlt export`: files for onnxruntime and torch that give the trained model's logits, or none."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hidden_fastlt import without_fastlt
from PIL import Image

import fastlt
from fastlt import cli
from fastlt.ensemble import log_mean_probability
from fastlt.export import checked, hub, programs
from fastlt.export.network import Exported
from fastlt.export.options import ExportOptions
from fastlt.recipe import load_recipe
from fastlt.run.cut_images import validation_images
from fastlt.run.model_folder import logits
from fastlt.run.preflight import prepare
from fastlt.run.stopping import Interrupted
from fastlt.run.trained import load_trained
from fastlt.run.trainer import Trainer

read_script = programs.FORMS["torchscript"].read
ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "digits_lt.yaml"
CPU = torch.device("cpu")
UINT8 = ExportOptions(preprocess=True)
STAGE = "stages.end_to_end"
SECOND = "stages.second={{method: {}, batch_size: 32, lr: 0.1, iterations: 4, evaluate_every: 2{}}}"
RUNS = {
    "linear": ["model.name=test_resnet"],
    "cosine": ["model.head=cosine"],
    "oltr": [SECOND.format("oltr", ", sampling: class_balanced, options: {attention_side: 2}")],
    "routed": ["model.experts=2", "model.head=cosine", f"{STAGE}.method=ride", SECOND.format("ride_router", "")],
    "expert": [f"{STAGE}.method=expert", f"{STAGE}.classes=few"],
}


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Runs of four iterations, by their names, on a data set of their own."""
    root = tmp_path_factory.mktemp("exported")
    shutil.copytree(digits, root / "data")
    common = [f"data.converted={root / 'data'}", f"runs={root}", "data.loader=resident", "num_threads=1"]
    common += [f"{STAGE}.{key}" for key in ("method=plain", "iterations=4", "evaluate_every=2", "warmup=0")]
    for name, more in RUNS.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        small = [f"{STAGE}.batch_size=32"]
        Trainer(prepare(load_recipe(RECIPE, [*common, *small, *more, f"name={name}"]))).fit()
    return root


def in_hand(folder):
    """The trained run, uint8 images, and the logits that its own network gives them."""
    trained = load_trained(folder, CPU)
    images = validation_images(trained.recipe.data, 20)
    return trained, images, logits(trained.model, images, trained)


def told(capsys, *words, code=0):
    assert cli.main(["export", *map(str, words)]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("oltr", "torchscript"),
        ("oltr", "onnx"),
        pytest.param("oltr", "torch", marks=pytest.mark.slow),
        ("routed", "torchscript"),
        ("routed", "torch"),
        pytest.param("routed", "onnx", marks=pytest.mark.slow),
        ("expert", "torchscript"),
    ],
)
def test_networks_that_branch_or_measure_distances_are_exported_too(runs, tmp_path, name, to):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    trained, images, expected = in_hand(runs / name)
    difference = checked.export([trained], to, images, tmp_path / "file", UINT8)
    assert 0 <= difference <= 2e-5
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    program = programs.FORMS[to].read(tmp_path / "file")
    with torch.no_grad():
        for count in (1, 3, 20):
            torch.testing.assert_close(program(images[:count]), expected[:count], rtol=0, atol=2e-5)


def test_files_are_read_where_fastlt_cannot_be_imported(runs, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    _, images, expected = in_hand(runs / "linear")
    np.savez(tmp_path / "images.npz", images=images, logits=expected)
    for to, suffix in (("onnx", "onnx"), ("torch", "pt2"), ("torchscript", "torchscript")):
        text = told(capsys, runs / "linear", "--to", to, "--preprocess", "--out", tmp_path / f"m.{suffix}")
        assert "on 32 validation images" in text
        assert "takes uint8 (N, 3, 8, 8) RGB, whole images; they are normalised inside" in text
    out = without_fastlt(
        """
        import json, numpy as np, onnxruntime, torch
        saved = np.load("images.npz")
        images, logits = saved["images"], saved["logits"]
        session = onnxruntime.InferenceSession("m.onnx")
        names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
        assert names == [str(c) for c in range(10)]
        script, extra = torch.jit.load("m.torchscript"), {"fastlt.json": ""}
        program = torch.export.load("m.pt2", extra_files=extra).module()
        assert json.loads(extra["fastlt.json"])["class_names"] == names
        with torch.no_grad():
            for count in (1, 7, 20):
                x = images[:count]
                for got in (
                    session.run(["logits"], {"images": x})[0],
                    program(torch.from_numpy(x)).numpy(),
                    script(torch.from_numpy(x)).numpy(),
                ):
                    assert np.abs(got - logits[:count]).max() <= 1e-5
        print("equal")
        """,
        tmp_path,
    )
    assert out == "equal\n"


def test_weights_that_an_onnx_file_cannot_hold_lie_beside_it(runs, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(programs, "LARGEST_ONNX", 1000)
    trained, images, expected = in_hand(runs / "linear")
    assert checked.export([trained], "onnx", images, tmp_path / "m.onnx", UINT8) <= 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx.data").stat().st_size > (tmp_path / "m.onnx").stat().st_size
    np.savez(tmp_path / "images.npz", images=images, logits=expected)
    (tmp_path / "elsewhere").mkdir()
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    out = without_fastlt(
        """
        import json, numpy as np, onnxruntime
        saved = np.load("images.npz")
        session = onnxruntime.InferenceSession("elsewhere/m.onnx")
        assert json.loads(session.get_modelmeta().custom_metadata_map["crop_ratio"]) == 1
        print(np.abs(session.run(["logits"], {"images": saved["images"]})[0] - saved["logits"]).max() <= 1e-5)
        """,
        tmp_path,
    )
    assert out == "True\n"


def test_without_preprocessing_it_takes_normalised_images(runs, tmp_path, capsys):
    _, images, expected = in_hand(runs / "cosine")
    text = told(capsys, runs / "cosine", "--to", "torchscript", "--out", tmp_path / "m.pt")
    assert "takes float32 (N, 3, 8, 8) RGB" in text
    assert "mean (0.306, 0.306, 0.306) and std (0.376, 0.376, 0.376)" in text
    x = (images.float() / 255 - 0.306) / 0.376
    torch.testing.assert_close(read_script(tmp_path / "m.pt")(x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("to", ["onnx", "torch", "torchscript"])
def test_images_of_any_size_are_taken_where_the_network_takes_them(runs, tmp_path, to):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    trained, images, expected = in_hand(runs / "cosine")
    options = ExportOptions(preprocess=True, dynamic_size=True)
    assert checked.export([trained], to, images, tmp_path / "file", options) <= 2e-5
    program = programs.FORMS[to].read(tmp_path / "file")
    larger = torch.cat([images, images], dim=3)[:, :, :, :13]
    with torch.no_grad():
        for given, logits_of in ((images, expected), (larger, logits(trained.model, larger, trained))):
            for count in (1, 5):
                torch.testing.assert_close(program(given[:count]), logits_of[:count], rtol=0, atol=2e-5)


def test_a_network_of_one_size_is_not_written_for_any(runs, tmp_path, capsys):
    words = ("--dynamic-size", "--out", tmp_path / "m.pt")
    text = told(capsys, runs / "oltr", "--to", "torchscript", *words, code=2)
    assert "takes no images of 12 x 8 pixels, only of 8" in text
    assert text.endswith("leave dynamic_size out\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["onnx", "torch", "torchscript"])
def test_half_precision_halves_the_file_and_stays_within_its_own_limit(runs, tmp_path, to):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    trained, images, expected = in_hand(runs / "linear")
    sizes = {}
    for precision in ("fp32", "fp16"):
        options = ExportOptions(preprocess=True, precision=precision)
        difference = checked.export([trained], to, images, tmp_path / precision, options)
        sizes[precision] = (tmp_path / precision).stat().st_size
    assert 1e-5 < difference <= options.allowed(expected) == pytest.approx(0.02 * max(1, expected.abs().max().item()))
    assert sizes["fp16"] < 0.7 * sizes["fp32"]
    program = programs.FORMS[to].read(tmp_path / "fp16")
    with torch.no_grad():
        found = program(images)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max().item() <= options.allowed(expected)


def test_a_network_whose_numbers_half_precision_has_not_is_refused(runs, tmp_path):
    trained, images, _ = in_hand(runs / "cosine")
    with torch.no_grad():
        first = next(m for m in trained.model.backbone.modules() if isinstance(m, torch.nn.Conv2d))
        first.weight *= 1e6  # the normalisation after it divides, and the logits stay what they are
        norm = next(m for m in trained.model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
        norm.running_mean *= 1e6
        norm.running_var *= 1e12
    checked.export([trained], "torchscript", images, tmp_path / "whole", UINT8)
    with pytest.raises(ValueError, match="is allowed for half precision; nothing was written"):
        checked.export([trained], "torchscript", images, tmp_path / "half", ExportOptions(True, precision="fp16"))
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_the_version_of_the_operators_is_the_one_that_is_asked_for_or_refused(runs, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    told(capsys, runs / "cosine", "--to", "onnx", "--opset", "19", "--out", tmp_path / "m.onnx")
    (operators,) = [of for of in onnx.load(tmp_path / "m.onnx").opset_import if of.domain == ""]
    assert operators.version == 19
    text = told(capsys, runs / "cosine", "--to", "onnx", "--opset", "8", "--out", tmp_path / "old.onnx", code=2)
    assert "opset is 8, and this network cannot be put into it" in text
    assert not (tmp_path / "old.onnx").exists()


def test_a_loaded_model_is_exported_as_by_the_command_and_stays_as_it_is(runs, tmp_path):
    _, images, expected = in_hand(runs / "linear")
    model = fastlt.load(runs / "linear", device="cpu")
    before = {key: tensor.clone() for key, tensor in model.model.state_dict().items()}
    made = model.export("torchscript", tmp_path / "half.pt", preprocess=True, precision="fp16")
    assert made.path == tmp_path / "half.pt"
    made = model.export("torchscript", str(tmp_path / "m.pt"), preprocess=True)
    assert made.difference <= 1e-5
    assert made.images == "32 validation images"
    torch.testing.assert_close(read_script(made.path)(images), expected, rtol=0, atol=1e-5)
    assert {key: tensor.dtype for key, tensor in model.model.state_dict().items()} == {
        key: tensor.dtype for key, tensor in before.items()
    }
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.model.state_dict().items())
    assert model.export("timm", tmp_path / "folder").path == tmp_path / "folder"
    with pytest.raises(ValueError, match=r"unknown form 'onxn'.*did you mean 'onnx'"):
        model.export("onxn")
    with pytest.raises(ValueError, match="precision is 'int8': allowed are fp32, fp16"):
        model.export("onnx", precision="int8")


def test_several_runs_are_their_mean_probability(runs, tmp_path, capsys):
    names = ("linear", "cosine")
    text = told(capsys, *(runs / name for name in names), "--to", "torchscript", "--out", tmp_path / "m.pt")
    assert "the largest difference of the log of the mean probability" in text
    each = [in_hand(runs / name) for name in names]
    images, expected = each[0][1], log_mean_probability([z for _, _, z in each])
    torch.testing.assert_close(read_script(tmp_path / "m.pt")(images).double(), expected, rtol=0, atol=1e-4)


def test_an_export_that_differs_is_not_left(runs, tmp_path, monkeypatch, capsys):
    forward = Exported.forward
    monkeypatch.setattr(Exported, "forward", lambda self, images: forward(self, images) + 2e-4)
    text = told(capsys, runs / "cosine", "--to", "torchscript", "--out", tmp_path / "m.pt", code=2)
    assert "differ from the trained model's by 0.0002" in text
    assert not list(tmp_path.iterdir())


def test_without_the_data_set_images_are_named(runs, tmp_path, capsys):
    _, images, _ = in_hand(runs / "cosine")
    shutil.copytree(runs / "cosine", tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(runs / "data"), str(tmp_path / "gone")))
    words = [tmp_path / "run", "--to", "torchscript", "--preprocess"]
    text = told(capsys, *words, code=2)
    assert "data set of" in text
    assert "--images FILE" in text
    assert not list((tmp_path / "run").glob("*.torchscript*"))
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / "one.png")
    assert "on 1 given image\n" in told(capsys, *words, "--images", tmp_path / "one.png")
    assert (tmp_path / "run" / "cosine.torchscript").is_file()
    (tmp_path / "no.png").write_text("no image")
    assert "no.png: " in told(capsys, *words, "--images", tmp_path / "no.png", code=2)


def test_the_wrong_words_are_answered_before_work_starts(runs, tmp_path, capsys, monkeypatch):
    linear = runs / "linear"

    def line(*words):
        text = told(capsys, *words, code=2)
        assert text.count("\n") == 1
        return text

    assert "does not exist" in line(tmp_path / "nowhere", "--to", "onnx")
    assert "preprocess is not for the form timm" in line(linear, "--to", "timm", "--preprocess")
    assert "dynamic_size is not for the form timm" in line(linear, "--to", "timm", "--dynamic-size")
    assert "precision is not for the form timm" in line(linear, "--to", "timm", "--precision", "fp16")
    assert "opset is a version of ONNX" in line(linear, "--to", "torch", "--opset", "18")
    assert "opset is 999: onnx" in line(linear, "--to", "onnx", "--opset", "999")
    assert "several runs are none" in line(linear, linear, "--to", "timm")
    assert "give --out FILE" in line(linear, linear, "--to", "torch")
    assert "--push uploads what timm reads" in line(linear, "--to", "onnx", "--push", "me/x")
    assert "give --push REPO" in line(linear, "--to", "timm", "--private")
    assert "so that nobody takes it" in line(linear, "--to", "torch", "--checkpoint", "best")
    assert "smoothed model of stages" in line(linear, "--to", "torch", "--checkpoint", "smoothed")
    assert "is a folder" in line(linear, "--to", "torch", "--out", tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "onnx" else found(name, *more))
    assert "pip install 'fastlt[export]'" in line(linear, "--to", "onnx")


def test_another_checkpoint_goes_to_another_place(runs, tmp_path, capsys):
    told(capsys, runs / "linear", "--to", "timm", "--checkpoint", "best", "--out", tmp_path / "best")
    assert load_trained(tmp_path / "best", CPU).select == "best"
    card = (tmp_path / "best" / "README.md").read_text()
    measured = json.loads((runs / "linear" / "result.json").read_text())["selection"]["best"]
    assert f"top-1 accuracy on the test split is {100 * measured['top1']:.2f} %" in card
    assert f"ECE {100 * measured['ece']:.2f} %" in card
    assert "All classes" not in card, "accuracies of classes are those of the result"


def test_a_network_that_timm_has_not_takes_the_place_of_an_earlier_export(runs, tmp_path, capsys):
    for select in ("best", "last"):
        words = ["export", str(runs / "cosine"), "--to", "timm", "--checkpoint", select, "--out", str(tmp_path / "out")]
        assert cli.main(words) == 2
        assert f"fastlt.load reads it from {tmp_path / 'out'}" in capsys.readouterr().err
        assert load_trained(tmp_path / "out", CPU).select == select


def test_a_run_that_is_not_finished_says_so(digits_words, capsys):
    context = prepare(load_recipe(RECIPE, [*digits_words, f"{STAGE}.method=plain"]))
    trainer = Trainer(context)
    log = trainer._log_training

    def stop(*arguments):
        log(*arguments)
        trainer.stopping.received = 15

    trainer._log_training = stop
    with pytest.raises(Interrupted):
        trainer.fit()
    text = told(capsys, context.folder, "--to", "timm", code=2)
    assert "holds no finished run" in text
    assert "the command that began it goes on" in text


@pytest.fixture
def reachable_hub(monkeypatch):
    """A hub that answers, and a token: nothing leaves this machine."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "reachable", lambda url: True)


def test_a_push_goes_through_timm_up_to_the_upload(runs, tmp_path, capsys, monkeypatch, reachable_hub):
    from types import SimpleNamespace

    from huggingface_hub import HfApi

    asked = {}

    def create_repo(self, repository, *, private, exist_ok):
        asked["private"] = private
        return SimpleNamespace(repo_id=repository)

    def upload_folder(self, *, repo_id, folder_path, **more):
        shutil.copytree(folder_path, tmp_path / "uploaded")
        asked["repository"] = repo_id
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "file_exists", lambda self, **which: False)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    text = told(capsys, runs / "linear", "--to", "timm", "--push", "me/digits", "--private")
    assert "https://huggingface.co/me/digits/commit/1" in text
    assert asked == {"private": True, "repository": "me/digits"}
    assert sorted(p.name for p in (tmp_path / "uploaded").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    card = (tmp_path / "uploaded" / "README.md").read_text()
    assert 'timm.create_model("hf-hub:me/digits", pretrained=True)' in card
    assert "| few-shot | 4 | 43 |" in card
    trained, images, expected = in_hand(runs / "linear")
    again = load_trained(tmp_path / "uploaded", CPU)
    torch.testing.assert_close(logits(again.model, images, trained), expected, rtol=0, atol=1e-5)


def test_a_push_that_cannot_be_is_refused_before_the_export(runs, capsys, monkeypatch, reachable_hub):
    def line(*words):
        text = told(capsys, runs / "linear", "--to", "timm", *words, code=2)
        assert text.count("\n") == 1
        return text

    assert "give NAME or OWNER/NAME" in line("--push", "a/b/c")
    with monkeypatch.context() as patch:
        patch.setattr(hub, "reachable", lambda url: False)
        assert "cannot be reached, it does not answer" in line("--push", "me/x")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "there is no token" in line("--push", "me/x")


def test_what_timm_has_not_is_not_pushed(runs, capsys, reachable_hub):
    text = told(capsys, runs / "routed", "--to", "timm", "--push", "me/x", code=2)
    assert "mean over experts" in text
