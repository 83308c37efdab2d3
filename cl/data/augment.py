"""From raw batches to network inputs, on the device: random crops, flips and colours, then normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from cl.errors import InputError
from cl.ranges import checked


@checked
class RandomCropFlip(nn.Module):
    """Pad images with zeros, crop each at a random position to its old size, flip half of them (He et al. 2016, 4.2).

    One gather for the whole batch: out[b, c, i, j] = padded[b, c, i + dy_b, k + dx_b], where dy_b and dx_b are uniform
    on 0..2*padding and k is j, or W - 1 - j with probability 1/2.

    Args:
        padding: Pixels of zeros added on every side; 0 does not shift images.
        flip: Whether to flip left and right.

    Raises:
        InputError: If `padding` is negative; in `forward`, if the inputs are not images (B, C, H, W).

    Example:
        >>> x = torch.arange(2, dtype=torch.uint8).expand(4, 1, 2, 2)
        >>> RandomCropFlip(padding=0)(x, np.random.default_rng(0))[:, 0, 0].tolist()
        [[1, 0], [1, 0], [1, 0], [0, 1]]
    """

    def __init__(self, padding: Annotated[int, Ge(0)] = 4, flip: bool = True) -> None:
        super().__init__()
        self.padding, self.flip = padding, flip

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"padding={self.padding}, flip={self.flip}"

    def forward(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """Return images (B, C, H, W) of the same shape and type; every image takes three draws from `rng`."""
        if x.ndim != 4:
            raise InputError(f"RandomCropFlip needs images (B, C, H, W), not {tuple(x.shape)}: set augment=null.")
        batch, channels, height, width = x.shape
        draw = rng.random((3, batch))
        moves = torch.from_numpy((draw * [[2 * self.padding + 1], [2 * self.padding + 1], [2]]).astype(np.int64))
        dy, dx, mirror = moves.to(x.device, non_blocking=True)[:, :, None]
        rows = torch.arange(height, device=x.device) + dy  # (B, H)
        columns = torch.arange(width, device=x.device).expand(batch, width)
        if self.flip:
            columns = torch.where(mirror == 1, width - 1 - columns, columns)
        index = rows[:, :, None] * (width + 2 * self.padding) + (columns + dx)[:, None, :]  # (B, H, W)
        padded = F.pad(x, (self.padding,) * 4).flatten(2)
        return padded.gather(2, index.view(batch, 1, -1).expand(-1, channels, -1)).view(x.shape)


@checked
class ContrastiveView(nn.Module):
    r"""Crop a random part of each image and resize it, mirror half of the images, and jitter their colours.

    As in SimCLR (Chen et al. 2020, appendix A). The crop's share of the area is uniform on [scale, 1] and its aspect
    ratio is log-uniform on [3/4, 4/3]; a side longer than the image's is cut to it. Four images in five are jittered:
    brightness, contrast and saturation are multiplied by factors uniform on [1 - jitter, 1 + jitter], and the hue is
    turned by up to jitter / 4 of the colour circle, in the YIQ space. These four changes come in this fixed order. One
    image in five becomes grey. Only images of three channels change in saturation and hue or become grey.

    Args:
        scale: Smallest share of the area that a crop covers, in (0, 1].
        flip: Whether to flip left and right.
        jitter: Strength of the changes in colour, in [0, 1]; 0 changes no colour and makes no image grey.

    Raises:
        InputError: If an argument is out of range.

    Example:
        >>> x = torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)
        >>> ContrastiveView(jitter=0.0)(x, np.random.default_rng(0)).mean()
        tensor(0.2000)
    """

    def __init__(
        self,
        scale: Annotated[float, Interval(gt=0, le=1)] = 0.2,
        flip: bool = True,
        jitter: Annotated[float, Interval(ge=0, le=1)] = 0.4,
    ) -> None:
        super().__init__()
        self.scale, self.flip, self.jitter = scale, flip, jitter

    def forward(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """Return images (B, C, H, W) as new floats, bytes scaled to [0, 1]; every image takes eleven draws."""
        draw = rng.random((11, len(x)))
        images = x.float() / 255 if x.dtype == torch.uint8 else x
        crop = torch.from_numpy(self._crop(draw[:5])).to(images, non_blocking=True)
        grid = F.affine_grid(crop, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        if self.jitter:
            images = self._colours(images, torch.from_numpy(draw[5:]).to(images, non_blocking=True))
        return images.clamp(0, 1) if x.dtype == torch.uint8 else images

    def _crop(self, draw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return affine maps (B, 2, 3) from positions in the crop to positions in the image, both in [-1, 1]."""
        area, ratio = self.scale + (1 - self.scale) * draw[0], (4 / 3) ** (2 * draw[1] - 1)
        width, height = (np.minimum(np.sqrt(area * r), 1) for r in (ratio, 1 / ratio))
        mirror = np.where(draw[4] < 0.5, -1.0, 1.0) if self.flip else 1.0
        zero, across, down = np.zeros_like(area), (1 - width) * (2 * draw[2] - 1), (1 - height) * (2 * draw[3] - 1)
        return np.stack([np.stack([mirror * width, zero, across], 1), np.stack([zero, height, down], 1)], 1)

    def _colours(self, images: Tensor, draw: Tensor) -> Tensor:
        """Jitter the colours of images (B, C, H, W), each by its own column of draws (6, B)."""
        factor = (1 + self.jitter * (2 * draw[:3] - 1))[..., None, None, None]
        some, grey = (draw[4] < 0.8).view(-1, 1, 1, 1), (draw[5] < 0.2).view(-1, 1, 1, 1)
        coloured = images.shape[1] == 3
        changed = images * factor[0]
        middle = (_luma(changed) if coloured else changed).mean((1, 2, 3), keepdim=True)
        changed = middle + factor[1] * (changed - middle)
        if not coloured:
            return torch.where(some, changed, images)
        changed = _luma(changed) + factor[2] * (changed - _luma(changed))
        changed = torch.where(some, _turn_hue(changed, self.jitter / 4 * (2 * draw[3] - 1)), images)
        return torch.where(grey, _luma(changed).expand_as(changed), changed)


_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def _luma(images: Tensor) -> Tensor:
    """Return the brightness (B, 1, H, W) of coloured images."""
    return (images * images.new_tensor(_YIQ[0]).view(3, 1, 1)).sum(1, keepdim=True)


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of each image (B, 3, H, W) by a share of the colour circle (B,); the brightness stays."""
    yiq, angle = images.new_tensor(_YIQ), 2 * torch.pi * turn
    rotation = torch.eye(3, dtype=images.dtype, device=images.device).repeat(len(images), 1, 1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -angle.sin(), angle.sin()
    return torch.einsum("bij,bjhw->bihw", torch.linalg.inv(yiq) @ rotation @ yiq, images)


def to_floats(x: Tensor) -> Tensor:
    """Return floats: uint8 pixels divided by 255; other integers (tokens, counts) cast; floats as they are.

    Example:
        >>> to_floats(torch.tensor([51], dtype=torch.uint8)).item(), to_floats(torch.tensor([42])).item()
        (0.20000000298023224, 42.0)
    """
    if x.is_floating_point():
        return x
    return x.to(torch.float32).div_(255.0) if x.dtype == torch.uint8 else x.to(torch.float32)


class Normalize(nn.Module):
    """Subtract the mean and divide by the standard deviation of each channel; uint8 is divided by 255 first.

    Args:
        mean: One number for all channels, or one for each channel (axis 1); for images in units of [0, 1].
        std: One number for all channels, or one for each channel; above 0.

    Raises:
        InputError: If both have several numbers and not equally many, or an entry of `std` is not above 0.

    Example:
        >>> Normalize(mean=[0.5], std=[0.25])(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).tolist()
        [[[[-2.0, 2.0]]]]
    """

    scale: Tensor
    byte_scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        means, stds = (torch.tensor([float(v) for v in values], dtype=torch.float64) for values in (mean, std))
        if not bool((stds > 0).all()) or min(len(means), len(stds)) not in (1, max(len(means), len(stds))):
            raise InputError(f"mean={list(mean)}, std={list(std)}: give one positive std for each mean.")
        scale, shift = torch.broadcast_tensors(1 / stds, -means / stds)
        self.register_buffer("scale", scale.float(), persistent=False)
        self.register_buffer("shift", shift.float(), persistent=False)
        self.register_buffer("byte_scale", (scale / 255).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return raw inputs (B, C, ...) of any type as new floats of the same shape: (x - mean) / std."""
        scale, shift = self.byte_scale if x.dtype == torch.uint8 else self.scale, self.shift
        if len(shift) > 1:
            shape = (-1, *[1] * (x.ndim - 2))
            scale, shift = scale.view(shape), shift.view(shape)
        return (x * scale).add_(shift)
