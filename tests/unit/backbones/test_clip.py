"""CLIP by open_clip, of small random weights in files of the true format, without a connection."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cl
from cl.backbones.blocks import blocks, freeze
from cl.backbones.clip import OpenClip, text_vectors
from cl.data.dataset import Dataset
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies.lingocl import LingoCL
from cl.strategies.zscl import ZSCL
from cl.testing import toy_learner
from cl.toolkit.inject import LowRank, add_low_rank, awaken, find

open_clip = pytest.importorskip("open_clip")

CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
TEMPLATES = ["a photo of a {}.", "a drawing of the {}"]
NAMES = ("polar_bear", "cat", "lawn mower")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return the folder of a CLIP, and the file of its weights."""
    path = tmp_path_factory.mktemp("clip")
    (path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}})
    )
    (path / "small_clip.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path / "small_clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("small_clip")
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    torch.save(model.state_dict(), path / "open_clip_pytorch_model.bin")
    return f"local-dir:{path}", path / "open_clip_pytorch_model.bin"


def pixels(size: int = 32) -> Tensor:
    return torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def named() -> Dataset:
    """Return a data set of three classes with names."""
    x, y = pixels().repeat(2, 1, 1, 1), torch.arange(6) % 3
    return Dataset("named", x, y, x.clone(), y.clone(), class_names=NAMES)


def zero_shot(folder: str, x: Tensor) -> Tensor:
    """Return open_clip's own logits of bytes x."""
    model = open_clip.create_model(folder).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    names = [name.replace("_", " ") for name in NAMES]
    texts = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer(folder), names, TEMPLATES)
    with torch.no_grad():
        images = model.encode_image((x / 255 - mean) / std, normalize=True)
        return model.logit_scale.exp() * images @ texts


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("method", [LingoCL, ZSCL])
def test_the_first_logits_are_open_clips_own_zero_shot_logits(files, method, frozen) -> None:
    network = OpenClip((3, 32, 32), files[0], templates=TEMPLATES)
    if frozen:
        freeze(network)
    stream = cl.streams.split(named(), num_tasks=3, scenario="class")
    state = torch.random.get_rng_state()
    assert network.class_vectors(NAMES).shape == (3, 12)
    assert torch.equal(torch.random.get_rng_state(), state)
    learner = Learner(stream, network, {"it": method("text", eta=None)}, lambda p: torch.optim.SGD(p, lr=0.1))
    x = pixels()
    with learner.evaluating(), torch.no_grad():
        logits = learner.head(learner.backbone(learner.prepare(x)))
    assert torch.allclose(logits, zero_shot(files[0], x), atol=1e-5)
    assert logits.std() > 0.1


def test_the_image_tower_is_open_clips_in_blocks(files) -> None:
    folder, weights = files
    network = OpenClip((3, 32, 32), "small_clip", str(weights))
    assert all(module.training for module in network.modules())
    network.eval()
    assert network.num_features == 12 and network.normalizes and network.pretrained and len(blocks(network)) == 4
    assert network.eta == pytest.approx(math.exp(open_clip.create_model(folder).logit_scale.item()))
    tower = open_clip.create_model(folder).visual.eval()
    x = pixels()
    with torch.no_grad():
        assert torch.allclose(network(x), tower(network[0][0](x)), atol=1e-6)
        assert torch.allclose(network[0][0](x)[:, 0], (x[:, 0] / 255 - 0.48145466) / 0.26862954, atol=1e-6)
        assert network(pixels(20)).shape == (3, 12)  # resized
        assert OpenClip((3, 32, 32), folder, image_size=48).eval()[0](x).shape == (3, 37, 16)
    assert not any("text" in name or "token_embedding" in name for name, _ in network.named_parameters())
    own = {id(p) for p in network.parameters()}
    assert {id(p) for block in blocks(network) for p in block.parameters()} == own


def test_it_takes_low_ranks(files) -> None:
    network = freeze(OpenClip((3, 32, 32), files[0]))
    x = pixels() / 255
    before = network(x)
    names = find(network, ["c_fc", "c_proj"])
    assert len(names) == 4
    pairs = add_low_rank(network, names, lambda weight: LowRank(weight, rank=2))
    awaken(network)
    assert torch.allclose(network(x), before, atol=1e-5)  # torch computes attention in another way without gradients
    network(x).square().sum().backward()
    assert all(pair.B.grad is not None and pair.B.grad.any() for pair in pairs)


def test_other_towers_are_one_block(tmp_path: Path) -> None:
    average = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "pool_type": "avg"}}
    (tmp_path / "average_clip.json").write_text(json.dumps(average))
    open_clip.add_model_config(tmp_path / "average_clip.json")
    network = OpenClip((3, 32, 32), "average_clip")
    assert len(blocks(network)) == 1 and network(pixels()).shape == (3, 12)
    with pytest.raises(InputError, match=r"random weights knows no names: set backbone.pretrained"):
        network.class_vectors(NAMES)


def test_templates_are_averaged_as_unit_vectors(files) -> None:
    both = text_vectors(["cat"], files[0], None, TEMPLATES)
    parts = [text_vectors(["cat"], files[0], None, [template]) for template in TEMPLATES]
    assert torch.allclose(both, torch.nn.functional.normalize(parts[0] + parts[1], dim=1), atol=1e-6)
    assert not torch.allclose(parts[0], parts[1], atol=1e-3)
    assert torch.equal(text_vectors(["polar_bear"], files[0], None), text_vectors(["polar bear"], files[0], None))


def test_what_cannot_be_is_said(files, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="three channels, not 1"):
        OpenClip((1, 28, 28), files[0])
    with pytest.raises(InputError, match=r"hold \{\}"):
        OpenClip((3, 32, 32), files[0], templates=["a photo"])
    with pytest.raises(InputError, match=r"cannot build 'ViT-B-32' with pretrained='nowhere.bin'"):
        OpenClip((3, 32, 32), "ViT-B-32", "nowhere.bin")
    with pytest.raises(InputError, match="cannot build 'no_clip'"):
        OpenClip((3, 32, 32), "no_clip")
    for vectors, eta, setting in (("text", 1.0, "vectors=text"), ("orthogonal", None, "eta=null")):
        with pytest.raises(InputError, match=f"{setting} asks the backbone's text tower, but ToyBackbone has none"):
            toy_learner({"lingocl": LingoCL(vectors, eta)})
    monkeypatch.setattr("cl.backbones.clip.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'clsim\[clip\]'"):
        OpenClip((3, 32, 32), files[0])
