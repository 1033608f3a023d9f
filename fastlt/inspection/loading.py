"""What loading a data set costs: memory of each loader, the choice of `auto`, and the time of decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastlt.inspection.profile import Profile
from loaders.cores import available_cores
from loaders.factory import choose_backend
from loaders.order.crop import CropSpec
from loaders.order.plan import EpochPlan
from loaders.readers import BACKENDS
from loaders.readers.free_memory import free_bytes
from loaders.readers.resident_loader import resident_bytes
from loaders.stored.encode import stored_sizes


@dataclass(frozen=True)
class Loading:
    """device: where pixels would be kept. free: bytes there now.

    needed: bytes that each loader keeps in memory, by its name and the split; None where it keeps no images.
    auto, reason: the loader that `auto` takes for train, and why.
    decoding_s: seconds in which all cores decode train once; None where that is not known.
    """

    device: str
    free: int
    needed: Mapping[str, Mapping[str, int] | None]
    auto: str
    reason: str
    cores: int
    decoding_s: float | None

    @property
    def once(self) -> bool:
        """Whether images are decoded at the start alone."""
        return self.auto == "resident"


def measure_loading(profile: Profile, data: Mapping[str, Any], device: torch.device) -> Loading | None:
    """For images that are stored and cut as the data of a recipe say; None where no header can be read."""
    if not all(len(split.known_sizes) for split in profile.splits.values()):
        return None
    longest = data.get("storage", {}).get("max_resolution")
    pixels: dict[str, int] = {}
    plan = None
    for name, split in profile.splits.items():
        kind = data["train_crop"] if name == "train" else data["eval_crop"]
        crop = CropSpec(kind, data["image_size"])
        readable = split.sizes.min(axis=1) > 0
        heights, widths = stored_sizes(split.sizes[readable], longest).T
        pixels[name] = resident_bytes(crop, heights, widths)
        if name == "train":
            plan = EpochPlan(split.labels[readable], heights, widths, crop, 1, train=True)
    assert plan is not None
    auto, reason = choose_backend(plan, device)
    files = {name: int(split.file_bytes.sum()) for name, split in profile.splits.items()}
    needed = {name: {"resident": pixels, "resident_jpeg": files}.get(name) for name in BACKENDS}
    cores, seconds = available_cores(), None
    if profile.decoding is not None:
        seconds = len(profile.splits["train"]) / (profile.decoding.images_per_s * cores)
    return Loading(str(device), free_bytes(device), needed, auto, reason, cores, seconds)
