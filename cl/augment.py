"""From raw batches to network inputs, on the device: random crops and flips, then normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.errors import InputError


class RandomCropFlip(nn.Module):
    """Pad images with zeros, crop each at a random place to its old size and flip half of them (He et al. 2016, 4.2).

    One gather for the whole batch: out[b, c, i, j] = padded[b, c, i + dy_b, k + dx_b], where dy_b and dx_b are uniform
    on 0..2*padding and k is j, or W - 1 - j with probability 1/2.

    Args:
        padding: Pixels on every side; 0 leaves the place as it is.
        flip: Whether to flip left and right.

    Raises:
        InputError: If `padding` is negative, or later the inputs are no images.

    Example:
        >>> x = torch.arange(2, dtype=torch.uint8).expand(4, 1, 2, 2)
        >>> RandomCropFlip(padding=0)(x, np.random.default_rng(0))[:, 0, 0].tolist()
        [[1, 0], [1, 0], [1, 0], [0, 1]]
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        super().__init__()
        if padding < 0:
            raise InputError(f"padding={padding} of RandomCropFlip is negative: give 0 or more pixels.")
        self.padding, self.flip = padding, flip

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"padding={self.padding}, flip={self.flip}"

    def forward(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """Augment (B, C, H, W) of any type with three draws a row, whatever the settings; shape and type stay."""
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


class Normalize(nn.Module):
    """Subtract the mean and divide by the standard deviation of each channel; uint8 is divided by 255 first.

    Args:
        mean: One number for all channels or one a channel (axis 1); images in units of [0, 1].
        std: As `mean`; above 0.

    Raises:
        InputError: If the two differ in length or `std` is not above 0.

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
        """Map raw (B, C, ...) of uint8 or floats to new floats of the same shape: x * scale + shift."""
        scale, shift = self.scale if x.is_floating_point() else self.byte_scale, self.shift
        if len(shift) > 1:
            shape = (-1, *[1] * (x.ndim - 2))
            scale, shift = scale.view(shape), shift.view(shape)
        return (x * scale).add_(shift)
