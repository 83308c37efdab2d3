"""What a run ran on: versions, the commit, and every sitting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cl.report.manifest import versions, write_manifest
from example_runs import make_run


def test_versions_name_what_is_installed_and_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = versions()
    assert found["numpy"] == np.__version__ and found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "platform", "pytorch_lightning", "torchmetrics", "hydra", "clsim"} <= found.keys()
    assert "git_commit" not in found
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert versions()["git_commit"] == head
    (tmp_path / "file").write_text("2")
    assert versions()["git_commit"] == f"{head}-dirty"


def test_looking_for_versions_imports_nothing_heavy() -> None:
    look = "print(sorted({'wandb','timm','avalanche'} & set(sys.modules)))"
    code = f"import sys; from cl.report.manifest import versions; versions(); {look}"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"


def test_a_manifest_tells_of_every_sitting(tmp_path: Path) -> None:
    run = make_run(2, directory=tmp_path / "new")
    write_manifest(run, -1)
    write_manifest(run, 1)
    found = json.loads((run.directory / "manifest.json").read_text())
    assert found["versions"] == versions() and [s["after_task"] for s in found["sittings"]] == [0, 1]
    write_manifest(run, -1)
    assert len(json.loads((run.directory / "manifest.json").read_text())["sittings"]) == 1
