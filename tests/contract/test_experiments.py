"""The rows on pre-trained weights: each starts from what the recipe makes, and no weights are in the checkout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

from checkout import CONF
from cl.app.build import build as build_experiment
from cl.engine.learner import Learner

ROWS = sorted(path.stem for path in (CONF / "experiment").glob("cifar100_vit_*.yaml") if "pretrain" not in path.stem)
TRAINED = ("finetune", "joint", "slca", "o_lora", "inflora")  # the last two add their products to the weights


def as_saved(name: str) -> str:
    """Return the name of a weight of the backbone before LoRA and adapters were added."""
    return "backbone." + name.replace(".parametrizations.weight.original", ".weight").replace(".layer.", ".")


def run(folder: Path, *overrides: str) -> Learner:
    with initialize_config_module("cl.conf", version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, "report=quiet", "logger=none", "epochs=1"])
    folder.mkdir()
    experiment = build_experiment(cfg, folder)
    experiment.run()
    return experiment.learner


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of images of 54 classes, and the checkpoint that the recipe makes on the first 50."""
    from PIL import Image

    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for c in range(54):
        for part, count in (("train", 2), ("test", 1)):
            place = root / part / f"class_{c:02d}"
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{i}.png")
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    run(folder, "experiment=cifar100_vit_pretrain", f"dataset.root={root}")
    return root, folder / "checkpoints" / "after_task_001.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_every_row_starts_from_the_weights_that_the_recipe_makes(row, pretrained, tmp_path):
    root, checkpoint = pretrained
    small = ["stream.num_tasks=2", "stream.classes=[50,51,52,53]"]
    small += ["strategy.ranpac.num_projections=50"] * row.endswith("ranpac")
    learner = run(tmp_path / "run", f"experiment={row}", f"dataset.root={root}", f"weights={checkpoint}", *small)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    own = {as_saved(name): w for name, w in learner.backbone.state_dict().items()}
    kept = all(torch.equal(own[name], w) for name, w in saved.items() if name.startswith("backbone."))
    assert learner.tasks_learned == 2 and kept == (row.removeprefix("cifar100_vit_") not in TRAINED)


def test_no_weights_are_kept_among_the_sources():
    """A checkpoint lies where the recipe's command puts it, in runs/, which git ignores."""
    recipe = (CONF / "experiment" / "cifar100_vit_pretrain.yaml").read_text()
    assert "hydra.run.dir=runs/" in recipe and "/runs/" in (CONF.parent / ".gitignore").read_text().split()
    for folder in ("cl", "strategies", "streams", "conf", "tests", "benchmarks"):
        found = [p for end in ("ckpt", "pt", "pth", "safetensors") for p in (CONF.parent / folder).rglob(f"*.{end}")]
        assert not found
