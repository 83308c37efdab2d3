"""Vision transformers of Hugging Face from a folder in their true format, without a connection."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from cl.app.build import _notes
from cl.backbones.blocks import blocks, freeze
from cl.backbones.huggingface_vit import HuggingFaceViT
from cl.backbones.networks import MLP
from cl.errors import InputError
from cl.toolkit.inject import Adapter, LowRank, add, add_low_rank, awaken, find

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of transformers itself

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL))
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4], resample=3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        model.save_pretrained(path)
        processor.save_pretrained(path)
    return path


def pixels(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_features_are_the_class_token_of_the_librarys_own_model_on_its_processors_images(folder: Path) -> None:
    state = torch.random.get_rng_state()
    network = HuggingFaceViT((3, 32, 32), str(folder)).eval()
    assert torch.equal(torch.random.get_rng_state(), state)  # loading draws nothing
    assert network.num_features == 16 and network.normalizes and len(blocks(network)) == 4
    assert network[0][0].resize.interpolation == "bicubic"
    model = transformers.ViTModel.from_pretrained(folder).eval()
    x = pixels(32)
    prepared = transformers.ViTImageProcessor.from_pretrained(folder)(list(x), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        own = model(prepared).last_hidden_state
        assert torch.allclose(network(x), own[:, 0], atol=1e-6)
        assert torch.allclose(network.encode(network.embed(x)), own, atol=1e-6)
        assert network(pixels(20)).shape == (3, 16)  # resized
        whole, through = network(x), x
        for block in blocks(network):
            through = block(through)
        assert torch.equal(through, whole)


def test_images_of_another_size_interpolate_the_positions(folder: Path) -> None:
    network = HuggingFaceViT((3, 32, 32), str(folder), image_size=48).eval()
    model = transformers.ViTModel.from_pretrained(folder).eval()
    x = pixels(48)
    with torch.no_grad():
        own = model(network[0][0](x), interpolate_pos_encoding=True).last_hidden_state[:, 0]
        assert network.embed(x).shape == (3, 37, 16)
        assert torch.allclose(network(x), own, atol=1e-6)


def test_it_freezes_in_part_and_takes_low_ranks_and_adapters(folder: Path) -> None:
    network = HuggingFaceViT((3, 32, 32), str(folder))
    assert network.training and all(module.training for module in network.modules())
    freeze(network, 2)
    assert not any(p.requires_grad for block in blocks(network)[:2] for p in block.parameters())
    assert all(p.requires_grad for block in blocks(network)[2:] for p in block.parameters())
    freeze(network)
    x = pixels(32) / 255
    before = network(x)
    names = find(network, ["linear"], [1])
    assert len(names) == 6  # queries, keys, values, outputs, and two layers of the MLP
    pairs = add_low_rank(network, names, lambda weight: LowRank(weight, rank=2))
    add(network, find(network, ["block"], [1, 2]), [lambda channels: Adapter(channels, width=3)], x)
    awaken(network)
    assert torch.equal(network(x), before)
    network(x).square().sum().backward()
    assert all(pair.B.grad is not None and pair.B.grad.any() for pair in pairs)
    for pair in pairs:
        torch.nn.init.ones_(pair.B)
    assert not torch.allclose(network(x), before, atol=1e-3)


def test_its_frozen_weights_are_no_random_ones(folder: Path) -> None:
    network = freeze(HuggingFaceViT((3, 32, 32), str(folder)))
    cfg = OmegaConf.create({"weights": None, "backbone": {"name": "any"}})
    assert _notes(cfg, network) == []
    assert _notes(cfg, freeze(MLP((4,), [3])))[0].startswith("The backbone is frozen at random weights")


def test_what_cannot_be_loaded_is_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="images of 3 channels and a multiple of 8 pixels, not 1 and 32"):
        HuggingFaceViT((1, 28, 28), str(folder))
    with pytest.raises(InputError, match="not 3 and 30"):
        HuggingFaceViT((3, 32, 32), str(folder), image_size=30)
    with pytest.raises(InputError, match=r"cannot load .*name a folder with a model and its image processor"):
        HuggingFaceViT((3, 32, 32), str(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    for name in ("model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(InputError, match="lacks 16 weights"):
        HuggingFaceViT((3, 32, 32), str(tmp_path))
    monkeypatch.setattr("cl.backbones.huggingface_vit.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'clsim\[transformers\]'"):
        HuggingFaceViT((3, 32, 32), "google/vit-base-patch16-224-in21k")
