"""What holds for every test: the models are tiny, so a second thread costs more than it brings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

collect_ignore = ["clusters"]  # scripts that CI calls where Slurm and Ray are installed


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep Weights & Biases offline; return a place for a run."""
    for name in ("WANDB_API_KEY", "WANDB_DATA_DIR", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "run"
