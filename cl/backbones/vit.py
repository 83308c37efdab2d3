"""Vision transformers that take prompts, and all other models of timm."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from cl.backbones.blocks import TRANSFORMER, Plan, in_mode, plan_of, planned, tokens_of
from cl.backbones.preprocess import Preprocess, Resize
from cl.errors import InputError, reason
from cl.ranges import checked

Prefixes = Mapping[int, Tensor]  # by block, keys and values (B, 2, L, D) that are put before its own


def image_shape(what: str, shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """Return C, H and W of images that are at least so many pixels high and wide.

    Args:
        what: The backbone, for the error.
        shape: The shape of an input.
        smallest: Least height and width.

    Raises:
        InputError: If the shape is not that of an image, or the image is too small.

    Example:
        >>> image_shape("LeNet", (1, 28, 28), smallest=16)
        (1, 28, 28)
    """
    if len(shape) != 3 or min(shape[1:]) < smallest or shape[0] < 1:
        raise InputError(
            f"{what} takes images (C, H, W) of at least {smallest}x{smallest} pixels, not inputs of shape "
            f"{tuple(shape)}: enlarge them (image_size) or choose another backbone."
        )
    channels, height, width = shape
    return channels, height, width


def _encode(model: Any, tokens: Tensor, prefixes: Prefixes | None = None) -> Tensor:
    for i, block in enumerate(model.blocks):
        tokens = block(tokens) if not prefixes or i not in prefixes else _prefixed(block, tokens, prefixes[i])
    encoded: Tensor = model.norm(tokens)
    return encoded


def _prefixed(block: Any, x: Tensor, prefix: Tensor) -> Tensor:
    """Run a block of timm whose tokens also attend to a prefix."""
    return finish(block, x, attend(block.attn, block.norm1(x), prefix))


def finish(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Return the output (..., N, D) of a block of timm for tokens x, given the output of its attention."""
    x = x + block.drop_path1(block.ls1(attended))
    out: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return out


def attend(attention: Any, x: Tensor, prefix: Tensor) -> Tensor:
    """Return the output (B, N, D) of an attention of timm on tokens x (B, N, D) that also attend to a prefix.

    Args:
        attention: `attn` of one of a transformer's `blocks`.
        x: Tokens after the block's first norm.
        prefix: L keys and values (B, 2, L, D); L may be 0.
    """
    heads = attention.num_heads, attention.head_dim
    q, k, v = attention.qkv(x).unflatten(2, (3, *heads)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim)
    q, k = attention.q_norm(q), attention.k_norm(k)
    keys, values = prefix.to(v.dtype).unflatten(3, heads).permute(1, 0, 3, 2, 4)
    k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
    dropout = attention.attn_drop.p if attention.training else 0.0
    x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)
    out: Tensor = attention.proj_drop(attention.proj(x))
    return out


def _num_blocks(model: Any) -> int:
    """Return the number of blocks; raise an AttributeError if `_prefixed` cannot run all of them."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block

    for block in model.blocks:
        plain = type(block) is Block and type(block.attn) is Attention
        extras = [getattr(block.attn, name, None) for name in ("gate", "norm")] if plain else []
        if not plain or any(extra is not None and not isinstance(extra, nn.Identity) for extra in extras):
            raise AttributeError("The attention of the blocks does not take prefixes.")
    return len(model.blocks)


def freeze_transformer(method: str, backbone: nn.Module, **blocks: Sequence[int]) -> None:
    """Freeze the backbone of a method with prompts; refuse a backbone that cannot take them.

    Args:
        method: The method's name in the configuration.
        backbone: The backbone.
        blocks: For each argument of the method that lists blocks, the blocks that get prefixes.

    Raises:
        InputError: If the backbone is not a transformer, does not take prefixes, or lacks a block.

    Example:
        >>> freeze_transformer("coda_prompt", ViT((3, 8, 8), dim=16, depth=2, heads=2), blocks=[0, 2])
        Traceback (most recent call last):
        cl.errors.InputError: coda_prompt.blocks=[0, 2], but the blocks of ViT are 0 to 1: choose among these.
    """
    kind = type(backbone).__name__
    if not (hasattr(backbone, "embed") and hasattr(backbone, "encode")):
        raise InputError(
            f"{method} puts prompts among a transformer's tokens, but {kind} has no embed and encode: use "
            "backbone=vit, or a ViT of timm."
        )
    if blocks and not hasattr(backbone, "num_blocks"):
        raise InputError(
            f"{method} puts prefixes before keys and values, but {kind} has no blocks that take them (num_blocks): use "
            "backbone=vit, or a plain ViT of timm."
        )
    for name, chosen in blocks.items():
        last = int(backbone.num_blocks) - 1  # type: ignore[arg-type]
        if any(not 0 <= block <= last for block in chosen) or len({*chosen}) < len(chosen):
            raise InputError(
                f"{method}.{name}={list(chosen)}, but the blocks of {kind} are 0 to {last}: choose among these."
            )
    backbone.requires_grad_(False).eval()


@checked
class ViT(nn.Module):
    """A small vision transformer of timm (Dosovitskiy et al. 2021), whose feature is the encoded class token.

    Args:
        input_shape: (C, H, W), with H and W multiples of `patch_size`.
        patch_size: Side of a patch, in pixels.
        dim: Width of a token, D = `num_features`; a multiple of `heads`.
        depth: Number of blocks.
        heads: Number of attention heads.
        mlp_ratio: Ratio of the hidden width of a block's MLP and `dim`.
        dropout: Probability of dropout of position embeddings, projections and MLPs.
        drop_path: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.

    Raises:
        InputError: If `patch_size` does not divide H and W, or `heads` does not divide `dim`.

    Example:
        >>> vit = ViT((3, 8, 8), dim=16, depth=1, heads=2)
        >>> tokens = vit.embed(torch.zeros(2, 3, 8, 8))
        >>> prompts = torch.zeros(2, 6, 16)
        >>> tokens.shape, vit.encode(torch.cat([prompts, tokens], dim=1)).shape
        (torch.Size([2, 5, 16]), torch.Size([2, 11, 16]))
        >>> vit(torch.zeros(2, 3, 8, 8), {0: torch.zeros(2, 2, 7, 16)}).shape  # seven keys and values in block 0
        torch.Size([2, 16])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        patch_size: Annotated[int, Interval(ge=1, le=1000)] = 4,
        dim: Annotated[int, Ge(1)] = 192,
        depth: Annotated[int, Interval(ge=1, le=1000)] = 6,
        heads: Annotated[int, Interval(ge=1, le=1000)] = 3,
        mlp_ratio: Annotated[float, Ge(0)] = 4.0,
        dropout: Annotated[float, Interval(ge=0, le=1)] = 0.0,
        drop_path: Annotated[float, Interval(ge=0, le=1)] = 0.0,
    ) -> None:
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        channels, height, width = image_shape("ViT", input_shape, patch_size)
        if height % patch_size or width % patch_size:
            raise InputError(f"patch_size={patch_size} of ViT does not divide {height}x{width}: choose one that does.")
        if dim % heads:
            raise InputError(f"dim={dim} of ViT is not a multiple of heads={heads}: change one of them.")
        self.num_features, self.num_blocks = dim, depth
        self.model = VisionTransformer(
            img_size=(height, width),
            patch_size=patch_size,
            in_chans=channels,
            num_classes=0,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            pos_drop_rate=dropout,
            proj_drop_rate=dropout,
            drop_path_rate=drop_path,
        )

    def embed(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to the tokens of class and N patches, with position embeddings, (B, 1+N, D)."""
        return tokens_of(self.model, x)

    def blocks(self) -> list[nn.Module]:
        """Return the embedding, the blocks of attention, and the last norm with the choice of the class token."""
        return planned(self.model, TRANSFORMER)

    def encode(self, tokens: Tensor, prefixes: Prefixes | None = None) -> Tensor:
        """Map tokens (B, L, D), of any number L, through all blocks and the last norm to (B, L, D)."""
        return _encode(self.model, tokens, prefixes)

    def forward(self, x: Tensor, prefixes: Prefixes | None = None) -> Tensor:
        """Map images (B, C, H, W) to the encoded class token (B, D).

        Args:
            x: Images.
            prefixes: By block, L keys and values (B, 2, L, D) that are put before its own, so that all its tokens
                attend to them (Li and Liang 2021); each head takes its part of D.
        """
        return self.encode(self.embed(x), prefixes)[:, 0]


class Timm(nn.Module):
    """Any model of timm by name, without its classifier; a vision transformer takes prompts as `ViT` does.

    With trained weights it resizes and normalises raw images itself, as its weights expect; else it takes the stream's
    images as they are prepared for any network.

    Args:
        input_shape: (C, H, W) of the stream's images.
        name: A name of `timm.list_models()`.
        pretrained: Whether to download weights.
        image_size: Height and width that images are resized to. None means the size that trained weights expect, and
            without these the stream's own; models of a fixed size get it as `img_size`.
        kwargs: Further arguments of `timm.create_model`, such as
            `pretrained_cfg_overlay: {file: weights.safetensors}` for weights in a local file.

    Attributes:
        normalizes: Whether it normalises raw inputs itself, so that the statistics of the dataset are not used.

    Raises:
        InputError: If there is no such model, it does not take such images, or its weights cannot be loaded.

    Example:
        >>> Timm((3, 32, 32), "test_resnet").num_features
        96
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        name: str,
        pretrained: bool = False,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        import timm

        channels, height, width = image_shape(name, input_shape, 1)
        _check_name(name)
        try:
            known = timm.get_pretrained_cfg(name)
            if pretrained and image_size is None and known is not None:
                image_size = known.input_size[-1]
            if image_size is not None:
                height = width = image_size
            if known is not None and known.fixed_input_size:
                kwargs.setdefault("img_size", (height, width))
            options = {"in_chans": channels, "num_classes": 0} | kwargs
            self.model = timm.create_model(name, pretrained=pretrained, **options).eval()
            with torch.no_grad():
                example = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))
                self.num_features = int(self.model(example).shape[1])
                self._plan: Plan | None = plan_of(self.model, example)
        except Exception as error:  # models raise errors of many types
            remedy = (
                "check the network, or set pretrained=false" if pretrained else "resize the images or change kwargs"
            )
            raise InputError(
                f"timm cannot build {name!r} for inputs {tuple(input_shape)} ({reason(error)}): {remedy}."
            ) from error
        self.model.train()
        self.normalizes = False
        self.inputs: nn.Module = nn.Identity()
        if pretrained:
            self.expect(self.model.pretrained_cfg, channels, image_size)
        elif image_size is not None:
            self.inputs = Resize(image_size)

    def expect(self, config: Mapping[str, Any], channels: int, size: int | None) -> None:
        """Resize and normalise raw images from now on as trained weights expect, by a configuration of timm."""
        mean, std = (tuple(config[key])[:channels] for key in ("mean", "std"))
        self.inputs = Preprocess(mean, std, size, config.get("interpolation") or "bicubic")
        self.normalizes = True

    def blocks(self) -> list[nn.Module]:
        """Return the resizing with the stem, the network's own blocks, and what follows them up to the features."""
        if self._plan is None:
            return [self]
        first, *others = planned(self.model, self._plan)
        return [in_mode(nn.Sequential(self.inputs, first)), *others]

    @property
    def embed(self) -> Callable[[Tensor], Tensor]:
        """See `ViT.embed`; only a vision transformer has it."""
        model = self._transformer("embed")
        return lambda x: tokens_of(model, self.inputs(x))

    @property
    def encode(self) -> Callable[..., Tensor]:
        """See `ViT.encode`; only a vision transformer has it."""
        return partial(_encode, self._transformer("encode"))

    @property
    def num_blocks(self) -> int:
        """The number of blocks, which can take prefixes; only a vision transformer with standard attention has it."""
        return _num_blocks(self._transformer("num_blocks"))

    def _transformer(self, wanted: str) -> Any:
        from timm.models.vision_transformer import VisionTransformer

        model: nn.Module = self.model
        if not isinstance(model, VisionTransformer):
            raise AttributeError(f"{type(model).__name__} has no {wanted!r}: it is not a vision transformer.")
        return model

    def forward(self, x: Tensor, prefixes: Prefixes | None = None) -> Tensor:
        """Map images (B, C, H, W) to what the classifier would receive, (B, num_features); on prefixes, see `ViT`."""
        features: Tensor = (
            self.model(self.inputs(x))
            if prefixes is None
            else self.model.forward_head(self.encode(self.embed(x), prefixes), pre_logits=True)
        )
        return features


def _check_name(name: str) -> None:
    import timm

    if ":" in name or timm.is_model(name):  # timm looks up hf_hub:owner/name on the hub
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "timm.list_models() has all names."
    raise InputError(f"There is no timm model called {name!r}: {hint}")
