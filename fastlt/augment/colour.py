"""Changing values: pure functions of uint8 images (N, 3, H, W) and one parameter an image.

Every operation that maps a channel's values by themselves is a table of 256 entries an image and channel, so that all
of them together are one gather. The tables are made with torchvision's arithmetic in float32 and its truncation to
uint8, which makes the results equal bit by bit to its functions on tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlt.augment.constants import as_divisor, kept, number, whole_numbers


def apply_tables(images: Tensor, tables: Tensor, values: Tensor | None = None) -> Tensor:
    """out = tables[n, c, images[n, c, i, j]], clamped to 0..255 and truncated.

    tables: float32 (N, 3 or 1, 256), changed in place. values: `pixel_values(images)`, if they are there already.
    Returns contiguous uint8.
    """
    values = pixel_values(images) if values is None else values
    return _to_uint8(tables).expand(-1, images.shape[1], -1).gather(2, values).view(images.shape)


def pixel_values(images: Tensor) -> Tensor:
    """Pixels as places in tables: int64 (N, 3, H * W)."""
    return images.flatten(2).long()


@kept
def levels(device: torch.device) -> Tensor:
    """0..255 as float32 (1, 1, 256)."""
    return torch.arange(256, dtype=torch.float32, device=device).view(1, 1, 256)


def brightness_table(factor: Tensor) -> Tensor:
    """Values times `factor` (N,), >= 0."""
    return _rows(factor) * levels(factor.device)


def contrast_table(images: Tensor, factor: Tensor) -> Tensor:
    """Values blended with the mean of the image's grey version: 0 is flat grey, 1 changes nothing; (N,), >= 0."""
    return brightness_table(factor) + _rows(1 - factor) * mean_level(luma(images))


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """`brightness_table`, applied."""
    return apply_tables(images, brightness_table(factor))


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """`contrast_table`, applied."""
    return apply_tables(images, contrast_table(images, factor))


def posterize_table(bits: int, device: torch.device) -> Tensor:
    """Only the upper `bits` of each value, 0..8."""
    step = 1 << (8 - bits)
    return (levels(device) / step).floor() * step


def solarize_table(threshold: float, device: torch.device) -> Tensor:
    """Values from `threshold` on are inverted."""
    value = levels(device)
    return torch.where(value >= threshold, 255 - value, value)


def stretch(low: Tensor, high: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """What AutoContrast does to values: less the first, times the second, float32 (N, 3, 1) each.

    The smallest value `low` of each channel becomes 0 and its largest one `high` 255; flat channels stay. low, high:
    uint8 (N, 3). chosen: int64 (N, 1), 1; or 0 for images of which nothing is to change.
    """
    place = torch.add(high * chosen, low, alpha=256)
    less, times = F.embedding(place, _stretches(low.device)).unsqueeze(2).unbind(3)
    return less, times


@kept
def _stretches(device: torch.device) -> Tensor:
    """`stretch` of each pair, at 256 * low + high: float32 (65536, 2). Where high <= low, nothing changes."""
    level = torch.arange(256, dtype=torch.float32)
    low, high = level.view(-1, 1), level.view(1, -1)
    changes = high > low
    pairs = torch.where(changes, low, 0.0), torch.where(changes, 255 / (high - low), 1.0)
    return torch.stack(pairs, dim=2).view(-1, 2).to(device)


def equalized(values: Tensor, high: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """What Equalize makes of each level: what is added, whole float32 (N, 3, 256), to the level times 0 or 1 (N, 3, 1).

    It spreads each channel's values so that their histogram becomes flat, in Pillow's integer arithmetic; channels of
    too few pixels to spread stay. values: `pixel_values`. high: each channel's largest, uint8 (N, 3). left: int64
    (N, 1), 0; or 256 for images of which nothing is to change. May be above 255.
    """
    pixels = values.shape[2]
    # Level v is counted at v + 1: so the sum up to a place is that of the levels below it. Nothing is counted at 257.
    counts = torch.zeros(*values.shape[:2], 258, dtype=torch.int32, device=values.device)
    of_level = counts[:, :, 1:]
    of_level.scatter_add_(2, values, number(1, torch.int32, values.device).expand_as(values))
    # Of all that is there: a GPU would copy a part before it sums.
    below = torch.cumsum(counts, 2, dtype=torch.int32)[:, :, :256]
    # The largest value that occurs is left out of the step: it becomes 255 whatever its share is.
    last = of_level.gather(2, torch.maximum(high, left).unsqueeze(2))
    half, step, stays = F.embedding(last, _equalize_steps(pixels, values.device)).unbind(3)
    # Whole numbers that a float holds: rounding a quotient never lifts it to the next whole number.
    return torch.div(below + half, step, rounding_mode="trunc").to(torch.float32), stays.to(torch.float32)


@kept
def _equalize_steps(pixels: int, device: torch.device) -> Tensor:
    """For each count of the largest value: half a step, the step, and whether levels stay: (pixels + 1, 3).

    They stay where the step is 0, as they do at count 0; the step is infinite there, so that nothing is added.
    """
    step = (pixels - torch.arange(pixels + 1)) // 255
    step[0] = 0
    stays = step == 0
    columns = step // 2, torch.where(stays, torch.inf, step), stays
    return torch.stack([column.to(whole_numbers(2 * pixels)) for column in columns], dim=1).to(device)


@kept
def _luma_weights(device: torch.device) -> Tensor:
    return torch.tensor([0.2989, 0.587, 0.114], device=device).view(3, 1, 1)


def luma(images: Tensor) -> Tensor:
    """0.2989 R + 0.587 G + 0.114 B, truncated: whole float32 (N, 1, H, W)."""
    # uint8 times float32 is slower than converting first.
    red, green, blue = (images.to(torch.float32) * _luma_weights(images.device)).split(1, dim=1)
    return (red + green).add_(blue).trunc_()


def mean_level(grey: Tensor) -> Tensor:
    """The mean of each image of `luma`'s: float32 (N, 1, 1).

    It is exact; torchvision's is too up to 256x256 pixels, beyond which its float32 sum can be a level off.
    """
    pixels = grey.shape[2] * grey.shape[3]
    total = grey.flatten(2).sum(2, keepdim=True, dtype=whole_numbers(255 * pixels))
    return (total / as_divisor(pixels, total)).to(torch.float32)


def grey(images: Tensor) -> Tensor:
    """`luma` as uint8 (N, 1, H, W)."""
    return luma(images).to(torch.uint8)


def saturate(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey version by `factor` (N,), >= 0: 0 is grey, 1 changes nothing."""
    share, rest = _rows(factor).unsqueeze(3), _rows(1 - factor).unsqueeze(3)
    return _to_uint8((images.to(torch.float32) * share).add_(rest * luma(images)))


def blurred(pixels: Tensor) -> Tensor:
    """The 3x3 mean in which the centre counts five times, rounded; the border is not blurred.

    pixels: whole float32 (N, 3, H, W), of three pixels or more in both directions.
    """
    centre = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    out = pixels.clone()
    total = sums_of_nine(pixels).add_(pixels[centre], alpha=4)
    # A sum over 13 is never halfway between two values, so this rounds as any exact convolution does.
    torch.round(total / 13, out=out[centre])
    return out


def sums_of_nine(pixels: Tensor) -> Tensor:
    """The sum of each 3x3 square of whole float32 (N, C, H, W): (N, C, H - 2, W - 2)."""
    if pixels.device.type != "cpu":
        return F.avg_pool2d(pixels, 3, stride=1, divisor_override=1)
    # A CPU takes a tenth of the time of pooling for the same sums.
    rows = (pixels[:, :, :, :-2] + pixels[:, :, :, 1:-1]).add_(pixels[:, :, :, 2:])
    return (rows[:, :, :-2] + rows[:, :, 1:-1]).add_(rows[:, :, 2:])


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur by a Gaussian of standard deviation `sigma` (N,) pixels, cut off `radius` pixels from its centre.

    The image is mirrored at its border (the border row itself is not repeated), so `radius` is cut to the image's
    shorter side - 1. Two batched matrix products with banded weights, one a direction.
    """
    height, width = images.shape[2:]
    radius = min(radius, height - 1, width - 1)
    planes = F.pad(images.to(torch.float32, memory_format=torch.contiguous_format), (radius,) * 4, mode="reflect")
    rows = torch.matmul(planes, _gaussian_band(sigma, radius, width).unsqueeze(1).transpose(2, 3))
    out = torch.matmul(_gaussian_band(sigma, radius, height).unsqueeze(1), rows)
    return out.round_().clamp_(0, 255).to(torch.uint8)


def _gaussian_band(sigma: Tensor, radius: int, length: int) -> Tensor:
    """float32 (N, length, length + 2 * radius): how much each padded position gives to each output, rows sum to 1."""
    padded = torch.arange(length + 2 * radius, device=sigma.device)
    offset = padded - radius - torch.arange(length, device=sigma.device).view(-1, 1)
    weights = torch.exp(-0.5 * (offset / _rows(sigma)) ** 2) * (offset.abs() <= radius)
    return weights / weights.sum(2, keepdim=True)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of every pixel by `shift` (N,) of a full circle, in [-0.5, 0.5]."""
    pixels = images.to(torch.float32)
    pixels = pixels / as_divisor(255, pixels)
    red, green, blue = pixels.unbind(1)
    value, low = pixels.amax(1), pixels.amin(1)
    chroma = value - low
    grey_pixel = chroma == 0
    saturation = chroma / torch.where(grey_pixel, 1.0, value)
    divisor = torch.where(grey_pixel, 1.0, chroma)
    from_red, from_green, from_blue = ((value - channel) / divisor for channel in (red, green, blue))
    sixth = torch.where(
        value == red,
        from_blue - from_green,
        torch.where(value == green, 2.0 + from_red - from_blue, 4.0 + from_green - from_red),
    )
    hue = torch.fmod(sixth / as_divisor(6, sixth) + 1.0, 1.0)
    hue = torch.remainder(hue + shift.to(torch.float32).view(-1, 1, 1), 1.0)
    return (_hsv_to_rgb(hue, saturation, value) * (256.0 - 1e-3)).to(torch.uint8)


def _hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """float32 (N, H, W) each in 0..1 to (N, 3, H, W); each channel falls from `value` with its distance to the hue."""
    sector = torch.floor(hue * 6.0)
    part = hue * 6.0 - sector
    sector = sector.to(torch.int64) % 6
    low = (value * (1.0 - saturation)).clamp_(0.0, 1.0)
    falling = (value * (1.0 - saturation * part)).clamp_(0.0, 1.0)
    rising = (value * (1.0 - saturation * (1.0 - part))).clamp_(0.0, 1.0)
    shades = torch.stack((value, falling, low, rising), dim=1)
    # In each sixth of the circle every channel is one of the four shades; green runs two sixths after red, blue four.
    channels = [_shade(sector, behind) for behind in (0, 2, 4)]
    return shades.gather(1, torch.stack(channels, dim=1))


def _shade(sector: Tensor, behind: int) -> Tensor:
    """Which of (value, falling, low, rising) a channel takes in each sector: int64, of `sector`'s shape."""
    turned = (sector - behind) % 6
    # Red over the six sectors: value, falling, low, low, rising, value.
    return torch.where(turned == 1, 1, torch.where((turned == 2) | (turned == 3), 2, torch.where(turned == 4, 3, 0)))


def _rows(parameter: Tensor) -> Tensor:
    """A parameter an image (N,) as float32 (N, 1, 1), to meet tables. 1 - factor is taken before it is rounded."""
    return parameter.to(torch.float32).view(-1, 1, 1)


def _to_uint8(values: Tensor) -> Tensor:
    """Clamped to 0..255 and truncated."""
    return values.clamp_(0, 255).to(torch.uint8)
