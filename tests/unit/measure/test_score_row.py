"""A row of R on the test sets of any stream: which classes compete, what fits, and that the learner stays as it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cl
from cl.data.stream_checks import same
from cl.data.task import Stream, Task, TaskData
from cl.engine import checkpoint
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.measure.score_row import check_fit, membership_of, score_row, unchanged
from cl.testing import toy_learner, toy_stream
from cl.testing.toys import trainer


class Table(nn.Module):
    """Its features are its inputs, so that with an identity head the logits are known."""

    num_features = 4

    def forward(self, x: Tensor) -> Tensor:
        return x


def known(scenario: str = "class", seen: tuple[int, ...] = (0, 1)) -> Learner:
    """Return a learner of two tasks, {0, 1} and {2, 3}, whose logits are its inputs, after the first task."""
    x = torch.eye(4)
    tasks = [
        Task(t, TaskData(x, torch.arange(2).repeat(2) + 2 * t, t), TaskData(x, torch.arange(2).repeat(2) + 2 * t, t))
        for t in range(2)
    ]
    stream = Stream(tasks, scenario=scenario, num_classes=4, class_names=["a", "b", "c", "d"])
    learner = Learner(stream, Table(), {}, partial(torch.optim.SGD, lr=0.1))
    learner.head.weight.data, learner.head.bias.data = torch.eye(4), torch.zeros(4)
    learner.seen[list(seen)] = True
    learner.tasks_learned = 1
    learner._update_masks()
    return learner


def sets_of(*sets: tuple[list[list[float]], list[int]], **options) -> Stream:
    parts = [TaskData(torch.tensor(x), torch.tensor(y), t) for t, (x, y) in enumerate(sets)]
    return Stream(
        [Task(t, part, part) for t, part in enumerate(parts)], **{"num_classes": 4, "repeats": True, **options}
    )


def test_the_masks_are_those_of_R_for_the_classes_of_the_new_test_sets() -> None:
    """Logits of two examples by hand; the classes 0 and 1 are seen."""
    one = ([[2.0, 1.0, 3.0, 0.0], [0.0, 1.0, 0.0, 2.0]], [0, 1])  # seen classes alone: both right; all: both wrong
    other = ([[2.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 2.0]], [0, 3])  # its class 3 is not seen: all classes compete
    rows, errors = score_row(known(), sets_of(one, other), trainer)
    assert rows["class"].tolist() == [1.0, 1.0]
    assert rows["task"].tolist() == [1.0, 1.0], "the classes {0, 1} and {0, 3} compete"
    wrong = ([[2.0, 1.0, 3.0, 0.0], [0.0, 0.0, 1.0, 2.0]], [0, 3])  # the first is wrong where class 2 competes
    rows, errors = score_row(known(), sets_of(wrong), trainer)
    assert (rows["class"].tolist(), rows["task"].tolist()) == ([0.5], [1.0])
    p = torch.tensor([[2.0, 1.0, 3.0, 0.0], [0.0, 0.0, 1.0, 2.0]]).softmax(1).amax(1)
    by_hand = abs(p.mean() - 0.5)  # both in the interval from 0.6 to 0.67, of which one is right
    assert float(errors["class"][0]) == pytest.approx(float(by_hand), abs=1e-6)


def test_a_domain_incremental_learner_lets_all_classes_compete() -> None:
    learner, _ = toy_learner(num_tasks=2, scenario="domain")
    other = toy_stream(3, "domain", seed=5)
    rows, _ = score_row(learner, other, trainer)
    assert list(rows) == ["domain"] and rows["domain"].shape == (3,)
    x, y, task = other[2].test.tensors()
    with torch.no_grad():
        right = (learner.eval().predict(Batch(x, y, task)).argmax(1) == y).float().mean()
    assert rows["domain"][2] == right


def test_numbers_as_targets_are_scored_too() -> None:
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    data = [TaskData(x, x[:, :2] * (t + 1), t) for t in range(2)]
    stream = Stream(
        [Task(t, part, part) for t, part in enumerate(data)], scenario="domain", num_classes=2, target="regression"
    )
    learner = Learner(stream, Table(), {}, partial(torch.optim.SGD, lr=0.1))
    run = Experiment(learner, stream, trainer, epochs=1).run()
    rows, errors = score_row(learner, stream, trainer)
    assert errors == {} and list(rows) == list(run.matrices)
    assert all(torch.equal(rows[key], matrix.R[2]) for key, matrix in run.matrices.items())


def test_the_learner_is_not_changed() -> None:
    learner, stream = toy_learner({"er": cl.strategies.ER(memory_size=8)}, num_tasks=2)
    Experiment(learner, stream, trainer, epochs=1).run()
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in learner.state_dict().items()}
    modes = [module.training for module in learner.modules()]
    task, one = learner.task, learner.trainer
    score_row(learner, toy_stream(2, seed=4), trainer)
    assert all(same(before[key], value) for key, value in learner.state_dict().items())
    assert [module.training for module in learner.modules()] == modes
    assert learner.task is task and learner.trainer is one


class OfTheTask(cl.Strategy):
    """Its predictions depend on the task that the learner is at."""

    def predict(self, learner: cl.LearnerLike, view: Tensor) -> Tensor:
        return learner(view).roll(learner.task_index, 1)


def test_a_loaded_learner_is_at_its_last_task_as_it_was_when_R_was_measured(tmp_path: Path) -> None:
    learner, stream = toy_learner({"it": OfTheTask()})
    Experiment(learner, stream, trainer, epochs=1, directory=tmp_path).run()
    for task in range(4):
        again, _ = toy_learner({"it": OfTheTask()}, seed=1)
        checkpoint.load(again, tmp_path / "checkpoints" / f"after_task_00{task}.ckpt")
        assert torch.equal(score_row(again, stream, trainer)[0]["class"], learner.matrices["class"].R[task])


def test_unchanged_restores_weights_counters_and_masks() -> None:
    learner, stream = toy_learner({"er": cl.strategies.ER(memory_size=8)}, num_tasks=2)
    Experiment(learner, stream, trainer, epochs=1).run()
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in learner.state_dict().items()}
    blank, _ = toy_learner({"er": cl.strategies.ER(memory_size=8)}, num_tasks=2)
    with pytest.raises(ZeroDivisionError), unchanged(learner):
        learner.load_state_dict(blank.state_dict())
        assert learner.tasks_learned == 0
        raise ZeroDivisionError
    assert learner.tasks_learned == 2 and bool(learner.seen.all())
    assert all(same(before[key], value) for key, value in learner.state_dict().items())


def test_a_run_of_several_processes_is_scored_by_one() -> None:
    learner, stream = toy_learner(num_tasks=2)
    of_two = partial(trainer, devices=2, strategy="ddp")
    assert torch.equal(score_row(learner, stream, of_two)[0]["class"], score_row(learner, stream, trainer)[0]["class"])


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (lambda: sets_of(([[0.0, 1.0]], [0])), r"has float32 inputs of shape \(2,\), the learner .* of shape \(4,\)"),
        (lambda: sets_of(([[0, 1, 2, 3]], [0])), "has int64 inputs of shape"),
        (lambda: sets_of(([[0.0] * 4], [0]), num_classes=5), "has 5 classes, the learner 4"),
        (
            lambda: sets_of(([[0.0] * 4], [0]), num_classes=2, class_names=["a", "x"]),
            "class 1 is 'x', the learner's is 'b'",
        ),
        (
            lambda: sets_of(([[0.0] * 4], [[1.0]]), num_classes=1, target="regression", scenario="domain"),
            "targets are of kind regression, the learner's of kind label",
        ),
    ],
)
def test_what_does_not_fit_is_refused(stream, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        check_fit(known(), stream(), ["a", "b", "c", "d"])
    assert "\n" not in str(error.value)


def test_fewer_classes_and_other_tasks_fit() -> None:
    check_fit(
        known(),
        sets_of(([[0.0] * 4] * 3, [0, 1, 1]), ([[0.0] * 4], [0]), num_classes=2, class_names=["a", "b"]),
        "abcd",
    )
    with pytest.raises(InputError, match=r"has the classes \[0, 2\], where the learner has \[0, 1\] there"):
        check_fit(known("task"), sets_of(([[0.0] * 4] * 2, [0, 2])))
    assert membership_of(sets_of(([[0.0] * 4] * 2, [0, 2])), 4).tolist() == [[True, False, True, False]]
