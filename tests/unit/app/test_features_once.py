"""The frozen part of a backbone, run once for each input, changes nothing but the time that a run takes."""

from __future__ import annotations

import logging
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from torch import Tensor, nn

import cl
from cl.app.build import build
from cl.app.features_once import features_once
from cl.backbones.blocks import blocks
from cl.backbones.frozen import FrozenBlocks, is_fixed, past_blocks
from cl.data.augment import RandomCropFlip
from cl.data.feature_rows import FeatureRows, Transformed, raw
from cl.data.sources import digits
from cl.data.task import Stream, Task, TaskData
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.testing import toy_stream
from strategies.derpp import DERpp
from strategies.er import ER
from strategies.ncm import NCM

CPU = {"accelerator": "cpu"}


class Net(nn.Sequential):
    """Two convolutions and a linear layer, (B, 1, 4, 4) -> (B, 6), of which the first blocks are frozen."""

    num_features = 6

    def __init__(self, frozen: int) -> None:
        torch.manual_seed(4)
        first, second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        super().__init__(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 6))
        self[1].running_mean.fill_(0.4), self[1].running_var.fill_(0.02)
        for block in list(self)[:frozen]:
            block.requires_grad_(False).eval()


class Calls:
    """Doubles its inputs, and counts them."""

    def __init__(self, name: str = "double") -> None:
        self.name, self.shape, self.rows = name, (2,), 0

    def __call__(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return 2 * x.float()

    def digest(self) -> str:
        return self.name


def learn(folder: Path | None, frozen: int, strategy: Any, stream: Any = None, **options: Any) -> Any:
    stream = stream or toy_stream(3)
    options = {"epochs": 3, "batch_size": 8, "progress": False, "trainer": CPU, **options}
    return cl.run(stream, strategy, Net(frozen), feature_dir=folder, **options)


def holds_features(run: Any) -> bool:
    return isinstance(run.learner.task.train.x, FeatureRows)


@pytest.mark.parametrize("strategy", [[], ER(20), DERpp(20), NCM()], ids=["finetune", "er", "derpp", "ncm"])
@pytest.mark.parametrize("frozen", [7, 3])
def test_results_are_those_of_a_run_on_the_inputs(tmp_path: Path, strategy: Any, frozen: int) -> None:
    plain, once = (learn(folder, frozen, strategy) for folder in (None, tmp_path / "features"))
    assert holds_features(once) and not holds_features(plain)
    for mask, matrix in plain.matrices.items():
        assert torch.equal(matrix.R.nan_to_num(9), once.matrices[mask].R.nan_to_num(9))
    assert plain.matrices["task"].R[3].sum() > 1.8  # it learned something
    x = toy_stream(3)[1].test.tensors()[0]
    for learner in (plain.learner, once.learner):
        learner.eval()
    for (name, one), other in zip(plain.learner.state_dict().items(), once.learner.state_dict().values(), strict=True):
        if isinstance(one, Tensor) and one.shape == other.shape and one.is_floating_point():
            assert torch.allclose(one, other, atol=1e-4), name
    with torch.no_grad():
        logits = [learner(learner.prepare(x)) for learner in (plain.learner, once.learner)]
    assert torch.allclose(*logits, atol=1e-4)  # a learner of features maps raw inputs, too


def test_the_frozen_part_runs_once_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = FrozenBlocks._run

    def counting(self: FrozenBlocks, x: Tensor) -> Tensor:
        seen.append(len(x))
        return run(self, x)

    monkeypatch.setattr(FrozenBlocks, "_run", counting)
    stream = toy_stream(3)
    inputs = sum(len(part) for task in stream for part in (task.train, task.test))
    learn(tmp_path, 7, ER(20), stream)
    first = sum(seen)
    assert inputs <= first <= inputs + 20  # and a few rows of which it learns the shape
    seen.clear()
    learn(tmp_path, 7, [], stream, seed=5)
    assert sum(seen) <= 6 * 5  # rows of which it learns the shape, or that it checks


def test_er_on_a_partly_frozen_backbone_is_latent_replay(tmp_path: Path) -> None:
    """It stores and replays what the frozen blocks return, and trains what follows on that alone."""
    frozen = 3
    stream = toy_stream(3)
    run = learn(tmp_path, frozen, ER(20), stream)
    memory, body = run.learner.strategies["er"].memory, run.learner.backbone
    stored = memory.rows_x[: len(memory)]
    assert stored.shape == (20, 4, 4, 4) and stored.dtype == torch.float32
    start = nn.Sequential(*list(Net(frozen))[:frozen])
    inputs = torch.cat([task.train.tensors()[0] for task in stream])
    labels = torch.cat([task.train.tensors()[1] for task in stream])
    with torch.no_grad():
        latent = start(run.learner.prepare(inputs))
    distance, source = (stored[:, None] - latent[None]).abs().flatten(2).amax(2).min(1)
    assert float(distance.max()) < 1e-4 and torch.equal(memory.rows_y[: len(memory)], labels[source])
    moved = [not torch.equal(a, b) for a, b in zip(body.parameters(), Net(frozen).parameters(), strict=True)]
    assert moved == [False] * 4 + [True] * 4


KEY = """
import sys
from pathlib import Path
import torch
from torch import nn
from cl.backbones.frozen import past_blocks
from cl.data.augment import Normalize
from cl.testing import toy_stream

stream = toy_stream(2)
if sys.argv[2] == "normalized":
    stream = stream.derive(stream.__getitem__, normalize=Normalize([0.5], [0.2]))
torch.manual_seed(0)
net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
past_blocks(stream, net, 2, Path(sys.argv[1]))[0].train.tensors()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "normalized"])
def test_a_file_has_the_same_name_in_every_process(tmp_path: Path, how: str) -> None:
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KEY, str(tmp_path), how], check=True, timeout=120)
        assert len(list(tmp_path.glob("*.done.npy"))) == 1


def test_what_a_run_needs_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Looks(Strategy):
        needs_inputs = True

    class Unfrozen(Strategy):
        def setup(self, learner: Any, stream: Any) -> None:
            learner.backbone.requires_grad_(True)

    class Encodes(Strategy):
        def encode(self, learner: Any, view: Tensor) -> Tensor:
            return learner.backbone(view)  # type: ignore[no-any-return]

    stream = toy_stream(3)
    for strategy, frozen in ((Looks(), 7), (Unfrozen(), 7), (Encodes(), 7), ([], 0)):
        assert not holds_features(learn(tmp_path, frozen, strategy, stream))
    augmented = stream.derive(stream.__getitem__, augment=RandomCropFlip(padding=1))
    with caplog.at_level(logging.INFO):
        assert not holds_features(learn(tmp_path, 7, [], augmented))
    assert "dataset.augment=null" in caplog.text
    assert holds_features(learn(tmp_path, 7, NCM(), augmented))  # nothing is trained, so nothing is augmented
    assert holds_features(learn(tmp_path, 7, [], stream))


def test_inputs_that_are_drawn_anew_at_each_reading_are_not_kept(tmp_path: Path) -> None:
    items = [(torch.rand(1, 4, 4), label % 2) for label in range(12)]
    for lazy in (True, False):
        data = TaskData.from_dataset(items, lazy=lazy)
        run = learn(tmp_path, 7, [], Stream([Task(0, data, data)], num_classes=2), epochs=1)
        assert holds_features(run) is not lazy


def test_instruments_measure_on_features(tmp_path: Path) -> None:
    options = ["freeze=true", "report.points=2", "stream.num_tasks=2", f"feature_dir={tmp_path}/f", "logger=none"]
    with initialize_config_module("cl.conf", version_base="1.3"):
        experiment = build(compose("config", overrides=[*options, "trainer.accelerator=cpu"]), tmp_path / "run")
    curves = experiment.instruments["curves"]
    curves.before_task(experiment.learner, experiment.stream[0])
    assert next(iter(curves._loader)).x.shape[1:] == experiment.stream.input_shape == (100,)


def test_blocks_are_fixed_where_nothing_changes_them() -> None:
    net = Net(7)
    assert all(is_fixed(block) for block in net)
    net[0].weight.requires_grad_(True)
    net[1].train()
    net[3].register_forward_hook(lambda *_: None)
    apart = nn.BatchNorm2d(4, track_running_stats=False).requires_grad_(False).eval()
    assert [is_fixed(block) for block in [*net, apart]] == [False, False, True, False, True, True, True, False]


def test_outputs_that_look_like_inputs_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(16, 3)).requires_grad_(False).eval()
    with pytest.raises(InputError, match="inputs' own shape"):
        past_blocks(toy_stream(2), net, 1, None)
    net.num_features = 3
    made: list[int] = []

    def make(depth: int) -> Any:
        made.append(depth)
        stream = past_blocks(toy_stream(2), net, depth, None) if depth == 1 else toy_stream(2)
        return Learner(stream, net, {}, lambda p: torch.optim.SGD(p, lr=0.1)), stream

    features_once(make)
    assert made == [0, 3]


def test_weights_that_change_after_training_are_refused(tmp_path: Path) -> None:
    class Changes(Strategy):
        def __init__(self, what: str = "weights") -> None:
            super().__init__()
            self.what = what

        def after_task(self, learner: Any, task: Any) -> None:
            if self.what == "weights":
                with torch.no_grad():
                    learner.backbone[0].weight.mul_(2)
            else:
                learner.backbone[0].requires_grad_(True)

    with pytest.raises(InputError, match="weights of a frozen block changed"):
        learn(tmp_path, 7, Changes())
    with pytest.raises(InputError, match="was unfrozen during the run"):
        learn(tmp_path, 7, Changes("freeze"))


def test_a_run_resumes_on_features(tmp_path: Path) -> None:
    whole = learn(tmp_path / "f", 7, ER(20), directory=tmp_path / "whole")

    class Stop(Exception):
        pass

    with pytest.raises(Stop):
        learn(tmp_path / "f", 7, ER(20), directory=tmp_path / "run", reports=[stopping(Stop)])
    again = learn(tmp_path / "f", 7, ER(20), directory=tmp_path / "run")
    assert torch.equal(whole.matrices["class"].R, again.matrices["class"].R)
    for name, value in whole.learner.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, again.learner.state_dict()[name]), name


def stopping(error: type[Exception]) -> Any:
    from cl.report.contract import Report

    class Stops(Report):
        def row(self, run: Any, after_task: int) -> None:
            if after_task == 2:
                raise error

    return Stops()


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_rows_are_computed_once_and_kept(tmp_path: Path) -> None:
    x = torch.arange(6.0).view(3, 2)
    network = Calls()
    for _ in range(2):
        rows = FeatureRows(x, network, str, tmp_path)
        assert rows[torch.tensor([2, 0, 2])].tolist() == [[8.0, 10.0], [0.0, 2.0], [8.0, 10.0]]
        assert len(rows) == 3 and rows.shape == (3, 2)
    assert network.rows == 2 + 2  # two rows once, and again to verify the file
    other = Calls("another")
    assert FeatureRows(x, other, str, tmp_path)[torch.tensor([0, 1])].tolist() == [[0.0, 2.0], [4.0, 6.0]]
    assert other.rows == 2


def test_a_single_row_is_not_stored(tmp_path: Path) -> None:
    assert FeatureRows(torch.ones(3, 2), Calls(), str, tmp_path / "f")[torch.tensor([1])].tolist() == [[2.0, 2.0]]
    assert not (tmp_path / "f").exists()


def test_damaged_rows_are_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x, index = torch.arange(20.0).view(10, 2), torch.arange(10)
    FeatureRows(x, Calls(), str, tmp_path)[index]
    (file,) = (path for path in tmp_path.glob("*.npy") if not path.name.endswith(".done.npy"))
    stored = np.load(file, mmap_mode="r+")
    stored[:] += 1
    stored.flush()
    assert torch.equal(FeatureRows(x, Calls(), str, tmp_path)[index], 2 * x)
    assert "damaged" in caplog.text


def test_rows_of_a_killed_process_that_do_not_count_as_done_are_computed(tmp_path: Path) -> None:
    x, index = torch.arange(20.0).view(10, 2), torch.arange(10)
    FeatureRows(x, Calls(), str, tmp_path)[index]
    (flags,) = tmp_path.glob("*.done.npy")
    done, rows = (
        np.load(flags, mmap_mode="r+"),
        np.load(flags.with_name(flags.name.replace(".done", "")), mmap_mode="r+"),
    )
    done[4:], rows[4:] = 0, -1
    done.flush(), rows.flush()
    network = Calls()
    assert torch.equal(FeatureRows(x, network, str, tmp_path)[index], 2 * x)
    assert network.rows == 4 + 6


def _read(folder: Path, start: int) -> None:
    x = torch.arange(6000.0).view(3000, 2)
    index = torch.arange(3000).roll(start)
    assert torch.equal(FeatureRows(x, Calls(), str, folder)[index], 2 * x[index])


def test_processes_fill_one_file_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_read, args=(tmp_path, 700 * k)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(list(tmp_path.glob("*.done.npy"))) == 1


def test_rows_that_another_process_has_computed_meanwhile_are_taken_from_it(tmp_path: Path) -> None:
    x, index, network = torch.arange(20.0).view(10, 2), torch.arange(10), Calls()
    rows = FeatureRows(x, network, str, tmp_path)
    rows[torch.tensor([0])]  # looks for the file, which is not there yet
    FeatureRows(x, Calls(), str, tmp_path)[index]
    assert torch.equal(rows[index], 2 * x)
    assert network.rows == 1


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(InputError, match="feature_dir"):
        FeatureRows(torch.zeros(3, 2), Calls(), str, tmp_path)[torch.arange(3)]
    with pytest.raises(InputError, match="feature_dir=/dev/null/x cannot be made"):
        FeatureRows(torch.zeros(3, 2), Calls(), str, Path("/dev/null/x"))[torch.arange(3)]


def test_raw_gives_back_the_inputs() -> None:
    x, y = torch.arange(6.0).view(3, 2), torch.arange(3)
    for data in (
        TaskData(x, y, index=torch.tensor([2, 0])),
        TaskData(x, y, index=torch.tensor([2, 0]), transform=torch.neg),
    ):
        inputs = data.x if data.transform is None else Transformed(data)
        index = data.index if data.transform is None else None
        features = TaskData(FeatureRows(inputs, Calls(), str, None), y, index=index)
        assert torch.equal(raw(features).tensors()[0], data.tensors()[0])


def test_streams_with_transforms_have_features_of_their_own(tmp_path: Path) -> None:
    stream = cl.streams.permuted(digits(), num_tasks=2)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).requires_grad_(False).eval()
    expected = [body(task.test.tensors()[0].float() / 255).numpy() for task in stream]
    features = past_blocks(stream, body, len(blocks(body)), tmp_path)
    for task, values in zip(features, expected, strict=True):
        x = body(stream.normalize(stream[task.index].test.tensors()[0])) if stream.normalize else values
        assert torch.allclose(task.test.tensors()[0], torch.as_tensor(x), atol=1e-5)
    assert not torch.allclose(features[0].test.tensors()[0], features[1].test.tensors()[0])
