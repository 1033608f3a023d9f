"""Moving pixels: pure functions of uint8 images (N, 3, H, W) and one parameter an image.

Crops and affine maps are one gather by a flat source position each; nothing is interpolated, so pixels stay uint8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlt.augment.constants import as_divisor, kept, number


def gather_pixels(images: Tensor, source: Tensor) -> Tensor:
    """out[n, c, i, j] = images[n, c] at flat position source[n, i, j].

    images: (N, C, H, W), any dtype. source: int64 (N, h, w), in [0, H*W). Returns contiguous (N, C, h, w).
    """
    n, channels = images.shape[:2]
    flat = source.flatten(1).unsqueeze(1).expand(n, channels, -1)
    return images.flatten(2).gather(2, flat).view(n, channels, *source.shape[1:])


def flip(images: Tensor) -> Tensor:
    """Mirror every image left to right. images: (N, C, H, W)."""
    return images.flip(-1)


def pad(images: Tensor, padding: int, fill: int) -> Tensor:
    """A border of `padding` pixels of the value `fill` on all four sides; contiguous (N, C, H + 2p, W + 2p)."""
    return F.pad(images.contiguous(), (padding,) * 4, value=fill)


def reflect(images: Tensor, border: int) -> Tensor:
    """A border of `border` pixels on all four sides, mirrored at the outermost ones; contiguous (N, C, H + 2b, W + 2b).

    border: smaller than the sides.
    """
    for dim in (2, 3):
        images = images.index_select(dim, _reflected(images.shape[dim], border, images.device))
    return images.contiguous()


@kept
def _reflected(side: int, border: int, device: torch.device) -> Tensor:
    """Which of `side` pixels each pixel of a bordered row shows: int64 (side + 2 border,)."""
    place = torch.arange(-border, side + border, device=device).abs()
    return torch.minimum(place, 2 * (side - 1) - place)


def crop(images: Tensor, corner: Tensor, size: int) -> Tensor:
    """The square of side `size` whose upper left pixel is at the flat position `corner` of each image.

    images: (N, C, H, W). corner: int64 (N,), top * W + left with top in [0, H - size], left in [0, W - size]. Returns
    contiguous (N, C, size, size).
    """
    return gather_pixels(images, corner.view(-1, 1, 1) + _square(size, images.shape[3], images.device))


@kept
def _square(size: int, width: int, device: torch.device) -> Tensor:
    """Flat positions of a square's pixels in an image of that width, from its corner: int64 (size, size)."""
    steps = torch.arange(size, device=device)
    return steps.view(-1, 1) * width + steps


def shear_x(magnitude: Tensor, height: int) -> Tensor:
    """Inverse maps of a shear along x about the image's upper left corner; `magnitude` is its slope, float64 (N,)."""
    return _matrices(magnitude, b=magnitude, tx=magnitude * (height / 2))


def shear_y(magnitude: Tensor, width: int) -> Tensor:
    """Inverse maps of a shear along y about the image's upper left corner; `magnitude` is its slope, float64 (N,)."""
    return _matrices(magnitude, c=magnitude, ty=magnitude * (width / 2))


def translate_x(pixels: Tensor) -> Tensor:
    """Inverse maps of a shift by `pixels` to the right, cut to a whole number towards 0; float64 (N,)."""
    return _matrices(pixels, tx=-pixels.trunc())


def translate_y(pixels: Tensor) -> Tensor:
    """Inverse maps of a shift by `pixels` downwards, cut to a whole number towards 0; float64 (N,)."""
    return _matrices(pixels, ty=-pixels.trunc())


def rotate(degrees: Tensor) -> Tensor:
    """Inverse maps of a counter-clockwise rotation about the image's centre; float64 (N,)."""
    angle = torch.deg2rad(degrees)
    return _matrices(degrees, a=angle.cos(), b=-angle.sin(), c=angle.sin(), d=angle.cos())


def _matrices(
    like: Tensor,
    a: Tensor | float = 1.0,
    b: Tensor | float = 0.0,
    tx: Tensor | float = 0.0,
    c: Tensor | float = 0.0,
    d: Tensor | float = 1.0,
    ty: Tensor | float = 0.0,
) -> Tensor:
    """float64 (N, 6): pixel (x, y), measured from the centre, is taken from (ax + by + tx, cx + dy + ty)."""
    return torch.stack([torch.as_tensor(v, dtype=like.dtype).expand_as(like) for v in (a, b, tx, c, d, ty)], dim=1)


def affine_sources(matrices: Tensor, height: int, width: int) -> Tensor:
    """Where inverse maps take each pixel from: the nearest one, as torchvision's affine does by default.

    matrices: (M, 6), see `_matrices`. Returns flat positions int64 (M, H * W), H * W for what lies outside
    of the image. The arithmetic is float32 in torchvision's order (coordinates in -1..1, then back to pixels), because
    whole rows lie on ties between two pixels at some magnitudes: another order of rounding would move them. torch's
    matrix product, which torchvision takes, fuses its rounding for images above some 64 pixels a side; there the two
    differ in pixels that lie within 1e-4 of such a tie: up to 1.2 % of an image at some shears, 0.01 % at rotations,
    none at translations.
    """
    a, b, tx, c, d, ty = matrices.to(torch.float32).unsqueeze(2).unsqueeze(3).unbind(1)
    half_width, half_height = as_divisor(0.5 * width, a), as_divisor(0.5 * height, a)
    x, y = _centred(width, a.device).view(1, 1, -1), _centred(height, a.device).view(1, -1, 1)
    column = _to_pixels(x * (a / half_width) + y * (b / half_width) + tx / half_width, width)
    row = _to_pixels(x * (c / half_height) + y * (d / half_height) + ty / half_height, height)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return torch.where(inside, row.long() * width + column.long(), height * width).flatten(1)


def rotate_nearest(images: Tensor, matrices: Tensor) -> Tensor:
    """Each pixel from the nearest one of the turned image; 0 from outside.

    images: uint8 (N, C, H, W). matrices: float32 (N, 6), of `rotate`. Returns a contiguous one.
    """
    return move(images, affine_sources(matrices, *images.shape[2:]))


def rotate_bilinear(images: Tensor, matrices: Tensor) -> Tensor:
    """As `rotate_nearest`, from the four nearest pixels by their distances, rounded to uint8."""
    n, _, height, width = images.shape
    half = _half_sizes(height, width, images.device)
    # In torchvision's order of operations, so that pixels equal its own.
    grid = _pixel_centres(height, width, images.device).expand(n, -1, -1)
    grid = grid.bmm(matrices.view(n, 2, 3).transpose(1, 2) / half).view(n, height, width, 2)
    floats = images.to(torch.float32, memory_format=torch.contiguous_format)
    turned = F.grid_sample(floats, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return turned.round_().to(torch.uint8)


@kept
def _half_sizes(height: int, width: int, device: torch.device) -> Tensor:
    """float32 (2,): half the width and half the height."""
    return torch.tensor([0.5 * width, 0.5 * height], device=device)


@kept
def _pixel_centres(height: int, width: int, device: torch.device) -> Tensor:
    """float32 (1, H * W, 3): x and y of every pixel from the centre, and 1."""
    y, x = torch.meshgrid(_centred(height, device), _centred(width, device), indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], dim=2).view(1, height * width, 3)


def move(images: Tensor, sources: Tensor) -> Tensor:
    """Each pixel from its place in `sources` (N, H * W), see `affine_sources`; 0 from outside.

    images: uint8 (N, C, H, W). Returns a contiguous one.
    """
    outside = number(0, images.dtype, images.device).expand(*images.shape[:2], 1)
    pixels = torch.cat((images.flatten(2), outside), dim=2)
    return pixels.gather(2, sources.unsqueeze(1).expand(-1, images.shape[1], -1)).view(images.shape)


@kept
def _centred(length: int, device: torch.device) -> Tensor:
    """Pixel centres measured from the middle: float32 (length,)."""
    return torch.arange(length, dtype=torch.float32, device=device) - (length - 1) / 2


def _to_pixels(position: Tensor, length: int) -> Tensor:
    """The nearest pixel, as a whole float32, to a position in -1..1 (half to even)."""
    return ((position + 1) * (length / 2) - 0.5).round_()


def resized_crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut each image's own box and resize it to (size, size): bilinear, antialiased, rounded to uint8.

    images: uint8 (N, C, H, W). boxes: int64 (N, 4) as (top, left, height, width), inside the image. The filter is a
    triangle whose half-width is max(1, box / size), normalised, as in torch's antialiased interpolation; it is applied
    as two batched matrix products, so shapes depend on nothing random.
    """
    top, left, height, width = boxes.unbind(1)
    vertical = _resize_weights(top, height, size, images.shape[2])
    horizontal = _resize_weights(left, width, size, images.shape[3])
    planes = images.to(torch.float32, memory_format=torch.contiguous_format)
    rows = torch.matmul(planes, horizontal.unsqueeze(1).transpose(2, 3))
    out = torch.matmul(vertical.unsqueeze(1), rows)
    return out.round_().clamp_(0, 255).to(torch.uint8)


def _resize_weights(start: Tensor, length: Tensor, size: int, full: int) -> Tensor:
    """float32 (N, size, full): how much each of the `full` source positions gives to each of the `size` outputs."""
    scale = (length.to(torch.float32) / size).view(-1, 1, 1)
    centre = scale * (torch.arange(size, device=start.device) + 0.5).view(1, -1, 1)
    position = (torch.arange(full, device=start.device) - start.view(-1, 1)).unsqueeze(1)
    inside = (position >= 0) & (position < length.view(-1, 1, 1))
    weights = (1 - ((position + 0.5 - centre) / scale.clamp(min=1)).abs()).clamp_(min=0) * inside
    return weights / weights.sum(2, keepdim=True)


# How a rotated image is read, by the name that a recipe gives.
ROTATIONS = {"nearest": rotate_nearest, "bilinear": rotate_bilinear}
