"""BiC: the correction against other optimisers, what is held out, and a task written by hand."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from by_hand import close, ordered
from cl.data.task import Stream, Task, TaskData
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies.bic import BiC
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.bias import affine_correction
from draws import quick, seeds
from toys import Identity, build, float_stream, learn, toy


def loss_of(pair, logits, y, new, decay):
    """Stage 2, row by row."""
    found = 0.0
    for row, label in zip(logits, y, strict=True):
        q = torch.stack([pair[0] * o + pair[1] if is_new else o for o, is_new in zip(row, new, strict=True)])
        found = found + torch.logsumexp(q, 0) - q[label]
    return found / len(y) + decay / 2 * ((pair[0] - 1) ** 2 + pair[1] ** 2)


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.floats(0.05, 1))
def test_the_correction_is_the_stationary_point_of_a_convex_loss(seed, n, m, decay):
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(8, n + m, generator=draw, dtype=torch.float64)
    y, new = torch.randint(n + m, (8,), generator=draw), torch.arange(n + m) >= n
    pair = affine_correction(logits, y, new, decay).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(pair, logits, y, new, decay), pair)
    assert float(gradient.abs().max()) < 1e-6


def test_another_optimiser_finds_the_same_correction():
    draw = torch.Generator().manual_seed(0)
    y, new = torch.arange(40) % 4, torch.tensor([False, False, True, True])
    logits = 2 * F.one_hot(y, 4) + torch.randn(40, 4, generator=draw)
    biased = torch.where(new, 1.5 * logits + 1.0, logits).double()
    pair = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([pair], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.where(new, pair[0] * biased + pair[1], biased), y)
        (loss + 0.005 * ((pair[0] - 1) ** 2 + pair[1] ** 2)).backward()
        optimizer.step()
    found = affine_correction(biased, y, new, 0.01)
    torch.testing.assert_close(found, pair.detach(), atol=1e-3, rtol=0)
    alpha, beta = affine_correction(biased, y, new, 0.0)
    as_before = affine_correction(logits, y, new, 0.0)
    torch.testing.assert_close(torch.stack([1.5 * alpha, alpha + beta]), as_before, atol=1e-5, rtol=0)


def test_a_correction_solved_by_hand():
    """One new class, whose output is 1 for each example: only s = alpha + beta counts, and sigmoid(s) is its share."""
    logits = torch.tensor([[0.0, 1.0]]).repeat(4, 1)
    alpha, beta = affine_correction(logits, torch.tensor([0, 1, 1, 1]), torch.tensor([False, True]), 1e-7).tolist()
    assert alpha + beta == pytest.approx(float(torch.tensor(3.0).log()), abs=1e-5)
    assert alpha - 1 == pytest.approx(beta, abs=1e-6), "the nearest such pair to (1, 0)"


def test_nothing_is_corrected_in_the_first_task():
    learner, stream = toy(BiC(memory_size=20), [0])
    method = learner.strategies["method"]
    view = learner.prepare(stream[0].test.x)
    assert torch.equal(method.predict(learner, view), learner(view))
    assert method.correction.tolist() == [[1.0] * 6, [0.0] * 6]


def test_the_held_out_are_as_many_of_each_class_and_never_trained_on():
    """Thirty exemplars, a third of them held out: 5, 2 and 1 of each class in the three tasks, and 10, 5 and 3 not."""
    learner, stream = toy(BiC(memory_size=30, held_out=0.34))
    method, trained = learner.strategies["method"], set()
    given = method.training_data

    def watched(learner, task):
        data = given(learner, task)
        trained.update(row.numpy().tobytes() for row in data.tensors()[0])
        return data

    learner._owners["training_data"] = watched
    for task, apart, rest in zip(stream, (5, 2, 1), (10, 5, 3), strict=True):
        learn(learner, stream, [task.index])
        t = 2 * task.index + 2
        for memory, size in ((method.apart, apart), (method.memory, rest)):
            assert torch.bincount(memory.ranked()[1]).tolist() == [size] * t
        assert not trained & {row.numpy().tobytes() for row in method.apart.ranked()[0]}
        assert trained >= {row.numpy().tobytes() for row in method.memory.ranked()[0]}
    assert len(trained) == sum(48 - 2 * size for size in (5, 2, 1))


def test_the_second_and_third_task_are_those_written_by_hand():
    learner, stream = toy(BiC(memory_size=28, held_out=0.5, decay=0.2), [0], epochs=2)
    method = learner.strategies["method"]
    told, factor, summand = [], torch.ones(6), torch.zeros(6)
    for t in (1, 2):
        net = deepcopy(nn.Sequential(learner.backbone, learner.head))
        teacher, n = deepcopy(net), 2 * t
        random = deepcopy(method.random.generator)
        order = torch.from_numpy(random.permutation(48))
        x, y, _ = stream[t].train.tensors()
        out = torch.cat([order[y[order] == c][: 14 // (n + 2)] for c in (n, n + 1)])
        kept = torch.tensor([i for i in range(48) if i not in out])
        seen_x = torch.cat([x[kept], method.memory.ranked()[0]])
        seen_y = torch.cat([y[kept], method.memory.ranked()[1]])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for rows in ordered(len(seen_y), t, epochs=2):
            view = seen_x[rows].float() / 255
            soft = ((teacher(view) * factor + summand)[:, :n] / 2).softmax(1).detach()
            logits = net(view)
            distilled = -(soft * (logits[:, :n] / 2).log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            (2 / (n + 2) * F.cross_entropy(logits[:, : n + 2], seen_y[rows]) + n / (n + 2) * distilled).backward()
            optimizer.step()
        learn(learner, stream, [t], epochs=2)
        close(learner, net)
        with torch.no_grad():
            held_x, held_y, _, _ = method.apart.ranked()
            outputs = net(held_x.float() / 255)[:, : n + 2].double()
        assert {r.numpy().tobytes() for r in held_x[held_y >= n]} == {r.numpy().tobytes() for r in x[out]}
        alpha, beta = affine_correction(outputs, held_y, torch.arange(n + 2) >= n, 0.2).tolist()
        factor = torch.tensor([1.0] * n + [alpha] * 2 + [1.0] * (4 - n))
        summand = torch.tensor([0.0] * n + [beta] * 2 + [0.0] * (4 - n))
        view = learner.prepare(torch.cat([task.test.x for task in stream]))
        torch.testing.assert_close(method.predict(learner, view), learner(view) * factor + summand)
        told.append(alpha)
    assert max(abs(alpha - 1) for alpha in told) > 1e-3, "there is something to correct"


def test_the_correction_lowers_the_number_of_predictions_of_new_classes():
    """Features say the class, with noise; of the old classes few examples are trained on."""
    draw = torch.Generator().manual_seed(0)
    ys = [torch.arange(200) % 2, torch.arange(200) % 2 + 2]
    stream = float_stream([3 * F.one_hot(y, 4) + 1.5 * torch.randn(200, 4, generator=draw) for y in ys], ys)
    learner = learn(build(stream, Identity(4), BiC(memory_size=40, held_out=0.5, decay=0.01), batch_size=20), stream)
    method, view = learner.strategies["method"], torch.cat([task.test.x for task in stream])
    y = torch.cat(ys)
    raw, corrected = learner(view).argmax(1), method.predict(learner, view).argmax(1)
    share = [float((found >= 2).float().mean()) for found in (raw, corrected)]
    assert abs(share[1] - 0.5) < abs(share[0] - 0.5)
    assert (corrected == y).float().mean() >= (raw == y).float().mean()


def test_a_class_with_one_example_is_trained_on():
    base = toy_stream(2)
    x, y, _ = base[1].train.tensors()
    tasks = [base[0], Task(1, TaskData(x[:2], y[:2], 1), base[1].test)]
    stream = Stream(tasks, num_classes=4)
    learner = learn(build(stream, ToyBackbone(), BiC(memory_size=12)), stream)
    method = learner.strategies["method"]
    assert torch.bincount(method.memory.ranked()[1], minlength=4)[2:].tolist() == [1, 1]
    assert method.correction.tolist() == [[1.0] * 4, [0.0] * 4]


class OwnsEncode(Strategy):
    def encode(self, learner, view):
        return learner.backbone(view)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toy(BiC(), scenario="domain"), "BiC works with scenario=class, but .* scenario=domain"),
        (
            lambda: toy(BiC(memory_size=11)),
            r"bic\.memory_size=11 leaves .* less than 2 exemplars: set it to 12",
        ),
        (lambda: toy({"other": OwnsEncode(), "bic": BiC()}), "BiC distils .* another strategy owns encode"),
        (lambda: BiC(held_out=0.6), r"bic\.held_out=0\.6 must be"),
        (lambda: BiC(decay=-1.0), r"bic\.decay=-1\.0 must be 0 or more"),
    ],
)
def test_bic_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()
