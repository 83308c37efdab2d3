"""Backbones as blocks, whose composition is the backbone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cl.backbones.blocks import blocks
from cl.backbones.networks import MLP, ResNet18, SimpleCNN
from cl.backbones.vit import Timm, ViT

CASES = {
    "mlp": (lambda: MLP((3, 8, 8), [5, 4]), 5),
    "cnn": (lambda: SimpleCNN((3, 8, 8), [4, 4], 8), 9),
    "resnet": (lambda: ResNet18((3, 8, 8), width=4), 9),
    "vit": (lambda: ViT((3, 8, 8), dim=16, depth=3, heads=2), 5),
    "timm vit": (lambda: Timm((3, 32, 32), "test_vit"), 8),
    "timm efficientnet": (lambda: Timm((3, 32, 32), "tf_efficientnet_lite0"), 9),
    "timm mobilenet": (lambda: Timm((3, 32, 32), "mobilenetv3_small_050"), 8),
    "timm resnet": (lambda: Timm((3, 32, 32), "resnet10t"), 6),
    "timm convnext": (lambda: Timm((3, 32, 32), "test_convnext"), 6),
    "timm, resized": (lambda: Timm((3, 32, 32), "test_vit", image_size=48), 8),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_run_one_after_the_other_give_the_backbone(name: str) -> None:
    make, number = CASES[name]
    torch.manual_seed(0)
    backbone = make().eval()
    size = 8 if name in ("mlp", "cnn", "resnet", "vit") else 32
    x = torch.rand(3, 3, size, size)
    found = blocks(backbone)
    assert len(found) == number
    y = x
    with torch.no_grad():
        for block in found:
            y = block(y)
        assert torch.equal(y, backbone(x))
    own = {id(p) for p in backbone.parameters()}
    assert {id(p) for block in found for p in block.parameters()} == own
    assert sum(len(list(block.parameters())) for block in found) == len(own)  # each in one block
    assert not any(block.training for block in found)
    backbone.train()
    assert any(block.training for block in blocks(backbone))


def test_another_network_is_one_block() -> None:
    class Skips(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    own = Skips(nn.Linear(3, 3), nn.ReLU())
    assert blocks(own) == [own]
    unknown = Timm((3, 32, 32), "test_byobnet")
    assert len(blocks(unknown)) >= 1
