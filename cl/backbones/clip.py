"""CLIP by open_clip: its image tower as a backbone, and its text tower, which makes vectors of class names."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from cl.backbones.preprocess import Preprocess
from cl.backbones.vit import image_shape
from cl.errors import InputError, reason
from cl.files import expand_path
from cl.ranges import checked

TEMPLATES = ("a photo of a {}.",)


class _Embed(nn.Module):
    """Images to tokens."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.conv1, self.patch_dropout, self.ln_pre = tower.conv1, tower.patch_dropout, tower.ln_pre
        self.class_embedding, self.positional_embedding = tower.class_embedding, tower.positional_embedding

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv1(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(x), 1, -1), patches], dim=1)
        embedded: Tensor = self.ln_pre(self.patch_dropout(tokens + self.positional_embedding))
        return embedded


class _Project(nn.Module):
    """The last norm, the choice of the class token, and the projection to the length of text features."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.ln_post, self.proj = tower.ln_post, tower.proj

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.ln_post(tokens)[:, 0] @ self.proj
        return features


@checked
class OpenClip(nn.Sequential):
    """The image tower of a CLIP (Radford et al. 2021) of open_clip; needs `pip install 'clsim[clip]'`.

    Features are the image features before they are scaled to length 1, (B, E). It resizes and normalises images itself,
    as its weights expect. The blocks of a vision transformer are the embedding, those of attention, and the projection;
    other towers are one block. The text tower is no part of the backbone: `class_vectors` loads it, and lets it go.

    Args:
        input_shape: (3, H, W) of the stream's images.
        name: A name of `open_clip.list_models()`, such as "ViT-B-32"; or "hf-hub:OWNER/NAME" or "local-dir:FOLDER",
            which bring their weights.
        pretrained: The tag of its weights, which are downloaded once, or their file; None means random weights, or
            those that `name` brings.
        image_size: Height and width that images are resized to; None means that of the weights.
        templates: Sentences in which "{}" stands for the name of a class.

    Attributes:
        normalizes: True: it normalises raw inputs itself, so that the statistics of the dataset are not used.
        eta: The scale of the cosines of images and texts, as it was trained.

    Raises:
        InputError: If the library is missing, the model cannot be built or loaded, images have not three channels, or a
            template has no "{}".

    Example:
        The two towers, as ZSCL and LingoCL use them::

            clip = OpenClip((3, 32, 32), "ViT-B-32", "laion2b_s34b_b79k")
            clip.class_vectors(["cat", "polar_bear"]).shape  # (2, 512)
    """

    normalizes = True

    def __init__(
        self,
        input_shape: Sequence[int],
        name: str = "ViT-B-32",
        pretrained: str | None = None,
        image_size: Annotated[int, Ge(1)] | None = None,
        templates: Sequence[str] = TEMPLATES,
    ) -> None:
        channels, _, _ = image_shape(name, input_shape, 1)
        if channels != 3:
            raise InputError(f"{name} takes images of three channels, not {channels}: set dataset.channels=3.")
        wrong = [template for template in templates if "{}" not in template]
        if wrong or not templates:
            raise InputError(
                f"backbone.templates={list(templates)}: give sentences that hold {{}}, for the name of a class."
            )
        model = _load(name, pretrained, image_size)
        config = model.visual.preprocess_cfg
        size = config["size"] if isinstance(config["size"], int) else config["size"][0]
        inputs = Preprocess(config["mean"], config["std"], size, config["interpolation"])
        first, *others = _blocks(model.visual, torch.zeros(1, 3, size, size))
        super().__init__(nn.Sequential(inputs, first), *others)
        self.eval()
        with torch.no_grad():
            self.num_features = int(self(torch.zeros(1, 3, size, size)).shape[1])
        self.train()
        self.name, self.templates, self.eta = name, tuple(templates), float(model.logit_scale.detach().exp())
        self.weights = pretrained
        self.pretrained = _is_trained(name, pretrained)

    def class_vectors(self, names: Sequence[str]) -> Tensor:
        """Return the text features of class names by `text_vectors`, unit vectors (C, E).

        Raises:
            InputError: If the weights are random.
        """
        if not self.pretrained:
            raise InputError("A text tower of random weights knows no names: set backbone.pretrained.")
        return text_vectors(names, self.name, self.weights, self.templates)


def text_vectors(
    names: Sequence[str], name: str, pretrained: str | None, templates: Sequence[str] = TEMPLATES
) -> Tensor:
    r"""Return a unit vector for each class, float32 (C, E): the mean of its templates' text features.

    .. math:: e_c \propto \sum_k \frac{g(t_k(c))}{\lVert g(t_k(c)) \rVert}

    with the text tower g and the template :math:`t_k` (Radford et al. 2021, section 3.1.4).

    Args:
        names: The names of the classes; "_" stands for a blank.
        name: See `OpenClip`.
        pretrained: See `OpenClip`.
        templates: Sentences in which "{}" stands for the name of a class.
    """
    model = _load(name, pretrained, None).eval()
    import open_clip

    tokenizer, rows = open_clip.get_tokenizer(name), []
    with torch.no_grad():
        for label in names:
            texts = [template.replace("{}", label.replace("_", " ")) for template in templates]
            rows.append(F.normalize(model.encode_text(tokenizer(texts)), dim=1).mean(0))
    return F.normalize(torch.stack(rows).float(), dim=1)


def _blocks(tower: Any, example: Tensor) -> list[nn.Module]:
    """Return the blocks of a vision transformer, if they give what it gives; else the tower itself."""
    try:
        blocks = [_Embed(tower), *tower.transformer.resblocks, _Project(tower)]
        tower.eval()
        with torch.no_grad():
            x = example
            for block in blocks:
                x = block.eval()(x)
            return blocks if torch.equal(x, tower(example)) else [tower]
    except Exception:  # towers of other kinds raise errors of many types
        return [tower]


def _is_trained(name: str, pretrained: str | None) -> bool:
    return pretrained is not None or ":" in name


def _load(name: str, pretrained: str | None, size: int | None) -> Any:
    """Return the model with both towers, on the CPU."""
    if find_spec("open_clip") is None:
        raise InputError("The library open_clip is not installed: run `pip install 'clsim[clip]'`.")
    import open_clip

    trained = _is_trained(name, pretrained)
    file = None if pretrained is None else expand_path(pretrained)
    try:
        with torch.random.fork_rng(devices=[], enabled=trained):
            return open_clip.create_model(
                name,
                pretrained=str(file) if file is not None and file.is_file() else pretrained,
                force_image_size=size,
                require_pretrained=trained,
            )
    except Exception as error:  # files and connections raise errors of many types
        raise InputError(
            f"open_clip cannot build {name!r} with pretrained={pretrained!r} ({reason(error)[:200]}): check both, "
            "which open_clip.list_pretrained() lists, and the network."
        ) from error
