"""Networks that map inputs to features, `(B, *input) -> (B, num_features)`, without the head."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from cl.backbones.vit import Timm as Timm
from cl.backbones.vit import ViT as ViT
from cl.backbones.vit import image_shape
from cl.errors import InputError, unknown
from cl.files import expand_path
from cl.ranges import checked


@checked
class MLP(nn.Sequential):
    """Linear layers on the flattened input, each followed by a ReLU, optionally with batch norm before the ReLU.

    Args:
        input_shape: Shape of one input, of any number of dimensions.
        hidden: Width of each layer; the last is `num_features`. Without layers, the flattened input is the feature.
        bias: Whether layers have biases; projection methods such as GPM require False.
        norm: Whether there is batch norm before each ReLU.

    Example:
        >>> MLP((1, 28, 28), hidden=[100, 50])(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 50])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        hidden: Sequence[Annotated[int, Ge(1)]] = (100, 100),
        bias: bool = True,
        norm: bool = False,
    ) -> None:
        widths = [math.prod(input_shape), *hidden]
        if min(widths) < 1:
            raise InputError(f"hidden={list(hidden)} of MLP has an empty layer: give widths of at least 1.")
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b, bias=bias), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU()]
        super().__init__(nn.Flatten(), *layers)
        self.num_features = widths[-1]


@checked
class SimpleCNN(nn.Sequential):
    """Blocks of 3x3 convolution, ReLU and 2x2 max-pooling, then one linear layer; no normalisation, no dropout.

    Args:
        input_shape: (C, H, W), with H and W at least 2^(number of blocks).
        channels: Channels of each block.
        hidden: Width of the linear layer, `num_features`.
        bias: Whether layers have biases.

    Example:
        >>> SimpleCNN((3, 32, 32))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 128])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        channels: Sequence[Annotated[int, Ge(1)]] = (32, 64, 64),
        hidden: Annotated[int, Ge(1)] = 128,
        bias: bool = True,
    ) -> None:
        depth, height, width = image_shape("SimpleCNN", input_shape, 2 ** len(channels))
        layers: list[nn.Module] = []
        for a, b in pairwise([depth, *channels]):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2)]
            depth, height, width = b, height // 2, width // 2
        super().__init__(*layers, nn.Flatten(), nn.Linear(depth * height * width, hidden, bias=bias), nn.ReLU())
        self.num_features = hidden


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "batch_no_stats": partial(nn.BatchNorm2d, track_running_stats=False),
    "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
}


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inside: int, outside: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = norm(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), norm(outside))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class _HalfBlock(nn.Module):
    """One 3x3 convolution with a shortcut, and a norm after each of its two ReLUs (released code of TAG)."""

    def __init__(self, inside: int, outside: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.norm1, self.norm2 = norm(outside), norm(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(F.relu(self.conv(x)))
        return self.norm2(F.relu(out + self.shortcut(x)))  # type: ignore[no-any-return]


BLOCKS: dict[str, Callable[[int, int, int, Callable[[int], nn.Module]], nn.Module]] = {
    "residual": _ResidualBlock,
    "half": _HalfBlock,
}


@checked
class ResNet18(nn.Sequential):
    """ResNet-18 for small images: a 3x3 stem of stride 1, no max-pooling, four stages, global average pooling.

    He et al. 2016, with the stem of their CIFAR networks. `width=20` is the slim network of GEM (Lopez-Paz and Ranzato
    2017).

    Args:
        input_shape: (C, H, W) with H and W at least 8.
        width: Channels of the first stage; `num_features` is 8 times as many.
        norm: "batch"; "batch_no_stats", which uses the statistics of the batch also at test, so that a prediction
            depends on its batch; or "group", with which an example does not depend on others.
        block: "residual", that of the paper; or "half", that of the network that the code of Stable SGD (Mirzadeh et
            al. 2020) and TAG calls ResNet-18: one convolution a block, a norm after each ReLU, none in the shortcut.

    Raises:
        InputError: If the inputs are not images of that size, or `norm` or `block` is unknown.

    Example:
        >>> ResNet18((3, 32, 32), width=20).num_features
        160
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        width: Annotated[int, Ge(1)] = 64,
        norm: str = "batch",
        block: str = "residual",
    ) -> None:
        for name, value, known in (("norm", norm, NORMS), ("block", block, BLOCKS)):
            if value not in known:
                raise InputError(f"{name}={value!r} of ResNet18 is unknown: use one of {', '.join(known)}.")
        channels, _, _ = image_shape("ResNet18", input_shape, 8)
        new_norm = NORMS[norm]
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(channels, width, 3, padding=1, bias=False), norm=new_norm(width), relu=nn.ReLU()
        )
        inside = width
        for stage in range(4):
            outside, stride = width * 2**stage, 2 if stage else 1
            blocks = BLOCKS[block](inside, outside, stride, new_norm), BLOCKS[block](outside, outside, 1, new_norm)
            layers[f"stage{stage + 1}"] = nn.Sequential(*blocks)
            inside = outside
        super().__init__(layers | {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()})
        self.num_features = inside


@checked
class AlexNetGPM(nn.Sequential):
    """The five-layer network of the GPM experiments on CIFAR-100 (Saha et al. 2021, appendix C), or that of HAT.

    Three convolutions and two linear layers without biases are each followed by batch normalisation without running
    statistics, ReLU and dropout, and the convolutions also by 2x2 max-pooling. So a prediction at test depends on its
    batch, which holds examples of one task in a fixed random order, and a batch of one example is refused. The paper's
    code does the same, with test batches of 64. The network of HAT (Serra et al. 2018) has biases instead of the
    normalisation.

    Args:
        input_shape: (C, H, W), with H and W at least 19.
        channels: Channels of the convolutions, whose kernels have sizes 4, 3 and 2.
        hidden: Width of the two linear layers, `num_features`.
        dropout: Probability of dropout after the first two layers, and after the others.
        norm: Whether there is batch normalisation and no biases; else there are biases and no normalisation.

    Raises:
        InputError: If the inputs are not images of that size.

    Example:
        >>> AlexNetGPM((3, 32, 32))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 2048])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        channels: Sequence[Annotated[int, Ge(1)]] = (64, 128, 256),
        hidden: Annotated[int, Ge(1)] = 2048,
        dropout: Sequence[Annotated[float, Interval(ge=0, le=1)]] = (0.2, 0.5),
        norm: bool = True,
    ) -> None:
        depth, height, width = image_shape("AlexNetGPM", input_shape, 19)
        if (len(channels), len(dropout)) != (3, 2):
            raise InputError(
                f"AlexNetGPM takes three channels and two dropouts, not {list(channels)}, {list(dropout)}: fix them."
            )
        layers: list[nn.Module] = []
        low, high = dropout
        for outside, kernel, rate in zip(channels, (4, 3, 2), (low, low, high), strict=True):
            layers.append(nn.Conv2d(depth, outside, kernel, bias=not norm))
            layers += [nn.BatchNorm2d(outside, track_running_stats=False)] if norm else []
            layers += [nn.ReLU(), nn.Dropout(rate), nn.MaxPool2d(2)]
            depth, height, width = outside, (height - kernel + 1) // 2, (width - kernel + 1) // 2
        layers.append(nn.Flatten())
        for inside in (depth * height * width, hidden):
            layers.append(nn.Linear(inside, hidden, bias=not norm))
            layers += [nn.BatchNorm1d(hidden, track_running_stats=False)] if norm else []
            layers += [nn.ReLU(), nn.Dropout(high)]
        super().__init__(*layers)
        self.num_features = hidden


def load_backbone(module: nn.Module, path: str | Path) -> None:
    """Load the weights of a backbone from the checkpoint of a run.

    Args:
        module: The backbone.
        path: A checkpoint: a dict whose "state_dict" has the keys "backbone.*". No code in the file is run.

    Raises:
        InputError: If the file is missing or not such a checkpoint, or its keys or shapes are not those of the
            backbone.
    """
    path = expand_path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file: name a checkpoint of a run.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        weights = {key.removeprefix("backbone."): w for key, w in saved.items() if key.startswith("backbone.")}
        shapes = {key: w.shape for key, w in weights.items()}
    except Exception as error:  # files of other origin raise errors of many types
        raise InputError(f"{path} is not a checkpoint with a state_dict: name one that a run has written.") from error
    own = module.state_dict()
    odd = sorted(own.keys() ^ weights.keys()) or sorted(k for k in own if own[k].shape != shapes[k])
    if odd:
        raise InputError(
            f"{path} holds the weights of another backbone than {type(module).__name__} ({odd[0]!r} and "
            f"{len(odd) - 1} more differ): use the configuration that wrote it."
        )
    module.load_state_dict(weights)


SCHEMES: dict[str, Callable[[Tensor], Tensor]] = {
    "xavier": nn.init.xavier_uniform_,
    "kaiming": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
}


def initialise(modules: Sequence[nn.Module], scheme: str) -> None:
    """Draw the weights of every linear layer and convolution anew, and set their biases to zero.

    Args:
        modules: The modules, which are drawn in order from torch's global generator.
        scheme: "xavier" (Glorot and Bengio 2010, equation 16) or "kaiming" (He et al. 2015, equation 10), uniform.

    Raises:
        InputError: If the scheme is unknown.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> initialise([layer], "xavier")
        >>> bool(layer.weight.abs().max() <= 1) and layer.bias.tolist() == [0.0, 0.0, 0.0]
        True
    """
    if scheme not in SCHEMES:
        raise unknown("initialisation", scheme, SCHEMES)
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            SCHEMES[scheme](layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
