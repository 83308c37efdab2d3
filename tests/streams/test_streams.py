"""How streams are made: classes, permutations, angles, domains, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl.compose import permute_pixels, turn
from cl.compose import resize as to_shape
from cl.data.dataset import Dataset
from cl.data.sources import digits, synthetic
from cl.data.stream_checks import check_stream
from cl.data.task import Stream
from cl.errors import InputError
from cl.streams.domains import domains
from cl.streams.permuted import permuted
from cl.streams.rotated import rotated
from cl.streams.split import split

DIGITS = digits()


def rows(stream: Stream, part: str = "train") -> int:
    return sum(len(getattr(task, part)) for task in stream)


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@pytest.mark.parametrize("order", ["natural", "shuffled", [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]])
def test_split_uses_every_example_once_and_keeps_images_with_their_class(scenario, order):
    stream = split(DIGITS, num_tasks=5, class_order=order, scenario=scenario)
    assert rows(stream) == len(DIGITS.train_y) and rows(stream, "test") == len(DIGITS.test_y)
    original = {x.numpy().tobytes(): int(y) for x, y in zip(DIGITS.train_x, DIGITS.train_y, strict=True)}
    order_of = {}
    for task in stream:
        x, y, label = task.train.tensors()
        assert label.unique().tolist() == [task.index]
        for image, new in zip(x, y.tolist(), strict=True):
            order_of.setdefault((task.index, new), set()).add(original[image.numpy().tobytes()])
    assert all(len(old) == 1 for old in order_of.values()), "one stream-wide label is one class"
    assert len(order_of) == 10
    if order == "natural" and scenario != "domain":
        assert all(old == {new} for (_, new), old in order_of.items())
    stream.check()


def test_labels_follow_the_order_of_learning():
    stream = split(DIGITS, num_tasks=2, class_order=[5, 0, 1, 2, 3, 4, 6, 7, 8, 9])
    assert stream.class_names[:2] == ("5", "0")
    assert [task.classes for task in stream] == [tuple(range(5)), tuple(range(5, 10))]
    domain = split(DIGITS, num_tasks=5, scenario="domain")
    assert domain.num_classes == 2 and all(task.classes == (0, 1) for task in domain)


def test_a_designed_order_is_that_of_the_designer_and_moves_with_the_names_of_the_classes():
    from cl.compose.curriculum import class_distances, design_orders

    stream = split(DIGITS, num_tasks=5, class_order="curriculum")
    designed = design_orders(class_distances(DIGITS.train_x.flatten(1).double(), DIGITS.train_y))[0]
    assert stream.class_names == tuple(str(c) for c in designed)  # no class has more than 200 examples
    some = split(DIGITS, num_tasks=2, classes=[7, 1, 4, 9], class_order="curriculum")
    assert sorted(some.class_names) == ["1", "4", "7", "9"]
    assert some.class_names == split(DIGITS, num_tasks=2, classes=[9, 4, 1, 7], class_order="curriculum").class_names


def test_the_order_of_icarl_is_that_of_numpys_generator_with_seed_1993():
    rows = torch.arange(100)
    hundred = Dataset("hundred", rows[:, None].float(), rows, rows[:, None].float(), rows, tuple(map(str, range(100))))
    stream = split(hundred, num_tasks=10, class_order="icarl")
    # as printed in the logs of PyCIL and FACIL for CIFAR-100
    assert stream.class_names[:10] == tuple(["68", "56", "78", "8", "23", "84", "90", "65", "74", "76"])


def test_shuffled_order_is_a_function_of_the_seed():
    names = [split(DIGITS, num_tasks=5, class_order="shuffled", seed=s).class_names for s in (0, 0, 1)]
    assert names[0] == names[1] != names[2] and sorted(names[0]) == sorted(names[2])


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"num_tasks": 5}, [2] * 5),
        ({"classes_per_task": 5}, [5, 5]),
        ({"classes_per_task": [1, 2, 7]}, [1, 2, 7]),
        ({"num_tasks": 3, "first_task": 4}, [4, 3, 3]),
        ({"classes_per_task": 2, "first_task": 6}, [6, 2, 2]),
        ({"num_tasks": 1}, [10]),
        ({"num_tasks": 2, "classes": [1, 3, 5, 7]}, [2, 2]),
    ],
)
def test_class_counts(options, sizes):
    stream = split(DIGITS, **options)
    assert [len(task.classes) for task in stream] == sizes
    assert stream.num_classes == sum(sizes)
    stream.check()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_tasks": 11}, "num_tasks=11 is more than the 10 classes"),
        ({"num_tasks": 3}, "do not split evenly"),
        ({"num_tasks": 0}, "num_tasks=0 must be 1 or more"),
        ({"classes_per_task": 0}, "classes_per_task=0 must be 1 or more"),
        ({"num_tasks": 1, "classes": [0, 1], "class_order": [2, 3]}, "name different classes"),
        ({}, "either num_tasks or classes_per_task"),
        ({"num_tasks": 2, "classes_per_task": 5}, "either num_tasks or classes_per_task"),
        ({"classes_per_task": [5, 4]}, "adds up to 9"),
        ({"classes_per_task": [10, 0]}, r"split\.classes_per_task=\[10, 0\] must be 1 or more"),
        ({"num_tasks": 5, "class_order": "random"}, "class_order='random' is unknown"),
        ({"num_tasks": 5, "class_order": [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]}, "Class 0 is twice"),
        ({"num_tasks": 1, "classes": [3, 12]}, "Class 12 is not in"),
        ({"num_tasks": 5, "scenario": "tasks"}, "scenario='tasks' is unknown"),
    ],
)
def test_split_refuses_in_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence):
        split(DIGITS, **options)


def test_validation_comes_from_the_training_set_only():
    stream = split(DIGITS, num_tasks=5, val_fraction=0.25)
    whole = {x.numpy().tobytes() for x in DIGITS.train_x}
    for task in stream:
        train, val = ({x.numpy().tobytes() for x in part.tensors()[0]} for part in (task.train, task.val))
        assert not train & val and val <= whole
        assert len(task.val) == pytest.approx(0.25 * (len(task.train) + len(task.val)), abs=2)


@given(st.integers(0, 2**31), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_permuting_moves_pixels_and_changes_none(seed, num_rows):
    draw = np.random.default_rng(seed)
    x = torch.from_numpy(draw.integers(0, 256, (num_rows, 2, 3, 3), dtype=np.uint8))
    order = torch.from_numpy(draw.permutation(18))
    y = permute_pixels(x, order)
    assert y.flatten(1).sort(1).values.equal(x.flatten(1).sort(1).values)
    assert permute_pixels(y, order.argsort()).equal(x)


def test_permuted_tasks_differ_and_are_functions_of_the_seed():
    first, again, other = (permuted(DIGITS, num_tasks=3, seed=s) for s in (0, 0, 1))
    images = [[task.train.tensors()[0][0] for task in stream] for stream in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(images[0], images[1], strict=True))
    assert not torch.equal(images[0][0], images[2][0])
    assert not torch.equal(images[0][0], images[0][1])
    assert not torch.equal(images[0][0], DIGITS.train_x[0]), "the first task is permuted too"
    kept = permuted(DIGITS, num_tasks=3, identity_first=True)
    assert torch.equal(kept[0].train.tensors()[0], DIGITS.train_x)


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_tasks_may_share_labels_where_the_task_is_told(scenario):
    stream = permuted(DIGITS, num_tasks=3, scenario=scenario, shared_labels=True, val_fraction=0.1)
    stream.check()
    check_stream(lambda: permuted(DIGITS, num_tasks=3, scenario=scenario, shared_labels=True))
    assert (stream.scenario, stream.num_classes) == (scenario, 10)
    assert {task.classes for task in stream} == {tuple(range(10))}
    assert permuted(DIGITS, num_tasks=3, scenario=scenario).num_classes == 30
    assert permuted(DIGITS, num_tasks=3, shared_labels=True).num_classes == 10
    with pytest.raises(InputError, match="shared_labels=false with scenario=domain"):
        permuted(DIGITS, num_tasks=3, shared_labels=False)


def test_train_and_test_share_one_permutation():
    order = {}
    for part, x in (("train", DIGITS.train_x), ("test", DIGITS.test_x)):
        moved = getattr(permuted(DIGITS, num_tasks=2)[1], part).tensors()[0]
        columns = moved.flatten(1).T
        order[part] = [tuple(c) for c in columns.tolist()] and sorted(map(tuple, columns.tolist())) == sorted(
            map(tuple, x.flatten(1).T.tolist())
        )
    assert order == {"train": True, "test": True}


@pytest.mark.parametrize("make", [permuted, rotated])
def test_labels_are_shared_in_the_domain_scenario_and_own_otherwise(make):
    assert make(DIGITS, num_tasks=3).num_classes == 10
    own = make(DIGITS, num_tasks=3, scenario="class")
    assert own.num_classes == 30 and own[2].classes == tuple(range(20, 30))
    own.check()


def test_a_quarter_turn_is_exact():
    x = torch.arange(2 * 8 * 8, dtype=torch.uint8).view(2, 1, 8, 8)
    assert turn(x, 90.0).equal(torch.rot90(x, 1, (2, 3)))
    assert turn(x, 180.0).equal(x.flip(2, 3))


def test_angles():
    stream = rotated(DIGITS, num_tasks=4, max_angle=180)
    assert [task.name for task in stream] == ["0°", "45°", "90°", "135°"]
    assert torch.equal(stream[0].train.tensors()[0], DIGITS.train_x)
    assert torch.equal(stream[2].test.tensors()[0], torch.rot90(DIGITS.test_x, 1, (2, 3)))
    with pytest.raises(InputError, match="2 angles for num_tasks=3"):
        rotated(DIGITS, num_tasks=3, angles=[0, 10])
    with pytest.raises(InputError, match="only images can be rotated"):
        rotated(synthetic(num_classes=2), num_tasks=2)


def test_domains_share_or_own_their_labels():
    other = synthetic(num_classes=10, input_shape=(1, 8, 8), image=True)
    shared = domains({"digits": DIGITS, "blobs": other})
    assert shared.num_classes == 10 and shared.task_names == ["digits", "blobs"]
    own = domains({"digits": DIGITS, "blobs": other}, scenario="task")
    assert [task.classes for task in own] == [tuple(range(10)), tuple(range(10, 20))]
    for stream in (shared, own):
        stream.check()
    four = synthetic(num_classes=4, input_shape=(1, 8, 8), image=True)
    with pytest.raises(InputError, match=r"\[10, 4\] classes"):
        domains({"digits": DIGITS, "four": four}, scenario="domain", match="position")
    assert domains({"digits": DIGITS, "four": four}, scenario="domain")[1].classes == (0, 1, 2, 3)
    assert domains({"digits": DIGITS, "four": four}).num_classes == 14


def test_domains_bring_images_to_one_shape():
    colour = synthetic(num_classes=3, input_shape=(3, 16, 16), image=True)
    with pytest.raises(InputError, match=r"Inputs of 'colour' have shape \(3, 16, 16\)"):
        domains({"digits": DIGITS, "colour": colour}, scenario="task")
    stream = domains({"digits": DIGITS, "colour": colour}, scenario="task", input_shape=(3, 16, 16))
    stream.check()
    x = stream[0].train.tensors()[0]
    assert x.dtype == torch.uint8 and torch.equal(x[:, 0], x[:, 2])
    assert torch.equal(stream[1].train.tensors()[0], colour.train_x)
    flat = torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)
    assert to_shape(flat, (3, 9, 9)).unique().tolist() == [7]


def test_a_stream_is_a_sequence_that_nests():
    stream = split(DIGITS, num_tasks=5)
    assert [(a.index, b.index) for a in stream for b in stream] == [(i, j) for i in range(5) for j in range(5)]
    assert stream[-1].index == 4 and [task.index for task in stream[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        stream[5]
