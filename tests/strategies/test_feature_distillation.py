"""Feature distillation beside a loop written by hand."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones.networks import MLP
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.loader import TrainLoader
from cl.errors import InputError
from cl.random import derive
from cl.testing import toy_stream
from cl.testing.toys import ToyBackbone, trainer
from strategies.feature_distillation import FeatureDistillation


def teacher(shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(11)
    return MLP(shape, hidden=[7])


def learned(labels: bool, num_tasks: int = 2, epochs: int = 2) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    stream, body = toy_stream(num_tasks), ToyBackbone()
    method = FeatureDistillation(teacher, weight=2.0, labels=labels, folder=None)
    learner = Learner(stream, body, {"fd": method}, partial(torch.optim.SGD, lr=0.1), batch_size=8, seed=3)
    before = deepcopy(learner)
    experiment = Experiment(learner, stream, trainer, epochs=epochs)
    for task in stream:
        experiment.learn(task)
    return learner, before, stream


@pytest.mark.parametrize("labels", [True, False])
def test_the_weights_are_those_of_a_loop_by_hand(labels: bool) -> None:
    learner, start, stream = learned(labels)
    body, head, mapping = start.backbone, start.head, start.strategies["fd"].map
    taught = teacher((1, 4, 4)).eval()
    for task in stream:
        x, y, _ = task.train.tensors()
        x = x.float() / 255
        with torch.no_grad():
            targets = taught(x) - taught(x).mean(0)
        optimizer = torch.optim.SGD([*body.parameters(), *head.parameters(), *mapping.parameters()], lr=0.1)
        seed = derive(3, "task", task.index)
        steps = len(y) // 8
        for epoch in range(2):
            loader = TrainLoader(task.train, 8, 1, steps, seed, partial(int, epoch * steps), torch.device("cpu"))
            for (batch,) in loader:
                rows = torch.as_tensor(batch.rows)
                h = body(x[rows])
                cosine = (mapping(h) * targets[rows]).sum(1) / (mapping(h).norm(dim=1) * targets[rows].norm(dim=1))
                loss = 2.0 * (1 - cosine).mean()
                if labels:
                    loss = loss + F.cross_entropy(head(h)[:, : 2 * task.index + 2], y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    for one, other in zip(learner.backbone.parameters(), body.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert torch.allclose(learner.strategies["fd"].map.weight, mapping.weight, atol=1e-6)
    assert torch.allclose(learner.head.weight, head.weight, atol=1e-6)


def test_without_labels_the_head_stays() -> None:
    learner, start, _ = learned(labels=False)
    assert torch.equal(learner.head.weight, start.head.weight)
    assert not FeatureDistillation(teacher, labels=False).needs_labels


def test_the_student_comes_close_to_the_teacher() -> None:
    learner, start, stream = learned(labels=False, num_tasks=1, epochs=30)
    x = stream[0].test.tensors()[0].float() / 255
    taught = teacher((1, 4, 4))(x)

    def distance(of: Any) -> Tensor:
        mapped = of.strategies["fd"].map(of.backbone(x))
        return 1 - F.cosine_similarity(mapped, taught - taught.mean(0)).mean()

    assert distance(learner) < 0.7 * distance(start)


def test_a_teacher_is_run_once_and_stays_as_it_was(tmp_path: Any) -> None:
    torch.manual_seed(0)
    stream = toy_stream(2)
    method = FeatureDistillation(teacher, folder=str(tmp_path / "f"))
    learner = Learner(stream, ToyBackbone(), {"fd": method}, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    experiment = Experiment(learner, stream, trainer, epochs=1)
    for task in stream:
        experiment.learn(task)
    assert len(list((tmp_path / "f").glob("*.done.npy"))) == 2  # one for each task's images
    assert not any("teacher" in name for name in learner.state_dict())
    with pytest.raises(InputError, match="weight"):
        FeatureDistillation(teacher, weight=0.0)
