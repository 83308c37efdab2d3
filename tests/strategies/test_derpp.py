"""Dark Experience Replay++: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

import pytest
import torch

from cl.strategies import derpp
from cl.strategies.derpp import DERpp
from cl.testing import ToyBackbone, toy_stream
from toys import build, learn, same, toy, trunk


def test_der_without_both_terms_is_finetuning_to_the_bit():
    assert same(trunk(toy(DERpp(memory_size=12, alpha=0, beta=0), range(3))[0]), trunk(toy(None, range(3))[0]))


def test_worked_example_20_dark_knowledge_is_a_mean_over_rows_and_classes():
    logits, stored = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3)
    assert float(derpp.dark_knowledge(logits, stored)) == pytest.approx(5 / 3)
    assert float(derpp.dark_knowledge(logits.repeat(4, 1), stored.repeat(4, 1))) == pytest.approx(5 / 3)


def test_der_stores_the_logits_from_before_the_step_of_every_class():
    torch.manual_seed(0)
    stream = toy_stream()
    learner = build(stream, ToyBackbone(), DERpp(memory_size=48), batch_size=48)
    before = learner(learner.prepare(stream[0].train.x)).detach()
    learn(learner, stream, [0])
    memory = learner.strategies["method"].memory
    position = {x.numpy().tobytes(): i for i, x in enumerate(stream[0].train.x)}
    drawn = memory.sample(48)
    rows = [position[x.numpy().tobytes()] for x in drawn.x]
    torch.testing.assert_close(drawn.extras["logits"], before[rows])
