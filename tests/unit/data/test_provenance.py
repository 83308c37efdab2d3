"""Data or code that change between two sessions of a run are told; what stays the same goes on."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from cl.compare.command import parser
from cl.compare.command import run as compare
from cl.data import provenance, rows
from cl.data.provenance import changes, digest
from cl.data.rows import Mapped
from cl.data.task import Stream, Task, TaskData
from cl.engine.experiment import Experiment
from cl.errors import InputError
from cl.report.config_file import read_config
from cl.report.tables import FileReport
from cl.strategies.er import ER
from cl.testing import toy_learner, toy_stream

cpu = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)

pytestmark = pytest.mark.xdist_group(__name__)  # one worker makes what all of these look at

STRATEGY = """
from cl.engine.strategy import Strategy
from helper import factor

class Shrink(Strategy):
    def loss(self, learner, batch, logits):
        return factor * logits.square().mean()
"""
ARRAYS = ["stream=from_arrays", *(f"stream.{name}={name}.npy" for name in ("train_x", "train_y", "test_x", "test_y"))]
COMMAND = [
    *(*ARRAYS, "stream.num_tasks=3", "strategy=[]", "+strategy.shrink._target_=mine.Shrink", "epochs=1"),
    *("report=quiet", "logger=none", "trainer.accelerator=cpu", "hydra.run.dir=out"),
]


def write_arrays(place: Path) -> None:
    draw = np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 30)):
        np.save(place / f"{name}_x.npy", draw.normal(size=(count, 4)).astype(np.float32))
        np.save(place / f"{name}_y.npy", np.arange(count) % 6)


@pytest.fixture(scope="module")
def half(cl_run, tmp_path_factory):
    """A run that was stopped after two of three tasks."""
    place = tmp_path_factory.mktemp("half")
    write_arrays(place)
    (place / "mine.py").write_text(STRATEGY)
    (place / "helper.py").write_text("factor = 0.1\n")
    done = cl_run(*COMMAND, cwd=place)
    assert done.returncode == 0, done.stderr
    finished = place / "finished"
    shutil.copytree(place / "out", finished / "out")
    for name in ("checkpoints/after_task_003.ckpt", "result.json"):
        (place / "out" / name).unlink()
    return place


def other_pixels(place: Path) -> None:
    x = np.load(place / "train_x.npy")
    np.save(place / "train_x.npy", x + np.float32(1e-6))


def permuted_labels(place: Path) -> None:
    y = np.load(place / "train_y.npy")
    np.save(place / "train_y.npy", y[[1, 0, *range(2, len(y))]])


def fewer_rows(place: Path) -> None:
    for name in ("test_x", "test_y"):
        np.save(place / f"{name}.npy", np.load(place / f"{name}.npy")[:-6])


def edited(name: str):
    def edit(place: Path) -> None:
        (place / name).write_text((place / name).read_text().replace("0.1", "0.2") + "\n")

    return edit


CHANGES = {
    "inputs of task 1 train": other_pixels,
    "task 1 t": permuted_labels,
    "task 1 test had 10 rows and has 8": fewer_rows,
    "source of mine": edited("mine.py"),
    "source of helper": edited("helper.py"),
}


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        *(
            ("half", "inputs of task 1 train"),
            ("half", "task 1 test had 10 rows and has 8"),
            ("half", "source of helper"),
        ),
        *(("finished", "task 1 t"), ("finished", "source of mine")),
    ],
)
def test_changed_data_or_code_is_refused_with_what_changed(words, stage, half, cl_run, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(half, place)
    if stage == "finished":
        shutil.rmtree(place / "out")
        shutil.move(place / "finished" / "out", place / "out")
    CHANGES[words](place)
    before = {f: f.read_bytes() for f in (place / "out").rglob("*") if f.is_file() and f.suffix != ".log"}
    refused = cl_run(*COMMAND, cwd=place)
    assert refused.returncode == 1 and words in refused.stderr and "allow_changed=true" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert before == {f: f.read_bytes() for f in (place / "out").rglob("*") if f.is_file() and f.suffix != ".log"}


def test_a_change_that_is_allowed_stands_beside_the_numbers_for_good(half, cl_run, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(half, place)
    other_pixels(place)
    for options in (["allow_changed=true"], []):  # the second goes on from what the first recorded
        done = cl_run(*COMMAND, *options, cwd=place)
        assert done.returncode == 0, done.stderr
        assert "Changed between two sessions: inputs of task 1 train" in (place / "out/transfer.json").read_text()
        for name in ("checkpoints/after_task_003.ckpt", "result.json"):
            (place / "out" / name).unlink()


def test_files_written_anew_with_the_same_content_are_no_change(half, cl_run, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(half, place)
    write_arrays(place)
    done = cl_run(*COMMAND, cwd=place)
    assert done.returncode == 0, done.stderr


def test_a_branch_wants_the_data_of_its_parent(half, cl_run, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(half, place)
    other_pixels(place)
    branch = [*COMMAND[:-1], "from=out:task=1", "hydra.run.dir=branch"]
    refused = cl_run(*branch, cwd=place)
    assert refused.returncode == 1 and "learned other data (inputs of task 1 train" in refused.stderr
    allowed = cl_run(*branch, "allow_changed=true", cwd=place)
    assert allowed.returncode == 0, allowed.stderr
    assert "Data changed since the run it begins from" in (place / "branch/transfer.json").read_text()


def test_rows_of_a_large_file_are_read_once_and_again_only_where_it_was_touched(tmp_path, monkeypatch):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(12, dtype=np.float32).reshape(6, 2))
    data = TaskData(Mapped(path), torch.arange(6))
    reads = []
    monkeypatch.setattr(provenance, "parts", lambda x: reads.append(1) or rows.parts(x))
    first = digest(data)
    assert digest(TaskData(Mapped(path), torch.arange(6))) == first and len(reads) == 1
    array = np.load(path)
    array[5, 1] += 1  # beyond any sample of the first rows
    np.save(path, array)
    os.utime(path, ns=(1, 1))
    assert digest(TaskData(Mapped(path), torch.arange(6)))[1] != first[1] and len(reads) == 2


def test_what_tells_two_sets_apart():
    x, y = torch.arange(12.0).view(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    same = TaskData(x.clone(), y.clone())
    one = TaskData(x, y)
    assert digest(one) == digest(same)
    assert digest(one)[0] != digest(TaskData(x, y.flip(0)))[0]
    assert digest(one)[0] != digest(TaskData(x, y, task=1))[0]
    assert digest(one)[1] != digest(one.take(torch.tensor([1, 0, 2, 3, 4, 5])))[1]
    assert digest(one)[1] != digest(one.then(lambda v: v.flip(1)))[1]
    assert digest(one)[1] != digest(TaskData(x.double(), y))[1]


def test_every_part_of_every_task_counts():
    stream = toy_stream(3)
    before = provenance.provenance(stream, {})
    for t in range(3):
        for name in ("train", "test"):

            def build(k: int, t: int = t, name: str = name) -> Task:
                task = stream[k]
                moved = task.each(lambda part: part.then(lambda v: v + 1))
                return Task(k, **{n: getattr(moved if (k, n) == (t, name) else task, n) for n in ("train", "test")})

            after = provenance.provenance(Stream(build, num_tasks=3, scenario="domain", num_classes=6), {})
            assert changes(before, after) == [f"inputs of task {t + 1} {name}"]


def test_a_torn_record_is_no_reason_to_stop(tmp_path):
    found = provenance.provenance(toy_stream(2), {})
    assert provenance.check_and_store(tmp_path, found, allowed=False, begun=False) == []
    (tmp_path / "provenance.json").write_text("{")
    assert provenance.check_and_store(tmp_path, found, allowed=False, begun=True) == []
    with pytest.raises(InputError, match="inputs of task 1 train"):
        other = {**found, "data": {**found["data"], "task 1 train": [found["data"]["task 1 train"][0], "", ""]}}
        provenance.check_and_store(tmp_path, other, allowed=False, begun=True)


def test_what_was_told_of_a_change_is_told_in_later_sittings(tmp_path):
    found = provenance.provenance(toy_stream(2), {})
    assert provenance.check_and_store(tmp_path, found, allowed=True, begun=False, remarks=["Other data before."]) == [
        "Other data before."
    ]
    assert provenance.check_and_store(tmp_path, found, allowed=False, begun=True) == ["Other data before."]


def test_a_run_made_from_python_keeps_its_configuration_and_can_be_compared(tmp_path):
    for seed in (0, 1):
        for name, strategy in (("er", ER(memory_size=10)), ("finetune", None)):
            learner, stream = toy_learner({name: strategy} if strategy else {}, num_tasks=2, seed=seed)
            place = tmp_path / f"{name}_{seed}"
            Experiment(learner, stream, cpu, directory=place, reports=[FileReport()]).run()
    config = read_config(tmp_path / "er_0" / "config.yaml")
    assert config["strategy"]["er"] == {"_target_": "cl.strategies.er.ER", "memory_size": 10} | {
        key: config["strategy"]["er"][key] for key in config["strategy"]["er"].keys() - {"_target_", "memory_size"}
    }
    compare(parser().parse_args([str(tmp_path), "--out", str(tmp_path)]))
    assert "er" in (tmp_path / "comparison.csv").read_text()


def test_another_learner_from_python_is_refused_in_the_same_directory(tmp_path):
    for rate, refused in ((0.1, False), (0.1, False), (0.2, True)):
        learner, stream = toy_learner({"er": ER(memory_size=10)}, num_tasks=2, lr=rate)
        work = Experiment(learner, stream, cpu, directory=tmp_path).run
        if not refused:
            work()
            continue
        with pytest.raises(InputError, match=r"another configuration \(optimizer\.lr: 0\.1 there, 0\.2 here"):
            work()
