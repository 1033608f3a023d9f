"""What the loaders are compared with, written as these libraries' own users write it: FFCV, DALI and torchvision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from loaders.order.crop import CropSpec
from loaders.sources import ArraySplit, FileSplit
from loaders.stored.ffcv_kernels import keep_torch_threads
from loaders.stored.tar_shards import TarShards

Epochs = Callable[[], Iterator[Tensor]]  # each call is one epoch of full batches, shuffled


def bare_ffcv(beton: Path, *, crop: CropSpec, batch: int, workers: int, device: torch.device) -> Epochs:
    """FFCV's Loader with its own random-resized crop, or with none."""
    with keep_torch_threads():
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import ToDevice, ToTensor

        if crop.kind == "none":
            decoder = SimpleRGBImageDecoder()
        else:
            decoder = RandomResizedCropRGBImageDecoder((crop.size, crop.size), scale=crop.scale, ratio=crop.aspect)
        upload = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
        loader = Loader(
            str(beton),
            batch_size=batch,
            num_workers=workers,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=True,
            pipelines={"image": [decoder, ToTensor(), *upload], "label": [IntDecoder(), ToTensor(), *upload]},
        )

    def epochs() -> Iterator[Tensor]:
        with keep_torch_threads():
            for images, _ in loader:
                yield images

    return epochs


AHEAD = 2  # batches that DALI prepares, its default
# How our pipeline decodes, which gives libjpeg-turbo's usual pixels; DALI's defaults blow colours up more coarsely.
SAME_PIXELS = {"jpeg_fancy_upsampling": True, "use_fast_idct": True}


def bare_dali(
    index: Path, *, crop: CropSpec, batch: int, workers: int, device: torch.device, decoding: Mapping[str, bool]
) -> Epochs:
    """A DALI pipeline over its own WebDataset reader, shuffling in a buffer, with its own random crop, or with none.

    decoding: options of its decoder, SAME_PIXELS or none.
    """
    from nvidia.dali import Pipeline, fn, types

    shards = TarShards(index)
    gpu = device.type == "cuda"
    device_id = torch.cuda.current_device() if gpu else None
    pipeline = Pipeline(batch_size=batch, num_threads=workers, device_id=device_id, prefetch_queue_depth=AHEAD)
    with pipeline:
        # DALI's stubs give its readers no result, and take options in a mapping for positional ones.
        encoded, label = fn.readers.webdataset(  # pyright: ignore[reportGeneralTypeIssues]
            paths=[str(tar) for tar in shards.tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in shards.tars],
            ext=["jpg;png", "cls"],
            random_shuffle=True,
            name="reader",
        )
        decode_on = "mixed" if gpu else "cpu"
        if crop.kind == "none":
            images = fn.decoders.image(  # pyright: ignore[reportCallIssue]
                encoded,
                device=decode_on,
                output_type=types.DALIImageType.RGB,
                **decoding,  # pyright: ignore[reportArgumentType]
            )
        else:
            ranges = {"random_area": list(crop.scale), "random_aspect_ratio": list(crop.aspect)}
            images = fn.decoders.image_random_crop(  # pyright: ignore[reportCallIssue]
                encoded,
                device=decode_on,
                output_type=types.DALIImageType.RGB,
                **ranges,  # pyright: ignore[reportArgumentType]
                **decoding,  # pyright: ignore[reportArgumentType]
            )
            images = fn.resize(images, size=[crop.size, crop.size])
        pipeline.set_outputs(images, label)
    pipeline.build()
    # A pipeline's first schedule_run() starts AHEAD batches, every later one a single batch. These are taken out now:
    # otherwise one batch too many would be in flight for good, and be decoded after the epoch that it is counted in.
    pipeline.schedule_run()
    for _ in range(AHEAD):
        pipeline.share_outputs()
        pipeline.release_outputs()

    def epochs() -> Iterator[Tensor]:
        # Not pipeline.run(): its reader never ends, so an epoch would find batches decoded before it was measured, and
        # leave others to be decoded while the next loader is.
        batches = len(shards) // batch
        for _ in range(min(AHEAD, batches)):
            pipeline.schedule_run()
        for number in range(batches):
            images = torch.from_dlpack(pipeline.share_outputs()[0].as_tensor())
            if number + AHEAD < batches:
                pipeline.schedule_run()
            yield images
            pipeline.release_outputs()

    return epochs


class _PilImages(Dataset):
    """Images as torchvision's data sets give them to their transform: files through PIL, arrays as PIL images."""

    def __init__(self, split: ArraySplit | FileSplit, transform: Callable) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if isinstance(self.split, ArraySplit):
            return self.transform(Image.fromarray(self.split.image(i))), 0
        with Image.open(self.split.root / self.split.paths[i]) as image:
            return self.transform(image.convert("RGB")), 0


def torchvision_loader(
    split: ArraySplit | FileSplit, *, crop: CropSpec, batch: int, workers: int, device: torch.device
) -> Epochs:
    """torch's DataLoader over PIL images and torchvision's transforms, to uint8 batches."""
    steps: list[Callable] = [transforms.PILToTensor()]
    if crop.kind != "none":
        steps.insert(0, transforms.RandomResizedCrop(crop.size, scale=crop.scale, ratio=crop.aspect))
    loader = DataLoader(
        _PilImages(split, transforms.Compose(steps)),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )

    def epochs() -> Iterator[Tensor]:
        for images, _ in loader:
            yield images.to(device, non_blocking=True)

    return epochs
