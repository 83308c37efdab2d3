"""Unbiased experience replay: worked examples, the geometry of its gradients, and the loop written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from by_hand import by_hand, close
from cl.backbones.networks import MLP
from cl.data.sources import digits
from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies.uer import UER
from cl.streams.split import split
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.proxies import cosine_logits, proxies
from draws import normal, quick, seeds
from toys import learn, same, toy, trunk, weights

SCALE = 1 / 0.09
H, W = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])


def test_worked_example_new_rows_by_angle_and_replayed_rows_by_product():
    h, w, y = H.clone().requires_grad_(), W.clone().requires_grad_(), torch.tensor([1])
    torch.testing.assert_close(h @ w.T, torch.tensor([[8.0, 3.0]]))
    angles = cosine_logits(h, w, SCALE)
    torch.testing.assert_close(angles, torch.tensor([[8.8889, 6.6667]]), rtol=0, atol=1e-4)
    loss = F.cross_entropy(angles, y)
    assert float(loss.detach()) == pytest.approx(2.325111, abs=1e-5)
    assert float(F.cross_entropy(h @ w.T, y).detach()) == pytest.approx(5.006715, abs=1e-5)
    to_h, to_w = torch.autograd.grad(loss, (h, w))
    assert float(to_h.norm()) > 0.1 and bool((to_w.norm(dim=1) > 0.1).all())
    torch.testing.assert_close((to_h * H).sum(1), torch.zeros(1), atol=1e-6, rtol=0)
    torch.testing.assert_close((to_w * W).sum(1), torch.zeros(2), atol=1e-6, rtol=0)


@quick
@given(seeds, st.integers(1, 5), st.integers(2, 6), st.integers(2, 8), st.floats(0.1, 20))
def test_angles_know_no_lengths_and_their_gradients_change_none(seed, rows, num_classes, dim, scale):
    h, w = normal(seed, rows, dim).requires_grad_(), normal(seed + 1, num_classes, dim).requires_grad_()
    logits = cosine_logits(h, w, scale)
    expected = scale * (h @ w.T) / (h.norm(dim=1)[:, None] * w.norm(dim=1))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(cosine_logits(3 * h, 0.5 * w, scale), logits)
    y = torch.randint(num_classes, (rows,), generator=torch.Generator().manual_seed(seed))
    to_h, to_w = torch.autograd.grad(F.cross_entropy(logits, y), (h, w))
    for gradient, vectors in ((to_h, h), (to_w, w)):
        assert float((gradient * vectors.detach()).sum(1).abs().max()) < 1e-9


def test_a_vector_of_length_zero_has_finite_logits_and_gradients():
    h, w = torch.zeros(1, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    logits = cosine_logits(h, w, SCALE)
    assert not logits.any()
    for gradient in torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0])), (h, w)):
        assert bool(gradient.isfinite().all())


def test_a_vector_shorter_than_a_millionth_is_divided_by_it():
    got = cosine_logits(torch.tensor([[2e-7, 0.0]]), torch.tensor([[1.0, 0.0], [1e-7, 0.0]]), 1.0)
    torch.testing.assert_close(got, torch.tensor([[0.2, 0.02]]))


def test_as_many_are_replayed_as_are_asked_for():
    for size, expected in ((3, 3), (None, 5)):
        learner, stream = toy(UER(memory_size=12, batch_size=size), [0])
        incoming = Batch(*(column[:5] for column in stream[1].train.tensors()))
        assert len(learner.strategies["method"].extend_batch(learner, incoming)) == 5 + expected


@pytest.mark.parametrize("every_epoch", [False, True])
def test_uer_is_the_loop_written_by_hand(every_epoch):
    def loss_of(net, x, y, memory, seen):
        h, w = net[0](x), net[1].weight
        cosines = (h / h.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T
        loss = F.cross_entropy(2 * cosines[:, :seen], y)
        if memory.rows:
            old_x, old_y = memory.some(len(y))[:2]
            loss = loss + F.cross_entropy((net[0](old_x) @ w.T)[:, :seen], old_y)
        return loss, h @ w.T

    learner, _ = toy(UER(memory_size=12, scale=2.0, every_epoch=every_epoch), range(3), epochs=2)
    close(learner, by_hand(loss_of, every_epoch=every_epoch))


def test_both_losses_are_under_the_mask_of_the_scenario():
    learner, stream = toy(UER(memory_size=12), [0, 1], scenario="task")
    learner.before_task(stream[2])
    strategy, new = learner.strategies["method"], Batch(*(column[:4] for column in stream[2].train.tensors()))
    batch = new.append(Batch(*(column[:3] for column in stream[0].train.tensors())))
    logits = learner(learner.prepare(batch.x), batch.task)
    h, w = learner.backbone(learner.prepare(batch.x)), learner.head.weight
    expected = F.cross_entropy(cosine_logits(h[:4], w[4:], SCALE), batch.y[:4] - 4)
    expected = expected + F.cross_entropy(h[4:] @ w[:2].T, batch.y[4:])
    torch.testing.assert_close(strategy.criterion(learner, batch, logits), expected)
    alone = strategy.criterion(learner, new, learner(learner.prepare(new.x), new.task))
    torch.testing.assert_close(alone, F.cross_entropy(cosine_logits(h[:4], w[4:], SCALE), new.y - 4))


def test_predictions_are_the_products_and_the_bias_is_not_used():
    learner, stream = toy(UER(memory_size=12))
    bias = learner.head.bias.detach().clone()
    learn(learner, stream, [0, 1])
    assert torch.equal(learner.head.bias, bias)
    view = learner.prepare(stream[1].test.x)
    h, strategy = learner.backbone(view), learner.strategies["method"]
    assert torch.equal(strategy.predict(learner, view), h @ learner.head.weight.T)
    strategy.predict_with = "cos"
    torch.testing.assert_close(strategy.predict(learner, view), cosine_logits(h, learner.head.weight, SCALE))


def test_predicting_by_angles_is_far_worse():
    def accuracy(predict_with: str) -> tuple[float, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        stream = split(digits(), num_tasks=5, scenario="class")
        strategies = {"uer": UER(memory_size=100, predict_with=predict_with)}
        learner = Learner(stream, MLP, strategies, partial(torch.optim.SGD, lr=0.1), batch_size=10)
        learn(learner, stream).eval()
        right = []
        for task in stream:
            x, y, label = task.test.tensors()
            right.append((learner.predict(Batch(x, y, label)).argmax(1) == y).float().mean())
        return float(torch.stack(right).mean()), trunk(learner)

    by_product, one = accuracy("dot")
    by_angle, other = accuracy("cos")
    assert same(one, other), "predictions leave the training as it is"
    assert by_product > by_angle + 0.2


def test_a_head_without_a_row_for_each_class_is_refused():
    class Deep(nn.Module):
        def __init__(self, width: int, num_classes: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(width, 8), nn.Linear(8, num_classes))

        def forward(self, x):
            return self.layers(x)

    optimizer = partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(InputError, match=r"UER .* the head Deep has no weight of shape \(6, 16\): use head=linear"):
        Learner(toy_stream(3), ToyBackbone(), {"method": UER()}, optimizer, head=Deep)
    with pytest.raises(InputError, match="kind of logits"):
        UER(predict_with="angle")
    without = Learner(toy_stream(3), ToyBackbone(), {"method": UER()}, optimizer, head=partial(nn.Linear, bias=False))
    assert "bias" not in weights(without.head) and proxies(without) is without.head.weight
