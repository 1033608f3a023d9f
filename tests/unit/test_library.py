"""fastlt in a training loop of one's own: docs/library.md as written, equality with the trainer's step, refusals."""

from __future__ import annotations

import copy
import os
import random
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastlt
from fastlt.recipe import load_recipe
from fastlt.run import fit as fit_module
from fastlt.run.loading import endless, normaliser, whole_split
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "library.md"
COUNTS = [40, 20, 10, 5]


@pytest.fixture(scope="module")
def page():
    """The names that the blocks of the page define, run one after the other."""
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def images_of(counts, seed=0):
    """Images of classes that can be told apart, and their labels."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.randn(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    images[torch.arange(len(labels)), labels % 3] += 1.0 + labels[:, None, None] / 2
    return images, labels


def network(classes=4, side=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * side * side, classes)
    )


def build(model, method="difficulty", **more):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return fastlt.build_step(method, model, optimizer, COUNTS, **{"meta_set": [images_of([6] * 4, 1)], **more})


def test_the_loop_of_the_page_learns_in_20_lines(page, capsys):
    first = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len([line for line in first[1].splitlines() if line.strip()]) <= 20
    model = network()
    sets = [TensorDataset(*images_of(counts, seed)) for seed, counts in enumerate((COUNTS, [10] * 4))]
    page["train"](model, *sets, COUNTS, epochs=6)
    images, labels = sets[0].tensors
    assert (model.eval()(images).argmax(1) == labels).float().mean() > 0.9
    assert capsys.readouterr().out.count("tensor(") == 6


def test_the_second_stage_of_the_page_trains_the_classifier_alone(page):
    model = network()
    features, classifier = model[:4], model[4]
    before = copy.deepcopy(model.state_dict())
    images, labels = images_of(COUNTS)
    page["second_stage"](features, classifier, TensorDataset(images, labels), labels, COUNTS, epochs=2)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"4.weight", "4.bias"}


def test_balanced_softmax_of_the_page(page):
    logits, labels = torch.randn(5, 4), torch.arange(5) % 4
    expected = torch.nn.functional.cross_entropy(logits + torch.tensor(COUNTS).log(), labels)
    assert torch.allclose(page["balanced_softmax"](logits, labels, COUNTS), expected)


def test_the_loaders_of_the_page(page, digits):
    model = network(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    output = page["converted"](digits, model, optimizer)
    assert output.per_class["weight"].shape == (10,)
    with fastlt.build_loader(digits, "train", 64) as batches:
        epochs = [torch.cat([labels for _, labels in batches]) for _ in range(2)]
        assert len(batches) == 431 // 64
        assert not torch.equal(*epochs)
        batches.set_epoch(0)
        assert torch.equal(torch.cat([labels for _, labels in batches]), epochs[0])
        images, _ = next(iter(batches))
        assert images.dtype == torch.uint8
    with fastlt.build_loader(digits, "train", 64, crop="random_resized", image_size=6, loader="resident") as batches:
        images, _ = next(iter(batches))
        assert images.shape == (64, 3, 6, 6)


@pytest.mark.parametrize("loader", ["resident", "ffcv"])
def test_an_epoch_has_the_same_crops_after_those_before_it_and_without(digits, loader):
    words = {"crop": "random_resized", "image_size": 6, "loader": loader, "num_workers": 1}
    with (
        fastlt.build_loader(digits, "train", 64, **words) as whole,
        fastlt.build_loader(digits, "train", 64, **words) as begun,
    ):
        epochs = [torch.cat([images for images, _ in whole]) for _ in range(3)]
        begun.set_epoch(2)
        assert torch.equal(torch.cat([images for images, _ in begun]), epochs[2])
        assert not torch.equal(epochs[1], epochs[2])


def test_the_step_is_that_of_the_trainer_bit_for_bit(digits_words):
    words = [*digits_words, "data.augment=[flip, {cutout: {size: 4}}]", "stages.end_to_end.loss=balanced_softmax"]
    context = prepare(load_recipe("digits_lt", words))
    trainer = Trainer(context)
    stage = trainer.build_stage("end_to_end")
    step, settings = stage.step, stage.recipe
    model, augment, meta_augment = map(copy.deepcopy, (step.model, step.parts.augment, step.parts.meta_augment))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1.0, momentum=settings.momentum, nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
    )  # fmt: skip
    meta = whole_split(context, "meta")
    mine = fastlt.build_step(
        "difficulty",
        model,
        optimizer,
        context.counts,
        meta_set=[(normaliser(context)(meta.images), meta.labels)],
        loss="balanced_softmax",
    )
    mine.step.net.load_state_dict(step.net.state_dict())
    batches, meta_batches = endless(stage.loaders.train, 0), endless(stage.loaders.meta, 0)
    step.train_mode()
    model.train()
    for iteration in range(5):
        batch, meta_batch = next(batches), next(meta_batches)
        stage.begin(iteration)
        for group in optimizer.param_groups:
            group["lr"] = step.optimizer.param_groups[0]["lr"]
        images, meta_images = augment(batch.images), meta_augment(meta_batch.images)
        output = mine(images, batch.labels, meta_images, meta_batch.labels)
        expected = step(batch, meta_batch)
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.per_class["weight"], expected.per_class["weight"])
    stage.loaders.close()
    for name, tensor in step.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for name, tensor in step.net.state_dict().items():
        assert torch.equal(mine.step.net.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "method", ["plain", "difficulty", "sample_difficulty", "mwn", "cb_da", "cdb", "mixup", "cutmix"]
)
def test_every_method_of_the_list_goes_on_from_its_state(method):
    images, labels = images_of(COUNTS)
    options = {"from_epoch": 0} if method == "cb_da" else {}

    def made():
        torch.manual_seed(1)
        return build(network(), method, meta_batch_size=8, **options)

    def iterate(step, times):
        for _ in range(times):
            step(images[:32], labels[:32])

    whole, first, second = made(), made(), made()
    for step in (whole, first):
        step.start_epoch(0)
    iterate(whole, 5)
    iterate(first, 2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    iterate(second, 3)
    for name, tensor in whole.step.model.state_dict().items():
        assert torch.equal(second.step.model.state_dict()[name], tensor), name


def test_losses_of_torch_and_optimizers_of_torch_are_taken():
    model = network()
    optimizer = torch.optim.AdamW([{"params": model[:4].parameters(), "lr": 1e-3}, {"params": model[4].parameters()}])
    step = fastlt.build_step(
        "difficulty", model, optimizer, COUNTS, meta_set=[images_of([6] * 4, 1)],
        loss=nn.CrossEntropyLoss(reduction="none"),
    )  # fmt: skip
    images, labels = images_of(COUNTS)
    losses = [step(images, labels).loss.item() for _ in range(10)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"method": "dificulty"}, "unknown method 'dificulty'.*did you mean 'difficulty'"),
        ({"method": "crt"}, "unknown method 'crt'"),
        ({"driver_wieght": 1}, "driver_wieght: unknown key.*did you mean driver_weight"),
        ({"driver_weight": -1}, "driver_weight: is -1"),
        ({"driver_weight": 0, "meta_weight": 0}, "meta_weight and driver_weight are both 0"),
        ({"lookahead": "precond"}, "lookahead: is a string.*did you mean 'preconditioned'"),
        ({"tangent": "fp23"}, "tangent: is a string.*did you mean 'fp32'"),
        ({"driver_target": "absolut"}, "driver_target: is a string.*did you mean 'absolute'"),
        ({"hidden": "autoo"}, "hidden: is a string.*an integer or auto"),
        ({"lean": 3}, "lean: is an integer.*true or false"),
        ({"meta_weight": True}, "meta_weight: is a boolean.*a number"),
        ({"lr": "fast"}, "lr: is a string.*a number"),
        ({"approximate": {"evry": 2}}, "approximate.evry: unknown key.*did you mean approximate.every"),
        ({"meta_set": None}, "needs a meta_set"),
        ({"meta_set": [torch.zeros(2, 3, 8, 8)]}, r"no batches \(images, labels\)"),
        ({"meta_set": [(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2).long())]}, "uint8"),
        ({"meta_set": [images_of([6] * 5)]}, "labels that are not int64 from 0 to 3"),
        ({"class_counts": [3, 2, 1]}, "labels that are not int64 from 0 to 2"),
        ({"class_counts": [4, 3, 2, 1, 1]}, "5 classes"),
        ({"class_counts": [4, 3, 2, 0]}, "each of 1 or more"),
        ({"loss": "balanced_sofmax"}, "did you mean 'balanced_softmax'"),
        ({"loss": nn.CrossEntropyLoss()}, 'reduction="none"'),
        ({"refresh": "eppch"}, "did you mean 'epoch'"),
        ({"lookahead": "preconditioned"}, "SGD has no diagonal preconditioner"),
        ({"optimizer": "part"}, "optimizer has not '4.weight' and 1 more"),
        ({"optimizer": "more"}, "1 parameters that the model does not train"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_refused(change, expected):
    model = network()
    parameters = {"part": model[:4].parameters(), "more": [*model.parameters(), nn.Parameter(torch.zeros(1))]}
    change = dict(change)
    optimizer = torch.optim.SGD(parameters.get(change.pop("optimizer", None), model.parameters()), lr=0.1)
    given = {"method": "difficulty", "class_counts": COUNTS, "meta_set": [images_of([6] * 4)], **change}
    with pytest.raises(ValueError, match=expected):
        fastlt.build_step(model=model, optimizer=optimizer, **given)(*images_of(COUNTS))


@pytest.mark.parametrize("method", ["difficulty", "mwn"])
def test_autocast_around_the_step_is_that_of_the_network_alone(method):
    images, labels = images_of(COUNTS)
    half = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    torch.manual_seed(1)
    given = build(network(), method, autocast=half)
    torch.manual_seed(1)
    around = build(network(), method)
    for _ in range(3):
        expected = given(images, labels)
        with half():
            found = around(images, labels)
    # Not the same bits: in `around` also what the step computes between its passes has half types.
    torch.testing.assert_close(found.loss, expected.loss, rtol=2e-2, atol=0)
    assert {p.dtype for p in around.step.net.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["difficulty", "cdb"])
def test_the_default_type_may_be_another(method):
    images, labels = images_of(COUNTS)
    torch.set_default_dtype(torch.float64)
    try:
        step = build(network(), method, meta_set=[(images_of([6] * 4, 1)[0].double(), images_of([6] * 4, 1)[1])])
        assert torch.isfinite(step(images.double(), labels).loss)
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_image_has_one_weight():
    images, labels = images_of(COUNTS)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    assert build(model)(images[:1], labels[:1]).metrics["weight_std"] == 0


@pytest.mark.parametrize("switch", ["grad_checkpointing", "gradient_checkpointing"])
def test_a_network_that_recomputes_activations_is_refused(switch):
    model = network()
    setattr(model[0], switch, True)
    with pytest.raises(ValueError, match=r"0 recomputes activations.*options\.lean: true lowers memory"):
        build(model)
    build(model, "plain")
    build(model, meta_weight=0.0)


class OverwritesItsInput(nn.Module):
    def forward(self, x):
        return x.sub_(0.5).div_(0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_that_overwrites_its_input_leaves_the_meta_set_as_it_is(dtype):
    images, labels = images_of([6] * 4, 1)
    images = images.to(dtype)
    given = images.clone()
    step = build(nn.Sequential(OverwritesItsInput(), network()).to(dtype), meta_set=[(images, labels)])
    assert torch.equal(step.meta.images, given)
    assert torch.equal(images, given)
    assert all((step.step.class_accuracy.images == image).flatten(1).all(1).any() for image in given)


def test_options_are_read_as_those_of_a_recipe():
    options = build(network(), lr="0.1", approximate={"every": 2}).step.options
    assert (options.lr, options.approximate.every) == (0.1, 2)


def test_images_that_are_not_normalised_are_refused():
    images, labels = images_of(COUNTS)
    with pytest.raises(ValueError, match="build_augment"):
        build(network())(images.byte(), labels)


def test_a_sampler_gives_classes_equally_often_and_another_order_each_epoch():
    labels = images_of(COUNTS)[1]
    sampler = fastlt.build_sampler("class_balanced", labels, seed=3)
    first, second = list(sampler), list(sampler)
    assert first != second
    assert max(torch.bincount(labels[first])) - min(torch.bincount(labels[first])) <= 1
    again = fastlt.build_sampler("class_balanced", labels, seed=3)
    again.set_epoch(1)
    assert list(again) == second
    assert len(list(DataLoader(TensorDataset(labels), batch_size=10, sampler=sampler))) == 8
    with pytest.raises(ValueError, match="unknown sampling"):
        fastlt.build_sampler("balanced", labels)


# fastlt.fit

QUICK = ["stages.end_to_end.iterations=4", "stages.end_to_end.evaluate_every=2", "stages.end_to_end.warmup=0"]


def state_of_process():
    return {
        "environment": dict(os.environ),
        "handlers": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)},
        "threads": torch.get_num_threads(),
        "generators": (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),
        "benchmark": torch.backends.cudnn.benchmark,
    }


def test_fit_trains_twice_in_one_process_and_leaves_it_as_it_was(page, digits_words, capsys):
    before = state_of_process()
    folder, top1 = page["fit_digits"](*digits_words, *QUICK, "num_threads=2", "data.loader=torch", "data.num_workers=1")
    assert 0 <= top1 <= 1
    assert (folder / "result.json").exists()
    told = capsys.readouterr().out
    assert told.count("overall  ") == told.count("stage end_to_end: difficulty") == 1
    assert state_of_process() == before
    # Another precision, which Accelerate allows once a process.
    run = fastlt.fit("digits_lt", *digits_words, *QUICK, "name=other", "precision=bf16")
    assert run.result["precision"] == "bf16"
    assert run.folder.name == "other"
    assert state_of_process() == before
    # And what is finished is only told again.
    assert fastlt.fit("digits_lt", *digits_words, *QUICK, "name=other", "precision=bf16") == run


def test_fit_trains_in_another_thread(digits_words):
    found = []
    thread = threading.Thread(target=lambda: found.append(fastlt.fit("digits_lt", *digits_words, *QUICK)))
    thread.start()
    thread.join(120)
    assert found[0].result["iterations"] == 4
    here = fastlt.fit("digits_lt", *digits_words, *QUICK, "name=here")
    assert here.result["per_class_accuracy"] == found[0].result["per_class_accuracy"]


def test_fit_raises_mistakes_and_frees_the_folder(digits_words):
    with pytest.raises(ValueError, match="did you mean"):
        fastlt.fit("digits_lt", "sede=1")
    words = [*digits_words, *QUICK]
    with pytest.raises(ValueError, match="batch_size is 4000"):
        fastlt.fit("digits_lt", *words, "stages.end_to_end.batch_size=4000")
    assert not Path(load_recipe("digits_lt", words).folder).exists()
    with fit_module._one_at_a_time, pytest.raises(ValueError, match="another run is being trained"):
        fastlt.fit("digits_lt", *words)


def test_an_interrupt_saves_a_checkpoint_and_is_raised_anew(digits_words, monkeypatch):
    log = Trainer._log_training

    def interrupt(self, *arguments):
        log(self, *arguments)
        if self.progress.done == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_log_training", interrupt)
    before = state_of_process()
    with pytest.raises(KeyboardInterrupt):
        fastlt.fit("digits_lt", *digits_words, *QUICK)
    assert state_of_process() == before
    monkeypatch.undo()
    run = fastlt.fit("digits_lt", *digits_words, *QUICK)
    assert run.result["iterations"] == 4


def test_rates_of_groups_are_told_apart_though_they_warm_up_from_nothing():
    model = network()
    groups = [{"params": model[:4].parameters()}, {"params": model[4:].parameters(), "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: iteration / 10)
    fastlt.build_step("difficulty", model, optimizer, COUNTS, meta_set=[images_of([6] * 4)])
    assert optimizer.param_groups[1]["lr_factor"] == 0.5
    optimizer = torch.optim.SGD(
        [{"params": model[:4].parameters(), "lr": 0.0}, {"params": model[4:].parameters()}], 0.1
    )
    with pytest.raises(ValueError, match="first group has lr 0"):
        fastlt.build_step("difficulty", model, optimizer, COUNTS, meta_set=[images_of([6] * 4)])
