"""Files that were torn or changed are told, and a run goes on from the last whole checkpoint, to the same bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from cl.backbones.networks import load_backbone
from cl.engine import checkpoint
from cl.engine.experiment import Experiment
from cl.files import replace_file
from cl.strategies.er import ER
from cl.testing import ToyBackbone, toy_learner

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)


def experiment(folder: Path) -> Experiment:
    learner, stream = toy_learner({"er": ER(memory_size=10)})
    return Experiment(learner, stream, trainer, epochs=1, directory=folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("whole")
    whole = experiment(folder)
    whole.run()
    return folder, whole.learner.state_dict()


def test_every_byte_of_a_checkpoint_counts(finished: tuple[Path, dict], tmp_path: Path) -> None:
    """A flipped bit anywhere and a cut anywhere are told: 1 of 7 bytes here, all in a run by hand."""
    source = finished[0] / "checkpoints" / "after_task_003.ckpt"
    raw, file = source.read_bytes(), tmp_path / "after_task_003.ckpt"
    for i in range(0, len(raw), 7):
        file.write_bytes(raw[:i] + bytes([raw[i] ^ (1 << (i % 8))]) + raw[i + 1 :])
        with pytest.warns(UserWarning, match="torn or changed"):
            assert checkpoint.latest(tmp_path) is None, i
        file.write_bytes(raw[:i])
        with pytest.warns(UserWarning, match="torn or changed"):
            assert checkpoint.latest(tmp_path) is None, i
    file.write_bytes(raw)
    assert checkpoint.latest(tmp_path) == file


@pytest.mark.parametrize("torn", [1, 2, 3, 4])
def test_a_run_goes_on_from_the_newest_whole_checkpoint_to_the_same_bits(
    finished: tuple[Path, dict], tmp_path: Path, torn: int
) -> None:
    (tmp_path / "checkpoints").mkdir()
    files = sorted((finished[0] / "checkpoints").iterdir())
    for file in files:
        cut = file in files[len(files) - torn :]
        (tmp_path / "checkpoints" / file.name).write_bytes(file.read_bytes()[: -100 if cut else None])
    again = experiment(tmp_path)
    with pytest.warns(UserWarning, match="torn or changed"):
        again.run()
    for (name, a), b in zip(finished[1].items(), again.learner.state_dict().values(), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a.nan_to_num(-7.0) if a.is_floating_point() else a, b.nan_to_num(-7.0)), name
    whole = [checkpoint.latest(tmp_path / "checkpoints")]
    assert whole == [tmp_path / "checkpoints" / "after_task_003.ckpt"]


def test_a_sealed_checkpoint_is_read_by_torch_and_as_weights(finished: tuple[Path, dict]) -> None:
    path = finished[0] / "checkpoints" / "after_task_003.ckpt"
    for mmap in (False, True):
        state = torch.load(path, weights_only=True, mmap=mmap)["state_dict"]
        assert torch.equal(state["head.weight"], finished[1]["head.weight"])
    body = ToyBackbone()
    load_backbone(body, path)
    assert torch.equal(
        next(iter(body.state_dict().values())), next(v for k, v in finished[1].items() if "backbone" in k)
    )


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    replace_file(file, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(file, fail)
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
