"""The maps inside a convolutional network, and the distance of those of two networks after pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def features_and_maps(backbone: nn.Module, view: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the features (B, D) of prepared inputs, and the outputs (B, C, H, W) of the stages of a backbone.

    The stages of an `nn.Sequential`, such as `ResNet18`, are its parts that consist of several modules with a
    convolution among them; if there are none, as in `SimpleCNN`, its convolutions. Other backbones have no stages here.

    Example:
        >>> from cl.backbones.networks import ResNet18
        >>> features, maps = features_and_maps(ResNet18((3, 8, 8), width=4), torch.zeros(2, 3, 8, 8))
        >>> [tuple(one.shape) for one in (features, *maps)]
        [(2, 32), (2, 4, 8, 8), (2, 8, 4, 4), (2, 16, 2, 2), (2, 32, 1, 1)]
    """
    if not isinstance(backbone, nn.Sequential):
        return backbone(view), []
    convolve = [part for part in backbone if any(isinstance(module, nn.Conv2d) for module in part.modules())]
    stages = [part for part in convolve if not isinstance(part, nn.Conv2d)] or convolve
    maps = []
    for part in backbone:
        view = part(view)
        if any(part is stage for stage in stages):
            maps.append(view)
    return view, maps


def pooled_distance(maps: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    r"""Return the distance of maps whose squares are summed over their width, and over their height, a scalar.

    This is POD-spatial (Douillard et al. 2020, equation 5). For a map a of an example, let p(a) be the sums
    :math:`\sum_w a_{chw}^2` and :math:`\sum_h a_{chw}^2` as one vector, scaled to length 1. The distance is the mean of
    :math:`\lVert p(a) - p(a') \rVert` over examples and stages.

    Args:
        maps: For each stage, (B, C, H, W).
        others: As many of the same shapes.

    Example:
        >>> one, other = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, 3.0]]]])
        >>> round(float(pooled_distance([one], [other])), 4)
        1.0
    """

    def pooled(a: Tensor) -> Tensor:
        squares = a.square()
        return F.normalize(torch.cat([squares.sum(3).flatten(1), squares.sum(2).flatten(1)], dim=1), dim=1)

    distances = [(pooled(a) - pooled(b)).norm(dim=1).mean() for a, b in zip(maps, others, strict=True)]
    return torch.stack(distances).mean()
