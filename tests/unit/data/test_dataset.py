from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cl.data.cache
from cl.compose import copies, transform
from cl.data.cache import Allocate, cached, decoded, fingerprint
from cl.data.dataset import Array, Dataset, channel_moments, split_validation
from cl.errors import InputError

X = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
Y = torch.tensor([0, 1, 0, 1])


def dataset(**changes: object) -> Dataset:
    fields = {"train_x": X, "train_y": Y, "test_x": X, "test_y": Y, "class_names": ("a", "b")} | changes
    return Dataset("toy", **fields)  # type: ignore[arg-type]


def test_dataset_properties() -> None:
    data = dataset(mean=(0.1, 0.2, 0.3), std=(1.0,))
    assert data.num_classes == 2
    assert data.input_shape == (3, 2, 2)


VECTORS = torch.zeros(4, 5)
SICK = VECTORS.clone()
SICK[2, 3] = torch.inf


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_y": Y + 1}, "train set of 'toy' has label 2, outside 0..1"),
        ({"test_y": Y - 1}, "test set of 'toy' has label -1, outside 0..1"),
        ({"train_x": X[:0], "train_y": Y[:0]}, "train set of 'toy' is empty"),
        ({"test_x": X[:0], "test_y": Y[:0]}, "test set of 'toy' is empty"),
        ({"train_y": Y[:3]}, "4 inputs but 3 labels"),
        ({"test_x": X[:, :1]}, r"\(3, 2, 2\) uint8 in the train set but \(1, 2, 2\) uint8 in the test set"),
        ({"test_x": X.float()}, "uint8 in the train set but .* float32 in the test set"),
        ({"train_x": X.double()}, "holds torch.float64 inputs"),
        ({"train_x": X.flatten(1)}, r"holds torch.uint8 inputs of shape \(4, 12\)"),
        ({"train_y": Y.int()}, "labels of torch.int32"),
        ({"train_x": SICK, "test_x": VECTORS}, "train set .* NaN or infinite value in row 2"),
        ({"train_x": VECTORS, "test_x": SICK * 0}, "test set .* NaN or infinite value in row 2"),
        ({"mean": (0.1, 0.2)}, r"mean=\[0.1, 0.2\] .* give 1 or 3 finite numbers"),
        ({"std": (float("nan"),)}, "std=.* finite"),
        ({"std": (0.0,)}, "not above 0"),
    ],
)
def test_dataset_refuses_in_one_sentence(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        dataset(**changes)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@given(
    counts=st.lists(st.integers(6, 40), min_size=1, max_size=6),
    fraction=st.floats(0.1, 0.6),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_validation_is_stratified_disjoint_and_reproducible(counts: list[int], fraction: float, seed: int) -> None:
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed % 1000))]
    train, val = split_validation(y, fraction, seed)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(len(y)))
    exact = torch.tensor(counts, dtype=torch.float64) * fraction
    extra = y[val].bincount(minlength=len(counts)) - exact
    assert len(val) == round(fraction * len(y))
    assert (extra.abs() < 1).all()
    up = extra > 1e-9  # a class is rounded up only where no other lost more by being rounded down
    assert not up.any() or up.all() or (exact % 1)[up].min() >= max((exact % 1)[extra < -1e-9].tolist(), default=0.0)
    again = split_validation(y, fraction, seed)
    assert torch.equal(train, again[0]) and torch.equal(val, again[1])


def test_validation_depends_on_the_seed_and_is_uniform() -> None:
    y = torch.zeros(20, dtype=torch.int64)
    hits = torch.stack([torch.isin(torch.arange(20), split_validation(y, 0.25, seed)[1]) for seed in range(400)])
    counts = hits.sum(0)  # each Binomial(400, 1/4): mean 100, standard deviation 8.7
    assert counts.min() > 60 and counts.max() < 140  # 4.6 sd: fails once in 1e4 for 20 rows, and the seeds are fixed


def test_validation_refusals() -> None:
    y = torch.tensor([0] * 10 + [1])
    with pytest.raises(InputError, match="Class 1 has 1 training examples"):
        split_validation(y, 0.6, 0)
    with pytest.raises(InputError, match="rounds to no example"):
        split_validation(y, 0.01, 0)
    for fraction in (-0.1, 1.0):
        with pytest.raises(InputError, match=r"not in \[0, 1\)"):
            split_validation(y, fraction, 0)
    train, val = split_validation(y, 0.0, 0)
    assert len(train) == 11 and len(val) == 0


def test_a_copy_of_a_dataset_keeps_validation_apart() -> None:
    x = torch.arange(20.0).view(20, 1)
    data = Dataset("toy", x, torch.arange(20) % 2, x + 100, torch.arange(20) % 2, ("a", "b"))
    task = transform(copies(data, 4, "task", val_fraction=0.2, seed=1), lambda t: torch.neg, "negative")[3]
    assert task.val is not None
    train, val = task.train.tensors(), task.val.tensors()
    assert len(train[0]) == 16 and len(val[0]) == 4
    assert sorted((-torch.cat([train[0], val[0]])).flatten().tolist()) == list(range(20))
    for inputs, labels, tasks in (train, val):
        assert torch.equal(labels, (-inputs.flatten()).long() % 2 + 6)
        assert set(tasks.tolist()) == {3}
    assert len(task.test) == 20 and task.classes == (6, 7)


def test_channel_moments_are_those_of_numpy() -> None:
    x = np.random.default_rng(0).integers(0, 256, (7, 3, 50, 41), dtype=np.uint8)
    mean, std = channel_moments(x)
    assert np.allclose(mean, (x / 255).mean((0, 2, 3)), atol=1e-12)
    assert np.allclose(std, (x / 255).std((0, 2, 3)), atol=1e-12)


def test_channel_moments_of_many_chunks() -> None:
    x = np.zeros((3, 1, 4096, 2048), dtype=np.uint8)  # two rows a chunk
    x[2] = 255
    mean, std = channel_moments(x)
    assert mean == pytest.approx([1 / 3]) and std == pytest.approx([np.sqrt(2) / 3])


class Counter:
    """Builds the same arrays each time, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, allocate: Allocate) -> dict[str, Array]:
        self.calls += 1
        x = allocate("x", (5, 1, 2, 2))
        x[:] = np.arange(20).reshape(x.shape)
        return {"x": x, "y": np.arange(5), "names": np.array(["a", "bb"])}


def test_cache_builds_once_and_maps_without_a_copy(tmp_path: Path) -> None:
    build = Counter()
    for _ in range(2):
        arrays = cached("key", tmp_path, build)
        assert isinstance(arrays["x"], np.memmap)
        tensor = torch.from_numpy(arrays["x"])  # a warning here would fail the test
        assert tensor.data_ptr() == arrays["x"].ctypes.data
        assert tensor.flatten().tolist() == list(range(20))
        assert arrays["names"].tolist() == ["a", "bb"]
    assert build.calls == 1
    assert sorted(os.listdir(tmp_path)) == ["key"]


def test_writing_to_a_mapped_array_never_reaches_the_disk(tmp_path: Path) -> None:
    torch.from_numpy(cached("key", tmp_path, Counter())["x"]).fill_(7)
    assert cached("key", tmp_path, Counter())["x"].ravel().tolist() == list(range(20))


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest", "zeros", "bit", "empty manifest", "names"])
def test_damaged_cache_is_built_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    build = Counter()
    cached("key", tmp_path, build)
    if damage == "truncate":
        os.truncate(tmp_path / "key" / "x.npy", 130)
    elif damage == "remove":
        (tmp_path / "key" / "y.npy").unlink()
    elif damage in ("zeros", "bit", "names"):
        file = tmp_path / "key" / ("names.npy" if damage == "names" else "x.npy")
        content = bytearray(file.read_bytes())
        content[-4:] = bytes(4) if damage == "zeros" else bytes([content[-4] ^ 1]) + content[-3:]
        file.write_bytes(content)
    elif damage == "empty manifest":
        (tmp_path / "key" / "manifest.json").write_text("{}")
    else:
        (tmp_path / "key" / "manifest.json").write_text('{"x.npy": 1')
    arrays = cached("key", tmp_path, build)
    assert arrays["x"].ravel().tolist() == list(range(20)) and arrays["names"].tolist() == ["a", "bb"]
    assert build.calls == 2
    assert "key is damaged and built again" in caplog.text and len(caplog.records) == 1


def test_arrays_are_looked_at_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(cl.data.cache, "_digest_array", lambda file: read.append(file) or "same")
    for _ in range(3):
        cached("key", tmp_path, Counter())
    assert len(read) == 3, "as they were written"
    cl.data.cache._verified.clear()  # another process
    for _ in range(3):
        cached("key", tmp_path, Counter())
    assert len(read) == 6


KILLED = """
import os, sys, time
from pathlib import Path
from cl.data.cache import cached
def build(allocate):
    allocate("x", (5, 1, 2, 2))[:2] = 1
    print("building", flush=True)
    time.sleep(60)
cached(sys.argv[1], Path(sys.argv[2]), build)
"""


@pytest.mark.slow
def test_leftovers_of_killed_builders_go_and_those_at_work_stay(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, "other", str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "building\n"
        return process

    started = [start() for _ in range(3)]
    for process in started[:2]:
        process.kill()
        process.communicate()
    (tmp_path / ".partial-0123456789abcdef").mkdir()  # of a version without locks
    assert len([f for f in os.listdir(tmp_path) if f.startswith(".partial") and not f.endswith(".lock")]) >= 2
    cached("key", tmp_path, Counter())
    left = [f for f in os.listdir(tmp_path) if f.startswith(".partial")]
    assert len(left) == 2 and {f.endswith(".lock") for f in left} == {True, False}, "the one at work"
    started[2].kill()
    started[2].communicate()
    cached("key", tmp_path, Counter())
    assert os.listdir(tmp_path) == ["key"]


def content(x: int) -> dict[str, Array]:
    return {"train_x": np.full((2, 1, 2, 2), x, dtype=np.uint8)}


def test_files_of_one_name_size_and_time_do_not_share_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    original = cl.data.cache._digest_source
    monkeypatch.setattr(cl.data.cache, "_digest_source", lambda file: reads.append(file) or original(file))
    files = []
    for k in range(2):
        files.append(tmp_path / f"tree{k}" / "a.bmp")
        files[k].parent.mkdir()
        files[k].write_bytes(bytes([k] * 9))
        os.utime(files[k], ns=(5, 5))

    def read(k: int, value: int) -> float:
        arrays = decoded("key", [files[k]], files[k].parent, None, lambda _: content(value), True, tmp_path / "cache")
        return float(arrays["train_x"].mean())

    assert [read(0, 10), read(1, 11)] == [10.0, 11.0]
    assert [read(0, 98), read(1, 99)] == [10.0, 11.0], "found again"
    os.utime(files[0], ns=(7, 7))
    assert read(0, 97) == 10.0, "the same content at another time"
    files[0].write_bytes(bytes([3] * 9))
    os.utime(files[0], ns=(5, 5))
    assert read(0, 12) == 12.0, "another content at the old time"
    reads.clear()
    monkeypatch.setattr(cl.data.cache, "_RESOLUTION", -100.0)  # as if the files had been there for long
    read(0, 96), read(1, 96)
    assert len(reads) == 2
    assert [read(0, 95), read(1, 95)] == [12.0, 11.0] and len(reads) == 2, "the same files are not read again"
    files[1].write_bytes(bytes([4] * 9))
    os.utime(files[1], ns=(5, 5))
    assert read(1, 13) == 13.0


def test_a_name_that_is_no_utf8_has_a_fingerprint(tmp_path: Path) -> None:
    names = [os.fsdecode(b"a\xff"), os.fsdecode(b"a\xfe")]
    found = []
    for name in names:
        (tmp_path / name).write_bytes(b"1")
        found.append(fingerprint([tmp_path / name], tmp_path))
    assert len(set(found)) == 2


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(allocate: Allocate) -> dict[str, Array]:
        allocate("x", (5,))[:2] = 1
        raise InputError("An image is broken.")

    with pytest.raises(InputError, match="broken"):
        cached("key", tmp_path, fail)
    assert os.listdir(tmp_path) == []


def test_entry_of_a_faster_process_is_used(tmp_path: Path) -> None:
    first, second = Counter(), Counter()

    def slow(allocate: Allocate) -> dict[str, Array]:
        cached("key", tmp_path, first)  # another process finishes meanwhile
        (tmp_path / "key" / "held").touch()
        return second(allocate)

    arrays = cached("key", tmp_path, slow)
    assert arrays["x"].ravel().tolist() == list(range(20))
    assert sorted(os.listdir(tmp_path)) == ["key"]
    assert (tmp_path / "key" / "held").exists()


def test_cache_says_what_stops_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="set cache_dir to another folder, or cache=false"):
        cached("key", tmp_path / "file", Counter())
    with pytest.raises(InputError, match=r"The cache needs .* GB for x"):
        cached("key", tmp_path, lambda allocate: {"x": allocate("x", (10**9, 10**9))})


def test_fingerprint_sees_files_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12")
    first = fingerprint([file], tmp_path, 3)
    assert fingerprint([file], tmp_path, 3) == first != fingerprint([file], tmp_path, 4)
    os.utime(file, ns=(5, 5))
    assert fingerprint([file], tmp_path, 3) == first, "content decides"
    file.write_bytes(b"13")
    os.utime(file, ns=(5, 5))
    third = fingerprint([file], tmp_path, 3)
    assert third != first
    moved = tmp_path / "moved"
    moved.mkdir()
    file.rename(moved / "a")
    assert fingerprint([moved / "a"], moved, 3) == third != fingerprint([moved / "a"], tmp_path, 3)
    with pytest.raises(InputError, match="No such file"):
        fingerprint([file], tmp_path)
