"""Data that stay in their file: the same bits as in memory, read by rows, and no more memory than is being read."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from cl.backbones.blocks import depends_on_batch
from cl.compose import copies, permute
from cl.data import rows, task
from cl.data.dataset import Dataset
from cl.data.rows import Items, Mapped, first_not_finite, open_array, release_pages, row_bytes
from cl.data.task import Stream, TaskData
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.loader import EvalLoader, TrainLoader
from cl.errors import InputError
from cl.testing import ToyBackbone, toy_stream

CPU = torch.device("cpu")


def test_mapped_rows_are_those_of_the_array(tmp_path: Path):
    array = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 5), dtype=np.uint8)
    np.save(tmp_path / "x.npy", array)
    x = Mapped(tmp_path / "x.npy")
    assert len(x) == 50 and tuple(x.shape) == array.shape and x.dtype == torch.uint8 and row_bytes(x) == 60
    index = torch.tensor([7, 0, 49, 7])
    part = x[index]
    assert torch.equal(part, torch.from_numpy(array)[index])
    part.zero_()
    assert np.array_equal(np.load(tmp_path / "x.npy"), array), "no write reaches the file"


def test_small_arrays_are_tensors_and_large_ones_stay_in_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    np.save(tmp_path / "x.npy", np.zeros((10, 8), dtype=np.float32))
    assert isinstance(open_array(tmp_path / "x.npy"), torch.Tensor)
    monkeypatch.setattr(rows, "RESIDENT", 319)
    assert isinstance(open_array(tmp_path / "x.npy"), Mapped)
    (tmp_path / "text.npy").write_text("no array")
    for name in ("text.npy", "missing.npy"):
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            open_array(tmp_path / name)


def test_numbers_that_are_not_finite_are_found_across_parts(monkeypatch: pytest.MonkeyPatch):
    x = torch.zeros(5_000_000, 8)
    assert first_not_finite(x) is None
    x[4_500_000, 3] = -torch.inf
    assert first_not_finite(x) == 4_500_000
    assert first_not_finite(torch.zeros(3, 2, dtype=torch.uint8)) is None


def mapped_dataset(folder: Path) -> tuple[Dataset, Dataset]:
    """The same images in memory and in files."""
    train, test = (toy_stream(1, num_rows=90, scenario="domain")[0].train for _ in range(2))
    arrays = {}
    for name, data in (("train", train), ("test", test)):
        np.save(folder / f"{name}.npy", data.x.numpy())
        arrays[name] = (data.x, Mapped(folder / f"{name}.npy"), data.y)
    both = []
    for side in (0, 1):
        (train_x, test_x), y = (arrays[n][side] for n in ("train", "test")), arrays["train"][2]
        both.append(Dataset("toy", train_x, y, test_x, arrays["test"][2], ("a", "b")))
    return both[0], both[1]


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_training_from_a_file_gives_the_bits_of_training_from_memory(tmp_path: Path, monkeypatch, chunk_size):
    held, filed = mapped_dataset(tmp_path)
    weights, matrices = [], []
    for dataset, limit in ((held, 2**30), (filed, 2**30), (filed, 0)):
        monkeypatch.setattr(task, "RESIDENT", limit)
        stream = permute(copies(dataset, 2, val_fraction=0.2))
        assert stream[0].train.resident == (limit > 0)
        torch.manual_seed(0)
        optimizer = partial(torch.optim.SGD, lr=0.1)
        learner = Learner(stream, ToyBackbone(), {}, optimizer, batch_size=7, chunk_size=chunk_size)
        run = Experiment(learner, stream, partial(pl.Trainer, accelerator="cpu", logger=False), epochs=2).run()
        weights.append(torch.cat([p.detach().flatten() for p in learner.parameters()]))
        matrices.append(run.primary.R)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert torch.equal(matrices[0], matrices[2])


def test_loaders_give_the_same_batches_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    held, filed = mapped_dataset(tmp_path)
    monkeypatch.setattr(task, "RESIDENT", 0)
    views = [TaskData(d.train_x, d.train_y, 3, torch.arange(80, 5, -1)) for d in (held, filed)]
    chunks = [list(TrainLoader(v, 8, 4, 9, 1, lambda: 2 * 9, CPU)) for v in views]
    assert [len(c) for c in chunks[0]] == [len(c) for c in chunks[1]] == [4, 4, 1]
    flat = [[b for chunk in some for b in chunk] for some in chunks]
    evaluated = [list(EvalLoader([v, v], CPU, 16)) for v in views]
    for pairs in (flat,):
        for a, b in zip(*pairs, strict=True):
            assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.task, b.task)
            assert np.array_equal(a.host[0], b.host[0]) and np.array_equal(a.host[1], b.host[1])
    for column in ("x", "y", "task"):
        a, b = (torch.cat([getattr(batch, column) for batch in batches]) for batches in evaluated)
        assert torch.equal(a, b)


@pytest.mark.parametrize("limit", [2**30, 0])
def test_parts_apart_come_in_one_random_order_and_even_minibatches(tmp_path: Path, monkeypatch, limit):
    held, filed = mapped_dataset(tmp_path)
    monkeypatch.setattr(task, "RESIDENT", limit)
    parts = [TaskData(filed.train_x, filed.train_y, t, torch.arange(40 * t, 40 * t + 33)) for t in range(2)]
    batches, again = (list(EvalLoader(parts, CPU, 16, apart=True)) for _ in range(2))
    assert [len(batch) for batch in batches] == 2 * [11, 11, 11] and len(EvalLoader(parts, CPU, 16, apart=True)) == 6
    assert [batch.task.unique().tolist() for batch in batches] == 3 * [[0]] + 3 * [[1]]
    for a, b in zip(batches, again, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    first = torch.cat([batch.x for batch in batches[:3]]).flatten(1)
    rows = held.train_x[:33].flatten(1)
    where = [i for row in first for i in (rows == row).all(1).nonzero().flatten().tolist()]
    assert sorted(where) == list(range(33)), "every row once"
    assert where != sorted(where)


class BatchNormed(ToyBackbone):
    """The toy backbone behind batch norm that keeps no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LazyBatchNorm1d(track_running_stats=False, affine=False)

    def forward(self, x):
        return super().forward(self.norm(x.flatten(1)).view_as(x))


def test_an_accuracy_is_no_matter_of_other_tasks_or_of_how_a_folder_is_sorted():
    assert depends_on_batch(BatchNormed()) and not depends_on_batch(ToyBackbone())
    stream, found = toy_stream(num_tasks=3, scenario="task"), []
    tasks = [t.each(lambda d: d.take(d.labels.argsort(stable=True))) for t in stream]  # class after class
    for count in (2, 3):
        some = Stream(tasks[:count], scenario="task", num_classes=6)
        torch.manual_seed(0)
        learner = Learner(some, BatchNormed(), {}, partial(torch.optim.SGD, lr=0.1), batch_size=8, eval_batch_size=10)
        run = Experiment(learner, some, partial(pl.Trainer, accelerator="cpu", logger=False), epochs=5).run()
        found.append(run.primary.R[:2, :2])
    assert torch.equal(found[0], found[1])
    assert run.primary.R[1:].diagonal().min() > 0.9
    one_class_each = torch.cat([learner.predict(batch) for batch in EvalLoader([tasks[2].test], CPU, 12)])
    assert (one_class_each[:, 4:].argmax(1) + 4 == tasks[2].test.labels).float().mean() < 0.8, "neighbours tell"


def test_an_error_while_reading_ahead_reaches_the_reader():
    class Torn:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int):
            if i == 39:
                raise InputError("image 39 cannot be read.")
            return torch.zeros(2), 0

    data = TaskData(Items(Torn()), torch.zeros(40, dtype=torch.int64))
    with pytest.raises(InputError, match="image 39"):
        list(TrainLoader(data, 4, 2, 10, None, lambda: 0, CPU))


def test_a_union_of_views_of_one_array_is_a_view():
    x, y = torch.arange(20.0)[:, None], torch.arange(20) % 4
    parts = [TaskData(x, y, t, torch.arange(t, 20, 4)) for t in (2, 0, 3)]
    union = TaskData.concat(parts)
    assert union.x is x and union.tasks.tolist() == [2] * 5 + [0] * 5 + [3] * 5
    gathered = [torch.cat(c) for c in zip(*(p.tensors() for p in parts), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(union.tensors(), gathered, strict=True))
    twice = TaskData.concat([parts[0], parts[0].renumbered(1)])  # a row with two task labels is there twice
    assert twice.tasks.tolist() == [2] * 5 + [1] * 5 and len(twice) == 10


def test_letting_go_keeps_what_was_written(tmp_path: Path):
    x = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.uint8, shape=(3, 10_000))
    x[1] = 5
    release_pages(x)
    x[2] = 6
    private = np.load(tmp_path / "x.npy", mmap_mode="c")
    private[0] = 9
    release_pages(private)
    release_pages(np.zeros(3))
    assert x.sum(1).tolist() == [0, 50_000, 60_000] and private[0, 0] == 9


def test_resident_memory_does_not_grow_with_the_file(tmp_path: Path):
    """A file of 400 MB is gone through in a process whose memory grows by a fraction of it."""
    x = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.uint8, shape=(4000, 100_000))
    x[:] = 7
    del x
    script = """
        import resource, sys, torch
        from cl.data import task
        from cl.engine.loader import TrainLoader
        from cl.data.rows import Mapped
        task.RESIDENT = 0
        data = task.TaskData(Mapped(sys.argv[1]), torch.zeros(4000, dtype=torch.int64))
        loader = TrainLoader(data, 20, 5, 200, 0, lambda: 0, torch.device("cpu"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        total = sum(int(b.x[:, ::1000].sum()) for chunk in loader for b in chunk)
        print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    total, grown = map(int, done.stdout.split())
    assert total == 7 * 4000 * 100
    assert grown < 200_000, f"{grown} kB for a file of 400,000"


def test_every_part_comes_to_the_device_where_one_is_read_piece_by_piece() -> None:
    lazy = TaskData.from_dataset([(torch.zeros(2), 0)] * 3, lazy=True)
    held = TaskData(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    assert {batch.x.device.type for batch in EvalLoader([lazy, held], torch.device("meta"))} == {"meta"}
