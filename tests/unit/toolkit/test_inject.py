"""What is added to a frozen backbone: where it goes, that it starts at nothing, and what it computes."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from cl.backbones.blocks import blocks
from cl.backbones.efficientnet import EfficientNetLite0
from cl.backbones.networks import MLP, ResNet18
from cl.backbones.vit import Timm, ViT
from cl.errors import InputError
from cl.toolkit.inject import (
    Adapter,
    LowRank,
    ScaleShift,
    add,
    add_low_rank,
    added,
    awaken,
    find,
    freeze,
    frozen_weight,
    low_rank_layers,
    low_ranks,
    merge,
    places,
    use,
)
from draws import quick, seeds

IMAGES = (3, 32, 32)
BACKBONES = {
    "mlp": partial(MLP, IMAGES, hidden=[8, 8]),
    "resnet18": partial(ResNet18, IMAGES, width=4),
    "vit": partial(ViT, IMAGES, patch_size=8, dim=16, depth=2, heads=2),
    "timm": partial(Timm, IMAGES, "test_vit"),
    "efficientnet": partial(EfficientNetLite0, IMAGES, image_size=32, pretrained=False),
}
PARTS = {"adapter": partial(Adapter, width=3), "ssf": ScaleShift}


@pytest.fixture(params=BACKBONES)
def backbone(request) -> nn.Module:
    torch.manual_seed(0)
    return BACKBONES[request.param]().eval()


def stir(parts) -> None:
    """Give parts weights that are not those they start with."""
    draw = torch.Generator().manual_seed(1)
    for parameter in (p for part in parts for p in part.parameters()):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)


def outputs(net: nn.Module) -> torch.Tensor:
    x = torch.rand(2, *IMAGES, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        through = x
        for block in blocks(net):
            through = block(through)
        whole = net(x)
    assert torch.equal(through, whole), "blocks and the whole backbone differ"
    return whole


# ------------------------------------------------------------------ LoRA


def test_low_rank_starts_at_nothing_and_its_merge_is_the_adapted_network(backbone):
    before = outputs(backbone)
    freeze(backbone)
    pairs = add_low_rank(backbone, find(backbone, ["linear", "conv"]), partial(LowRank, rank=2, scale=0.5))
    assert torch.equal(outputs(backbone), before)
    stir(pairs)
    adapted = outputs(backbone)
    assert not torch.allclose(adapted, before, atol=1e-3)
    copy = deepcopy(backbone)
    for layer, pair in zip(low_rank_layers(backbone), low_ranks(backbone), strict=True):
        merge(layer, pair)
    assert torch.equal(outputs(backbone), adapted) and not any(pair.B.any() for pair in pairs)
    assert torch.equal(outputs(copy), adapted), "a copy has pairs of its own"


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_a_convolution_gets_two_convolutions_in_turn(seed, rank, size, stride, bias):
    """BA with A (r, in k k) is a convolution to r channels, then one of 1x1."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(2, 5, size, stride, padding=1, bias=bias)
    x = torch.randn(2, 2, 7, 7)
    plain = conv(x)
    (pair,) = add_low_rank(nn.Sequential(conv), ["0"], partial(LowRank, rank=rank, scale=0.7))
    stir([pair])
    down = F.conv2d(x, pair.A.view(-1, 2, size, size), stride=stride, padding=1)
    torch.testing.assert_close(conv(x), plain + 0.7 * F.conv2d(down, pair.B[:, :, None, None]), rtol=1e-4, atol=1e-4)


def test_only_the_pair_has_gradients():
    net = MLP((4,), hidden=[3])
    freeze(net)
    (pair,) = add_low_rank(net, ["1"], partial(LowRank, rank=9))
    assert pair.A.shape == (3, 4), "the rank is at most that of the weight"
    net(torch.randn(5, 4)).sum().backward()
    assert frozen_weight(net[1]).grad is None and net[1].bias.grad is None
    assert pair.B.grad.any() and not pair.A.grad.any(), "as long as B is 0, A has a gradient of 0"


def test_functional_call_replaces_a_pair():
    net = MLP((4,), hidden=[3])
    (pair,) = add_low_rank(net, ["1"], partial(LowRank, rank=2))
    x, B = torch.randn(5, 4), torch.randn(3, 2)
    name = next(name for name, p in net.named_parameters() if p is pair.B)
    expected = (x @ (frozen_weight(net[1]) + B @ pair.A).T + net[1].bias).relu()
    torch.testing.assert_close(functional_call(net, {name: B}, (x,)), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_compiled_it_computes_the_same():
    net = ViT(IMAGES, patch_size=8, dim=16, depth=2, heads=2)
    pairs = add_low_rank(net, find(net, ["qkv"]), partial(LowRank, rank=2))
    add(net, find(net, ["mlp"]), [PARTS["adapter"]], torch.zeros(1, *IMAGES), parallel=True)
    stir([*pairs, *added(net)])
    x = torch.rand(2, *IMAGES)
    torch.testing.assert_close(torch.compile(net)(x), net(x), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ adapters, scale and shift


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("parallel", [True, False])
def test_added_parts_start_at_nothing_and_can_be_put_aside(backbone, kind, parallel):
    before = outputs(backbone)
    names = find(backbone, ["mlp"]) or find(backbone, ["block"]) or find(backbone, ["linear", "conv"])
    add(backbone, names, [PARTS[kind]] * 2, torch.zeros(1, *IMAGES), parallel)
    assert len(added(backbone)) == len(names) and torch.equal(outputs(backbone), before)
    stir(parts[1] for parts in added(backbone))
    use(backbone, 1)
    changed = outputs(backbone)
    assert not torch.allclose(changed, before, atol=1e-3)
    for position in (0, None):
        use(backbone, position)
        assert torch.equal(outputs(backbone), before)


def test_an_adapter_and_scale_and_shift_by_hand():
    """One channel of a map, D = (1), U = (2), c = 1, s = .5: h + .5 (2 max(0, x) + 1); then g = .5, b = -1."""
    adapter, shift = Adapter(1, 1, scale=0.5), ScaleShift(1)
    for parameter, value in ((adapter.down.weight, 1.0), (adapter.up.weight, 2.0), (adapter.up.bias, 1.0)):
        nn.init.constant_(parameter, value)
    nn.init.constant_(shift.g, 0.5)
    nn.init.constant_(shift.b, -1.0)
    x = torch.tensor([[[[-3.0, 4.0]]]])
    assert adapter(x).flatten().tolist() == [0.5, 4.5]
    assert shift(x).flatten().tolist() == [-2.5, 1.0]
    tokens = torch.randn(2, 3, 1)
    torch.testing.assert_close(shift(tokens), 0.5 * tokens - 1)


def test_where_shapes_differ_a_parallel_part_stands_behind():
    net = MLP((4,), hidden=[3, 3])
    add(net, ["1", "3"], [ScaleShift], torch.zeros(1, 4), parallel=True)
    assert [net[1].parallel, net[3].parallel] == [False, True]
    nn.init.ones_(net[3].parts[0].g)
    x = torch.randn(5, 3)
    torch.testing.assert_close(net[3](x), net[3].layer(x) + x)


# ------------------------------------------------------------------ where, and in which mode


def test_modules_are_found_by_kind_and_block():
    vit = BACKBONES["vit"]()
    assert find(vit, ["qkv"]) == ["model.blocks.0.attn.qkv", "model.blocks.1.attn.qkv"]
    assert find(vit, ["fc1", "fc2"], [2]) == ["model.blocks.1.mlp.fc1", "model.blocks.1.mlp.fc2"]
    assert find(vit, ["block"], [1]) == ["model.blocks.0"]
    net = BACKBONES["efficientnet"]()
    convolutions = [net.get_submodule(name) for name in find(net, ["conv"])]
    assert len(convolutions) > 20 and all(conv.groups == 1 for conv in convolutions)
    assert all(net.get_submodule(name).groups > 1 for name in find(net, ["conv_dw"]))


def test_what_cannot_be_found_is_told():
    net = MLP((4,), hidden=[3])
    with pytest.raises(InputError, match=r"lora finds no modules for layers=\['qkv'\] and blocks=None in MLP: choose"):
        places("lora", net, [], ["qkv"], None)
    with pytest.raises(InputError, match=r"blocks=\[0, 3\], but MLP has the blocks 0 to 2"):
        places("lora", net, [["linear"]], None, [0, 3])
    with pytest.raises(InputError, match="2 is a ReLU: choose other layers"):
        add_low_rank(net, ["2"], partial(LowRank, rank=1))
    add_low_rank(net, ["1"], partial(LowRank, rank=1))
    with pytest.raises(InputError, match="Two strategies add LoRA"):
        add_low_rank(net, ["1"], partial(LowRank, rank=1))


def test_frozen_layers_stay_in_evaluation_mode():
    net = MLP((4,), hidden=[3], norm=True)
    freeze(net)
    (pair,) = add_low_rank(net, ["1"], partial(LowRank, rank=1))
    net.train()
    awaken(net)
    assert net.training and pair.training and not net[2].training
    mean = net[2].running_mean.clone()
    net(torch.randn(5, 4))
    assert torch.equal(net[2].running_mean, mean)
