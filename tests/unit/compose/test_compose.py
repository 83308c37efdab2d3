"""Building blocks of streams against their laws: what stays, what changes, how much, and in which order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cl.compose import (
    concat,
    copies,
    label_noise,
    label_scarcity,
    long_tail,
    partition,
    permute,
    relabel,
    reorder,
    repeat,
    rotate,
    subsample,
    transform,
)
from cl.data.dataset import Dataset
from cl.data.sources import digits, map_style, synthetic
from cl.data.task import Stream, Task, TaskData
from cl.errors import InputError
from cl.streams.boundary_free import boundary_free
from cl.streams.i_blurry import blend, i_blurry
from cl.streams.repetition import occurrences, repetition
from cl.streams.split import split
from cl.testing import check_stream, toy_stream

DIGITS = digits()
ALPHA = 1e-4  # false alarms of a statistical test


def numbered(num_rows: int = 60, num_classes: int = 3) -> Dataset:
    """Inputs that say which row they are."""
    x, y = torch.arange(float(num_rows))[:, None], torch.arange(num_rows) % num_classes
    return Dataset("rows", x, y, x + 1000, y, tuple("abcdefghij"[:num_classes]))


def rows(data: TaskData) -> list[int]:
    return data.tensors()[0][:, 0].long().tolist()


# ------------------------------------------------------------------ labels and amounts


@given(st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_label_noise_makes_exactly_that_share_wrong_and_touches_nothing_else(fraction, seed):
    clean = split(numbered(90, 6), num_tasks=2)
    noisy = label_noise(clean, fraction, seed=seed)
    for a, b in zip(clean, noisy, strict=True):
        assert int((a.train.labels != b.train.labels).sum()) == round(fraction * len(a.train))
        assert set(b.train.labels.tolist()) <= set(a.classes), "a wrong label is one of the task"
        assert torch.equal(a.test.labels, b.test.labels) and rows(a.train) == rows(b.train)
        assert a.classes == b.classes


def test_symmetric_noise_is_uniform_over_the_other_classes():
    data = synthetic(num_classes=5, num_train=20_000, num_test=10)
    noisy = label_noise(data, 0.6)[0].train.labels
    for c in range(5):
        own = noisy[data.train_y == c]
        counts = np.bincount(own[own != c], minlength=5)[[k for k in range(5) if k != c]]
        assert stats.chisquare(counts).pvalue > ALPHA / 5


def test_pairflip_gives_the_next_class():
    clean, noisy = numbered(60, 3), label_noise(numbered(60, 3), 0.5, "pairflip")[0].train.labels
    wrong = noisy != clean.train_y
    assert torch.equal(noisy[wrong], (clean.train_y[wrong] + 1) % 3)


@given(st.floats(1, 500), st.integers(2, 8), st.booleans())
@settings(max_examples=30, deadline=None)
def test_long_tail_sizes_are_the_exponential_law(imbalance, num_classes, shuffled):
    data = numbered(80 * num_classes, num_classes)
    tail = long_tail(data, imbalance, shuffled, seed=5)[0].train
    sizes = torch.bincount(tail.labels, minlength=num_classes).tolist()
    law = [max(1, round(80 * imbalance ** (-r / (num_classes - 1)))) for r in range(num_classes)]
    assert (sorted(sizes, reverse=True) if shuffled else sizes) == law
    assert len(set(rows(tail))) == len(tail), "no row twice"


def test_shuffled_ranks_are_a_function_of_the_seed():
    sizes = [torch.bincount(long_tail(numbered(), 10, seed=s)[0].train.labels).tolist() for s in (0, 0, 1, 2, 3)]
    assert sizes[0] == sizes[1] and any(other != sizes[0] for other in sizes[2:])


def test_scarcity_parts_the_rows_and_hides_labels():
    task = label_scarcity(numbered(100, 4), 0.2)[0]
    assert torch.bincount(task.train.labels).tolist() == [5, 5, 5, 5]
    assert sorted(rows(task.train) + rows(task.unlabelled)) == list(range(100))
    assert set(task.unlabelled.labels.tolist()) == {-1}
    whole = label_scarcity(numbered(), 1.0)[0]
    assert whole.unlabelled is None and len(whole.train) == 60


def test_subsample_thins_out_the_tasks_that_are_named():
    stream = subsample(split(numbered(90, 6), num_tasks=3), 0.4, tasks=[1])
    assert [len(task.train) for task in stream] == [30, 12, 30]
    assert torch.bincount(subsample(numbered(), max_per_class=7)[0].train.labels).tolist() == [7, 7, 7]


def test_relabel_by_task():
    stream = relabel(copies(numbered(), 2), {1: [1, 2, 0]})
    assert torch.equal(stream[0].train.labels, numbered().train_y)
    assert torch.equal(stream[1].test.labels, (numbered().test_y + 1) % 3)


# ------------------------------------------------------------------ tasks


@given(st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_an_order_moves_tasks_whole_and_is_stored(order):
    plain = split(numbered(80, 8), num_tasks=4)
    for moved in (split(numbered(80, 8), num_tasks=4, order=order), reorder(plain, order)):
        assert moved.order == tuple(order)
        for position, place in enumerate(order):
            assert rows(moved[position].train) == rows(plain[place].train)
            assert moved[position].classes == plain[place].classes and moved[position].name == plain[place].name
            assert moved[position].index == position and set(moved[position].test.tasks.tolist()) == {position}
        check_stream(moved)


def test_a_block_keeps_the_order_of_what_it_changes():
    stream = label_noise(split(numbered(80, 8), num_tasks=4, order=[2, 0, 3, 1]))
    assert stream.order == (2, 0, 3, 1)


def test_a_shuffled_order_is_a_function_of_the_seed():
    orders = [split(numbered(80, 8), num_tasks=8, order="shuffled", seed=s).order for s in (0, 0, 1, 2)]
    assert orders[0] == orders[1] and len(set(orders)) > 1 and all(sorted(o) == list(range(8)) for o in orders)


def test_rows_that_belong_to_other_tasks_follow_an_order():
    plain = i_blurry(DIGITS, 3, blur=0.5)
    moved = i_blurry(DIGITS, 3, blur=0.5, order=[2, 0, 1])
    place = torch.tensor([1, 2, 0])  # where each task went
    for position, old in enumerate([2, 0, 1]):
        assert torch.equal(moved[position].train.tasks, place[plain[old].train.tasks])
        assert moved[position].classes == plain[old].classes
    with pytest.raises(InputError, match="before it blends"):
        repeat(plain)[3].train.tensors()


def test_a_task_learned_again_shows_instant_transfer():
    """The same task twice: both columns hold the same numbers, whatever was learned in between."""
    from functools import partial

    import pytorch_lightning as pl

    from cl.engine.experiment import Experiment
    from cl.engine.learner import Learner
    from cl.testing import ToyBackbone

    stream = repeat(toy_stream(2), visits=[0, 1, 0])
    torch.manual_seed(0)
    learner = Learner(stream, ToyBackbone(), {}, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    trainer = partial(pl.Trainer, accelerator="cpu", logger=False)
    R = Experiment(learner, stream, trainer, epochs=10).run().matrices["task"].R
    assert torch.equal(R[:, 0], R[:, 2])
    assert R[1, 2] > 0.8, "the task to come is known already"


@given(st.integers(1, 6), st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_a_partition_uses_each_row_once_and_each_class_evenly(num_tasks, seed):
    stream = partition(numbered(67, 3), num_tasks, seed)
    assert sorted(r for task in stream for r in rows(task.train)) == list(range(67))
    assert sorted(r for task in stream for r in rows(task.test)) == list(range(1000, 1067))
    counts = np.array([torch.bincount(task.train.labels, minlength=3).tolist() for task in stream])
    assert (np.ptp(counts, axis=0) <= 1).all()


def test_concat_gives_each_part_its_own_columns_of_targets():
    x = torch.rand(6, 2)
    y = (torch.arange(12).view(6, 2) % 3 == 0).float()
    part = Dataset("many", x, y, x + 1, y, ("a", "b"), target="multilabel")
    stream = concat([part, part], scenario="class")
    assert stream.num_classes == 4 and stream.target.name == "multilabel"
    assert torch.equal(stream[1].train.labels[:, 2:], y) and not stream[1].train.labels[:, :2].any()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: copies(DIGITS, 0), "num_tasks=0"),
        (lambda: rotate(synthetic(), [3]), "only images can be rotated"),
        (lambda: rotate(DIGITS, [3, 4]), "2 angles for num_tasks=1"),
        (lambda: relabel(numbered(), [0, 1]), r"labels=\[0, 1\] for task 0"),
        (lambda: label_noise(DIGITS, 1.2), r"label_noise\.fraction=1\.2 must be between 0 and 1"),
        (lambda: label_noise(DIGITS, 0.2, "odd"), "kind='odd'"),
        (lambda: label_noise(split(DIGITS, num_tasks=10))[0], "has one class"),
        (lambda: label_scarcity(DIGITS, 0), r"label_scarcity\.fraction=0 must be above 0"),
        (lambda: subsample(DIGITS, max_per_class=0), "max_per_class=0"),
        (lambda: long_tail(DIGITS, 0.5), "imbalance=0.5"),
        (lambda: repeat(DIGITS, visits=[1]), r"visits 1 of 'digits': give positions in 0\.\.0"),
        (lambda: repeat(DIGITS, times=0), "times=0 must be between 1"),
        (lambda: repeat(DIGITS, visits=[]), "visits no task"),
        (lambda: concat([]), "nothing to concatenate"),
        (lambda: partition(DIGITS, 500)[0], "rows for 500 parts"),
        (lambda: split(DIGITS, num_tasks=5, order=[0, 1]), r"order=\[0, 1\].*positions 0\.\.4 once"),
        (lambda: split(DIGITS, num_tasks=5, order="random"), "order='random'"),
        (lambda: boundary_free(split(DIGITS, num_tasks=5), overlap=2), "overlap=2"),
        (lambda: i_blurry(DIGITS, 11), "num_tasks=11 for 10 classes"),
        (lambda: i_blurry(DIGITS, scenario="domain"), "have different classes"),
        (lambda: repetition(DIGITS, first=0), "first=0"),
        (lambda: repetition(DIGITS, again=[0.1]), r"again=\[0.1\]"),
        (lambda: Stream.from_datasets([[(torch.zeros(1), 0)]], []), "1 training sets but 0 test sets"),
        (lambda: TaskData.from_dataset([(torch.zeros(1), 0), (torch.zeros(2), 0)]), r"Item 1 .* has shape \(2,\)"),
        (lambda: TaskData.from_dataset([]), "dataset is empty"),
    ],
)
def test_blocks_refuse_in_one_sentence(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert "\n" not in str(error.value)


def test_blocks_leave_their_source_as_it_is_and_build_nothing_before_it_is_needed():
    built = []

    def build(t: int) -> Task:
        built.append(t)
        data = TaskData(torch.full((4, 1), float(t)), torch.arange(4) % 2, t)
        return Task(t, data, TaskData(data.x + 9, data.y, t))

    source = Stream(build, num_tasks=3, num_classes=2, scenario="domain")
    chained = transform(label_noise(repeat(source), 0.5), lambda t: lambda x: x + 1, "more")
    assert built == []
    assert chained[4].train.tensors()[0][0].item() == 2.0
    assert built == [1]
    assert source[1].train.tensors()[0][0].item() == 1.0 and source[1].train.labels.tolist() == [0, 1, 0, 1]


# ------------------------------------------------------------------ without boundaries, with repetition


def test_without_overlap_boundaries_are_where_they_were():
    source = split(numbered(90, 6), num_tasks=3)
    for hard, task in zip(boundary_free(source, overlap=0), source, strict=True):
        assert sorted(rows(hard.train)) == rows(task.train)


@pytest.mark.parametrize("overlap", [0.3, 1.0])
def test_the_share_of_a_task_falls_linearly_between_neighbours(overlap):
    size, T = 30_000, 3
    source = permute(copies(numbered(size, 3), T))
    tasks = torch.cat([task.train.tasks for task in boundary_free(source, overlap)])
    assert torch.bincount(tasks).tolist() == [size] * T, "each row once"
    # rows stand by time, evenly: the share of task 0 around the first boundary is linear
    for s in (1 - overlap / 4, 1.0, 1 + overlap / 4):
        window = tasks[int((s - 0.01) * size) : int((s + 0.01) * size)]
        expected = 0.5 - (s - 1) / overlap
        assert stats.binomtest(int((window == 0).sum()), len(window), expected).pvalue > ALPHA / 6
    middle = tasks[int((1 + overlap / 2 + 0.001) * size) : int((2 - overlap / 2 - 0.001) * size)]
    assert overlap == 1 or set(middle.tolist()) == {1}


def test_rows_without_boundaries_are_trained_on_in_their_order():
    seen: list[int] = []

    from cl.engine.strategy import Strategy

    class Watch(Strategy):
        def after_step(self, learner, batch, logits):
            seen.extend(batch.x[:, 0, 0, 0].tolist())

    from functools import partial

    import pytorch_lightning as pl

    from cl.engine.experiment import Experiment
    from cl.engine.learner import Learner
    from cl.testing import ToyBackbone

    stream = boundary_free(toy_stream(3))
    learner = Learner(stream, ToyBackbone(), {"watch": Watch()}, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    run = Experiment(learner, stream, partial(pl.Trainer, accelerator="cpu", logger=False)).run()
    assert seen == [x for task in stream for x in task.train.tensors()[0][:, 0, 0, 0].tolist()]
    assert run.rows == "evaluation points passed"


@given(st.integers(1, 6), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_blurry_classes_leak_exactly_their_share(num_tasks, disjoint, blur, seed):
    labels = np.repeat(np.arange(10), 30)
    owner, place = blend(labels, 10, num_tasks, disjoint, blur, seed)
    away = place != owner[labels]
    counts = np.bincount(labels[away], minlength=10)
    leaking = 10 - round(disjoint * 10) if num_tasks > 1 else 0
    assert sorted(counts) == [0] * (10 - leaking) + [round(blur * 30)] * leaking
    assert np.ptp(np.bincount(owner, minlength=num_tasks)) <= 1
    for c in range(10):  # evenly over the other tasks
        spread = np.bincount(place[(labels == c) & away], minlength=num_tasks)
        assert num_tasks == 1 or np.ptp(np.delete(spread, owner[c])) <= 1


def test_every_row_of_i_blurry_comes_once_and_is_tested_with_its_class():
    stream = i_blurry(numbered(90, 6), 3, blur=0.4)
    assert sorted(r for task in stream for r in rows(task.train)) == list(range(90))
    assert sorted(r for task in stream for r in rows(task.test)) == list(range(1000, 1090))
    assert sorted(c for task in stream for c in task.classes) == list(range(6))


def test_occurrences_follow_their_law():
    T, C, first, again = 12, 4000, 0.3, 0.25
    present = occurrences(T, C, first, [again] * C, seed=1)
    start = present.argmax(0)
    assert present.any(0).all() and present.any(1).all()
    law = [first * (1 - first) ** t for t in range(T - 1)] + [(1 - first) ** (T - 1)]
    assert stats.chisquare(np.bincount(start, minlength=T), np.array(law) * C).pvalue > ALPHA
    later = np.arange(T)[:, None] > start
    assert stats.binomtest(int(present[later].sum()), int(later.sum()), again).pvalue > ALPHA


def test_repetition_shares_a_task_out_among_its_classes_and_tests_them():
    stream = repetition(DIGITS, num_tasks=8, rows_per_task=60, again=0.4, seed=2)
    for task in stream:
        counts = torch.bincount(task.train.labels, minlength=10)[list(task.classes)]
        assert len(task.train) == 60 and int(counts.max() - counts.min()) <= 1
        assert set(task.test.labels.tolist()) == set(task.classes)
        assert len(task.test) == int(torch.isin(DIGITS.test_y, torch.tensor(task.classes)).sum())
    assert len({c for task in stream for c in task.classes}) == 10
    assert sum(len(task.classes) for task in stream) > 10, "classes come again"


# ------------------------------------------------------------------ map-style datasets


def test_any_map_style_dataset_becomes_a_task():
    from PIL import Image
    from torch.utils.data import Dataset as MapStyle

    class Pictures(MapStyle):
        def __init__(self, low: int) -> None:
            self.low = low

        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int):
            return Image.new("RGB", (5, 4), (i, self.low, 7)), self.low + i % 2

    stream = Stream.from_datasets([Pictures(0), Pictures(2)], [Pictures(0), Pictures(2)])
    assert stream.input_shape == (3, 4, 5) and stream.input_dtype == torch.uint8
    assert [task.classes for task in stream] == [(0, 1), (2, 3)]
    x = stream[1].train.tensors()[0]
    assert x[3, :, 0, 0].tolist() == [3, 2, 7]


def test_any_map_style_dataset_can_be_split_by_class():
    from PIL import Image

    pictures = [(Image.new("L", (4, 4), 10 * i), i % 4) for i in range(20)]
    stream = split(map_style(pictures, pictures[:8]), num_tasks=2)
    assert stream.input_dtype == torch.uint8 and [task.classes for task in stream] == [(0, 1), (2, 3)]
    assert [int(x[0, 0, 0]) for x in stream[1].train.tensors()[0][:4]] == [20, 30, 60, 70]


def test_a_lazy_dataset_draws_anew_each_time_it_is_read():
    class Noise:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int):
            return torch.rand(3), i % 2

    lazy, once = (TaskData.from_dataset(Noise(), lazy=lazy) for lazy in (True, False))
    assert not torch.equal(lazy.tensors()[0], lazy.tensors()[0]) and not lazy.resident
    assert torch.equal(once.tensors()[0], once.tensors()[0])
    assert lazy.labels.tolist() == [0, 1, 0, 1, 0]
