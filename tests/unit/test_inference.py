"""`fastlt.load` and `fastlt predict`: the logits of evaluation, and what is made of them."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from test_stored_pixels import SIZES, photograph

import fastlt
from fastlt import cli
from fastlt.inference import Predictor
from fastlt.inference.inputs import images_below
from fastlt.recipe import load_recipe
from fastlt.run.loading import normaliser, whole_split
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer

CLASSES = ("ant", "bee", "yak")
COUNTS = (12, 6, 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A long tail of three classes of photographs of several sizes."""
    root = tmp_path_factory.mktemp("mine")
    for split, counts in (("train", COUNTS), ("val", (4, 4, 4)), ("test", (4, 4, 4))):
        for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = photograph(*SIZES[k % 4], 1000 * label + 100 * len(split) + k)
                Image.fromarray(pixels).save(folder / f"{k}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def trainer(root, tmp_path_factory) -> Trainer:
    """A run of a few iterations on the images stored raw and scaled down."""
    work = tmp_path_factory.mktemp("work")
    words = ["image_folder", "--root", root, "--out", work / "data", "--max-resolution", "48", "--meta-per-class", "4"]
    assert cli.main(["convert", *map(str, words), "--quiet"]) == 0
    recipe = work / "mine.yaml"
    stage = "{method: plain, loss: cross_entropy, iterations: 4, batch_size: 8, lr: 0.1, evaluate_every: 2}"
    recipe.write_text(
        f"name: mine\nruns: {work}/runs\nnum_threads: 1\nmodel: {{name: cifar_resnet8}}\n"
        f"data: {{source: image_folder, converted: {work}/data, meta_per_class: 4, image_size: 24, shots: [8, 4],"
        " mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25], train_crop: random_resized, eval_crop: center,"
        " loader: resident}\n"
        f"stages: {{end_to_end: {stage}}}\n"
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(prepare(load_recipe(recipe)))
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def model(trainer) -> Predictor:
    return fastlt.load(trainer.folder, device="cpu")


@pytest.fixture(scope="module")
def evaluated(trainer) -> torch.Tensor:
    """The logits of the test images, as the trainer's evaluation computes them."""
    images = whole_split(trainer.context, "test").images
    trainer.model.eval()
    with torch.no_grad():
        return trainer.model(normaliser(trainer.context)(images))


def test_files_of_the_test_set_give_the_logits_of_evaluation(root, model, evaluated):
    """Bit for bit: they were stored raw, though scaled, and are read and scaled as the conversion did it."""
    assert torch.equal(model.logits(root / "test"), evaluated)
    assert model.classes == CLASSES
    predictions = model.predict(root / "test", top=2)
    p = torch.softmax(evaluated.double(), 1)
    expected = p.topk(2, dim=1)
    np.testing.assert_array_equal(predictions.indices, expected.indices.numpy())
    np.testing.assert_allclose(predictions.probabilities, expected.values.numpy(), rtol=1e-5)
    first = predictions[0]
    assert first.source == str(root / "test/ant/0.jpg")
    assert first.names == tuple(CLASSES[k] for k in first.indices)
    assert (first.name, first.index, first.probability) == (first.names[0], first.indices[0], first.probabilities[0])
    assert predictions.names == [one.name for one in predictions]
    assert [one.source for one in predictions[-2:]] == [str(root / f"test/yak/{k}.jpg") for k in (2, 3)]
    assert predictions.coverage == 1
    with pytest.raises(IndexError):
        predictions[12]


def test_images_are_taken_in_every_form(root, model, tmp_path):
    paths = images_below(root / "test")
    assert [path.relative_to(root).as_posix() for path in paths[:2]] == ["test/ant/0.jpg", "test/ant/1.jpg"]
    expected = model.logits(paths)
    images = [Image.open(path) for path in paths]
    pixels = [np.asarray(image) for image in images]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in pixels]
    transformed = [model.transform(image) for image in images]
    assert (transformed[0].shape, transformed[0].dtype) == ((3, 24, 24), torch.float32)
    mixed = [str(paths[0]), images[1], pixels[2], tensors[3], root / "test" / "bee", *paths[8:]]
    for form in (
        [*map(str, paths)],
        images,
        pixels,
        tensors,
        transformed,
        torch.stack(transformed),
        mixed,
        iter(paths),
    ):
        torch.testing.assert_close(model.logits(form), expected, rtol=0, atol=0)
    assert torch.equal(model.logits(str(paths[0])), model.logits(transformed[0]))
    same = [pixels[k] for k in range(12) if pixels[k].shape == pixels[0].shape]
    assert torch.equal(model.logits(np.stack(same)), model.logits(same))
    assert torch.equal(model.logits(torch.from_numpy(np.stack(same)).permute(0, 3, 1, 2)), model.logits(same))
    gray = pixels[0][:, :, 0]
    assert torch.equal(model.logits(gray), model.logits(np.repeat(gray[:, :, None], 3, axis=2)))
    assert pickle.loads(pickle.dumps(model.transform)) == model.transform
    assert model.predict(images)[3].source is None
    # In batches, and with several threads, the images keep their order.
    for batch_size in (1, 2, 5):  # 12, 6 and 3 batches, of which three are decoded ahead
        small = model.predict(paths, batch_size=batch_size, workers=3)
        assert [one.source for one in small] == [*map(str, paths)]
        assert small.positions.tolist() == [*range(12)]
        np.testing.assert_allclose(small.probabilities, model.predict(paths).probabilities, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images were given"),
        (3, "images of type int"),
        (np.zeros((4, 4, 3)), "type float64"),
        (np.zeros((4, 4, 4), np.uint8), r"shape \(4, 4, 4\)"),
        (torch.zeros(2, 3, 8, 8), r"give \(N, 3, 24, 24\) from `transform`"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "give pixels"),
    ],
)
def test_what_are_no_images_is_refused(model, images, message):
    with pytest.raises(ValueError, match=message):
        model.predict(images)


def test_images_that_cannot_be_read_do_not_stop_the_others(root, model, tmp_path):
    (tmp_path / "damaged.jpg").write_bytes((root / "test/ant/0.jpg").read_bytes()[:300])
    (tmp_path / "empty.png").touch()
    files = [tmp_path / "damaged.jpg", root / "test/bee/1.jpg", tmp_path / "gone.jpg", tmp_path / "empty.png"]
    predictions = model.predict(files, batch_size=2)
    assert [one.position for one in predictions] == [1]
    assert [(one.position, one.source) for one in predictions.unreadable] == [(k, str(files[k])) for k in (0, 2, 3)]
    assert "no such file" in predictions.unreadable[1].reason
    np.testing.assert_array_equal(predictions.indices, model.predict(files[1]).indices)
    with pytest.raises(ValueError, match=r"none of 2 images could be read: .*gone.jpg \(no such file\)"):
        model.predict(files[2:])
    with pytest.raises(ValueError, match=r"damaged\.jpg"):
        model.logits(files)


def test_a_folder_is_searched_as_a_data_set_is(root, tmp_path):
    for name in ("a/b/1.JPG", "a/2.png", "3.jpeg", ".hidden.jpg", "@eaDir/4.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    shutil.copy(root / "test/ant/0.jpg", tmp_path / "a/without_an_extension")
    os.symlink(tmp_path, tmp_path / "a/loop")
    found = [path.relative_to(tmp_path).as_posix() for path in images_below(tmp_path)]
    assert found == ["3.jpeg", "a/2.png", "a/b/1.JPG", "a/without_an_extension"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        images_below(tmp_path / "none")


def test_prior_and_temperature_are_those_of_the_formula(root, model, evaluated):
    """log p = z / T - log pi + log d, in float64."""
    z, pi = evaluated.double().numpy(), np.array(COUNTS) / sum(COUNTS)
    np.testing.assert_allclose(model.carried.shares, pi)
    for prior, d in (("uniform", np.full(3, 1 / 3)), ("training", pi), ({"ant": 0, "bee": 3, "yak": 1}, [0, 3, 1])):
        predictions = model.predict(root / "test", top=3, prior=prior, temperature=0.7)
        with np.errstate(divide="ignore"):
            log_p = z / 0.7 - np.log(pi) + np.log(d)
        p = np.exp(log_p - log_p.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        np.testing.assert_array_equal(predictions.indices[:, 0], p.argmax(1))
        np.testing.assert_allclose(predictions.probabilities, -np.sort(-p, axis=1), atol=1e-6)
    unchanged = model.predict(root / "test", prior="training").probabilities
    np.testing.assert_allclose(unchanged, model.predict(root / "test").probabilities, atol=1e-6)


def test_the_temperature_is_fitted_on_validation_and_never_on_test(root, model):
    logits, labels = model.validation()
    assert torch.equal(logits, model.logits(root / "val"))
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    fitted = model.fit_temperature()
    nll = {
        t: torch.nn.functional.cross_entropy(logits.double() / t, labels).item()
        for t in (1.0, fitted.value, 1.01 * fitted.value, fitted.value / 1.01)
    }
    assert fitted.nll_before == pytest.approx(nll[1.0])
    assert fitted.at_bound or min(nll, key=lambda t: nll[t]) == fitted.value
    adjusted = model.fit_temperature(adjusted=True)
    offset = torch.tensor(COUNTS).double().log().neg()
    expected = torch.nn.functional.cross_entropy(logits.double() / adjusted.value + offset, labels).item()
    assert adjusted.nll_after == pytest.approx(expected)
    one = model.predict(root / "test", temperature="validation").probabilities
    np.testing.assert_array_equal(one, model.predict(root / "test", temperature=fitted.value).probabilities)
    other = model.predict(root / "test", temperature="validation", prior="uniform").probabilities
    again = model.predict(root / "test", temperature=adjusted.value, prior="uniform").probabilities
    np.testing.assert_array_equal(other, again)


def test_abstaining_names_nothing_and_coverage_says_how_often(root, model):
    threshold = float(np.median(model.predict(root / "val").probabilities[:, 0]))
    predictions = model.predict(root / "val", abstain=threshold)
    silent = predictions.probabilities[:, 0] < threshold
    assert 0 < silent.sum() < 12
    assert predictions.coverage == pytest.approx(1 - silent.mean())
    for one, is_silent in zip(predictions, silent, strict=True):
        assert one.abstained == is_silent
        assert (one.name is None) == (one.index is None) == is_silent
        assert one.probability == one.probabilities[0]
    low, at, high = model.coverage([0.0, threshold, 1.1])
    labels = np.repeat(range(3), 4)
    right = predictions.indices[:, 0] == labels
    assert (low.coverage, low.accuracy) == (1.0, pytest.approx(right.mean()))
    assert (at.coverage, at.accuracy) == (pytest.approx((~silent).mean()), pytest.approx(right[~silent].mean()))
    assert (high.coverage, high.accuracy) == (0.0, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"abstain": 0}, "abstain is 0"),
        ({"abstain": 1.5}, "abstain is 1.5"),
        ({"top": 0}, "top is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"prior": "test"}, "no such file"),
    ],
)
def test_options_out_of_their_range_are_refused(root, model, options, message):
    with pytest.raises(ValueError, match=message):
        model.predict(root / "test", **options)


def test_what_cannot_be_loaded_is_refused(trainer, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        fastlt.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'gpu' is no device of this machine; allowed here: cpu"):
        fastlt.load(trainer.folder, device="gpu")
    with pytest.raises(ValueError, match="precision is 'fp16'"):
        fastlt.load(trainer.folder, precision="fp16")


def test_a_precision_of_its_own_and_an_earlier_run(root, trainer, model, tmp_path):
    half = fastlt.load(trainer.folder, device="cpu", precision="bf16").logits(root / "test")
    exact = model.logits(root / "test")
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)
    old = tmp_path / "old"
    shutil.copytree(trainer.folder, old)
    result = json.loads((old / "result.json").read_text())
    assert result.pop("storage") == {"keeps_jpeg": False, "max_resolution": 48}
    (old / "result.json").write_text(json.dumps(result))
    (note,) = fastlt.load(old, device="cpu").notes
    assert "earlier version" in note
    assert not model.notes


def test_five_crops_of_the_test_are_five_crops_here(root, trainer, model, tmp_path):
    """The recipe is given the key afterwards: the network is the same, and every image is cut 6 pixels larger."""
    run = tmp_path / "five"
    shutil.copytree(trainer.folder, run)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(
        recipe.replace("test_crops: 1", "test_crops: 5").replace("expand: 24", "expand: 6")
    )
    five = fastlt.load(run, device="cpu")
    large = torch.stack([five.transform(path) for path in images_below(root / "test")])
    assert large.shape == (12, 3, 30, 30)
    views = [(0, 0), (0, 6), (6, 0), (6, 6), (3, 3)]
    expected = sum(model.logits(large[:, :, y : y + 24, x : x + 24]) for y, x in views) / 5
    torch.testing.assert_close(five.logits(root / "test"), expected)
    torch.testing.assert_close(five.logits(large), expected)
    assert five.validation()[0].shape == (12, 3)


def test_validation_images_of_other_data_are_refused(trainer, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(trainer.folder, moved)
    recipe = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(recipe.replace("/data\n", "/elsewhere\n"))
    model = fastlt.load(moved, device="cpu")
    with pytest.raises(ValueError, match=r"validation set of .* cannot be read: .*elsewhere does not exist"):
        model.fit_temperature()


def test_whole_images_of_another_size_are_cut_to_their_square(digits_words, tmp_path):
    """Evaluation of the digits takes whole images of 8 pixels, which stay what they are."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(prepare(load_recipe("digits_lt", [*digits_words, "stages.end_to_end.method=plain"])))
    trainer.fit()
    images = whole_split(trainer.context, "test").images
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(normaliser(trainer.context)(images))
    model = fastlt.load(trainer.folder, device="cpu")
    assert torch.equal(model.logits(images, batch_size=512), expected)
    wide = np.zeros((16, 40, 3), np.uint8)
    wide[:, 12:28] = images[0].permute(1, 2, 0).numpy().repeat(2, axis=0).repeat(2, axis=1)
    torch.testing.assert_close(model.logits(wide), model.logits(images[0]))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_line_an_image(root, trainer, model, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    (tmp_path / "list.txt").write_text(f"{root}/test/yak/0.jpg\n\n{tmp_path}/bad.jpg\n")
    words = [trainer.folder, root / "test" / "ant", f"@{tmp_path}/list.txt", "--top", "2", "--abstain", "0.5"]
    files = ["--csv", tmp_path / "out.csv", "--json", tmp_path / "out.json"]
    assert cli.main(["predict", *map(str, [*words, *files]), "--device", "cpu", "--workers", "1"]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert "5 images in" in told.err
    assert "1 could not be read:\n" in told.err
    assert f"{tmp_path}/bad.jpg: not an image" in told.err
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = model.predict([root / "test" / "ant", root / "test/yak/0.jpg"], top=2, abstain=0.5)
    assert [row["image"] for row in rows] == [*expected.sources, str(tmp_path / "bad.jpg")]
    for row, one in zip(rows, expected, strict=False):
        assert (row["prediction"], row["class_1"], row["class_2"]) == (one.name or "", *one.names)
        assert float(row["probability_2"]) == pytest.approx(one.probabilities[1], rel=1e-5)
    assert rows[-1]["error"].startswith("not an image")
    assert rows[-1]["prediction"] == ""
    tree = json.loads((tmp_path / "out.json").read_text())
    assert [p["prediction"] for p in tree["predictions"]] == expected.names
    assert tree["predictions"][0]["probabilities"] == pytest.approx(list(expected[0].probabilities))
    assert tree["unreadable"][0]["image"] == str(tmp_path / "bad.jpg")
    assert tree["coverage"] == pytest.approx(expected.coverage)
    assert tree["prior_of_logits"] == pytest.approx(dict(zip(CLASSES, np.array(COUNTS) / 21, strict=True)))


def test_the_command_prints_what_no_file_is_given_for(root, trainer, model, capsys, tmp_path):
    image = str(root / "test/bee/0.jpg")
    (tmp_path / "deployed.csv").write_text("ant,1\nbee,1\nyak,98\n")
    words = ["--prior", str(tmp_path / "deployed.csv"), "--temperature", "validation", "--quiet", "--device", "cpu"]
    assert cli.main(["predict", str(trainer.folder), image, *words]) == 0
    told = capsys.readouterr()
    deployed = {"ant": 1, "bee": 1, "yak": 98}
    (expected,) = model.predict(image, prior=deployed, temperature="validation")
    assert told.out == f"{expected}\n"
    assert "fitted on 12 validation images" in told.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "ROOT/nothing.jpg"], "none of 1 images could be read"),
        (["RUN", "@ROOT/list.txt"], "cannot be read"),
        (["RUN", "ROOT/test", "--csv", "ROOT/none/out.csv"], "lies in no folder"),
        (["RUN", "ROOT/test", "--csv", "ROOT"], "is a folder"),
        (["RUN", "ROOT/test", "--csv", "a.csv", "--json", "a.csv"], "give two files"),
        (["RUN", "ROOT/test", "--temperature", "warm"], "temperature is 'warm'"),
        (["RUN", "ROOT/test", "--abstain", "2"], "abstain is 2.0"),
        (["RUN", "ROOT/test", "--prior", "nowhere.csv"], "no such file"),
        (["RUN", "ROOT/test", "--device", "tpu9"], "is no device"),
        (["ROOT", "ROOT/test"], "holds no finished run"),
        (["RUN"], "required: IMAGES"),
    ],
)
def test_the_command_refuses_with_one_message_and_code_2(root, trainer, words, message, capsys):
    words = [word.replace("RUN", str(trainer.folder)).replace("ROOT", str(root)) for word in words]
    try:
        code = cli.main(["predict", *words])
    except SystemExit as stopped:
        code = stopped.code
    told = capsys.readouterr().err
    assert code == 2
    assert message in told
    assert "Traceback" not in told


def test_paths_that_are_not_there_are_refused_before_a_network_is_loaded(tmp_path, capsys):
    assert cli.main(["predict", str(tmp_path / "no_run"), str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]) == 2
    told = capsys.readouterr().err
    assert f"none of 2 images could be read: {tmp_path / 'a.jpg'} (no such file)" in told
