"""One of two processes that train on their halves of the batches: `two_processes.py RANK FOLDER`.

Saves, for every case, the model and what the method learns beside it to FOLDER/<rank>.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import balms_reference
import numpy as np
import torch
import torch.distributed as dist
from float64_steps import Scaled
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from fastlt.autograd import ForwardRecord
from fastlt.benchmarks.communication import Traffic
from fastlt.device import gradients
from fastlt.device.distributed import Reducer
from fastlt.device.gradients import mean_gradients
from fastlt.losses import build_loss
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.models import Classifier, ExpertClassifier, LinearHead
from fastlt.models.sync_batch_norm import synchronise_batch_norm
from fastlt.optim import ShardedAdam
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts, base, learned_weights, meta

CLASSES, ITERATIONS = 5, 6
# method (with `options.lean` or in two micro-batches where it says so), how A is refreshed where the method wants it,
# and what normalises: BatchNorm over the batches of all processes, something that has no statistics of the batch, or
# nothing
CASES = [
    ("plain", "exact", "group"),
    ("cdb", "epoch", "group"),
    ("difficulty", "exact", "group"),
    ("difficulty", "rolling", "group"),
    ("mwn", "exact", "group"),
    ("sample_difficulty", "exact", "group"),
    ("cb_da", "exact", "group"),
    ("ride", "exact", "group"),
    ("paco", "exact", "group"),
    ("dro_lt", "exact", "group"),
    ("plain", "exact", "batch"),
    ("difficulty", "exact", "batch"),
    ("difficulty", "rolling", "batch"),
    ("mwn", "exact", "batch"),
    ("difficulty lean", "exact", "none"),
    ("difficulty lean", "rolling", "batch"),
    ("mwn lean", "exact", "batch"),
    ("plain accumulate", "exact", "group"),
    ("difficulty accumulate", "exact", "group"),
]
# Those that are also trained with gradients in one piece, in one piece a parameter, and in bfloat16: with passes of
# their own for lookahead, tangent and update, with what one pass keeps, and with micro-batches of it.
IN_PIECES = [
    ("plain", "exact", "group"),
    ("difficulty", "exact", "group"),
    ("difficulty", "rolling", "batch"),
    ("difficulty accumulate", "exact", "group"),
]
BATCH_NORMS = 2  # layers in the network that has them
OPTIONS = {
    # The absolute target jumps with an accuracy, which rounded gradients may change by an image.
    "difficulty": {"driver_target": "relative"},
    "cb_da": {"from_epoch": 0, "eps_lr": 1.0},
    "paco": {"dim": 4, "queue": 20, "momentum": 0.5, "alpha": 0.2},
    "dro_lt": {"radius": 0.5},
}
COUNTS = ClassCounts(np.array([40, 20, 10, 5, 2]), tuple("abcde"))


def network(normalisation: str = "group") -> nn.Module:
    """Two convolutions and a head; the second BatchNorm, in timm's class, brings its own activation."""
    norms = {
        "batch": lambda: [nn.BatchNorm2d(8), BatchNormAct2d(8, act_layer=nn.Tanh, inplace=False)],
        "group": lambda: [nn.GroupNorm(2, 8), nn.Tanh()],
        "none": lambda: [nn.Identity(), nn.Tanh()],
    }[normalisation]()
    layers = [nn.Conv2d(3, 8, 3, 2), norms[0], nn.ReLU(), nn.Conv2d(8, 8, 3), norms[1], nn.Flatten()]
    return Classifier(nn.Sequential(*layers), LinearHead(72, CLASSES)).double().train()


def training_images(reducer: Reducer) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of a training set, in batches that are not all of one size."""
    whole = draw(32, torch.Generator().manual_seed(7))
    batch = share(Batch(whole.images, torch.arange(32) % CLASSES, whole.index), reducer)
    yield from zip(Scaled()(batch.images).split(9), batch.labels.split(9), strict=True)


class Experts(ExpertClassifier):
    """Two networks whose logits are averaged."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.networks = nn.ModuleList([network(), network()])

    def expert_logits(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([one(images) for one in self.networks])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.expert_logits(images).mean(0)


def draw(size: int, generator: torch.Generator) -> Batch:
    images = torch.randint(0, 256, (size, 3, 11, 11), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    return Batch(images, labels, torch.arange(size))


def share(batch: Batch, reducer: Reducer) -> Batch:
    """This process's images of a batch that all processes know."""
    return Batch(*(reducer.mine(t) for t in (batch.images, batch.labels, batch.index)))


@contextmanager
def released_activations() -> Iterator[list[int]]:
    """How many activations that autograd has saved each record releases."""
    numbers: list[int] = []
    release = ForwardRecord.release

    def counted(record: ForwardRecord) -> None:
        release(record)
        numbers.append(sum(a.saved_for_backward and a.tensor is None for _, a in record.recorded))

    with patch.object(ForwardRecord, "release", counted):
        yield numbers


def train(method: str, refresh: str, normalisation: str, reducer: Reducer) -> dict:
    """What a model and its method become in a few iterations."""
    torch.manual_seed(0)
    model = Experts() if method == "ride" else network(normalisation)
    if reducer.world_size > 1:
        synchronise_batch_norm(model, reducer)
    generator = torch.Generator().manual_seed(1)
    method, _, how = method.partition(" ")
    kind = STEPS[method]
    options = kind.Options(**OPTIONS.get(method, {}), **({"lean": True} if how == "lean" else {}))
    kind.prepare_model(model, options, seed=2)
    if method == "paco":
        model.auxiliary.layers[1] = nn.Identity()  # its BatchNorm
    accuracy = None
    if kind.needs.class_accuracy:
        images = torch.randint(0, 256, (30, 3, 11, 11), dtype=torch.uint8, generator=generator)
        labels = torch.arange(30) % CLASSES
        accuracy = ClassAccuracy(
            images, labels, CLASSES, prepare=Scaled(), refresh=refresh, window=3, batch_size=4, reducer=reducer
        )
    parts = StepParts(
        model=model,
        # RIDE divides by the weights' sum over all processes.
        loss=build_loss("class_balanced" if method == "ride" else "cross_entropy", COUNTS).double(),
        optimizer=torch.optim.SGD(
            kind.parameter_groups(model, options), lr=0.2, momentum=0.9, weight_decay=5e-4, foreach=True
        ),
        augment=Scaled(),
        meta_augment=Scaled(),
        class_counts=COUNTS,
        class_accuracy=accuracy,
        second_augment=Scaled(0.5),
        training_images=lambda: training_images(reducer),
        reducer=reducer,
        accumulate=2 if how == "accumulate" else 1,
    )
    step = kind(parts, options)
    step.start_epoch(0)
    with released_activations() as released:
        for _ in range(ITERATIONS):
            step(share(draw(12, generator), reducer), share(draw(10, generator), reducer))
    state = {"model": model.state_dict()}
    if how == "lean":
        state["released"] = {"activations": torch.tensor(released)}
    if hasattr(step, "net"):
        state["net"] = step.net.state_dict()
    if method == "paco":
        state["queue"] = {"keys": step.queue.keys, "labels": step.queue.labels}
    if method == "dro_lt":
        state["centroids"] = {"mu": step.centroids}
    if accuracy is not None:
        state["accuracy"] = {"A": accuracy.latest}
    return state


def balms_step(reducer: Reducer):
    """BALMS on the frozen features of `network()`, at the learning rates of its reference."""
    torch.manual_seed(0)
    kind, model = STEPS["balms"], network()
    options = kind.Options(lr=balms_reference.RATE_LR, init_pow=0.3, pool_factor=3)
    kind.prepare_model(model, options, seed=1)
    optimizer = torch.optim.SGD(
        kind.parameter_groups(model, options),
        lr=balms_reference.LR,
        momentum=balms_reference.MOMENTUM,
        weight_decay=balms_reference.DECAY,
    )
    loss = build_loss("balanced_softmax", COUNTS)
    step = kind(StepParts(model, loss, optimizer, Scaled(), Scaled(), COUNTS, reducer=reducer), options)
    step.train_mode()
    return step


def balms_batches() -> list[tuple[Batch, Batch]]:
    generator = torch.Generator().manual_seed(1)
    return [(draw(24, generator), draw(10, generator)) for _ in range(ITERATIONS)]


def train_balms(reducer: Reducer) -> dict:
    step = balms_step(reducer)
    for batch, meta_batch in balms_batches():
        step(share(batch, reducer), share(meta_batch, reducer))
    return {**step.model.head.state_dict(), "rates": step.rate_logits.detach()}


def rounded_gradients(reducer: Reducer) -> dict[str, list[Tensor]]:
    """The mean gradients of a network as they are, and sent in bfloat16."""
    torch.manual_seed(0)
    model, batch = network(), share(draw(64, torch.Generator().manual_seed(5)), reducer)
    parameters = list(model.parameters())

    def gradients_by(one: Reducer) -> list[Tensor]:
        losses = nn.functional.cross_entropy(model(Scaled()(batch.images)), batch.labels)
        return mean_gradients(one, losses, parameters)

    return {"exact": gradients_by(reducer), "rounded": gradients_by(replace(reducer, compressed=True))}


SHAPES = [(7, 5), (7,), (3, 7), (2, 0), (11,)]  # of the parameters of a ShardedAdam: 74 numbers, 37 a process


def sharded_adam(reducer: Reducer) -> dict:
    """Parameters, the whole state of Adam and this process's share of it after some steps, and after some more.

    The later ones are taken by another optimizer, which starts from the whole state.
    """
    torch.manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    results = {}
    before = None
    for part in ("first", "later"):
        optimizer = ShardedAdam(parameters, lr=0.1, weight_decay=0.01, foreach=True)
        if before is not None:
            optimizer.load_state_dict(before)
        for _ in range(ITERATIONS):
            optimizer.step([torch.randn(shape) for shape in SHAPES])
        gathered = [optimizer.gathered()]
        results[part] = {
            "parameters": [p.detach().clone() for p in parameters],
            "share": optimizer.state_dict()["share"],
            "whole": gathered[0],
        }
        dist.broadcast_object_list(gathered)
        before = gathered[0]
    return results


def flat_mean(reducer, objective, parameters, *, retain_graph=False, added_to=None, share=1.0):
    """`mean_gradients` without buckets: all gradients of the pass in one piece, when it is over."""
    gradients = [g.clone() for g in mean_gradients(Reducer(), objective, parameters, retain_graph=retain_graph)]
    if added_to is not None:
        gradients = [before.add(g, alpha=share) for before, g in zip(added_to, gradients, strict=True)]
    reducer.mean_(gradients)
    return gradients


def flat_mean_of_each(reducer, parameters, gradients):
    found = dict(gradients)
    gradients = [found[i] for i in range(len(parameters))]
    reducer.mean_(gradients)
    return gradients


def train_flat(*case: str, reducer: Reducer) -> dict:
    with (
        patch.object(base, "mean_gradients", flat_mean),
        patch.object(meta, "mean_gradients", flat_mean),
        patch.object(meta, "mean_of_each", flat_mean_of_each),
    ):
        return train(*case, reducer)


class Sometimes(nn.Module):
    """A network whose second layer one of the processes leaves out; BatchNorm communicates in its backward pass."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        return self.last(self.norm(self.second(x) if self.used else x))


def gradients_of_some(reducer: Reducer) -> dict[str, list[Tensor]]:
    """The mean gradients of `Sometimes` where process 0 uses the layer, and what each process has alone."""
    model = Sometimes(reducer.rank == 0).double()
    synchronise_batch_norm(model, reducer)
    images = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)[reducer.rank]
    parameters = list(model.parameters())
    mean = mean_gradients(reducer, model(images).square().mean(), parameters)
    own = mean_gradients(Reducer(), model(images).square().mean(), parameters)
    return {"mean": mean, "own": own}


def main(rank: str, folder: str) -> None:
    torch.set_num_threads(1)
    reducer = Reducer(int(rank), 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=reducer.rank, world_size=2)
    traffic, results = Traffic(), {}
    for case in CASES:
        with traffic.counted():
            results["-".join(case)] = train(*case, reducer)
        results["-".join(case)]["traffic"] = traffic.take()
    for case in IN_PIECES:
        results["-".join(case)]["flat"] = train_flat(*case, reducer=reducer)
        with patch.object(gradients, "FIRST_BUCKET_BYTES", 1):
            results["-".join(case)]["in pieces"] = train(*case, replace(reducer, bucket_bytes=1))
            results["-".join(case)]["compressed"] = train(*case, replace(reducer, compressed=True))
    with patch.object(gradients, "FIRST_BUCKET_BYTES", 1):
        results["some"] = gradients_of_some(replace(reducer, bucket_bytes=1))
    results["bfloat16"] = rounded_gradients(reducer)
    results["balms"] = train_balms(reducer)
    results["sharded_adam"] = sharded_adam(reducer)
    with patch.object(learned_weights, "SHARDED_FROM", 0):
        results["sharded theta"] = train("difficulty", "exact", "group", reducer)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
