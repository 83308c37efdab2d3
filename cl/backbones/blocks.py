"""A backbone as a list of blocks that run one after the other, for whatever works on a part of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cl.errors import InputError


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the blocks of a backbone, whose composition is the backbone: each maps the output of the one before.

    They are what its method `blocks()` returns, or the parts of an `nn.Sequential`; any other backbone is one block.
    For `ViT` and `Timm` they are the stem (of a transformer the embedding), the network's own blocks, and what follows
    them up to the features.

    Args:
        backbone: A module (B, *input) -> (B, num_features). The blocks hold its own weights, not copies.

    Example:
        >>> from cl.backbones.networks import MLP
        >>> [type(block).__name__ for block in blocks(MLP((4,), hidden=[3]))]
        ['Flatten', 'Linear', 'ReLU']
    """
    own = getattr(backbone, "blocks", None)
    if callable(own) and not isinstance(own, nn.Module):
        return list(own())
    if isinstance(backbone, nn.Sequential) and type(backbone).forward is nn.Sequential.forward:
        return list(backbone)
    return [backbone]


def freeze(backbone: nn.Module, first: int | None = None) -> nn.Module:
    """Freeze a backbone, or its first blocks, set them to evaluation mode, and return it.

    Args:
        backbone: The backbone.
        first: How many of its blocks, see `blocks`; None means all of it.

    Raises:
        InputError: If it has fewer blocks.

    Example:
        >>> from cl.backbones.networks import MLP
        >>> net = freeze(MLP((4,), hidden=[3, 2]), first=3)
        >>> [p.requires_grad for p in net.parameters()]
        [False, False, True, True]
    """
    found = blocks(backbone)
    if first is not None and not 1 <= first <= len(found):
        kind = type(backbone).__name__
        raise InputError(f"freeze={first}, but {kind} has {len(found)} blocks: give 1 to {len(found)}, or true.")
    for block in [backbone] if first is None else found[:first]:
        block.requires_grad_(False).eval()
    return backbone


def depends_on_batch(module: nn.Module) -> bool:
    """Say whether, in evaluation, an output depends on the other examples: batch norm without running statistics.

    Example:
        >>> depends_on_batch(nn.BatchNorm1d(2)), depends_on_batch(nn.BatchNorm1d(2, track_running_stats=False))
        (False, True)
    """
    return any(isinstance(part, _BatchNorm) and part.running_mean is None for part in module.modules())


def tokens_of(model: Any, x: Tensor) -> Tensor:
    """Return the tokens (B, L, D) of images (B, C, H, W) in a vision transformer of timm, before its blocks."""
    tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    return tokens


_EMBEDDING = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")  # modules of `tokens_of`


class Embed(nn.Module):
    """The first block of a vision transformer of timm: images to tokens with position embeddings."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.__dict__["model"] = model
        for name in ("cls_token", "reg_token", "pos_embed", *_EMBEDDING):
            setattr(self, name, getattr(model, name, None))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to tokens (B, L, D)."""
        return tokens_of(self.__dict__["model"], x)


class Pool(nn.Module):
    """The last block of a network of timm: the output of its body to features, without the classifier."""

    def __init__(self, model: Any, names: Sequence[str], before: Sequence[str]) -> None:
        super().__init__()
        self.__dict__["model"], self.__dict__["names"] = model, names
        for name, part in model.named_children():
            if name not in before:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, L, D) or maps (B, C, H, W) to features (B, num_features)."""
        model = self.__dict__["model"]
        for name in self.__dict__["names"]:
            x = getattr(model, name)(x)
        features: Tensor = model.forward_head(x, pre_logits=True)
        return features


# Names of the modules of a network of timm that run one after the other: a stem, a body of several blocks, an end.
Plan = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
TRANSFORMER: Plan = ((), ("blocks",), ("norm",))  # its stem is `Embed`
_PLANS: tuple[Plan, ...] = (
    (("conv_stem", "bn1"), ("blocks",), ("conv_head", "bn2")),  # EfficientNet
    (("conv_stem", "bn1"), ("blocks",), ()),  # MobileNetV3
    (("conv1", "bn1", "act1", "maxpool"), ("layer1", "layer2", "layer3", "layer4"), ()),  # ResNet
    (("stem",), ("stages",), ("norm_pre",)),  # ConvNeXt
    (("stem",), ("stages",), ("final_conv",)),  # ByobNet and RegNet
    TRANSFORMER,
)


def plan_of(model: nn.Module, example: Tensor) -> Plan | None:
    """Return how a network of timm without classifier splits into blocks; None if that is unknown.

    A plan is returned only if on an example its blocks give the bits of the whole network.

    Args:
        model: The network.
        example: Prepared inputs (B, C, H, W).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            whole = model(example)
            return next((plan for plan in _PLANS if _runs(model, plan, example, whole)), None)
    finally:
        for module, mode in modes:
            module.training = mode


def planned(model: Any, plan: Plan) -> list[nn.Module]:
    """Return the blocks of a network of timm by its plan."""
    stem, body, end = plan
    first: nn.Module = nn.Sequential(*(getattr(model, name) for name in stem)) if stem else Embed(model)
    before = (*stem, *body, *(() if stem else _EMBEDDING))
    middle = [part for name in body for part in _parts(getattr(model, name))]
    return [in_mode(first), *middle, in_mode(Pool(model, end, before))]


def in_mode(block: nn.Module) -> nn.Module:
    """Return a block that was just made of modules of a network, in training mode if one of these is."""
    block.training = any(part.training for part in block.children())
    return block


def _parts(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.Sequential | nn.ModuleList) else [module]


def _runs(model: nn.Module, plan: Plan, x: Tensor, whole: Tensor) -> bool:
    if not all(hasattr(model, name) for names in plan for name in names):
        return False
    try:
        for block in planned(model, plan):
            x = block(x)
    except Exception:  # modules that do not follow one another raise errors of many types
        return False
    return x.shape == whole.shape and bool((x == whole).all())
