"""Finished runs evaluated together: the mean of what they predict, as `fastlt.commands.ensemble` describes it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlt.device.openmp import runtime
from fastlt.run.dataset import existing_dataset
from fastlt.run.finished_data import check_same_images, evaluation_batches
from fastlt.run.metrics import Metrics
from fastlt.run.result import device_name, processor_name, standard_error, versions
from fastlt.run.trained import RecordedRun, load_trained, read_finished
from fastlt.typed_yaml import to_tree
from loaders.sources.split import SPLITS
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.unconverted import UnconvertedDataset

ROWS = 4096  # images whose predictions are averaged at a time


@dataclass(frozen=True)
class Member:
    """A finished run, and its data set."""

    run: RecordedRun
    dataset: ConvertedDataset | UnconvertedDataset

    def batches(self, split: str, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The positions int64 (N,) and logits float32 (N, C) of a split's images, batch by batch, on the device."""
        trained = load_trained(self.run.folder, device)
        for batch in evaluation_batches(self.run, self.dataset, split, device):
            yield batch.index, trained.logits(batch.images)

    def logits(self, split: str, device: torch.device) -> Tensor:
        """The logits of every image of a split, in its order: float32 (N, C) on the host."""
        logits = torch.full((len(self.dataset.labels(split)), self.dataset.num_classes), math.nan)
        for index, of_batch in self.batches(split, device):
            logits[index.cpu()] = of_batch.cpu()
        return logits


def open_member(folder: Path) -> Member:
    """ValueError when the folder holds no finished run or its data set is not there."""
    run = read_finished(folder)
    dataset = existing_dataset(run.recipe.data)
    check_same_images(run, dataset, say=print)
    return Member(run, dataset)


def check_members(members: Sequence[Member]) -> None:
    """ValueError when there are fewer than two or they do not belong to the same images and classes."""
    if len(members) < 2:
        raise ValueError(f"{len(members)} run was given: an ensemble needs two or more")
    first = members[0]
    for other in members[1:]:
        both = f"{first.run.folder} and {other.run.folder} belong to different data sets"
        one, two = first.dataset, other.dataset
        if one.root.resolve() != two.root.resolve():
            if isinstance(one, ConvertedDataset) and isinstance(two, ConvertedDataset):
                a, b = one.manifest["request"], two.manifest["request"]
                wrong = [f"{k} is {a.get(k)!r} and {b.get(k)!r}" for k in {**a, **b} if a.get(k) != b.get(k)]
                if wrong:
                    raise ValueError(f"{both} ({one.root}, {two.root}): {'; '.join(wrong)}")
            same = one.class_names == two.class_names and all(
                np.array_equal(one.labels(split), two.labels(split)) for split in SPLITS
            )
            if not same:
                raise ValueError(f"{both} ({one.root}, {two.root}): their classes or labels differ")
        if first.run.data and other.run.data and (wrong := other.run.data.differences(first.run.data)):
            raise ValueError(f"{both}: {'; '.join(wrong)}")
        shots = first.run.counts.shots, other.run.counts.shots
        if shots[0] != shots[1]:
            raise ValueError(
                f"{first.run.folder} and {other.run.folder} have different data.shots, {to_tree(shots[0])} and "
                f"{to_tree(shots[1])}: many-, medium- and few-shot would have no one meaning"
            )


def log_mean_probability(logits: Sequence[Tensor]) -> Tensor:
    """log of the mean over members of softmax(z), z (N, C) each: float64 (N, C).

    In logarithms, so that small probabilities keep their order and none becomes 0; in float64, so that no two classes
    tie that did not before.
    """
    log_p = torch.stack([torch.log_softmax(z.double(), dim=1) for z in logits])
    return torch.logsumexp(log_p, dim=0) - math.log(len(logits))


def evaluate(members: Sequence[Member], split: str, device: torch.device) -> dict[str, Any]:
    """The metrics of the mean prediction on a split."""
    dataset = members[0].dataset
    logits = [member.logits(split, device) for member in members]
    labels = torch.from_numpy(dataset.labels(split))
    metrics = Metrics(dataset.num_classes)
    for start in range(0, len(labels), ROWS):
        part = slice(start, start + ROWS)
        metrics.update(log_mean_probability([z[part] for z in logits]), labels[part])
    return metrics.summary(members[0].run.counts)


def described(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Which runs an ensemble is made of, for its result and to tell later whether it still is."""
    return [
        {"run": m.run.folder.resolve().name, "seed": m.run.recipe.seed, "top1": m.run.result["top1"]} for m in members
    ]


def _parts_of_time(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What any of the runs spent time on beside its training."""
    return list(dict.fromkeys(part for result in results for part in result.get("aside_s", {})))


def ensemble(members: Sequence[Member], name: str, device: torch.device) -> dict[str, Any]:
    """A result in the form of a run's result.json, with `members` and `average`; times are sums over the runs."""
    check_members(members)
    results = [m.run.result for m in members]
    counts = members[0].run.counts
    train_s = sum(r["train_s"] for r in results)
    validation_top1 = evaluate(members, "meta", device)["top1"]

    def common(key: str) -> Any:
        values = [r.get(key) for r in results]
        return values[0] if values.count(values[0]) == len(values) else None

    return {
        "name": name,
        **evaluate(members, "test", device),
        "select": None,
        "selected_iteration": None,
        "validation_top1": validation_top1,
        "validation_top1_se": standard_error(validation_top1, len(members[0].dataset.labels("meta"))),
        "selection": None,
        "class_names": list(counts.names),
        "class_counts": counts.counts.tolist(),
        "class_weights": None,
        "shots": to_tree(counts.shots),
        "imbalance_factor": counts.imbalance_factor,
        "seed": common("seed"),
        "precision": common("precision"),
        "device": device_name(device),
        "processor": processor_name(),
        "processes": 1,
        "threads": torch.get_num_threads(),
        "openmp": runtime(),
        "storage": common("storage"),
        "parts": [],
        "iterations": sum(r["iterations"] for r in results),
        "train_s": train_s,
        "aside_s": {k: sum(r.get("aside_s", {}).get(k, 0.0) for r in results) for k in _parts_of_time(results)},
        **{k: sum(r[k] * r["train_s"] for r in results) / train_s for k in ("img_s", "data_wait_share")},
        "versions": versions(),
        "average": "probabilities",
        "members": described(members),
    }
