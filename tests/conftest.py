"""What holds for every test: the models are tiny, so a second thread costs more than it brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.trainer.connectors import callback_connector

from checkout import HARNESS

Done = subprocess.CompletedProcess[str]

torch.set_num_threads(1)
# each Trainer looks through all that is installed for callbacks, a fifth of a small job; tests want none of them
callback_connector._load_external_callbacks = lambda group: []

collect_ignore = ["clusters", "harness"]  # scripts


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep Weights & Biases offline; return a place for a run."""
    for name in ("WANDB_API_KEY", "WANDB_DATA_DIR", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Give the package `datasets`, with a cache of the test's own."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    hub = pytest.importorskip("datasets")
    hub.disable_progress_bars()
    return hub


@pytest.fixture(scope="session")
def cl_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Done]]:
    """Run `cl-run` as a process of its own: of a new interpreter, or a fork of one that has imported torch already."""
    harness = HARNESS / "warm.py"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server: list[subprocess.Popen[str]] = []
    place = tmp_path_factory.mktemp("commands")

    def call(*arguments: str, cwd: Path, path: Path | None = None, cold: bool = False) -> Done:
        if cold or not hasattr(os, "fork"):
            environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
            command = [sys.executable, "-m", "cl", *arguments]
            return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        if not server:
            server.append(subprocess.Popen([sys.executable, str(harness)], **pipes))  # type: ignore[call-overload]
        out, err = place / "out.txt", place / "err.txt"
        out.write_text(""), err.write_text("")
        asked = {"arguments": arguments, "cwd": str(cwd), "path": [str(path)] if path else []}
        print(json.dumps({**asked, "out": str(out), "err": str(err)}), file=server[0].stdin, flush=True)
        assert server[0].stdout is not None
        status = int(server[0].stdout.readline())
        return Done(arguments, status, out.read_text(), err.read_text())

    yield call
    for process in server:
        process.communicate()
