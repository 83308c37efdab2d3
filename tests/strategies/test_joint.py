"""Joint training: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import torch

from cl.data.task import Stream, Task, TaskData
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.strategies.joint import Joint
from cl.testing import ToyBackbone, toy_learner
from toys import learn, same, trainer, trunk


def test_joint_is_finetuning_on_the_concatenated_stream():
    learner, stream = toy_learner({"joint": Joint()})
    matrices = Experiment(learner, stream, trainer, epochs=2).run().matrices
    for name in ("class", "task"):
        R = matrices[name].R
        assert torch.equal(R[1], R[2]) and torch.equal(R[1], R[3]) and not torch.equal(R[0], R[1])
    union = TaskData.concat([task.train for task in stream])
    whole = Stream([Task(0, TaskData(union.x, union.y), TaskData(union.x, union.y))], num_classes=6)
    torch.manual_seed(0)
    plain = Learner(whole, ToyBackbone(), {}, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    assert same(trunk(learner), trunk(learn(plain, whole, epochs=2)))
