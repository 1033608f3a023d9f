"""Runs put together: the mean of probabilities, a run with itself, and the table's row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from fastlt import cli, ensemble, train
from fastlt.meta.class_accuracy import evaluation_mode
from fastlt.recipe import load_recipe
from fastlt.reproduce import execution
from fastlt.run.loading import normaliser, whole_split
from fastlt.run.metrics import Metrics
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]

RECIPE = ROOT / "recipes" / "digits_lt.yaml"
LAS = (
    "stages.classifier={method: las, loss: label_aware_smoothing, sampling: class_balanced, batch_size: 32, lr: 0.1, "
    "iterations: 6, evaluate_every: 3}"
)


def run(words, *more):
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(prepare(load_recipe(RECIPE, [*words, *more])))
    trainer.fit()
    return trainer


def probabilities(trainer, split="test"):
    """float64 (N, C) and labels, from the trainer's own network and loader."""
    batch = whole_split(trainer.context, split)
    with evaluation_mode(trainer.model):
        z = trainer.model(normaliser(trainer.context)(batch.images)).double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True), batch.labels.numpy()


def test_the_mean_is_of_probabilities_and_small_ones_keep_their_order():
    z = np.random.default_rng(0).normal(size=(2, 6, 5)) * [[[1.0]], [[40.0]]]
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    got = ensemble.log_mean_probability(list(torch.from_numpy(z)))
    np.testing.assert_allclose(got.exp().numpy(), p.mean(0), rtol=1e-12)
    far = torch.tensor([[0.0, -2000.0, -3000.0]])
    assert ensemble.log_mean_probability([far, far]).tolist() == far.tolist()
    # The head with the larger logits does not decide alone, as it would in a mean of logits.
    three = [torch.tensor(z) for z in ([[0.0, 4.0]], [[0.0, 4.0]], [[40.0, 0.0]])]
    assert sum(three).argmax() == 0
    assert ensemble.log_mean_probability(three).argmax() == 1


@pytest.mark.parametrize("more", [[], ["precision=bf16"]], ids=["fp32", "bf16"])
def test_a_run_with_itself_is_the_run(digits_words, tmp_path, capsys, more):
    trainer = run(digits_words, "stages.end_to_end.method=plain", LAS, *more)
    folder = str(trainer.folder)
    assert cli.main(["ensemble", folder, folder, folder, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    alone = json.loads((trainer.folder / "result.json").read_text())
    assert set(alone) <= set(result)
    for key in ("top1", "top5", "many", "medium", "few", "macro_f1", "per_class_accuracy", "validation_top1"):
        assert result[key] == alone[key], key
    assert result["ece"] == pytest.approx(alone["ece"], abs=1e-6)
    for key in ("class_names", "class_counts", "shots", "imbalance_factor", "seed", "precision", "versions"):
        assert result[key] == alone[key], key
    assert result["iterations"] == 3 * alone["iterations"]
    assert result["train_s"] == pytest.approx(3 * alone["train_s"])
    assert result["img_s"] == pytest.approx(alone["img_s"])
    assert result["average"] == "probabilities"
    assert f"{100 * alone['top1']:.2f}" in capsys.readouterr().out


def test_runs_on_unconverted_images_are_put_together(digits_words, tmp_path, capsys):
    words = [*digits_words, "data.convert=false", "data.converted=null"]
    one, two = (run(words, f"seed={seed}", f"name=seed{seed}") for seed in (0, 1))
    assert cli.main(["ensemble", str(one.folder), str(two.folder), "--out", str(tmp_path / "out")]) == 0
    (one.folder / "predictions.npz").unlink()
    assert cli.main(["report", str(one.folder), "--measure"]) == 0
    assert (one.folder / "predictions.npz").exists()


def test_two_heads_and_experts_give_the_mean_of_what_each_network_predicts(digits_words, tmp_path):
    linear = run(digits_words, "stages.end_to_end.method=plain", LAS, "name=linear")
    cosine = run(digits_words, "stages.end_to_end.method=plain", LAS, "model.head=cosine", "name=cosine", "seed=1")
    routed = run(
        digits_words,
        *("stages.end_to_end.method=ride", "model.head=cosine", "model.experts=2", "name=routed"),
        "stages.router={method: ride_router, iterations: 4, batch_size: 32, lr: 0.1, evaluate_every: 2}",
    )
    members = [ensemble.open_member(t.folder) for t in (linear, cosine, routed)]
    result = ensemble.ensemble(members, "three", torch.device("cpu"))
    for split, got in (("test", result["top1"]), ("meta", result["validation_top1"])):
        p, labels = zip(*(probabilities(t, split) for t in (linear, cosine, routed)), strict=True)
        mean, labels = np.mean(p, axis=0), labels[0]
        assert got == pytest.approx((mean.argmax(1) == labels).mean())
        if split == "test":
            metrics = Metrics(10)
            metrics.update(torch.from_numpy(np.log(mean)), torch.from_numpy(labels))
            expected = metrics.summary(linear.context.counts)
            assert result["ece"] == pytest.approx(expected["ece"], abs=1e-6)
            assert result["per_class_accuracy"] == expected["per_class_accuracy"]
    assert result["seed"] is None
    assert [m["run"] for m in result["members"]] == ["linear", "cosine", "routed"]
    assert [m["top1"] for m in result["members"]] == [m.run.result["top1"] for m in members]


def test_what_does_not_belong_together_is_refused(digits_words, digits, tmp_path, capsys):
    trainer = run(digits_words, "stages.end_to_end.method=plain")
    folder = trainer.folder

    def told(*words):
        assert cli.main(["ensemble", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "needs two or more" in told(folder)
    assert "nowhere does not exist" in told(folder, tmp_path / "nowhere")
    assert "holds a run" in told(folder, folder, "--out", folder)

    def changed(name, *words):
        """A copy of the run under another recipe; nothing is trained."""
        shutil.copytree(folder, tmp_path / name)
        recipe = load_recipe(folder / "recipe.yaml", words)
        (tmp_path / name / "recipe.yaml").write_text(recipe.to_yaml())
        return tmp_path / name

    assert "different data.shots" in told(folder, changed("shots", "data.shots=[70, 30]"))
    other = tmp_path / "other"
    shutil.copytree(digits, other)
    copied = changed("copied", f"data.converted={other}")
    assert cli.main(["ensemble", str(folder), str(copied)]) == 0
    capsys.readouterr()
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["request"]["imbalance_factor"] = 50
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert "imbalance_factor is 20.0 and 50" in told(folder, copied)
    (tmp_path / "copied" / "result.json").unlink()
    assert "result.json is missing" in told(folder, copied)
    shots = tmp_path / "shots" / "checkpoints" / "final_end_to_end.pt"
    (tmp_path / "shots" / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    shots.write_bytes(b"nothing")
    assert "no other copy was kept" in told(folder, tmp_path / "shots")


def test_the_tables_row_trains_both_puts_them_together_and_does_neither_twice(digits, tmp_path, capsys, monkeypatch):
    """Table 11's "Ours (2 experts)" on the digits, two iterations a stage, in this process."""

    def here(words, output, nice):
        AcceleratorState._reset_state(reset_partial_state=True)
        code = cli.main(words[3:]) if words[1] == "-m" else train.main(words[2:])
        return SimpleNamespace(poll=lambda: code)

    monkeypatch.setattr(execution, "start", here)
    words = ["table11", "--rows", "Ours (2 experts)", "--columns", "ResNet-10", "--scale", "short"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--set"]
    words += ["data.source=digits", "data.num_classes=10", f"data.converted={digits}", "data.image_size=8"]
    words += ["data.imbalance_factor=20", "data.train_crop=none", "data.eval_crop=none", "data.augment=[]"]
    words += ["model.name=cifar_resnet8", "num_threads=1", "stages.end_to_end.meta_batch_size=8"]
    for stage in ("end_to_end", "classifier"):
        words += [f"stages.{stage}.{key}" for key in ("iterations=2", "evaluate_every=2", "warmup=0", "batch_size=8")]
    assert cli.main(["reproduce", *words]) == 0
    told = capsys.readouterr().err
    # Each member is two runs: Difficulty-Net by itself, which other rows need as well, and what LAS makes of it.
    assert told.count("running imagenet_lt_ours_las-") == 2
    assert told.count("running imagenet_lt_ours_las_cosine-") == 2
    assert told.count("running imagenet_lt_ours_las+imagenet_lt_ours_las_cosine-") == 1
    (row,) = json.loads((tmp_path / "out" / "table11_short.json").read_text())
    (path,) = (tmp_path / "runs").glob("imagenet_lt_ours_las+*/result.json")
    result = json.loads(path.read_text())
    heads = [load_recipe(path.parent.parent / m["run"] / "recipe.yaml").model.head for m in result["members"]]
    assert heads == ["linear", "cosine"]
    assert row["ours"] == pytest.approx(100 * result["top1"])
    assert (row["paper"], row["seeds"]) == (47.5, 1)

    assert cli.main(["reproduce", *words]) == 0
    assert "running" not in capsys.readouterr().err
    # A member that says something else now makes the ensemble anew.
    member = path.parent.parent / result["members"][1]["run"] / "result.json"
    member.write_text(member.read_text().replace(f'"top1": {result["members"][1]["top1"]}', '"top1": 0.123'))
    assert cli.main(["reproduce", *words]) == 0
    assert capsys.readouterr().err.count("running") == 1

    monkeypatch.setattr(execution, "start", lambda *_: SimpleNamespace(poll=lambda: 2))
    assert cli.main(["reproduce", *words, "stages.end_to_end.lr=0.3"]) == 1
    assert "failed with code 2" in capsys.readouterr().out
