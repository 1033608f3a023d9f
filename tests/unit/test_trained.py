"""A finished run in hand: the network that was tested, with nothing but the run folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastlt.recipe import load_recipe
from fastlt.run.loading import normaliser, whole_split
from fastlt.run.preflight import prepare
from fastlt.run.trained import load_trained, read_finished
from fastlt.run.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "digits_lt.yaml"
CPU = torch.device("cpu")
PLAIN = "stages.end_to_end.method=plain"
LWS = "stages.classifier={method: lws, sampling: class_balanced, batch_size: 32, lr: 0.1, iterations: 6}"


def run(words, *more):
    trainer = Trainer(prepare(load_recipe(RECIPE, [*words, *more])))
    trainer.fit()
    return trainer


def images_and_logits(trainer):
    """uint8 test images, and the logits that the trainer's own network, which was tested, gives them."""
    images = whole_split(trainer.context, "test").images
    with torch.no_grad(), trainer.context.autocast():
        return images, trainer.model.eval()(normaliser(trainer.context)(images)).float()


@pytest.mark.parametrize("more", [[LWS], ["precision=bf16", "channels_last=false"]], ids=["lws", "bf16"])
def test_it_is_the_tested_network_without_the_data_and_draws_no_random_number(digits, digits_words, tmp_path, more):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    trainer = run([*digits_words, PLAIN, *more], f"data.converted={data}")
    images, expected = images_and_logits(trainer)
    shutil.rmtree(data)
    before = torch.get_rng_state()
    trained = load_trained(trainer.folder, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in trained.model.modules())
    assert torch.equal(trained.logits(images), expected)
    counts = trainer.context.counts
    assert trained.class_names == counts.names
    assert trained.counts.counts.tolist() == counts.counts.tolist()
    assert trained.counts.shots == counts.shots
    assert (trained.image_size, trained.eval_crop) == (8, "none")
    assert trained.checkpoint.name == f"final_{trained.run.stage}.pt"
    assert (trained.select, trained.iteration) == ("last", trained.run.result["selected_iteration"])


def test_any_kept_model_of_the_last_stage_can_be_asked_for(digits_words):
    folder = run(digits_words, PLAIN, "stages.end_to_end.lr=0.5").folder
    best = load_trained(folder, CPU, "best")
    state = torch.load(folder / "checkpoints" / "best_end_to_end.pt", weights_only=True)
    assert (best.checkpoint.name, best.iteration) == ("best_end_to_end.pt", state["iteration"])
    assert all(torch.equal(t, state["model"][name]) for name, t in best.model.state_dict().items())
    with pytest.raises(ValueError, match=r"smoothed model of .* of this run are kept: last, best"):
        load_trained(folder, CPU, "smoothed")


def test_a_run_of_a_version_that_kept_the_best_model_alone(digits_words):
    folder = run(digits_words, PLAIN, "stages.end_to_end.select=best").folder
    path = folder / "result.json"
    result = json.loads(path.read_text())
    for key in ("select", "selected_iteration", "selection"):
        del result[key]
    path.write_text(json.dumps(result))
    (folder / "inputs.json").unlink()
    trained = load_trained(folder, CPU)
    assert (trained.select, trained.checkpoint.name) == ("best", "best_end_to_end.pt")
    assert trained.run.data is None


def test_a_run_whose_last_stage_starts_afresh_has_only_its_own_form(digits_words):
    """The experts before it have another head, which the student never had."""
    expert = "{{method: expert, classes: {}, iterations: 2, batch_size: 8, lr: 0.1, start: fresh}}"
    student = "{method: lfme, options: {experts: [a, b]}, iterations: 2, batch_size: 8, lr: 0.1, start: fresh}"
    words = [f"stages.a={expert.format('many')}", f"stages.b={expert.format('few')}", f"stages.student={student}"]
    trainer = run([w for w in digits_words if "end_to_end" not in w], "stages.end_to_end=null", *words)
    images, expected = images_and_logits(trainer)
    assert torch.equal(load_trained(trainer.folder, CPU).logits(images), expected)


def test_what_cannot_be_loaded_is_refused_in_one_sentence(digits_words, tmp_path):
    folder = run(digits_words, PLAIN).folder

    def told(change):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises(ValueError, match=r".") as error:
            load_trained(copy, CPU)
        shutil.rmtree(copy, ignore_errors=True)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "does not exist" in told(shutil.rmtree)
    assert "result.json is missing, it was not trained to its end" in told(lambda f: (f / "result.json").unlink())
    assert "recipe.yaml is missing" in told(lambda f: (f / "recipe.yaml").unlink())
    assert "result.json is damaged" in told(lambda f: (f / "result.json").write_text("{"))
    best = "checkpoints/final_end_to_end.pt"
    assert "of this run are kept: best" in told(lambda f: [p.unlink() for p in f.glob(f"{best}*")])
    assert "no other copy was kept" in told(lambda f: [p.write_bytes(b"x") for p in f.glob(f"{best}*")])
    other = "name: cifar_resnet20"
    recipe = (folder / "recipe.yaml").read_text()
    assert "is not of the network" in told(
        lambda f: (f / "recipe.yaml").write_text(recipe.replace("name: cifar_resnet8", other))
    )


def test_an_ensemble_names_its_runs(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"top1": 0.5, "members": [{"run": "a"}, {"run": "b"}]}))
    with pytest.raises(ValueError, match="no network of its own; give a and b"):
        read_finished(tmp_path)


def test_a_recipe_that_names_files_which_are_gone_is_read(digits_words, tmp_path):
    trainer = run(digits_words, PLAIN)
    path = trainer.folder / "recipe.yaml"
    path.write_text(path.read_text().replace("source: digits", "source: list_file"))
    text = path.read_text().replace("train_list: null", "train_list: /gone/train.txt")
    path.write_text(text.replace("checkpoint: null", "checkpoint: /gone/weights.pt"))
    assert read_finished(trainer.folder).recipe.data.train_list == "/gone/train.txt"
    load_trained(trainer.folder, CPU)
