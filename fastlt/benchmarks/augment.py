"""The batched, on-device augmentation against torchvision's, which takes one image after another.

Both do a random crop with padding, flips, AutoAugment, normalisation and cutout; from uint8 images in memory to a
float32 batch on the device. On a GPU a third row is the device's work alone, captured in a CUDA graph, as it is part of
a captured iteration: the random choices are then drawn on the host while the device is busy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from fastlt.arguments import make_parser, positive, worker_count
from fastlt.augment import Augment, build_augment
from fastlt.benchmarks.options import add_device
from fastlt.benchmarks.rounds import interleaved, report_speeds, row
from fastlt.device.available import wait_for
from fastlt.device.replay import CudaCapture

NAME = "fastlt benchmark augment"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def main(arguments: list[str], prog: str = NAME) -> int:
    """Measure and print; returns the exit code."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("--batch", type=positive, nargs="+", default=[128, 512], metavar="N", help="batch sizes")
    parser.add_argument("--size", type=positive, default=32, metavar="PIXELS", help="side of the images (default: 32)")
    parser.add_argument("--policy", choices=("cifar10", "imagenet", "svhn"), default="cifar10", help="of AutoAugment")
    parser.add_argument("--rounds", type=positive, default=7, help="measured rounds (default: 7)")
    parser.add_argument("--threads", type=worker_count, metavar="N", help="CPU threads of torch (default: all)")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    words = parser.parse_args(arguments)
    if words.threads:
        torch.set_num_threads(words.threads)
    rows = []
    for batch in words.batch:
        speeds = interleaved(_variants(batch, words.size, words.policy, torch.device(words.device)), words.rounds)
        of_batch = {"torchvision": "torchvision, tensors", "prefix": f"batch {batch}: "}
        rows += [row(speeds, name, **of_batch) for name in speeds]
    settings = {"size": words.size, "policy": words.policy, "device": words.device, "rounds": words.rounds}
    report_speeds(rows, as_json=words.json, settings={**settings, "threads": torch.get_num_threads()})
    return 0


def _variants(batch: int, size: int, policy: str, device: torch.device) -> dict[str, Callable[[], int]]:
    images = _images(batch, size)
    on_device = images.to(device)
    specs = [
        {"random_crop": {"padding": size // 8}},
        "flip",
        {"auto_augment": {"policy": policy}},
        {"cutout": {"size": size // 2}},
    ]

    def build() -> Augment:
        return build_augment(specs, image_size=size, mean=MEAN, std=STD, seed=0, device=device)

    ours = build()
    tensors = [image.contiguous() for image in images]
    arrays = [image.permute(1, 2, 0).contiguous().numpy() for image in images]
    from_tensor = _one_by_one(size, policy, transforms.ConvertImageDtype(torch.float32))
    from_pil = _one_by_one(size, policy, transforms.ToTensor())

    def finished(result: Tensor) -> int:
        wait_for(device)
        return len(result)

    variants = {"fastlt": lambda: finished(ours(on_device))}
    if device.type == "cuda":
        replayed = Captured([(build(), on_device)])
        variants["fastlt, captured"] = lambda: finished(replayed()[0])
    return {
        **variants,
        "torchvision, tensors": lambda: finished(torch.stack([from_tensor(image) for image in tensors]).to(device)),
        "torchvision, PIL": lambda: finished(
            torch.stack([from_pil(Image.fromarray(array)) for array in arrays]).to(device)
        ),
    }


class Captured:
    """Applies each chain to its images by replaying one CUDA graph, always with the same draws; returns the results.

    The chains are held from then on, see `Augment.hold`.
    """

    def __init__(self, chains: list[tuple[Augment, Tensor]]) -> None:
        self.chains = chains  # kept, because the graph reads the draws that they hold
        for chain, images in chains:
            chain.hold(images)
        self.replay, self.results = CudaCapture()(lambda: [chain(images) for chain, images in chains])

    def __call__(self) -> list[Tensor]:
        self.replay()
        return self.results


def _one_by_one(size: int, policy: str, to_float: Callable) -> Callable:
    return transforms.Compose(
        [
            transforms.RandomCrop(size, padding=size // 8),
            transforms.RandomHorizontalFlip(),
            transforms.AutoAugment(transforms.AutoAugmentPolicy(policy)),
            to_float,
            transforms.Normalize(MEAN, STD),
            lambda image: _cutout(image, size // 2),
        ]
    )


def _cutout(image: Tensor, side: int) -> Tensor:
    """A square around a random place set to zero, for torchvision has none."""
    height, width = image.shape[1:]
    y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    image[:, max(y - side // 2, 0) : y + side // 2, max(x - side // 2, 0) : x + side // 2] = 0
    return image


def _images(batch: int, size: int) -> Tensor:
    """Smooth colours, uint8 (N, 3, H, W) channels_last: PIL's and torch's speed hardly depends on what is in them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (batch, 3, max(size // 4, 1), max(size // 4, 1)), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return smooth.clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)
