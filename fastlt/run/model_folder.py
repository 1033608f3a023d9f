"""The trained model of a run as a folder: timm's files where timm can compute it, and all that fastlt needs of it.

`timm.create_model("local-dir:FOLDER", pretrained=True)` gives the logits of the trained model. Where timm has no such
network the folder holds fastlt's own weights, and the card says why.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from fastlt.augment import normalise
from fastlt.models.timm_network import is_ours, timm_network
from fastlt.recipe import without_paths
from fastlt.run.atomic_file import RunFileError, not_written, write_atomically, write_json
from fastlt.run.context import RunContext
from fastlt.run.cut_images import validation_images
from fastlt.run.folder import model_folder, part_file
from fastlt.run.lock import lock_folder, unlock_folder
from fastlt.run.model_card import readme
from fastlt.run.trained import CONFIG, OURS, WEIGHTS, TrainedRun, is_model_folder, load_trained

README = "README.md"
LIMIT = 1e-4  # of a difference of logits
AT_THE_END = 8  # validation images by which a run checks the model that it leaves
CPU = torch.device("cpu")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packaged:
    """A model folder that was written.

    difference: the largest one of its logits from the trained model's.
    reason: why timm alone cannot load it; None where it can.
    """

    folder: Path
    difference: float
    reason: str | None


def write_model_folder(trained: TrainedRun, images: Tensor, out: Path) -> Packaged:
    """Write a trained model, on the CPU, to `out`; a model folder that is there is replaced.

    images: uint8 (N, 3, S, S), by which it is checked before it takes its place. ValueError when logits differ by more
    than 1e-4, or `out` is something else; RunFileError when it cannot be written. Nothing is left behind then.
    """
    assert trained.device.type == "cpu", trained.device
    network, reason = in_timm(trained)
    with _replacing(out) as part:
        part.mkdir()
        config = _own_config(trained, reason or "") if network is None else timm_config(network, trained)
        state = trained.model.state_dict() if network is None else network.state_dict()
        tensors = {key: tensor.contiguous() for key, tensor in state.items()}
        write_atomically(part / WEIGHTS, safetensors.torch.save(tensors))
        write_json(part / CONFIG, config)
        write_atomically(part / README, readme(trained, reason, of_timm=network is not None).encode())
        difference = _checked(trained, images, part, of_timm=network is not None)
    return Packaged(out, difference, reason)


def in_timm(trained: TrainedRun) -> tuple[nn.Module | None, str | None]:
    """The network of timm that computes a trained model, if there is one, and why timm alone cannot load it."""
    name = trained.recipe.model.name
    try:
        network = timm_network(trained.model, name, trained.image_size)
    except ValueError as error:
        return None, f"timm cannot compute it: {error}"
    return network, f"timm has no {name}, a network of fastlt's own" if is_ours(name) else None


def save_run_model(context: RunContext) -> None:
    """Write the model folder of a finished run where it is absent, on the main process.

    RunFileError when it cannot be written. Whatever else goes wrong is a warning: the result of the run stands.
    """
    folder = context.folder
    if not context.main or is_model_folder(model_folder(folder)):
        return
    try:
        images = validation_images(context.recipe.data, AT_THE_END, context.dataset)
        write_model_folder(load_trained(folder, CPU), images, model_folder(folder))
    except RunFileError:
        raise
    except Exception as error:
        # A mistake of the user's is told by its sentence, one of ours with its traceback.
        unknown = not isinstance(error, ValueError)
        log.warning("%s is not written: %s", model_folder(folder), error, exc_info=unknown)


def mend_run_model(context: RunContext) -> None:
    """`save_run_model` for a run that was killed between its result and its model; a warning where it cannot be."""
    if not context.main or is_model_folder(model_folder(context.folder)):
        return
    try:
        lock_folder(context.folder)
        try:
            save_run_model(context)
        finally:
            unlock_folder(context.folder)
    except (OSError, ValueError) as error:
        log.warning("%s is missing and cannot be written: %s", model_folder(context.folder), error)


def logits(network: nn.Module, images: Tensor, trained: TrainedRun) -> Tensor:
    """In float32 (N, C), for uint8 images (N, 3, S, S)."""
    with torch.no_grad():
        return network(normalise(images, trained.mean, trained.std)).float()


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference of two tensors of one shape; equal infinities have none."""
    assert one.shape == other.shape, (one.shape, other.shape)
    return torch.where(one == other, 0.0, (one - other).abs()).max().item()


def timm_config(network: nn.Module, trained: TrainedRun) -> dict[str, Any]:
    """The content of timm's config.json, by timm's own writer, and our part of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CONFIG
        save_config_for_hf(network, str(file), model_config=own_keys(trained, "timm"), data_config=data_config(trained))
        config = json.loads(file.read_text(encoding="utf-8"))
    # Of the network that timm has under this name, not of these weights.
    for key in ("license", "tag", "tags", "origin_url", "paper_name", "paper_ids", "notes"):
        config["pretrained_cfg"].pop(key, None)
    return config


def data_config(trained: TrainedRun) -> dict[str, Any]:
    """How images are cut and normalised, in timm's words."""
    return {
        "input_size": (3, trained.image_size, trained.image_size),
        "mean": trained.mean,
        "std": trained.std,
        "crop_pct": trained.eval_ratio if trained.eval_crop == "center" else 1.0,
        "crop_mode": "center",
        # Of timm's filters the nearest to the area interpolation of the training: pixels of photographs differ by 3.5
        # of 255 on average, with bicubic by 3.8, with box by 4.7.
        "interpolation": "bilinear",
    }


def own_keys(trained: TrainedRun, form: str) -> dict[str, Any]:
    """What is added to timm's keys: the class names, and all that fastlt needs of the run."""
    run = trained.run
    return {
        "label_names": list(run.class_names),
        OURS: {
            "form": form,
            "recipe": without_paths(run.recipe).to_tree(),
            "result": run.result,
            "data": None if run.data is None else run.data.to_tree(),
            "select": trained.select,
            "iteration": trained.iteration,
        },
    }


def _own_config(trained: TrainedRun, reason: str) -> dict[str, Any]:
    """In timm's form for what timm has no network for: it answers with the name of the architecture."""
    return {
        "architecture": f"{trained.recipe.model.name} by fastlt.load: {reason}",
        "num_classes": trained.counts.num_classes,
        "num_features": trained.model.head.in_features,
        "pretrained_cfg": data_config(trained),
        **own_keys(trained, "fastlt"),
    }


def _checked(trained: TrainedRun, images: Tensor, part: Path, *, of_timm: bool) -> float:
    """The largest difference of the logits that the folder gives; ValueError when it is too large."""
    expected = logits(trained.model, images, trained)
    networks: list[nn.Module] = [load_trained(part, CPU).model]
    if of_timm:
        networks.append(timm.create_model(f"local-dir:{part}", pretrained=True).eval())
    difference = max(largest_difference(logits(network, images, trained), expected) for network in networks)
    if not difference <= LIMIT:
        raise ValueError(
            f"the written model's logits differ from the trained one's by {difference:.2g}, more than {LIMIT:g} is "
            "allowed; nothing was written"
        )
    return difference


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A path for a folder, which takes the place of `out` at the end of the context; after an error it is gone."""
    if out.exists() and not (is_model_folder(out) or (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"{out} is there and is no model folder; give another one")
    part, old = part_file(out), part_file(out.with_name(f"{out.name}.replaced"))
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if out.exists():
            out.rename(old)
        part.rename(out)
    except OSError as error:
        raise RunFileError(not_written(out, error)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
