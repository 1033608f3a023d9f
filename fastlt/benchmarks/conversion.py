"""What a conversion changes: pixels, and the decisions of a pretrained network.

    fastlt benchmark conversion --images DIR --weights FILE
    fastlt benchmark conversion --images DIR --weights FILE --model tf_efficientnet_lite0 --size 224

The images are converted in several ways. The network sees the central crop of each, once of the original file and once
of what was stored. The table has the mean difference of the pixels of that crop in levels of 255, the share of images
whose top-1 class is another one, and the mean and largest difference of the probability of the top-1 class.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastlt.arguments import make_parser, path, positive
from fastlt.augment import normalise
from fastlt.models import build_model
from fastlt.models.classifier import check_model
from fastlt.models.pretrained import config_of, input_config
from loaders.order.crop import CropSpec
from loaders.sources import FileSplit
from loaders.sources.decode import EXTENSIONS
from loaders.stored.as_stored import cut
from loaders.stored.beton import Beton
from loaders.stored.ffcv_format import FfcvOptions, write_beton
from loaders.stored.image_check import check_images
from loaders.stored.progress import progress_bar

NAME = "fastlt benchmark conversion"
RATIO = 0.875  # of the central crop's side to the shorter side
BATCH = 32
WAYS = {
    "raw": FfcvOptions("raw"),
    "jpg": FfcvOptions("jpg"),
    "raw, 400 px": FfcvOptions("raw", max_resolution=400),
    "jpg, 400 px": FfcvOptions("jpg", max_resolution=400),
    "jpg, 256 px": FfcvOptions("jpg", max_resolution=256),
    "jpg, 256 px, quality 75": FfcvOptions("jpg", max_resolution=256, jpeg_quality=75),
}


def main(arguments: list[str], prog: str = NAME) -> int:
    """Convert, compare and print; returns the exit code. ValueError when there is no image."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument(
        "--images", type=path, required=True, metavar="DIR", help="folder of images, with its subfolders"
    )
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="of timm (default: tf_efficientnet_lite0)")
    parser.add_argument("--weights", type=path, required=True, metavar="FILE", help="its pretrained weights")
    parser.add_argument("--size", type=positive, default=224, help="side of the crop (default: 224)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    words = parser.parse_args(arguments)
    paths = sorted(str(p.relative_to(words.images)) for p in words.images.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not paths:
        raise ValueError(f"{words.images} has no image: give a folder of images")
    split = FileSplit(words.images, paths, np.zeros(len(paths), dtype=np.int64), "benchmark")
    model, prepare = _trained(words.model, words.weights, words.size)
    check = check_images(split)
    split, check = split.subset(check.good), check.of(check.good)
    if not len(split):
        raise ValueError(f"none of the {len(paths)} images below {words.images} can be decoded")
    rows = {}
    with progress_bar("stored and compared", len(split) * len(WAYS), not words.json) as advance:
        originals = _crops(split, words.size)
        before = _probabilities(model, prepare, originals)
        for name, options in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "images.beton"
                write_beton(file, split, options, check=check)
                crops = _crops(Beton.open(file), words.size)
            changed, after = (crops != originals).any(axis=(1, 2, 3)), before.clone()
            if changed.any():
                after[torch.from_numpy(changed)] = _probabilities(model, prepare, crops[changed])
            rows[name] = _difference(before, after, originals, crops)
            advance(len(split))
    if words.json:
        print(json.dumps({"images": len(split), "model": words.model, "size": words.size, "rows": rows}))
    else:
        print(f"{len(split)} images, {words.model}, central crops of {words.size} px")
        print(f"{'stored as':26}{'pixels':>9}{'other top-1 %':>15}{'probability':>13}{'at most':>9}")
        for name, row in rows.items():
            print(
                f"{name:26}{row['pixels']:>9.2f}{100 * row['other_top1']:>15.1f}{row['probability']:>13.4f}"
                f"{row['largest']:>9.3f}"
            )
    return 0


def _crops(images: FileSplit | Beton, size: int) -> np.ndarray:
    """The central crops, uint8 (N, size, size, 3)."""
    crop = CropSpec("center", size, ratio=RATIO)
    crops = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for i in range(len(images)):
        cut(images.image(i), crop, crops[i])
    return crops


def _trained(name: str, weights: Path, size: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The network with its head, and what normalises uint8 images (N, 3, S, S) for it. ValueError for other weights."""
    check_model(name, False, None)
    config = config_of(name)
    prepared, classes = input_config(config), config.get("num_classes", 1000)
    model = build_model(name, num_classes=classes, checkpoint=weights, image_size=size).eval()
    if not model.head_is_trained:
        raise ValueError(f"{weights} has no head for the {classes} classes of {name}: there would be no decisions")
    return model, lambda images: normalise(images, prepared.mean, prepared.std)


@torch.inference_mode()
def _probabilities(model: nn.Module, prepare: Callable[[Tensor], Tensor], crops: np.ndarray) -> Tensor:
    """The softmax of each crop, float32 (N, C)."""
    batches = torch.from_numpy(crops).permute(0, 3, 1, 2).split(BATCH)
    return torch.cat([model(prepare(batch)).softmax(1) for batch in batches])


def _difference(before: Tensor, after: Tensor, originals: np.ndarray, crops: np.ndarray) -> dict[str, float]:
    """pixels: mean difference in levels. other_top1: share. probability, largest: of the originals' top-1 class."""
    top = before.argmax(1)
    rows = torch.arange(len(top))
    gap = (before[rows, top] - after[rows, top]).abs()
    return {
        "pixels": float(np.abs(originals.astype(np.int16) - crops).mean()),
        "other_top1": float((after.argmax(1) != top).float().mean()),
        "probability": gap.mean().item(),
        "largest": gap.max().item(),
    }
