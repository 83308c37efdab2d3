"""What a network with trained weights expects of its inputs: their size, and their mean and standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from cl.data.augment import Normalize, to_floats
from cl.errors import InputError, unknown
from cl.ranges import checked

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


class Resize(nn.Module):
    """Resize images to a square by interpolation, which averages over pixels where images shrink.

    Args:
        size: Height and width.
        interpolation: "bicubic", "bilinear" or "nearest"; the last does not average.

    Raises:
        InputError: If the interpolation is unknown; in `forward`, if the inputs are not images (B, C, H, W).

    Example:
        >>> import torch
        >>> Resize(4)(torch.ones(2, 1, 2, 2)).shape
        torch.Size([2, 1, 4, 4])
    """

    def __init__(self, size: int, interpolation: str = "bicubic") -> None:
        super().__init__()
        if interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", interpolation, INTERPOLATIONS)
        self.size, self.interpolation = size, interpolation

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"size={self.size}, interpolation={self.interpolation!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Return images (B, C, size, size); images of that size are returned as they are."""
        if x.ndim != 4:
            raise InputError(f"The network takes images (B, C, H, W), not {tuple(x.shape)}: choose another backbone.")
        if x.shape[2:] == (self.size, self.size):
            return x
        smooth = self.interpolation != "nearest"
        return F.interpolate(x, (self.size, self.size), mode=self.interpolation, antialias=smooth)


@checked
class Preprocess(nn.Module):
    """Resize images, and normalise each channel by the statistics with which a network was trained.

    Args:
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel.
        size: Height and width to resize to; None keeps the size.
        interpolation: "bicubic", "bilinear" or "nearest". The first two average over pixels where images shrink.

    Raises:
        InputError: If the interpolation is unknown, or from `Normalize`.

    Example:
        >>> import torch
        >>> Preprocess([0.5], [0.5], size=4)(torch.zeros(2, 1, 2, 2, dtype=torch.uint8)).unique().tolist()
        [-1.0]
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: Annotated[int, Ge(1)] | None = None,
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        self.resize = nn.Identity() if size is None else Resize(size, interpolation)
        self.normalize = Normalize(mean, std)
        self.mean, self.std = tuple(mean), tuple(std)

    def extra_repr(self) -> str:
        """Show the statistics."""
        return f"mean={self.mean}, std={self.std}"

    def forward(self, x: Tensor) -> Tensor:
        """Return normalised images (B, C, size, size) from images (B, C, H, W): bytes, or floats in [0, 1]."""
        return self.normalize(self.resize(to_floats(x)))  # type: ignore[no-any-return]
