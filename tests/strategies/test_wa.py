"""WA: lengths that become equal, a worked loss, and a task written by hand."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from by_hand import close, ordered
from cl.engine.batch import Batch
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies.wa import WA, alignment
from draws import quick, seeds
from toys import learn, same, toy


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 4), st.sampled_from([1.0, 2.0, 3.0]))
def test_aligned_weights_are_equally_long_on_average(seed, n, m, norm):
    weight = torch.randn(n + m, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    old, new = torch.arange(n), torch.arange(n, n + m)
    gamma = alignment(weight, old, new, norm)
    lengths = [float((row.abs() ** norm).sum()) ** (1 / norm) for row in torch.cat([weight[old], gamma * weight[new]])]
    assert sum(lengths[:n]) / n == pytest.approx(sum(lengths[n:]) / m)
    assert float(alignment(weight, old, new, norm)) == pytest.approx(float(alignment(2 * weight, old, new, norm)))


def test_alignment_worked_by_hand():
    weight = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0], [0.0, 2.0]])  # lengths 5, 1 and 10, 2
    assert float(alignment(weight, torch.tensor([0, 1]), torch.tensor([2, 3]), 2.0)) == pytest.approx(0.5)
    assert float(alignment(weight, torch.tensor([0, 1]), torch.tensor([2, 3]))) == pytest.approx(0.5)
    assert float(alignment(weight, torch.tensor([0]), torch.tensor([1, 2, 3]), 1.0)) == pytest.approx(7 / 17 * 3)
    assert alignment(torch.eye(2) * torch.tensor([1.0, 0.0]), torch.tensor([0]), torch.tensor([1])).isfinite()


def test_the_loss_worked_by_hand():
    """The teacher says 3 to 1 and the student 1 to 1 of the old classes; what it says of others is not used."""
    learner, stream = toy(WA(memory_size=6, temperature=4.0), [0], epochs=2)
    learner.before_task(stream[1])
    method = learner.strategies["method"]
    method._share = 2 / 3
    taught = 4 * torch.tensor([[0.75, 0.25]]).log()
    method.teacher.forward = lambda view: F.pad(taught, (0, 4), value=7.0).expand(len(view), 6)
    x, y, task = (column[:2] for column in stream[1].train.tensors())
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0, 9.0, 9.0]]).repeat(2, 1)
    loss = method.criterion(learner, Batch(x, y, task, view=learner.prepare(x)), logits)
    log = torch.tensor([2.0, 4.0]).log()
    assert float(loss) == pytest.approx(float(log[1] / 3 + log[0] * 2 / 3))


@pytest.mark.parametrize(
    ("clip", "norm", "largest"), [(True, 1.0, None), (True, 2.0, 0.95), (False, 2.0, None), (False, 3.0, 0.9)]
)
def test_the_second_and_third_task_are_those_written_by_hand(clip, norm, largest):
    learner, stream = toy(WA(memory_size=14, clip=clip, norm=norm, largest=largest), [0], epochs=2)
    method = learner.strategies["method"]
    for t in (1, 2):
        net = deepcopy(nn.Sequential(learner.backbone, learner.head))
        teacher, n = deepcopy(net), 2 * t
        x, y = (torch.cat(pair) for pair in zip(stream[t].train.tensors()[:2], method.memory.ranked()[:2], strict=True))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for rows in ordered(len(y), t, epochs=2):
            view = x[rows].float() / 255
            logits, soft = net(view), (teacher(view)[:, :n] / 2).softmax(1).detach()
            distilled = -(soft * (logits[:, :n] / 2).log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            (2 / (n + 2) * F.cross_entropy(logits[:, : n + 2], y[rows]) + n / (n + 2) * distilled).backward()
            optimizer.step()
            if clip:
                net[1].weight.data.relu_()
        lengths = net[1].weight.detach().norm(p=norm, dim=1)
        gamma = min(float(lengths[:n].mean() / lengths[n : n + 2].mean()), largest or 1000)
        net[1].weight.data[n : n + 2] *= gamma
        learn(learner, stream, [t], epochs=2)
        close(learner, net)
        assert gamma != pytest.approx(1, abs=1e-3), "there is something to align"
        assert torch.bincount(method.memory.ranked()[1]).tolist() == [14 // (n + 2)] * (n + 2)
        assert bool((learner.head.weight >= 0).all()) == clip


def test_the_end_of_an_epoch_clips_where_a_process_had_no_example_in_the_last_step():
    for clip in (True, False):
        learner, stream = toy(WA(memory_size=14, clip=clip))
        learner.strategies["method"].after_epoch(learner, stream[0], 0)
        assert bool((learner.head.weight >= 0).all()) == clip


def test_gamma_is_recorded_after_every_task_but_the_first(monkeypatch):
    told: list[tuple[str, int, float]] = []
    learner, stream = toy(WA(memory_size=12, norm=2.0, largest=None))
    monkeypatch.setattr(
        type(learner), "record", lambda self, name, value: told.append((name, self.task_index, float(value)))
    )
    learn(learner, stream)
    assert [(name, task) for name, task, _ in told] == [("wa/gamma", 1), ("wa/gamma", 2)]
    lengths = learner.head.weight.detach().norm(dim=1)
    assert float(lengths[:4].mean()) == pytest.approx(float(lengths[4:].mean())) and told[1][2] > 0


def test_weights_of_the_old_classes_and_the_biases_are_not_scaled():
    learner, stream = toy(WA(memory_size=12), [0], epochs=2)
    method = learner.strategies["method"]
    learner.before_task(stream[1])
    learner.seen[:4] = True
    before = {name: tensor.clone() for name, tensor in learner.head.state_dict().items()}
    method.after_task(learner, stream[1])
    assert same({"bias": learner.head.bias}, {"bias": before["bias"]})
    ratio = learner.head.weight[2:4] / before["weight"][2:4]
    scaled = ratio[before["weight"][2:4] > 0]
    assert torch.equal(learner.head.weight[[0, 1, 4, 5]], before["weight"][[0, 1, 4, 5]])
    torch.testing.assert_close(scaled, scaled[:1].expand_as(scaled))


class OwnsEncode(Strategy):
    def encode(self, learner, view):
        return learner.backbone(view)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toy(WA(), scenario="task"), "WA works with scenario=class, but .* scenario=task"),
        (lambda: toy(WA(memory_size=5)), r"wa\.memory_size=5 leaves some of the 6 classes without .* to 6 or more"),
        (lambda: toy({"other": OwnsEncode(), "wa": WA()}), "WA distils .* another strategy owns encode"),
        (lambda: toy(WA(), head=nn.Sequential(nn.Linear(16, 6))), "WA compares .* use head=linear"),
        (lambda: WA(largest=0.0), r"wa\.largest=0\.0 must be above 0"),
        (lambda: WA(norm=0.5), "norm=0.5 must be 1 or more"),
        (lambda: WA(temperature=0.0), "temperature=0.0 must be above 0"),
    ],
)
def test_wa_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()
