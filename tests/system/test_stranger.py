"""A file from a stranger is data: a pickle that would run code does not run it, wherever it stands."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from cl.backbones.networks import load_backbone
from cl.data.cache import cached
from cl.data.rows import Mapped, open_array
from cl.engine import checkpoint
from cl.engine.branch import Branch
from cl.engine.experiment import Experiment
from cl.errors import InputError
from cl.files import digest_of
from cl.strategies.er import ER
from cl.testing import ToyBackbone, toy_learner

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)


class Evil:
    """Writes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def archives(folder: Path, mark: Path) -> dict[str, Path]:
    """Return files that run code when they are unpickled: as torch writes them, as it once did, and bare."""
    evil = Evil(mark)
    content = {"state_dict": {"backbone.layers.1.weight": evil}, "instruments": {}, "inside": evil}
    made = {name: folder / f"{name}.ckpt" for name in ("zip", "legacy", "bare")}
    torch.save(content, made["zip"])
    torch.save(content, made["legacy"], _use_new_zipfile_serialization=False)
    made["bare"].write_bytes(pickle.dumps(content))
    return made


def seal(source: Path, path: Path) -> None:
    """Put a file in the place of a checkpoint, with the digest that belongs there."""
    shutil.copy(source, path)
    if zipfile.is_zipfile(path):
        checkpoint._seal(path, path.name)
    else:
        digest = digest_of(path, name=path.name)
        path.write_bytes(path.read_bytes() + digest.encode())
    assert checkpoint.is_whole(path)


def experiment(folder: Path, **options: object) -> Experiment:
    learner, stream = toy_learner({"er": ER(memory_size=10)})
    return Experiment(learner, stream, trainer, epochs=1, directory=folder, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    experiment(folder).run()
    return folder


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_the_pickles_are_what_they_should_be(tmp_path: Path, kind: str) -> None:
    """Unpickled without care, each of them acts."""
    mark = tmp_path / "executed"
    torch.load(archives(tmp_path, mark)[kind], weights_only=False) if kind != "bare" else pickle.loads(
        archives(tmp_path, mark)[kind].read_bytes()
    )
    assert mark.is_dir()


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("name", ["after_task_002.ckpt", "in_task_002_step_00000003.ckpt"])
def test_in_a_run_directory_nothing_is_executed(finished: Path, tmp_path: Path, kind: str, name: str) -> None:
    mark, place = tmp_path / "executed", tmp_path / "run"
    shutil.copytree(finished, place)
    for task in (2, 3) if name.startswith("in") else (3,):
        (place / "checkpoints" / f"after_task_{task:03d}.ckpt").unlink()
    path = place / "checkpoints" / name
    seal(archives(tmp_path, mark)[kind], path)
    with pytest.raises(InputError, match=name) as refused:
        experiment(place).run()
    assert "\n" not in str(refused.value) and not mark.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_as_weights_and_as_a_branch_nothing_is_executed(finished: Path, tmp_path: Path, kind: str) -> None:
    mark, place = tmp_path / "executed", tmp_path / "run"
    file = archives(tmp_path, mark)[kind]
    with pytest.raises(InputError, match="is not a checkpoint"):
        load_backbone(ToyBackbone(), file)
    shutil.copytree(finished, place)
    (place / "config.yaml").write_text("{}\n")
    seal(file, place / "checkpoints" / "after_task_001.ckpt")
    with pytest.raises(InputError, match="after_task_001"):
        experiment(tmp_path / "new", branch=Branch(place, 1), config={}).run()
    assert not mark.exists()


def test_on_the_command_line_nothing_is_executed(cl_run: Any, tmp_path: Path) -> None:
    """verify=, resume=, from=, score= and weights= of a directory with such files end in one sentence each."""
    mark = tmp_path / "executed"
    small = ["epochs=1", "stream.num_tasks=2", "trainer.accelerator=cpu", "report=quiet", "~report.picture"]

    assert cl_run("hydra.run.dir=out", *small, cwd=tmp_path).returncode == 0
    last = tmp_path / "out" / "checkpoints" / "after_task_002.ckpt"
    seal(archives(tmp_path, mark)["zip"], last)
    seal(archives(tmp_path, mark)["zip"], last.with_name("after_task_001.ckpt"))
    asked = {
        "after_task_002": ["verify=out"],
        "after_task_002.ckpt": ["score=out", "hydra.run.dir=new"],
        "after_task_001": ["from=out:task=1", "hydra.run.dir=new", *small],
        "zip.ckpt": ["weights=zip.ckpt", "hydra.run.dir=other", *small],
    }
    for named, arguments in asked.items():
        result = cl_run(*arguments, cwd=tmp_path)
        assert result.returncode == 1 and named in result.stderr, result.stderr
        assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1
    (tmp_path / "out" / "result.json").unlink()
    result = cl_run("resume=out", cwd=tmp_path)
    assert result.returncode == 1 and "after_task_002" in result.stderr and "Traceback" not in result.stderr
    assert not mark.exists()


def test_arrays_that_hold_objects_are_refused(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    objects = np.array([Evil(mark)], dtype=object)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "x.npz", x=objects)
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(Evil(mark)))
    for name in ("x.npy", "x.npz", "bare.npy"):
        with pytest.raises(InputError, match=name):
            open_array(tmp_path / name)
    for name in ("x.npy", "bare.npy"):
        with pytest.raises(ValueError, match=r"object|pickle"):
            Mapped(tmp_path / name)
    entry = cached("key", tmp_path / "cache", lambda allocate: {"x": np.ones(3)})
    assert len(entry) == 1
    file = tmp_path / "cache" / "key" / "x.npy"
    raw = (tmp_path / "bare.npy").read_bytes()
    file.write_bytes(raw + bytes(file.stat().st_size - len(raw)))  # of the size that the cache knows
    rebuilt = cached("key", tmp_path / "cache", lambda allocate: {"x": np.ones(3)})  # its digest tells
    assert rebuilt["x"].tolist() == [1, 1, 1] and not mark.exists()
