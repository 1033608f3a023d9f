"""The model folder that a run leaves: the same logits by timm without fastlt, and by fastlt with nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from hidden_fastlt import without_fastlt

from fastlt import cli, train
from fastlt.recipe import load_recipe
from fastlt.run import model_folder
from fastlt.run.cut_images import validation_images
from fastlt.run.folder import inputs_file
from fastlt.run.model_folder import logits, write_model_folder
from fastlt.run.preflight import prepare
from fastlt.run.trained import load_trained, read_finished
from fastlt.run.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "digits_lt.yaml"
CPU = torch.device("cpu")
SHORT = [f"stages.end_to_end.{key}" for key in ("method=plain", "iterations=4", "evaluate_every=2")]
SECOND = "stages.second={{method: {}, sampling: class_balanced, batch_size: 32, lr: 0.1, iterations: 4{}}}"
# What is trained, and what the folder says of it: None where timm alone can load it.
TIMM = {
    "lws": ["model.name=test_resnet", SECOND.format("lws", "")],
    "tau_norm": [
        "model.name=test_efficientnet",
        SECOND.format("tau_norm", ", evaluate_every: 1, select: best, options: {taus: [0, 0.5, 1, 1.5]}"),
    ],
    "paco": [
        "model.name=test_resnet",
        "stages.end_to_end.method=paco",
        "stages.end_to_end.options={queue: 64, dim: 8}",
    ],
}
OWN = {
    "ours": ([], "timm has no cifar_resnet8"),
    "cosine": (["model.name=test_resnet", "model.head=cosine"], "takes cosines"),
    "experts": (["model.experts=2", "stages.end_to_end.method=ride"], "mean over experts"),
    "oltr": ([SECOND.format("oltr", ", options: {attention_side: 2}")], "MetaEmbeddingHead"),
}


def run(words, *more):
    folder = Trainer(prepare(load_recipe(RECIPE, [*words, *SHORT, *more])))
    folder.fit()
    return folder.folder


@pytest.fixture(scope="module")
def place(digits, tmp_path_factory):
    """A run of each kind that timm can load, and what their trained networks give some images."""
    root = tmp_path_factory.mktemp("packaged")
    words = [f"data.converted={digits}", f"runs={root / 'runs'}", "data.loader=resident", "num_threads=1"]
    for name, more in TIMM.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = run([*words, "stages.end_to_end.warmup=0"], *more, f"name={name}")
        trained = load_trained(folder, CPU)
        images = validation_images(trained.recipe.data, 20)
        x = (images.double() / 255 - trained.mean[0]) / trained.std[0]
        with torch.no_grad():
            np.savez(root / f"{name}.npz", x=x.float(), logits=trained.model(x.float()))
    return root


def test_timm_gives_the_same_logits_where_fastlt_cannot_be_imported(place):
    told = without_fastlt(
        f"""
        import numpy as np, timm, torch
        for name in {list(TIMM)}:
            saved = np.load(f"{{name}}.npz")
            model = timm.create_model(f"local-dir:runs/{{name}}/model", pretrained=True).eval()
            with torch.no_grad():
                difference = np.abs(model(torch.from_numpy(saved["x"])).numpy() - saved["logits"]).max()
            assert difference <= 1e-5, (name, difference)
            assert list(model.pretrained_cfg["label_names"]) == [str(c) for c in range(10)]
            config = timm.data.resolve_model_data_config(model)
            assert config["input_size"] == (3, 8, 8) and config["crop_pct"] == 1.0
            assert np.allclose(config["mean"], 0.306) and np.allclose(config["std"], 0.376)
            print(name)
        try:
            import fastlt
        except ModuleNotFoundError:
            print("hidden")
        """,
        place,
    )
    assert told.split() == [*TIMM, "hidden"]


def test_fastlt_needs_the_model_folder_alone(place, tmp_path):
    for name in TIMM:
        saved = np.load(place / f"{name}.npz")
        shutil.copytree(place / "runs" / name / "model", tmp_path / name)
        trained, before = load_trained(tmp_path / name, CPU), read_finished(place / "runs" / name)
        torch.testing.assert_close(
            trained.model(torch.from_numpy(saved["x"])), torch.from_numpy(saved["logits"]), rtol=0, atol=1e-5
        )
        assert trained.run.result == before.result
        assert trained.run.data == before.data
        assert trained.select == before.select
        assert trained.counts.counts.tolist() == before.counts.counts.tolist()


def test_the_card_has_data_recipe_results_and_command(place):
    folder = place / "runs" / "lws"
    text, result = (folder / "model" / "README.md").read_text(), read_finished(folder).result
    assert "431 of 10 classes, from 128 to 6 a class (imbalance factor 21.33)" in text
    assert "plain with cross_entropy, then lws with cross_entropy" in text
    assert f"| few-shot | 4 | 43 | {100 * result['few']:.2f} |" in text
    for name, count, accuracy in zip(
        result["class_names"], result["class_counts"], result["per_class_accuracy"], strict=True
    ):
        assert f"| {name} | {count} | {100 * accuracy:.2f} |" in text
    assert "fastlt train recipe.yaml" in text
    assert 'timm.create_model("local-dir:' in text
    # Nothing of this machine.
    assert str(place) not in text + (folder / "model" / "config.json").read_text()
    # The recipe in the card is one, and the same but for its paths.
    recipe = place / "recipe.yaml"
    recipe.write_text(text.split("```yaml\n")[1].split("```")[0])
    assert load_recipe(recipe).stages == read_finished(folder).recipe.stages


def test_a_model_folder_that_was_cut_off_says_so(place, tmp_path):
    copy = Path(shutil.copytree(place / "runs" / "lws" / "model", tmp_path / "model"))
    (copy / "config.json").write_text((copy / "config.json").read_text()[:100])
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON \(.*\); copy the model folder again"):
        load_trained(copy, CPU)


@pytest.mark.parametrize("case", OWN)
def test_what_timm_has_not_is_kept_for_fastlt_and_says_why(digits_words, tmp_path, case, capsys):
    more, why = OWN[case]
    folder = run(digits_words, *more)
    trained = load_trained(folder, CPU)
    images = validation_images(trained.recipe.data, 20)
    shutil.copytree(folder / "model", tmp_path / "elsewhere")
    alone = load_trained(tmp_path / "elsewhere", CPU)
    torch.testing.assert_close(
        logits(alone.model, images, trained), logits(trained.model, images, trained), rtol=0, atol=1e-5
    )
    text = " ".join((folder / "model" / "README.md").read_text().split())
    assert why in text
    assert "fastlt export RUN --to onnx" in text
    capsys.readouterr()
    code = cli.main(["export", str(folder), "--to", "timm"])
    told = capsys.readouterr()
    if case == "ours":
        assert code == 0
        assert f"{why}, a network of fastlt's own: import fastlt.models before\ntimm.create_model(" in told.out
        timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True)  # fastlt.models is imported here
    else:
        assert code == 2
        assert why in told.err
        assert told.err.count("\n") == 1
        with pytest.raises(RuntimeError, match=f"Unknown model .*{why}"):
            timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True)


def words_of(digits_words):
    return [str(RECIPE), *digits_words, *SHORT]


def test_a_kill_between_result_and_model_is_mended_by_the_next_start(digits_words, monkeypatch, capsys):
    class Killed(BaseException):
        pass

    def kill(*arguments):
        raise Killed

    context = prepare(load_recipe(RECIPE, [*digits_words, *SHORT]))
    with monkeypatch.context() as patch:
        patch.setattr(model_folder.safetensors.torch, "save", kill)
        with pytest.raises(Killed):
            Trainer(context).fit()
    assert (context.folder / "result.json").is_file()
    assert not (context.folder / "model").exists()
    (context.folder / "model.7.part").mkdir()  # of a process that could not clean up
    result = (context.folder / "result.json").read_bytes()
    assert train.main(words_of(digits_words)) == 0
    assert sorted(p.name for p in (context.folder / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert not list(context.folder.glob("*.part"))
    assert (context.folder / "result.json").read_bytes() == result
    # Once: it stays as it is.
    before = (context.folder / "model" / "config.json").stat()
    assert train.main(words_of(digits_words)) == 0
    assert (context.folder / "model" / "config.json").stat().st_mtime_ns == before.st_mtime_ns


def test_a_run_that_goes_on_keeps_its_earlier_model_apart(digits_words):
    folder = run(digits_words, "stages.end_to_end.schedule=constant")
    before = (folder / "model" / "model.safetensors").read_bytes()
    run(digits_words, "stages.end_to_end.schedule=constant", "stages.end_to_end.iterations=6")
    assert (folder / "model-4" / "model.safetensors").read_bytes() == before
    assert (folder / "model" / "model.safetensors").read_bytes() != before
    assert load_trained(folder / "model", CPU).iteration == 6


@pytest.mark.parametrize("left", [None, "no JSON"])
def test_a_model_whose_result_is_gone_is_kept_apart_too(digits_words, left):
    """The result was moved away or damaged; the run goes on, and its model is the new one."""
    folder = run(digits_words, "stages.end_to_end.schedule=constant")
    before = (folder / "model" / "model.safetensors").read_bytes()
    (folder / "result.json").unlink()
    if left is not None:
        (folder / "result.json").write_text(left)
    run(digits_words, "stages.end_to_end.schedule=constant", "stages.end_to_end.iterations=6")
    kept = folder / ("model-unknown" if left is None else "model-damaged")
    assert (kept / "model.safetensors").read_bytes() == before
    assert load_trained(folder / "model", CPU).iteration == 6


def test_a_model_that_is_not_the_trained_one_is_not_left(place, tmp_path, monkeypatch):
    trained = load_trained(place / "runs" / "lws", CPU)
    images = validation_images(trained.recipe.data, 4)
    network = model_folder.timm_network

    def wrong(*arguments):
        made = network(*arguments)
        with torch.no_grad():
            made.get_classifier().bias.add_(1e-3)
        return made

    monkeypatch.setattr(model_folder, "timm_network", wrong)
    with pytest.raises(ValueError, match=r"differ from the trained one's by 0\.001"):
        write_model_folder(trained, images, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_of_others_is_replaced(place, tmp_path):
    trained = load_trained(place / "runs" / "lws", CPU)
    images = validation_images(trained.recipe.data, 4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match="is no model folder"):
        write_model_folder(trained, images, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "all of it"
    write_model_folder(trained, images, tmp_path / "model")
    write_model_folder(trained, images, tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model"]


def test_a_model_folder_that_cannot_be_read_says_so(place, tmp_path):
    shutil.copytree(place / "runs" / "lws" / "model", tmp_path / "model")
    with pytest.raises(ValueError, match="holds the last model of its run, not the best one"):
        load_trained(tmp_path / "model", CPU, "best")
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged safetensors"):
        load_trained(tmp_path / "model", CPU)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": {}}))
    with pytest.raises(ValueError, match="was not made by fastlt"):
        load_trained(tmp_path / "model", CPU)


def test_a_run_of_an_earlier_version_gets_its_model_by_export(place, tmp_path, capsys):
    shutil.copytree(place / "runs" / "paco", tmp_path / "old")
    expected = (tmp_path / "old" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "old" / "model")
    inputs_file(tmp_path / "old").unlink()
    assert cli.main(["export", str(tmp_path / "old"), "--to", "timm"]) == 0
    assert "20 validation images" not in capsys.readouterr().out
    assert (tmp_path / "old" / "model" / "model.safetensors").read_bytes() == expected


def test_a_model_that_cannot_be_made_costs_the_run_nothing_but_a_warning(digits_words, monkeypatch, caplog):
    def refuse(*arguments):
        raise TypeError("odd network")

    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "timm_network", refuse)
        folder = run(digits_words)
    assert "model is not written: odd network" in caplog.text
    assert (folder / "result.json").is_file()
    assert not list(folder.glob("model*"))
