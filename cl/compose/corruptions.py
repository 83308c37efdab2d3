"""The fifteen corruptions of CIFAR-C at severities 1 to 5, on whole batches of images.

Hendrycks & Dietterich 2019, arXiv 1903.12261, section 4. The parameters are those of the authors' CIFAR script
(hendrycks/robustness, make_cifar_c.py), in pixels of a 32 x 32 image except where a comment says otherwise.

A corrupted image is a pure function of (pixels, kind, severity, seed), bit for bit. It depends neither on the batch,
nor on the image's position in it, nor on the number of threads. For this,

- random numbers are a hash of the image and a counter; normals and Poisson counts are looked up by quantile;
- sums run in a fixed order, or over numbers of so few bits that a sum in float64 has no rounding.

So two images with the same pixels are corrupted in the same way. Differences from the authors' script:

- values are rounded to the nearest level, where the script drops the fraction (half a level darker);
- `frost` overlays a fractal texture with the brightness, contrast and tint of the script's photographs of ice, which
  may not be shipped with this package; it has neither their needles nor their large structures;
- `glass_blur` is one parallel look-up a pass. The script intends to swap neighbours, but its swap of array views copies
  one way only, and its scan never reads a pixel that it has written: the look-up gives the same image;
- `elastic_transform` and `motion_blur` sample without the intermediate rounding to 1/32 pixel and to 8 bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cl.errors import InputError, unknown
from cl.random import derive

_BLOCK = {"cpu": 2**18}  # values corrupted at a time, by device, else 2^24: affects only speed and memory
_GOLDEN = -7046029254386353131  # 2^64 over the golden ratio as int64: the step of splitmix64


def check_corruption(kind: str, severity: int) -> None:
    """Refuse a kind or severity that does not exist."""
    if kind not in _KINDS:
        raise unknown("corruption", kind, CORRUPTIONS)
    if severity not in range(1, 6):
        raise InputError(f"severity={severity} of {kind} is not in 1..5: choose one of these.")


def corrupt(x: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt images as CIFAR-C does (Hendrycks & Dietterich 2019, section 4).

    Args:
        x: Images, uint8 (N, C, H, W), grey (C=1) or RGB (C=3), H and W at least 8; they are not changed.
        kind: One of `CORRUPTIONS`.
        severity: 1 to 5, on the authors' scale. For elastic_transform, a higher severity moves the whole image less
            and neighbouring pixels more.
        seed: 0 or more. Seed, pixels, kind and severity determine every random number. The kinds defocus_blur,
            zoom_blur, brightness, contrast, pixelate and jpeg_compression draw none.

    Returns:
        New images of the same shape, type and device.

    Raises:
        InputError: If the images, the kind, the severity or the seed are outside these ranges.

    Example:
        >>> x = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
        >>> corrupt(x, "brightness", severity=2).unique().tolist()
        [126]
        >>> corrupt(x, "fog", 3)[:1].equal(corrupt(x[:1], "fog", 3))
        True
    """
    check_corruption(kind, severity)
    if seed < 0:
        raise InputError(f"seed={seed} of {kind} is negative: give 0 or more.")
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 8:
        raise InputError(
            f"{kind} was given {x.dtype} of shape {tuple(x.shape)}: "
            "give uint8 images (N, C, H, W) with 1 or 3 channels, at least 8 pixels high and wide."
        )
    function, parameters = _KINDS[kind]
    draw_seed = derive(seed, kind, severity)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = max(1, _BLOCK.get(x.device.type, 2**24) // x.shape[1:].numel())
    for start in range(0, len(x), rows):
        block = x[start : start + rows].contiguous()
        changed = function(block.float(), _Draws(block, draw_seed), *parameters[severity - 1])
        out[start : start + rows] = changed.round().clamp(0, 255)
    return out


class _Draws:
    """Random numbers of each image: splitmix64 (Steele et al. 2014, section 5), started at a hash of the image."""

    def __init__(self, x: Tensor, seed: int) -> None:
        self.x, self.seed, self.used = x, seed, 0

    @cached_property
    def key(self) -> Tensor:
        """A hash of the pixels and the seed, int64 (N,): the sum of odd multiples of the pixels modulo 2^64."""
        pixels = self.x.flatten(1).long()
        weight = _mix(torch.arange(1, pixels.shape[1] + 1, device=self.x.device) * _GOLDEN) | 1
        return _mix((pixels * weight).sum(1) + self.seed)

    def bits(self, *shape: int) -> Tensor:
        """Integers uniform on 0..65535, int32 (N, *shape); each call continues the sequence of the last one."""
        count = math.prod(shape)
        step = torch.arange(self.used + 1, self.used + 1 + -(-count // 4), device=self.x.device) * _GOLDEN
        self.used += len(step)
        word = _mix(self.key[:, None] + step).view(torch.int16)[:, :count]
        return (word.int() & 0xFFFF).reshape(-1, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers uniform on (0, 1), multiples of 2^-17, float32 (N, *shape)."""
        return (self.bits(*shape) + 0.5) / 2**16

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, multiples of 2^-12 in (-4.4, 4.4), float32 (N, *shape)."""
        bits = self.bits(*shape)
        return _normal_quantiles().to(bits.device).index_select(0, bits.flatten()).view_as(bits)


def _mix(z: Tensor) -> Tensor:
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor  # the mask makes the shift a logical one
    return z ^ (z >> 31 & (1 << 33) - 1)


@lru_cache
def _normal_quantiles() -> Tensor:
    z: Tensor = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    return (z / z.square().mean().sqrt() * 2**12).round().div(2**12).float()


# Linear maps of rows and columns. Entries are multiples of 2^-18, so that products and sums are exact in float64.


def _separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return `rows @ x @ columns.T`, float64."""
    return rows.to(x.device) @ x.double() @ columns.to(x.device).T


def _fixed(matrix: Tensor) -> Tensor:
    return (matrix.double() * 2**18).round() / 2**18


def _linear_matrix(position: Tensor, size: int) -> Tensor:
    """Return the matrix that interpolates `size` samples linearly at given positions, (len(position), size)."""
    return _fixed((1 - (position[:, None] - torch.arange(size)).abs()).clamp(min=0))


def _zoom_matrices(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return the matrices, for rows and for columns, that enlarge the middle of an image to the whole."""
    rows, columns = (
        _zoom_matrix(size, math.ceil(size / factor), round(math.ceil(size / factor) * factor)) for size in x.shape[2:]
    )
    return rows, columns


@lru_cache(maxsize=256)
def _zoom_matrix(size: int, crop: int, zoomed: int) -> Tensor:
    """Return the matrix that crops the middle, enlarges it with aligned corner pixels, and crops the middle again."""
    row = torch.arange(size, dtype=torch.float64) + (zoomed - size) // 2
    return _linear_matrix((size - crop) // 2 + row * ((crop - 1) / (zoomed - 1)), size)


@lru_cache(maxsize=256)
def _gaussian_matrix(size: int, sigma: float, truncate: float) -> Tensor:
    """Return the matrix of a Gaussian blur, mirrored at the edge (d c b a | a b c d)."""
    radius = int(truncate * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1)
    weight = torch.exp(-0.5 * (offset.double() / sigma) ** 2)
    index = (torch.arange(size)[:, None] + offset) % (2 * size)
    index = torch.minimum(index, 2 * size - 1 - index)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return _fixed(matrix.scatter_add_(1, index, (weight / weight.sum()).expand(size, -1)))


# Noise


def _gaussian_noise(x: Tensor, draw: _Draws, scale: float) -> Tensor:
    return x + 255 * scale * draw.normal(*x.shape[1:])


def _shot_noise(x: Tensor, draw: _Draws, photons: int) -> Tensor:
    """Replace pixels by Poisson counts, drawn by inversion; `photons` is the mean for white and the largest count.

    All pixel values share one sorted table of quantiles.
    """
    table = _poisson_quantiles(photons).to(x.device)
    level = x.int()
    count = torch.searchsorted(table.flatten(), level * 2**16 + draw.bits(*x.shape[1:]), right=True, out_int32=True)
    return (count - level * table.shape[1]) * 255 / photons


@lru_cache
def _poisson_quantiles(photons: int) -> Tensor:
    """Return the first of 2^16 quantiles at which a count exceeds k, plus 2^16 times the pixel, (256, photons)."""
    level, count = torch.arange(256)[:, None], torch.arange(photons)
    cdf: Tensor = torch.special.gammaincc(count + 1.0, level.double() * photons / 255)
    return ((cdf * 2**16 - 0.5).ceil() + level * 2**16).int()


def _impulse_noise(x: Tensor, draw: _Draws, amount: float) -> Tensor:
    u = draw.uniform(*x.shape[1:])
    return torch.where(u < amount, 255 * (u < amount / 2), x)


# Blur


def _defocus_blur(x: Tensor, draw: _Draws, radius: float, alias: float) -> Tensor:
    kernel, (height, width) = _disk(radius, alias), x.shape[2:]
    padded, out = F.pad(x, (2, 2, 2, 2), mode="reflect"), torch.zeros_like(x)
    for i, j in (kernel > 1e-6).nonzero().tolist():
        out += padded[..., i : i + height, j : j + width] * float(kernel[i, j])
    return out


def _disk(radius: float, alias: float) -> Tensor:
    """Return a disk of at most 3 x 3 pixels, blurred by a 3 x 3 Gaussian, (5, 5)."""
    square = torch.arange(-2, 3, dtype=torch.float64) ** 2
    disk = (square[:, None] + square <= radius**2).double()
    edge = torch.exp(-0.5 * square[1:4] / alias**2)
    smooth = F.conv2d(disk[None, None], torch.outer(edge, edge)[None, None], padding=1)[0, 0]
    return smooth / smooth.sum()


def _glass_blur(x: Tensor, draw: _Draws, sigma: float, passes: int) -> Tensor:
    height, width = x.shape[2:]
    rows, columns = _gaussian_matrix(height, sigma, 4), _gaussian_matrix(width, sigma, 4)
    x = _separable(x, rows, columns).round()
    position = torch.arange(height * width, device=x.device).view(height, width)
    inner = (position >= 2 * width) & (position % width >= 2)  # the script does not move the first two rows and columns
    for _ in range(passes):
        bits = draw.bits(height, width)
        x = _look_up(x, position - ((bits & 1) + (bits >> 1 & 1) * width) * inner)
    return _separable(x, rows, columns)


def _look_up(x: Tensor, index: Tensor) -> Tensor:
    """Gather pixels of (N, C, H, W) by their positions 0..HW-1, int64 (N, H, W)."""
    return x.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view_as(x)


def _motion_blur(x: Tensor, draw: _Draws, radius: int, sigma: float) -> Tensor:
    return _smear(x, draw.uniform(1, 1) * 90 - 45, radius, sigma)


def _smear(x: Tensor, degrees: Tensor, radius: int, sigma: float) -> Tensor:
    """Blur each image to one side of a direction (N, 1, 1), with half a Gaussian at whole pixels, as ImageMagick does.

    ImageMagick's kernel has 2 radius + 1 weights; those beyond 4 sigma, at most 1/3000 of the first, are left out here.
    """
    height, width = x.shape[2:]
    angle = degrees.double() * (math.pi / 180)  # no angle points to a boundary between two pixels
    weight = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(min(2 * radius, int(4 * sigma)) + 1)]
    row, column = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)
    out = torch.zeros_like(x)
    for i, w in enumerate(weight):
        down, right = ((i * part - 0.5).ceil().long() for part in (angle.sin(), angle.cos()))
        index = (row + down).clamp(0, height - 1) * width + (column + right).clamp(0, width - 1)
        out += _look_up(x, index) * (w / sum(weight))
    return out


def _zoom_blur(x: Tensor, draw: _Draws, stop: float) -> Tensor:
    factors = np.arange(1, stop, 0.01).tolist()
    total = x = x.double()
    for (rows, columns), count in Counter(_zoom_matrices(x, factor) for factor in factors).items():
        total = total + count * _separable(x, rows, columns)  # the cached matrices of near factors are the same
    return total / (len(factors) + 1)


# Weather


def _snow(
    x: Tensor,
    draw: _Draws,
    mean: float,
    std: float,
    zoom: float,
    threshold: float,
    radius: int,
    sigma: float,
    keep: float,
) -> Tensor:
    height, width = x.shape[2:]
    flakes = _separable(draw.normal(1, height, width), *_zoom_matrices(x, zoom))
    flakes = (mean + std * flakes).float()
    flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
    flakes = _smear(flakes, draw.uniform(1, 1) * 90 - 135, radius, sigma)
    white = torch.maximum(x, _luma(x) * 1.5 + 127.5)
    return keep * x + (1 - keep) * white + 255 * (flakes + flakes.flip(2, 3))


def _luma(x: Tensor) -> Tensor:
    return x if x.shape[1] == 1 else 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def _frost(x: Tensor, draw: _Draws, keep: float, weight: float) -> Tensor:
    brightness = 95 + 135 * draw.uniform(1, 1, 1)
    crystal = 1 - (2 * _plasma(draw, x.shape[2:], 1.1) - 1).abs()
    ice = brightness + 110 * (crystal - 0.7)
    if x.shape[1] == 3:  # the photographs' red, green and blue as linear functions of their mean
        slope, base = ice.new_tensor([[1.19, 0.93, 0.88], [-48, 15, 33]]).view(2, 3, 1, 1)
        ice = slope * ice + base
    return keep * x + weight * ice


def _fog(x: Tensor, draw: _Draws, amount: float, decay: float) -> Tensor:
    top = x.amax((1, 2, 3), keepdim=True)
    return (x + 255 * amount * _plasma(draw, x.shape[2:], decay)) * top / (top + 255 * amount)


def _plasma(draw: _Draws, shape: Sequence[int], decay: float) -> Tensor:
    """Return a diamond-square fractal on a torus, scaled to [0, 1], float32 (N, 1, H, W).

    The noise is divided by decay^2 at each level.
    """
    size = 1 << (max(shape) - 1).bit_length()
    noise = draw.uniform(size, size) * 2 - 1
    plasma, step = torch.zeros_like(noise), size
    while step > 1:
        half = step // 2
        corner, centre = plasma[:, ::step, ::step], plasma[:, half::step, half::step]
        pair = corner + corner.roll(-1, 1)
        centre.copy_((pair + pair.roll(-1, 2)) / 4 + noise[:, half::step, half::step])
        above = corner + corner.roll(-1, 2) + centre + centre.roll(1, 1)
        plasma[:, ::step, half::step] = above / 4 + noise[:, ::step, half::step]
        beside = corner + corner.roll(-1, 1) + centre + centre.roll(1, 2)
        plasma[:, half::step, ::step] = beside / 4 + noise[:, half::step, ::step]
        noise, step = noise / decay**2, half
    low, high = plasma.amin((1, 2), keepdim=True), plasma.amax((1, 2), keepdim=True)
    return ((plasma - low) / (high - low))[:, None, : shape[0], : shape[1]]


# Colour, geometry and coding


def _brightness(x: Tensor, draw: _Draws, amount: float) -> Tensor:
    """Add to V in HSV: with the same hue and saturation, R, G and B are proportional to V."""
    value = x.amax(1, keepdim=True)
    brighter = (value + 255 * amount).clamp(max=255)
    return torch.where(value > 0, x * brighter / value.clamp(min=1), brighter)


def _contrast(x: Tensor, draw: _Draws, factor: float) -> Tensor:
    mean = x.double().sum((2, 3), keepdim=True) / math.prod(x.shape[2:])
    return (x - mean) * factor + mean


def _elastic_transform(x: Tensor, draw: _Draws, amplitude: float, sigma: float, affine: float) -> Tensor:
    """Move three points of the image at random, then every pixel by smoothed noise.

    Amplitude, sigma and affine are in units of the image's shorter side.
    """
    height, width = x.shape[2:]
    side, arm = min(height, width), min(height, width) // 3
    middle = torch.tensor([width // 2, height // 2], device=x.device)
    point = middle + torch.tensor([[arm, arm], [arm, -arm], [-arm, -arm]], device=x.device)
    moved = point + (draw.uniform(3, 2) * 2 - 1) * (affine * side)
    (ax, ay), (bx, by) = ((moved[:, i] - moved[:, i + 1]).T[..., None, None] for i in (0, 1))
    row, column = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)
    right, down = column - moved[:, 1, :1, None], row - moved[:, 1, 1:, None]
    # a pixel's coordinates in the moved frame (a, b), times two arms, are its position in the original image
    area = (ax * by - ay * bx) / (2 * arm)
    source_x = point[1, 0] + (ax * down - ay * right) / area
    source_y = point[1, 1] + (right * by - down * bx) / area
    x = _sample(x, source_y, source_x)
    if amplitude == 0:
        return x
    rows, columns = _gaussian_matrix(height, sigma * side, 3), _gaussian_matrix(width, sigma * side, 3)
    shift = amplitude * side * _separable(draw.uniform(2, height, width) * 2 - 1, rows, columns).float()
    return _sample(x, row + shift[:, 0], column + shift[:, 1])


def _sample(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Interpolate linearly at positions (N, H, W), mirrored at the edge pixels (c b | a b c)."""
    height, width = x.shape[2:]
    row = (height - 1 - (height - 1 - row.abs()).abs()).clamp(min=0)
    column = (width - 1 - (width - 1 - column.abs()).abs()).clamp(min=0)
    top, left = row.floor().clamp(max=height - 2), column.floor().clamp(max=width - 2)
    down, right = (row - top)[:, None], (column - left)[:, None]
    index = top.long() * width + left.long()
    pixel = [_look_up(x, index + offset) for offset in (0, 1, width, width + 1)]
    upper, lower = (a + (b - a) * right for a, b in (pixel[:2], pixel[2:]))
    return upper + (lower - upper) * down


def _pixelate(x: Tensor, draw: _Draws, scale: float) -> Tensor:
    """Resize by Pillow's box filter to a smaller size and back, rounded after each axis.

    At these scales each pixel of the small image is the mean of one or two whole pixels.
    """
    for axis in (3, 2):
        size, small = x.shape[axis], int(x.shape[axis] * scale)
        edge = (2 * size * torch.arange(small + 1) + small) // (2 * small)
        cell = (2 * torch.arange(size) + 1) * small // (2 * size)  # of the small image, over each pixel
        first, last = (index[cell].to(x.device) for index in (edge[:-1], edge[1:] - 1))
        x = ((x.index_select(axis, first) + x.index_select(axis, last) + 1) / 2).floor()
    return x


# JPEG (ITU-T T.81, annex K), as libjpeg implements it


_LUMINANCE = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"
)
_CHROMINANCE = "17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66" + " 99" * 38


def _jpeg_compression(x: Tensor, draw: _Draws, quality: int) -> Tensor:
    """Encode and decode with chroma at half resolution (4:2:0); entropy coding, which is lossless, is left out."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % 16, 0, -height % 16), mode="replicate")
    y = _luma(x)
    luma = _code_blocks(y.round(), _LUMINANCE, quality)[..., :height, :width]
    if x.shape[1] == 1:
        return luma
    chroma = torch.cat([(x[:, 2:] - y) / 1.772, (x[:, :1] - y) / 1.402], 1).round() + 128
    total = F.avg_pool2d(chroma, 2, divisor_override=1)
    chroma = (total + 1 + torch.arange(total.shape[3], device=x.device) % 2).div(4).floor()  # halves go up in turn
    chroma = _code_blocks(chroma, _CHROMINANCE, quality)[..., : -(-height // 2), : -(-width // 2)]
    rows, columns = _double_matrix(height), _double_matrix(width)
    odd = torch.arange(width, device=x.device) % 2
    cb, cr = (_separable(chroma, rows, columns) + (8 - odd) / 16).floor().sub(128).split(1, 1)
    return torch.cat([luma + 1.402 * cr, luma - (0.344136 * cb + 0.714136 * cr), luma + 1.772 * cb], 1)


def _double_matrix(size: int) -> Tensor:
    """Return the matrix that doubles a side to `size` pixels, each 3/4 of the nearest pixel and 1/4 of the next."""
    half = (size + 1) // 2
    return _linear_matrix((torch.arange(size) / 2 - 0.25).clamp(0, half - 1), half)


def _code_blocks(x: Tensor, table: str, quality: int) -> Tensor:
    """Quantise the cosine transform of each block of 8 x 8 pixels of (N, K, H, W) and transform back, to 0..255."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    step = x.new_tensor([(int(entry) * scale + 50) // 100 for entry in table.split()]).clamp(1, 255).view(8, 8)
    k = torch.arange(8, dtype=torch.float64)
    cosine = torch.cos(torch.outer(k, 2 * k + 1) * (math.pi / 16)) / 2
    cosine[0] /= 2**0.5
    cosine = _fixed(cosine)
    blocks = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4) - 128
    coefficient = (8 * _separable(blocks, cosine, cosine)).round()  # libjpeg's precision; halves go up below
    coefficient = coefficient.sign() * ((coefficient.abs() + 4 * step) / (8 * step)).floor() * step
    blocks = _separable(coefficient, cosine.T, cosine.T) + 128
    return blocks.transpose(3, 4).reshape(x.shape).round().clamp(0, 255)


_KINDS: dict[str, tuple[Callable[..., Tensor], Sequence[tuple[float, ...]]]] = {
    "gaussian_noise": (_gaussian_noise, [(0.04,), (0.06,), (0.08,), (0.09,), (0.10,)]),
    "shot_noise": (_shot_noise, [(500,), (250,), (100,), (75,), (50,)]),
    "impulse_noise": (_impulse_noise, [(0.01,), (0.02,), (0.03,), (0.05,), (0.07,)]),
    "defocus_blur": (_defocus_blur, [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)]),
    "glass_blur": (_glass_blur, [(0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)]),
    "motion_blur": (_motion_blur, [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)]),
    "zoom_blur": (_zoom_blur, [(1.06,), (1.11,), (1.16,), (1.21,), (1.26,)]),
    "snow": (
        _snow,
        [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
    ),
    "frost": (_frost, [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)]),
    "fog": (_fog, [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)]),
    "brightness": (_brightness, [(0.05,), (0.1,), (0.15,), (0.2,), (0.3,)]),
    "contrast": (_contrast, [(0.75,), (0.5,), (0.4,), (0.3,), (0.15,)]),
    "elastic_transform": (
        _elastic_transform,
        [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
    ),
    "pixelate": (_pixelate, [(0.95,), (0.9,), (0.85,), (0.75,), (0.65,)]),
    "jpeg_compression": (_jpeg_compression, [(80,), (65,), (58,), (50,), (40,)]),
}

# The names of three kinds of noise, four of blur, four of weather, and four of colour, geometry and coding.
CORRUPTIONS: tuple[str, ...] = tuple(_KINDS)
