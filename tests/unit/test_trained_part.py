"""Training a part of a network: what moves and what stays, for every method that allows it; and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from short_runs import RECIPE, STAGE, assert_same, comparable, make, stop_after
from torch import nn

from fastlt.device.distributed import Reducer
from fastlt.losses import build_loss
from fastlt.models import Classifier, build_model
from fastlt.models.timm_network import timm_network
from fastlt.models.trained_part import frozen_norms, trained_parameters
from fastlt.models.trained_state import trained_state
from fastlt.recipe import RecipeError, load_recipe
from fastlt.run import preflight
from fastlt.run.network_checks import advice_on_network
from fastlt.run.preflight import check_without_data
from fastlt.run.stopping import Interrupted
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts
from fastlt.train import main

COUNTS = ClassCounts(np.array([40, 12, 3]), ("a", "b", "c"))


def small_vit(**more):
    return build_model("vit_tiny_patch16_224", num_classes=3, image_size=32, **more)


# Which parameters


def test_the_words_name_parts_of_a_network():
    backbone = small_vit().backbone
    names = {name for name, _ in backbone.named_parameters()}
    assert trained_parameters(backbone, "all") == names
    assert trained_parameters(backbone, "head") == set()
    norms = trained_parameters(backbone, "norms")
    assert norms == {name for name in names if "norm" in name}
    assert {"blocks.0.norm1.weight", "norm.bias"} <= norms


def test_norms_are_found_by_what_they_are_not_by_their_names():
    norms = trained_parameters(build_model("resnet18", num_classes=3).backbone, "norms")
    assert {"bn1.weight", "layer1.0.bn2.bias", "layer2.0.downsample.1.weight"} <= norms
    assert not any("conv" in name for name in norms)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["layer4"], lambda name: name.startswith("layer4.")),
        (["backbone.layer4"], lambda name: name.startswith("layer4.")),
        (["layer[34]", "conv1"], lambda name: name.startswith(("layer3.", "layer4.", "conv1."))),
        (["*.bn1"], lambda name: ".bn1." in name),
        (["*.bias"], lambda name: name.endswith(".bias")),
        (["layer1.0.conv1.weight"], lambda name: name == "layer1.0.conv1.weight"),
        (["backbone"], lambda name: True),
        (["*"], lambda name: True),
    ],
)
def test_patterns_are_of_modules_and_parameters(patterns, expected):
    backbone = build_model("resnet18", num_classes=3).backbone
    names = {name for name, _ in backbone.named_parameters()}
    assert trained_parameters(backbone, patterns) == {name for name in names if expected(name)} != set()


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("layr4", "did you mean layer4"), ("blocks.11", "modules are conv1, bn1, layer1"), ("avgpool*", "modules are")],
)
def test_a_pattern_without_a_match_is_refused_with_what_is_near(pattern, hint):
    with pytest.raises(ValueError, match=f"(?s)model.train: '{pattern}'.*matches no.*{hint}".replace("*'", r"\*'")):
        build_model("resnet18", num_classes=3, train=["layer4", pattern])


def test_norms_of_a_network_without_any_are_refused():
    with pytest.raises(ValueError, match=r"model.train: is 'norms', but the backbone has no normalisation layer"):
        trained_parameters(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "norms")


def test_batch_norm_follows_its_parameters_unless_it_is_told_otherwise():
    backbone = build_model("resnet18", num_classes=3).backbone
    every = frozen_norms(backbone, "frozen", set())
    assert len(every) == 20
    assert frozen_norms(backbone, "train", set()) == set()
    assert frozen_norms(backbone, None, trained_parameters(backbone, "all")) == set()
    assert frozen_norms(backbone, None, trained_parameters(backbone, "norms")) == set()
    late = frozen_norms(backbone, None, trained_parameters(backbone, ["layer4"]))
    assert late == {name for name in every if not name.startswith("layer4")}


def test_frozen_statistics_stay_in_eval_mode_in_copies_and_whoever_asks_for_train_mode():
    model = build_model("resnet18", num_classes=3, norm="frozen")
    for one in (model.train(), torch.nn.Sequential(model).train()[0], copy.deepcopy(model).train()):
        assert one.training
        assert not any(m.training for m in one.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(p.requires_grad for p in model.parameters())


# What a step moves


class Normalised:
    """uint8 to float64 around 0."""

    def __call__(self, images, dtype=None):
        return images.double() / 128 - 1

    def state_dict(self):
        return {}


class NotedReducer(Reducer):
    """Two processes with the same gradients, a sum is twice each; notes how many numbers are sent."""

    def __init__(self):
        super().__init__(world_size=2)
        self.__dict__["sizes"] = []

    def start_sum(self, tensor):
        self.sizes.append(tensor.numel())
        tensor.mul_(2)
        return lambda: None


def step_of(model: Classifier, method="plain", reducer=None, **options):
    kind = STEPS[method]
    settings = kind.Options(**options)
    kind.prepare_model(model, settings, seed=0)
    optimizer = torch.optim.SGD(kind.parameter_groups(model, settings), lr=0.1, momentum=0.9, weight_decay=0.1)
    step = kind(
        StepParts(
            model=model,
            loss=build_loss("cross_entropy", COUNTS),
            optimizer=optimizer,
            augment=Normalised(),
            meta_augment=Normalised(),
            class_counts=COUNTS,
            reducer=reducer or Reducer(),
        ),
        settings,
    )
    step.train_mode()
    return step


def batch_of(size, seed=0, side=32):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=draw)
    return Batch(images, torch.arange(size) % 3, torch.arange(size))


@pytest.mark.parametrize("train", ["head", "norms", ["layer3.2"]])
def test_gradients_momentum_decay_and_communication_are_of_the_trained_part_alone(train):
    model = build_model("cifar_resnet20", num_classes=3, train=train).double()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    reducer = NotedReducer()
    step = step_of(model, reducer=reducer)
    step(batch_of(6))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {"head.weight", "head.bias"} | {
        f"backbone.{name}" for name in trained_parameters(model.backbone, train)
    }
    assert sum(reducer.sizes) == sum(p.numel() for p in trained.values())
    assert set(step.optimizer.state) == set(trained.values())
    assert all(p.grad is None for p in model.parameters())
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    kept = {name for name in statistics if name.rpartition(".")[0] in model.frozen_norms}
    assert moved == trained.keys() | (statistics - kept)
    assert bool(kept) == (train != "norms")


def saved_bytes(model):
    """What a forward pass keeps for the backward pass."""
    total = 0

    def note(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.train()(torch.randn(4, 3, 32, 32)).sum().backward()
    return total


def test_below_the_first_trained_layer_nothing_is_kept_for_the_backward_pass():
    whole, late, head = (
        saved_bytes(build_model("cifar_resnet20", num_classes=3, train=train)) for train in ("all", ["layer3"], "head")
    )
    assert head < late < whole
    assert late < 0.4 * whole
    assert head < 0.01 * whole


@pytest.mark.parametrize(("norm", "train"), [("frozen", "all"), (None, ["layer3.2"]), (None, "norms"), (None, "head")])
def test_the_meta_gradient_of_a_part_is_that_of_differentiating_twice(norm, train):
    model = build_model("cifar_resnet20", num_classes=3, train=train, norm=norm).double()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.1 * torch.rand_like(buffer))
    step = step_of(model, "mwn")
    batch, meta_batch, weights = batch_of(6), batch_of(9, seed=1), torch.linspace(0.5, 2, 6).double()
    run = step.training_pass(batch)
    found, _ = step.per_sample_gradient(run, weights, meta_batch)

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def losses(values, images, labels):
        copies = {name: b.clone() for name, b in buffers.items()}
        logits = torch.func.functional_call(model, {**copies, **values}, (images,))
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    w = weights.clone().requires_grad_()
    inner = (w * losses(parameters, Normalised()(batch.images), batch.labels)).mean()
    slopes = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
    ahead = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), slopes, strict=True)}
    meta = losses(ahead, Normalised()(meta_batch.images), meta_batch.labels).mean()
    (expected,) = torch.autograd.grad(meta, [w])
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))


# Whole runs

METHODS = {
    "plain": [],
    "cdb": [],
    "mixup": [],
    "cutmix": [],
    "difficulty": [],
    "difficulty lean": [f"{STAGE}.options.lean=true"],
    "mwn": [],
    "sample_difficulty": [],
    "cb_da": [f"{STAGE}.options.from_epoch=0"],
    "expert": [],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_moves_the_part_that_it_trains_and_nothing_else(digits_words, method):
    words = ["model.train=[layer3]", f"{STAGE}.method={method.split()[0]}", *METHODS[method]]
    trainer = make(digits_words, *words, f"{STAGE}.iterations=4", f"{STAGE}.weight_decay=0.1")
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    trainer.fit()
    after = trainer.model.state_dict()
    for name, value in before.items():
        name_after = name.replace("head.", "head.inner.") if method == "expert" else name
        same = torch.equal(value, after[name_after])
        assert same == (not name.startswith(("backbone.layer3", "head"))), name


@pytest.mark.parametrize("more", [["model.train=norms"], ["model.train=head", f"{STAGE}.method=plain"]])
def test_a_run_of_a_part_that_is_stopped_ends_as_one_that_is_not(digits_words, more):
    whole = make(digits_words, *more, "name=whole")
    whole.fit()
    with pytest.raises(Interrupted):
        stop_after(make(digits_words, *more, "name=stopped"), 5).fit()
    resumed = make(digits_words, *more, "name=stopped")
    resumed.fit()
    one, other = comparable(whole.folder), comparable(resumed.folder)
    one["progress"].pop("parts"), other["progress"].pop("parts")
    assert_same(one, other)


def test_a_frozen_backbone_and_a_stage_on_frozen_features_go_together(digits_words):
    second = "{method: crt, lr: 0.1, batch_size: 32, sampling: class_balanced, iterations: 3}"
    trainer = make(digits_words, "model.train=norms", f"{STAGE}.method=plain", f"stages.second={second}")
    assert trainer.fit()["iterations"] == 15


SECOND = "lr: 0.1, batch_size: 32, iterations: 3"
SECOND_STAGES = {
    "crt": f"{{method: crt, sampling: class_balanced, {SECOND}}}",
    "lws": f"{{method: lws, sampling: class_balanced, {SECOND}}}",
    "balms": f"{{method: balms, loss: balanced_softmax, meta_batch_size: 50, {SECOND}}}",
    "oltr": f"{{method: oltr, sampling: class_balanced, options: {{attention_side: 2}}, {SECOND}}}",
    "dro_lt": f"{{method: dro_lt, sampling: class_aware_4, {SECOND}}}",
}


@pytest.mark.parametrize("method", SECOND_STAGES)
def test_a_second_stage_moves_nothing_that_is_frozen(digits_words, tmp_path, method):
    torch.manual_seed(3)
    torch.save(build_model("cifar_resnet8", num_classes=10).backbone.state_dict(), tmp_path / "backbone.pt")
    words = [f"model.checkpoint={tmp_path / 'backbone.pt'}", "model.train=[layer3]", f"{STAGE}.method=plain"]
    trainer = make(digits_words, *words, f"{STAGE}.iterations=4", f"stages.second={SECOND_STAGES[method]}")
    frozen = trainer.model.frozen
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    trainer.fit()
    after = trainer.model.state_dict()
    assert frozen
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert not torch.equal(after["backbone.layer3.0.conv1.weight"], before["backbone.layer3.0.conv1.weight"])
    saved = torch.load(trainer.folder / "checkpoints" / "best_second.pt", weights_only=True)
    assert not saved["model"].keys() & frozen


def test_experts_of_a_part_teach_a_student(digits_words, tmp_path):
    torch.manual_seed(3)
    torch.save(build_model("cifar_resnet8", num_classes=10).backbone.state_dict(), tmp_path / "backbone.pt")
    settings = "lr: 0.1, batch_size: 16, iterations: 2, start: fresh"
    trainer = make(
        [word for word in digits_words if not word.startswith("stages.")],
        f"model.checkpoint={tmp_path / 'backbone.pt'}",
        "model.train=norms",
        "stages.end_to_end=null",
        f"stages.many={{method: expert, classes: many, {settings}}}",
        f"stages.few={{method: expert, classes: few, {settings}}}",
        f"stages.student={{method: lfme, options: {{experts: [many, few]}}, {settings}}}",
    )
    assert trainer.fit()["iterations"] == 6


# Refusals, before any data is read


@pytest.mark.parametrize("train", ["head", "norms"])
def test_a_checkpoint_of_a_part_is_no_network_to_begin_with(train, tmp_path, caplog):
    torch.save(build_model("cifar_resnet8", num_classes=3).backbone.state_dict(), tmp_path / "backbone.pt")
    part = build_model("cifar_resnet8", num_classes=3, checkpoint=tmp_path / "backbone.pt", train=train)
    torch.save(trained_state(part), tmp_path / "last.pt")
    caplog.clear()
    told = r"last\.pt keeps the trained part of its network alone, and the rest was cifar_resnet8 from .*backbone\.pt"
    with pytest.raises(ValueError, match=told):
        build_model("cifar_resnet8", num_classes=3, checkpoint=tmp_path / "last.pt")
    assert not caplog.records
    # The file that is named instead.
    save_file(timm_network(part, "cifar_resnet8", 32).state_dict(), tmp_path / "model.safetensors")
    whole = build_model("cifar_resnet8", num_classes=3, checkpoint=tmp_path / "model.safetensors")
    for name, value in part.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.train=[]"], r"model.train: is \[\]; name modules"),
        (["model.train=tail"], "model.train: is a string .'tail'.; allowed: all or head or norms or a list"),
        (["model.norm=batch"], "model.norm: is .*allowed: train or frozen"),
        (["model.train=head", "model.experts=2", f"{STAGE}.method=ride"], "model.experts: is set, and a part"),
        (["model.train=head", f"{STAGE}.method=paco"], "method: is 'paco', which trains the whole network"),
        (["model.norm=frozen", f"{STAGE}.method=paco"], "method: is 'paco', which trains the whole network"),
        (["model.train=head", f"{STAGE}.method=dro_lt"], "method: is 'dro_lt', which trains the features"),
        (
            ["model.norm=frozen", f"{STAGE}.method=las", f"{STAGE}.options.shift_batch_norm=true"],
            "options.shift_batch_norm: is true, but BatchNorm keeps",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(words, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(RECIPE, words)


def test_a_part_that_is_not_there_is_refused_before_data_is_read(digits_words, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "make_context", lambda *_: pytest.fail("data was read"))
    words = [*digits_words, "model.train=[layr3]"]
    with pytest.raises(ValueError, match="did you mean layer3"):
        check_without_data(load_recipe(RECIPE, words))
    assert main([str(RECIPE), *words]) == 2
    assert "model.train: 'layr3' matches no parameter" in capsys.readouterr().err


def test_keys_that_change_nothing_or_bring_little_are_told(digits_words, capsys):
    recipe = load_recipe(RECIPE, ["model={name: vit_tiny_patch16_224, norm: frozen}", "data.image_size=16"])
    model = build_model("vit_tiny_patch16_224", num_classes=10, image_size=16, norm="frozen")
    assert advice_on_network(recipe, model) == [
        "model.norm: frozen changes nothing, vit_tiny_patch16_224 has no BatchNorm"
    ]
    make(digits_words, "model.train=head")
    assert "stays as it is, with random weights" in capsys.readouterr().out
