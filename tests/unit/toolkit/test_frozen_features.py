"""Freezing a learner and reading a task's features."""

from __future__ import annotations

import pytest
import torch

from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.testing import toy_learner
from cl.toolkit.frozen_features import freeze_trunk, training_features


def test_nothing_is_trained_after_freezing():
    learner, _ = toy_learner()
    assert freeze_trunk(learner, Strategy()) == 16
    assert not any(p.requires_grad for p in learner.parameters())
    assert not any(module.training for module in learner.trunk().modules())


def test_another_strategys_features_are_refused_by_name():
    class Encodes(Strategy):
        def encode(self, learner, view):
            return learner.backbone(view)

    class Reads(Strategy):
        def setup(self, learner, stream):
            freeze_trunk(learner, self)

    with pytest.raises(InputError, match="Reads reads the backbone's features, but another strategy owns encode"):
        toy_learner({"a": Encodes(), "b": Reads()})


@pytest.mark.parametrize("size", [1, 7, 100])
def test_features_come_in_order_in_evaluation_mode_and_without_graphs(size):
    learner, stream = toy_learner(backbone="restless", eval_batch_size=size)
    parts = list(training_features(learner, stream[1]))
    assert torch.is_grad_enabled() and learner.backbone.training, "as before"
    x, y, _ = stream[1].train.tensors()
    learner.eval()
    torch.testing.assert_close(torch.cat([features for features, _ in parts]), learner.backbone(learner.prepare(x)))
    assert torch.equal(torch.cat([labels for _, labels in parts]), y)
    assert not any(features.requires_grad for features, _ in parts)
