from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from checkout import CONF
from cl.backbones.networks import MLP, AlexNetGPM, ResNet18, SimpleCNN, Timm, ViT, load_backbone
from cl.errors import InputError
from cl.toolkit.isolation import chained_layers

CUSTOM = CONF / "backbone" / "custom.yaml"  # of what the user names
DOWNLOADED = {CONF / "backbone" / f"{name}.yaml" for name in ("huggingface_vit", "open_clip")}  # tested from files
BACKBONES: dict[str, tuple[Any, tuple[int, ...], int, dict[str, Any]]] = {
    "mlp": (MLP, (1, 28, 28), 100, {}),
    "mlp-vector": (MLP, (7,), 5, {"hidden": [9, 5], "bias": False}),
    "cnn": (SimpleCNN, (3, 32, 32), 128, {}),
    "cnn-digits": (SimpleCNN, (1, 8, 8), 16, {"channels": [4, 4], "hidden": 16, "bias": False}),
    "resnet": (ResNet18, (3, 32, 32), 64, {"width": 8}),
    "resnet-grey": (ResNet18, (1, 28, 28), 64, {"width": 8, "norm": "batch_no_stats"}),
    "resnet-digits": (ResNet18, (1, 8, 8), 160, {"width": 20, "norm": "group"}),
    "alexnet": (AlexNetGPM, (3, 32, 32), 64, {"hidden": 64}),
    "alexnet-grey": (AlexNetGPM, (1, 28, 28), 64, {"hidden": 64}),
    "vit": (ViT, (3, 32, 32), 24, {"dim": 24, "depth": 2, "heads": 2, "patch_size": 8}),
    "vit-digits": (ViT, (1, 8, 8), 24, {"dim": 24, "depth": 1, "heads": 3}),
    "timm-cnn": (Timm, (3, 32, 32), 96, {"name": "test_resnet", "zero_init_last": False}),
    "timm-vit": (Timm, (1, 32, 32), 64, {"name": "test_vit"}),
}


def batch(shape: tuple[int, ...], rows: int = 4) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("key", BACKBONES)
def test_contract(key: str) -> None:
    make, shape, num_features, options = BACKBONES[key]
    x = batch(shape)
    torch.manual_seed(0)
    net = make(shape, **options)
    assert net.training and net.num_features == num_features
    torch.manual_seed(0)
    same = make(shape, **options).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in net.state_dict().items())
    out = net(x)
    assert out.shape == (4, num_features)
    (out * torch.randn_like(out)).sum().backward()
    still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still
    assert not any(name.startswith("head") for name, _ in net.named_parameters())
    net.eval()
    assert torch.equal(copy.deepcopy(net)(x), net(x))


def test_resnet18_is_torchvisions_but_for_the_stem() -> None:
    from torchvision.models import resnet18

    ours, theirs = ResNet18((3, 32, 32)), resnet18(num_classes=1000)
    head, stems = 512 * 1000 + 1000, 64 * 3 * (7 * 7 - 3 * 3)
    assert size(ours) == size(theirs) - head - stems == 11_168_832
    theirs.conv1, theirs.maxpool, theirs.fc = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity(), nn.Identity()
    weights = list(ours.state_dict().values())
    names = list(theirs.state_dict())
    assert [w.shape for w in weights] == [theirs.state_dict()[name].shape for name in names]
    theirs.load_state_dict(dict(zip(names, weights, strict=True)))
    for net in (ours.train(), ours.eval()):
        theirs.train(net.training)
        torch.testing.assert_close(net(batch((3, 32, 32))), theirs(batch((3, 32, 32))), rtol=1e-4, atol=1e-5)


def test_slim_resnet_has_gems_size() -> None:
    def counted(width: int) -> int:
        total = 3 * width * 9 + 2 * width
        inside = width
        for outside in (width, 2 * width, 4 * width, 8 * width):
            convolutions = 9 * (inside * outside + 3 * outside * outside)
            shortcut = 0 if inside == outside else inside * outside + 2 * outside
            total += convolutions + 4 * 2 * outside + shortcut
            inside = outside
        return total

    slim = ResNet18((3, 32, 32), width=20)
    assert size(slim) == counted(20)
    assert size(slim) + 160 * 100 + 100 == 1_109_240  # with the head of 100 classes: GEM's 1.1 million
    assert size(ResNet18((3, 32, 32))) == counted(64)


def test_a_half_block_is_one_convolution_with_a_norm_behind_each_relu():
    """The network that the code of Stable SGD and TAG calls ResNet-18, written out."""
    torch.manual_seed(0)
    net = ResNet18((3, 32, 32), width=20, block="half")
    x = torch.randn(4, 3, 32, 32)

    def normed(values, norm):
        mean, var = values.mean((0, 2, 3), keepdim=True), values.var((0, 2, 3), unbiased=False, keepdim=True)
        return (values - mean) / (var + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]

    out = normed(F.conv2d(x, net.conv.weight, padding=1), net.norm).relu()
    for stage in range(1, 5):
        for place, block in enumerate(getattr(net, f"stage{stage}")):
            stride = 2 if stage > 1 and place == 0 else 1
            past = out if stride == 1 else F.conv2d(out, block.shortcut.weight, stride=2)
            out = normed(F.conv2d(out, block.conv.weight, stride=stride, padding=1).relu(), block.norm1)
            out = normed((out + past).relu(), block.norm2)
    torch.testing.assert_close(net(x), F.avg_pool2d(out, 4).flatten(1), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == 1 + 8 + 3


def test_norms() -> None:
    x, other = batch((3, 16, 16)), batch((3, 16, 16)) * 3
    plain = ResNet18((3, 16, 16), width=8, norm="batch_no_stats").eval()
    assert not list(plain.buffers())
    assert not torch.allclose(plain(x)[:1], plain(torch.cat([x[:1], other]))[:1], atol=1e-3)
    group = ResNet18((3, 16, 16), width=8, norm="group").eval()
    torch.testing.assert_close(group(x)[:1], group(torch.cat([x[:1], other]))[:1])
    with pytest.raises(InputError, match=r"block='whole' of ResNet18 is unknown: use one of residual, half"):
        ResNet18((3, 16, 16), block="whole")
    with pytest.raises(InputError, match=r"norm='layer' .* batch, batch_no_stats, group"):
        ResNet18((3, 16, 16), norm="layer")


def test_alexnet_is_the_papers() -> None:
    net = AlexNetGPM((3, 32, 32))
    convolutions = 3 * 64 * 16 + 64 * 128 * 9 + 128 * 256 * 4
    linear, norms = 1024 * 2048 + 2048 * 2048, 2 * (64 + 128 + 256 + 2048 + 2048)
    assert size(net) == convolutions + linear + norms == 6_508_416
    kinds = [type(layer).__name__ for layer in net]
    assert kinds == 3 * ["Conv2d", "BatchNorm2d", "ReLU", "Dropout", "MaxPool2d"] + ["Flatten"] + 2 * [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Dropout",
    ]
    assert [layer.p for layer in net if isinstance(layer, nn.Dropout)] == [0.2, 0.2, 0.5, 0.5, 0.5]
    assert not list(net.buffers()) and not any(name.endswith("bias") and "." not in name for name in net.state_dict())
    assert all(layer.bias is None for layer in net if isinstance(layer, nn.Conv2d | nn.Linear))


def test_alexnet_of_hat_has_biases_for_norms() -> None:
    net, normed = AlexNetGPM((3, 32, 32), norm=False), AlexNetGPM((3, 32, 32))
    assert [type(layer) for layer in net] == [t for t in map(type, normed) if t not in (nn.BatchNorm2d, nn.BatchNorm1d)]
    assert size(net) == size(normed) - (64 + 128 + 256 + 2048 + 2048), "a bias where there were scale and shift"
    assert len(chained_layers(net.eval(), (3, 32, 32))) == 5, "its units can be gated"
    with pytest.raises(InputError, match="without norms"):
        chained_layers(normed.eval(), (3, 32, 32))


def test_batch_norm_of_an_mlp_stands_before_each_relu():
    kinds = [type(layer) for layer in MLP((3,), [5, 4], bias=False, norm=True)]
    assert kinds == [nn.Flatten, *([nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2)]
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in MLP((3,), [5, 4]))


def test_mlp_is_linear_and_relu() -> None:
    net = MLP((1, 28, 28))
    assert size(net) == 784 * 100 + 100 + 100 * 100 + 100
    x = batch((1, 28, 28))
    first, second = (layer for layer in net if isinstance(layer, nn.Linear))
    torch.testing.assert_close(net(x), second(first(x.flatten(1)).relu()).relu())
    assert MLP((2, 3), hidden=[]).num_features == 6


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 16, 8)])
def test_vit_equals_timm_and_encodes_any_length(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    vit = ViT(shape, dim=24, depth=2, heads=2, dropout=0.3, drop_path=0.2)
    x = batch(shape)
    patches = shape[1] * shape[2] // 16
    for mode in (True, False):
        vit.train(mode)
        torch.manual_seed(1)
        ours = vit(x)
        torch.manual_seed(1)
        theirs = vit.model.forward_head(vit.model.forward_features(x), pre_logits=True)
        assert torch.equal(ours, theirs)
    tokens = vit.embed(x)
    assert tokens.shape == (4, 1 + patches, 24)
    prompts = torch.randn(4, 5, 24)
    encoded = vit.encode(torch.cat([prompts, tokens], dim=1))
    assert encoded.shape == (4, 6 + patches, 24)
    assert not torch.allclose(encoded[:, 5], vit(x), atol=1e-3)  # the prompts are attended to
    assert vit.encode(tokens[:, :1]).shape == (4, 1, 24)


def test_timm_offers_tokens_only_for_a_transformer() -> None:
    x = batch((3, 32, 32))
    vit, cnn = Timm((3, 32, 32), "test_vit").eval(), Timm((3, 32, 32), "test_resnet")
    assert torch.equal(vit.encode(vit.embed(x)), vit.model.forward_features(x))
    assert not hasattr(cnn, "embed") and not hasattr(cnn, "encode")
    copied = copy.deepcopy(vit)
    torch.nn.init.zeros_(copied.model.cls_token)
    assert not torch.equal(copied.embed(x), vit.embed(x))  # a copy uses its own weights


def test_timm_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no timm model called 'vit_tinny_patch16_224': did you mean 'vit_tiny"):
        Timm((3, 32, 32), "vit_tinny_patch16_224")
    with pytest.raises(InputError, match=r"timm cannot build 'test_resnet' for inputs .*colour"):
        Timm((3, 32, 32), "test_resnet", colour=1)
    with pytest.raises(InputError, match=r"takes images .* not inputs of shape \(5,\)"):
        Timm((5,), "test_resnet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="check the network, or set pretrained=false") as caught:
        Timm((3, 160, 160), "test_vit", pretrained=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "shape", "words"),
    [
        (SimpleCNN, (3, 7, 32), "SimpleCNN takes images .* at least 8x8"),
        (ResNet18, (3, 7, 7), "ResNet18 takes images .* at least 8x8"),
        (ResNet18, (64,), r"ResNet18 takes images \(C, H, W\)"),
        (AlexNetGPM, (3, 18, 32), "AlexNetGPM takes images .* at least 19x19"),
        (ViT, (3, 30, 32), "patch_size=4 of ViT does not divide 30x32"),
        (ViT, (32, 32), "ViT takes images"),
        (lambda shape: ViT(shape, heads=5), (3, 32, 32), "dim=192 of ViT is not a multiple of heads=5"),
        (lambda shape: MLP(shape, hidden=[5, 0]), (3,), r"hidden=\[5, 0\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(make: Any, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(shape)


def test_smallest_images_fit() -> None:
    assert AlexNetGPM((3, 19, 19), hidden=8)(batch((3, 19, 19))).shape == (4, 8)
    assert SimpleCNN((3, 8, 8))(batch((3, 8, 8))).shape == (4, 128)


def test_load_backbone(tmp_path: Path) -> None:
    saved, net = MLP((4,), [3]), MLP((4,), [3])
    state = {f"backbone.{k}": v for k, v in saved.state_dict().items()} | {"head.weight": torch.zeros(2)}
    torch.save({"state_dict": state}, tmp_path / "run.ckpt")
    load_backbone(net, tmp_path / "run.ckpt")
    assert torch.equal(net(batch((4,))), saved(batch((4,))))
    for other in (MLP((4,), [5]), MLP((4,), [3], bias=False), MLP((4,), [3, 3])):
        with pytest.raises(InputError, match="weights of another backbone than MLP"):
            load_backbone(other, tmp_path / "run.ckpt")
    with pytest.raises(InputError, match="is not a file"):
        load_backbone(net, tmp_path / "none.ckpt")
    torch.save({"weights": state}, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": print}, tmp_path / "code.ckpt")
    for name in ("other", "text", "code"):
        with pytest.raises(InputError, match="is not a checkpoint"):
            load_backbone(net, tmp_path / f"{name}.ckpt")


@pytest.mark.parametrize(
    "file", sorted({*(CONF / "backbone").glob("*.yaml")} - {CUSTOM, *DOWNLOADED}), ids=lambda file: file.stem
)
def test_configured_backbones(file: Path) -> None:
    shape = (3, 224, 224) if file.stem == "timm" else (3, 32, 32)
    net = instantiate(OmegaConf.load(file), input_shape=shape)
    assert isinstance(net.num_features, int)


@pytest.mark.parametrize("file", sorted((CONF / "dataset").glob("*.yaml")), ids=lambda file: file.stem)
def test_configured_datasets(file: Path, tmp_path: Path) -> None:
    with initialize_config_module("cl.conf", version_base="1.3"):
        config = compose("config", overrides=[f"dataset={file.stem}"]).dataset
    if file.stem in ("digits", "synthetic", "synthetic_images"):
        assert instantiate(config).num_classes == 10
        return
    if file.stem == "map_style":  # of what the user names: test_compose.py
        assert OmegaConf.is_missing(config.train, "_target_") and OmegaConf.is_missing(config.test, "_target_")
        return
    place = {"path" if file.stem == "huggingface" else "root": str(tmp_path)}
    changes = place | ({"download": False} if "download" in config else {})
    with pytest.raises(InstantiationException, match=r"could not be loaded|is not a folder|cannot be read|huggingface"):
        instantiate(config, **changes)
