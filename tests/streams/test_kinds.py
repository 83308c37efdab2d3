"""Every kind of stream runs by its configuration, under every scenario that it supports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from checkout import CONF
from cl.app.build import build

NEED_FILES = {"custom", "five_datasets", "from_arrays", "image_folders", "manifest", "avalanche"}
HIDDEN = {"hidden_labels"}  # needs a strategy that learns without labels
KINDS = sorted({p.stem for p in (CONF / "stream").glob("*.yaml")} - NEED_FILES - HIDDEN)
FIXED = {
    "chronological": ["task"],
    "data_incremental": ["domain"],
    "linear_teachers": ["domain"],
    "transfer_by_design": ["domain"],
}
OWN = {"i_blurry": ["class", "task"], "repetition": ["class", "task"], "mosaic": ["class", "task", "domain"]}
OWN["overlapping"] = ["task", "class"]
SMALL = {
    "b0_inc10": ["stream.classes_per_task=5"],
    "b50_inc10": ["stream.first_task=4", "stream.classes_per_task=3"],
    "overlapping": ["stream.classes=[[0,1],[1,2]]"],
    "permuted": ["stream.num_tasks=3"],
    "rotated": ["stream.num_tasks=3"],
    "repetition": ["stream.num_tasks=5"],
    "corrupted": ["stream.kinds=[clean,fog,jpeg_compression]"],
    "mosaic": ["stream.num_images=100", "stream.num_test=40"],
}
# Each kind under its first scenario every time; the others are slow.
CASES = [
    pytest.param(kind, scenario, marks=[pytest.mark.slow] if later else [])
    for kind in KINDS
    for later, scenario in enumerate(FIXED.get(kind, OWN.get(kind, ["class", "task", "domain"])))
]


@pytest.mark.parametrize(("kind", "scenario"), CASES)
def test_a_kind_runs(kind: str, scenario: str, tmp_path: Path):
    overrides = [
        f"stream={kind}",
        "strategy=finetune",
        "report=quiet",
        "logger=none",
        "trainer.accelerator=cpu",
        "epochs=1",
    ]
    overrides += [f"scenario={scenario}"] * (kind not in FIXED) + SMALL.get(kind, [])
    with initialize_config_module("cl.conf", version_base="1.3"):
        cfg = compose("config", overrides=overrides)
    cfg.report = {}
    experiment = build(cfg, tmp_path)
    run = experiment.run()
    assert run.scenario == scenario
    assert bool(torch.isfinite(run.primary.R).all())
    assert run.primary.R.shape == (len(experiment.stream) + 1, len(experiment.stream))
