"""Changing values: pure functions of uint8 images (N, 3, H, W) and one parameter an image.

Every operation that maps a channel's values by themselves is a table of 256 entries an image and channel, so that all
of them together are one gather. The tables are made with torchvision's arithmetic in float32 and its truncation to
uint8, which makes the results equal bit by bit to its functions on tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlt.augment.draws import as_divisor


def apply_tables(images: Tensor, tables: Tensor) -> Tensor:
    """out = tables[n, c, images[n, c, i, j]]. tables: uint8 (N, 3 or 1, 256). Returns contiguous uint8."""
    values = images.flatten(2).long()
    return tables.expand(-1, images.shape[1], -1).gather(2, values).view(images.shape)


def levels(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """0..255 as (1, 1, 256)."""
    return torch.arange(256, dtype=dtype, device=device).view(1, 1, 256)


def identity_table(count: int, device: torch.device) -> Tensor:
    """uint8 (count, 3, 256): every value stays."""
    return levels(device, torch.uint8).expand(count, 3, 256)


def brightness_table(factor: Tensor) -> Tensor:
    """Values times `factor` (N,), >= 0."""
    return _to_uint8(_rows(factor) * levels(factor.device))


def contrast_table(images: Tensor, factor: Tensor) -> Tensor:
    """Values blended with the mean of the image's grey version: 0 is flat grey, 1 changes nothing; (N,), >= 0.

    The mean is exact; torchvision's is too up to 256x256 pixels, beyond which its float32 sum can be a level off.
    """
    total = grey(images).flatten(1).sum(1, dtype=torch.float64)
    mean = total / as_divisor(images.shape[2] * images.shape[3], total)
    return _to_uint8(_rows(factor) * levels(images.device) + _rows(1 - factor) * _rows(mean))


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """`brightness_table`, applied."""
    return apply_tables(images, brightness_table(factor))


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """`contrast_table`, applied."""
    return apply_tables(images, contrast_table(images, factor))


def posterize_table(bits: Tensor) -> Tensor:
    """Only the upper `bits` (N,) of each value, 0..8."""
    dropped = (8 - bits.long()).clamp(0, 8).view(-1, 1, 1)
    return ((levels(bits.device, torch.int64) >> dropped) << dropped).to(torch.uint8)


def solarize_table(threshold: Tensor) -> Tensor:
    """Values from `threshold` (N,) on are inverted."""
    value = levels(threshold.device)
    return _to_uint8(torch.where(value >= _rows(threshold), 255 - value, value))


def invert_table(count: int, device: torch.device) -> Tensor:
    """255 - value."""
    return 255 - identity_table(count, device)


def autocontrast_table(images: Tensor) -> Tensor:
    """Stretch each channel so that its smallest value becomes 0 and its largest 255; flat channels stay."""
    flat = images.flatten(2)
    low, high = (v.to(torch.float32).unsqueeze(2) for v in (flat.amin(2), flat.amax(2)))
    is_flat = low == high
    scale = torch.where(is_flat, 1.0, 255 / (high - low))
    return _to_uint8((levels(images.device) - torch.where(is_flat, 0.0, low)) * scale)


def equalize_table(images: Tensor) -> Tensor:
    """Spread each channel's values so that their histogram becomes flat, in Pillow's integer arithmetic."""
    flat = images.flatten(2).long()
    one = torch.ones((), dtype=torch.int32, device=images.device)
    count = torch.zeros(*flat.shape[:2], 256, dtype=torch.int32, device=images.device)
    count.scatter_add_(2, flat, one.expand_as(flat))
    # The largest value that occurs is left out of the step: it becomes 255 whatever its share is.
    last = count.gather(2, flat.amax(2, keepdim=True))
    step = torch.div(flat.shape[2] - last, 255, rounding_mode="floor")
    rank = torch.cumsum(count, 2, dtype=torch.int32) - count
    table = torch.div(rank + step // 2, step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    # An entry counts the values below it, and the first stays 0; step 0 means too few pixels to spread.
    table[:, :, 0] = 0
    return torch.where(step == 0, levels(images.device, torch.int32), table).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """Luma 0.2989 R + 0.587 G + 0.114 B, truncated: uint8 (N, H, W)."""
    red, green, blue = images.to(torch.float32).unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).to(torch.uint8)


def saturate(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey version by `factor` (N,), >= 0: 0 is grey, 1 changes nothing."""
    return _blend(images, grey(images).unsqueeze(1), factor)


def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with a blurred version by `factor` (N,), >= 0: 0 is blurred, 1 changes nothing.

    The blur is the 3x3 mean in which the centre counts five times; the border is not blurred, nor are images of two
    pixels or less in either direction.
    """
    if min(images.shape[2:]) <= 2:
        return images
    wide = images.to(torch.int16)
    rows = wide[:, :, :, :-2] + wide[:, :, :, 1:-1] + wide[:, :, :, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    # A sum over 13 is never halfway between two values, so this rounds as any exact convolution does.
    blurred = images.to(torch.float32)
    blurred[:, :, 1:-1, 1:-1] = (total / 13).round_()
    return _blend(images, blurred, factor)


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


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * images + (1 - factor) * other, clamped and truncated to uint8."""
    rows, rest = factor.view(-1, 1, 1, 1), (1 - factor).view(-1, 1, 1, 1)
    # uint8 times float32 is slower than converting first.
    images, other = images.to(torch.float32), other.to(torch.float32)
    return _to_uint8(rows.to(torch.float32) * images + rest.to(torch.float32) * other)


def _rows(parameter: Tensor) -> Tensor:
    """A parameter an image (N,) as float32 (N, 1, 1), to meet tables. 1 - factor is taken before it is rounded."""
    return parameter.to(torch.float32).view(-1, 1, 1)


def _to_uint8(values: Tensor) -> Tensor:
    """Clamped to 0..255 and truncated."""
    return values.clamp_(0, 255).to(torch.uint8)
