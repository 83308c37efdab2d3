"""Tasks that share classes, each with outputs of its own."""

from __future__ import annotations

import pytest
import torch

import cl
from cl.data.sources import digits, synthetic
from cl.errors import InputError
from cl.streams.overlapping import overlapping

CLASSES = [[0, 1, 2], [2, 3], [3, 0]]


def test_every_task_has_all_examples_of_its_classes_under_labels_of_its_own():
    data = digits()
    stream = overlapping(data, CLASSES, val_fraction=0.25)
    stream.check()
    assert stream.num_classes == 7 and len(stream) == 3
    for task, own, start in zip(stream, CLASSES, (0, 3, 5), strict=True):
        assert task.classes == tuple(range(start, start + len(own)))
        for position, c in enumerate(own):
            x, y, _ = task.test.tensors()
            expected = data.test_x[data.test_y == c]
            assert torch.equal(torch.as_tensor(x[y == start + position]), torch.as_tensor(expected))
        both = len(task.train) + len(task.val)
        assert both == sum(int((data.train_y == c).sum()) for c in own)
    assert stream.class_names[2] == "2 (task 1)" and stream.class_names[3] == "2 (task 2)"


def test_the_example_is_in_the_validation_set_of_every_task_or_of_none():
    """The split is of the data set, so that no task trains what another one holds out."""
    data = digits()
    stream = overlapping(data, [[0, 1], [1, 2]], val_fraction=0.5)
    first, second = (set(task.train.index.tolist()) for task in stream)
    held = [set(task.val.index.tolist()) for task in stream]
    assert not first & held[1] and not second & held[0]


def test_a_run_has_masks_of_its_own_tasks_alone():
    stream = overlapping(synthetic(num_classes=4), CLASSES)
    run = cl.run(stream, [], epochs=1, progress=False, trainer={"accelerator": "cpu"})
    assert run.R["task"].shape == (4, 3)
    assert run.learner.membership.sum(0).eq(1).all(), "no output belongs to two tasks"


@pytest.mark.parametrize(
    ("classes", "options", "sentence"),
    [
        ([[0, 1], []], {}, r"Task 2 of classes= has the classes \[\]"),
        ([[0, 1], [1, 1]], {}, r"Task 2 of classes= has the classes \[1, 1\]"),
        ([[0, 10]], {}, "Task 1 of classes= has class 10, which has no row in digits"),
        ([[0, 1]], {"scenario": "domain"}, "use scenario=task or class"),
    ],
)
def test_what_no_task_can_have_is_refused(classes, options, sentence):
    with pytest.raises(InputError, match=sentence):
        overlapping(digits(), classes, **options)
