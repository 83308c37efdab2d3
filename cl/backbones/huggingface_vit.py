"""Vision transformers of the library transformers, by their name at Hugging Face or from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from cl.backbones.preprocess import Preprocess
from cl.backbones.vit import image_shape
from cl.errors import InputError, reason
from cl.files import expand_path
from cl.ranges import checked

_INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # by their numbers in Pillow


class _Embed(nn.Module):
    """Images to tokens; position embeddings are interpolated if images have another size than in training."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.embeddings(x, interpolate_pos_encoding=True)
        return tokens


class _ClassToken(nn.Module):
    """The last norm, and the choice of the class token."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.norm(tokens)[:, 0]
        return features


@checked
class HuggingFaceViT(nn.Sequential):
    """A `ViTModel` of Hugging Face's transformers with its weights; needs `pip install 'clsim[transformers]'`.

    Features are the class token after the last norm, which the classifier of such a model receives; the pooler, which
    many weights lack, is not used. Images are resized and normalised as the model's image processor does. Its blocks
    are the embedding, the layers, and the last norm. It takes the prompts of L2P, but no prefixes.

    Args:
        input_shape: (C, H, W) of the stream's images, with as many channels as the model has.
        name: A name at Hugging Face, whose weights are downloaded once; or a folder with a model and an image
            processor, as `save_pretrained` writes them.
        image_size: Height and width that images are resized to, a multiple of the model's patch size; None means that
            of the image processor.

    Attributes:
        normalizes: True: it normalises raw inputs itself, so that the statistics of the dataset are not used.
        pretrained: True: its weights are trained ones.

    Raises:
        InputError: If the library is missing, the model cannot be loaded, some of its weights are missing, or it does
            not take such images.

    Example:
        A folder with a model is enough, without a connection::

            HuggingFaceViT((3, 32, 32), "models/vit-base").num_features  # 768
    """

    normalizes = pretrained = True

    def __init__(self, input_shape: Sequence[int], name: str, image_size: Annotated[int, Ge(1)] | None = None) -> None:
        channels, _, _ = image_shape(name, input_shape, 1)
        model, processor = _load(name)
        size = image_size or processor.size["height"]
        config = model.config
        if channels != config.num_channels or size % config.patch_size:
            raise InputError(
                f"{name} takes images of {config.num_channels} channels and a multiple of {config.patch_size} pixels, "
                f"not {channels} and {size}: change the channels of the dataset, or backbone.image_size."
            )
        plain = [0.0] * channels, [1.0] * channels
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else plain
        inputs = Preprocess([*mean], [*std], size, _interpolation(name, processor))
        layers = getattr(model, "layers", None) or model.encoder.layer  # by version
        super().__init__(nn.Sequential(inputs, _Embed(model.embeddings)), *layers, _ClassToken(model.layernorm))
        self.num_features: int = config.hidden_size
        self.train()

    def embed(self, x: Tensor) -> Tensor:
        """See `cl.backbones.vit.ViT.embed`."""
        tokens: Tensor = self[0](x)
        return tokens

    def encode(self, tokens: Tensor) -> Tensor:
        """See `cl.backbones.vit.ViT.encode`."""
        *layers, last = list(self)[1:]
        for layer in layers:
            tokens = layer(tokens)
        encoded: Tensor = last.get_submodule("norm")(tokens)
        return encoded


def _interpolation(name: str, processor: Any) -> str:
    number = int(processor.resample)
    if number not in _INTERPOLATIONS:
        raise InputError(
            f"The image processor of {name} resizes with filter {number} of Pillow, but known are "
            f"{', '.join(f'{n} ({kind})' for n, kind in _INTERPOLATIONS.items())}: change its configuration."
        )
    return _INTERPOLATIONS[number]


def _load(name: str) -> tuple[Any, Any]:
    """Return the model, without its pooler, and the image processor."""
    if find_spec("transformers") is None:
        raise InputError("The library transformers is not installed: run `pip install 'clsim[transformers]'`.")
    from transformers import ViTImageProcessor, ViTModel

    folder = expand_path(name)
    source = str(folder) if folder.is_dir() else name
    try:
        with torch.random.fork_rng(devices=[]):
            options = {"add_pooling_layer": False, "output_loading_info": True}
            model, found = ViTModel.from_pretrained(source, **options)
            processor = ViTImageProcessor.from_pretrained(source)
    except Exception as error:  # files and connections raise errors of many types
        raise InputError(
            f"transformers cannot load {name!r} ({reason(error)}): check the name and the network, or name a folder "
            "with a model and its image processor."
        ) from error
    missing = sorted({*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])})
    if missing:
        raise InputError(
            f"{name!r} lacks {len(missing)} weights of a ViTModel, the first of them {missing[0]}: it holds a model of "
            "another kind, so choose another, or backbone=timm."
        )
    return model, processor
