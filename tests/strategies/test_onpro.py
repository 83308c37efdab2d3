"""Online prototype learning: worked examples, what each term is, and replay alone as a special case."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from cl.backbones.networks import MLP
from cl.data.sources import digits
from cl.data.task import SCENARIOS, Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.errors import InputError
from cl.strategies.onpro import OnPro
from cl.streams.split import split
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.contrast import prototype_contrast, supervised_contrastive
from cl.toolkit.memory import Memory
from cl.toolkit.mixing import mixture, pair_probabilities, pairs_to_mix
from cl.toolkit.views import turned, with_another_view
from draws import ALPHA, normal, quick, seeds
from toys import build, learn, toy

SMALL = {"memory_size": 20, "batch_size": 8, "dim": 8}


def slow_equilibrium(first, second, temperature) -> float:
    """The loss as it is printed."""
    p = [row / row.norm() for row in (*first, *second)]
    rows = []
    for i in range(len(p)):
        pair = (i + len(first)) % len(p)
        below = sum(math.exp(float(p[i] @ p[j]) / temperature) for j in range(len(p)) if j != i)
        rows.append(-math.log(math.exp(float(p[i] @ p[pair]) / temperature) / below))
    return sum(rows) / len(rows)


def test_worked_examples():
    two = prototype_contrast(torch.eye(2), torch.eye(2), 0.5)
    assert float(two) == pytest.approx(0.239545, abs=1e-6)
    assert float(two) == pytest.approx(math.log((math.e**2 + 2) / math.e**2), abs=1e-6)
    assert float(prototype_contrast(torch.ones(1, 3), -torch.ones(1, 3), 0.5)) == 0, "one class has no other"
    points = torch.tensor([[0.0], [1.0], [3.0]])  # distances 1, 3 and 2
    expected = torch.tensor([math.e, math.exp(1 / 3), math.exp(1 / 2)])
    torch.testing.assert_close(pair_probabilities(points), expected / expected.sum())
    assert bool(pair_probabilities(torch.zeros(3, 2)).isfinite().all()), "classes in one place"
    torch.testing.assert_close(
        torch.tensor([1, 2, 4.0]).reciprocal().softmax(0), torch.tensor([0.481, 0.292, 0.227]), atol=5e-4, rtol=0
    )


@quick
@given(seeds, st.integers(1, 6), st.floats(0.1, 2))
def test_equilibrium_is_the_printed_loss(seed, num_classes, temperature):
    first, second = normal(seed, num_classes, 4), normal(seed + 1, num_classes, 4)
    loss = prototype_contrast(first, second, temperature)
    assert float(loss) == pytest.approx(slow_equilibrium(first, second, temperature), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(prototype_contrast(second, 3 * first, temperature), loss)


def test_the_copies_are_sixteen_turns_of_the_whole_and_of_halves():
    x = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    copies = turned(x)
    assert copies.shape == (32, 3, 4, 4) and torch.equal(copies[:2], x)
    assert len({tuple(copy.flatten().tolist()) for copy in copies[::2]}) == 16
    for copy in copies[::2]:
        assert sorted(copy[0].flatten().tolist()) == list(range(16))
    torch.testing.assert_close(copies[8:16], copies[:8].rot90(1, (2, 3)))
    assert torch.equal(copies[2][..., 2:], x[0][..., 2:]) and torch.equal(copies[2][..., :2], x[0][..., :2].flip(1, 2))
    assert torch.equal(copies[6], torch.cat([x[0][..., :2].flip(1, 2), x[0][..., 2:].flip(1, 2)], 2))
    assert turned(torch.zeros(1, 1, 5, 5)).shape == (16, 1, 5, 5)


def a_step(strategy: OnPro, task: int, scenario: str = "class"):
    """Return a learner in a task, with a memory of the tasks before it, and a batch of the task."""
    learner, stream = toy(strategy, range(task), scenario=scenario)
    learner.before_task(stream[task])
    return learner, Batch(*(column[:5] for column in stream[task].train.tensors()))


def loss_of(learner, batch):
    strategy = learner.strategies["method"]
    strategy.random.seed(2)
    strategy.memory.random.seed(4)
    return strategy.criterion(learner, batch, torch.zeros(0))


@pytest.mark.parametrize(("task", "scenario"), [(0, "class"), (2, "class"), (2, "task")])
def test_a_step_of_onpro_is_the_sum_of_its_terms(task, scenario):
    weights = {"prototype": 0.7, "instance": 0.3, "temperature": 0.4, "instance_temperature": 0.1}
    learner, batch = a_step(OnPro(**SMALL, **weights, base=0.5, mix=0.9), task, scenario)
    strategy = learner.strategies["method"]
    if task == 0:
        strategy.memory.insert(batch)
    loss = loss_of(learner, batch)
    strategy.random.seed(2)
    strategy.memory.random.seed(4)
    rng = strategy.random.generator

    def contrasts(rows):
        views = with_another_view(rows, strategy.augment, rng)
        z = F.normalize(strategy.projection(learner.backbone(learner.prepare(views.x))), dim=1)
        some = sorted(set(rows.y.tolist()))
        means = [torch.stack([half[rows.y == c].mean(0) for c in some]) for half in z.chunk(2)]
        means_of_all = torch.zeros(learner.num_classes, 8).index_copy_(0, torch.tensor(some), (means[0] + means[1]) / 2)
        return 0.7 * prototype_contrast(*means, 0.4), means_of_all.detach()

    def instances(rows):
        label = torch.cat([rows.y + learner.num_classes * i for i in range(16)])
        views = with_another_view(Batch(turned(rows.x), label, rows.task.repeat(16)), strategy.augment, rng)
        z = F.normalize(strategy.projection(learner.backbone(learner.prepare(views.x))), dim=1)
        return 0.3 * supervised_contrastive(z, torch.cat([label, label]), 0.1)

    def entropy(x, among, *targets):
        view = (strategy.augment(x, rng) * 255).round() / 255
        logits = learner.head(learner.backbone(view)).masked_fill(~among, -torch.inf)
        return sum((part * F.cross_entropy(logits, y, reduction="none")).mean() for part, y in targets)

    expected = contrasts(batch)[0] + instances(batch)
    old = strategy.memory.sample(8)
    term, means = contrasts(old)
    expected = expected + term
    if task == 0:
        expected = expected + entropy(batch.x, learner.seen, (1, batch.y))
    else:
        one, two, part = pairs_to_mix(old, means, strategy.memory, 0.5, 0.9, rng)
        assert int((part > 0).sum()) > 4 and bool((one.task != two.task).any())
        mixed = mixture(one, two, part)
        expected = expected + instances(mixed)
        own = torch.arange(6) // 2  # the task of each class
        apart = (one.task[:, None] == own) | (two.task[:, None] == own)
        among = apart if scenario == "task" else learner.seen
        expected = expected + entropy(mixed.x, among, (1 - part, one.y), (part, two.y))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    rng.bit_generator.state = (state := np.random.PCG64(5).state)
    means = strategy._equilibrium(learner, old)[1]
    rng.bit_generator.state = state
    torch.testing.assert_close(means, contrasts(old)[1])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_its_own_terms_it_is_replay_alone(scenario):
    learner, batch = a_step(OnPro(**SMALL, prototype=0.0, instance=0.0, base=1.0, mix=0.0), 2, scenario)
    strategy = learner.strategies["method"]
    loss = loss_of(learner, batch)
    strategy.random.seed(2)
    strategy.memory.random.seed(4)
    rng = strategy.random.generator
    with_another_view(batch, strategy.augment, rng)
    old = strategy.memory.sample(8)
    with_another_view(old, strategy.augment, rng)
    one, two, part = pairs_to_mix(old, torch.eye(learner.num_classes), strategy.memory, 1.0, 0.0, rng)
    assert not part.any() and torch.equal(one.x, two.x) and sorted(one.y.tolist()) == sorted(old.y.tolist())
    view = (strategy.augment(one.x, rng) * 255).round() / 255
    logits = learner.head(learner.backbone(view)).masked_fill(~learner.competing(one.task), -torch.inf)
    torch.testing.assert_close(loss, F.cross_entropy(logits, one.y))
    loss.backward()
    assert not strategy.projection.weight.grad.any()


def test_as_many_are_replayed_as_the_batch_and_the_classes_seen_allow():
    for task, per_class, expected in ((0, 1, 8), (1, 1, 4), (2, 1, 6), (2, 7, 8)):
        learner, batch = a_step(OnPro(**SMALL, per_class=per_class, instance=0.0), task)
        memory, drawn = learner.strategies["method"].memory, []
        memory.insert(batch)
        memory.insert(batch)
        sample = memory.sample
        memory.sample = lambda size, sample=sample, drawn=drawn: drawn.append(size) or sample(size)
        loss_of(learner, batch)
        assert drawn == [expected]


def test_each_row_is_offered_in_the_first_epoch_alone():
    learner, _ = toy(OnPro(**SMALL, instance=0.0), [0, 1], epochs=2)
    assert learner.strategies["method"].memory.num_seen == 2 * 48


def test_in_the_first_batch_there_is_nothing_to_replay():
    learner, batch = a_step(OnPro(**SMALL, prototype=0.0, instance=0.0), 0)
    strategy = learner.strategies["method"]
    loss = loss_of(learner, batch)
    strategy.random.seed(2)
    with_another_view(batch, strategy.augment, strategy.random.generator)
    view = (strategy.augment(batch.x, strategy.random.generator) * 255).round() / 255
    expected = F.cross_entropy(learner.head(learner.backbone(view))[:, :2], batch.y)
    torch.testing.assert_close(loss, expected)


def filled(num_classes: int = 4) -> Memory:
    x = torch.arange(40).view(40, 1, 1, 1).float()
    data = TaskData(x, torch.arange(40) % num_classes)
    memory = Memory(40, Stream([Task(0, data, data)], num_classes=num_classes))
    memory.insert(Batch(x, data.labels, torch.zeros(40).long()))
    return memory


def test_near_classes_are_mixed_more_often():
    memory, rng = filled(3), np.random.default_rng(0)
    means = torch.tensor([[1.0, 0.0], [1.0, 0.5], [-1.0, 0.0]])
    counts = Counter()
    for _ in range(300):
        one, two, part = pairs_to_mix(memory.sample(10), means, memory, 0.0, 1.0, rng)
        counts.update(zip(one.y.tolist(), two.y.tolist(), strict=True))
        assert bool(((part >= 0) & (part <= 1)).all()) and len(one) == len(two) == 10
    assert set(counts) == {(0, 1), (0, 2), (1, 2)}
    p = pair_probabilities(means)
    found = [counts[pair] for pair in ((0, 1), (0, 2), (1, 2))]
    assert chisquare(found, (3000 * p.double() / p.double().sum()).numpy()).pvalue > ALPHA


def test_pairs_are_drawn_rows_and_the_rest_by_class():
    memory, rng = filled(), np.random.default_rng(1)
    drawn = memory.sample(10)
    means = torch.eye(4)
    one, two, part = pairs_to_mix(drawn, means, memory, 0.75, 1.0, rng)
    rows = set(drawn.x.flatten().tolist())
    assert {*one.x[:7].flatten().tolist(), *two.x[:7].flatten().tolist()} <= rows and len(one) == 10
    assert sorted(one.x[:7].flatten().tolist()) == sorted(two.x[:7].flatten().tolist()), "each is a partner once"
    assert float(part[:7].max()) < 0.6 and bool((one.y[7:] < two.y[7:]).all())
    for batch in (one, two):
        assert torch.equal(batch.y, batch.x.flatten().long() % 4)
    single = pairs_to_mix(drawn, means * torch.tensor([[0.0], [0.0], [1.0], [0.0]]), memory, 0.5, 0.0, rng)
    assert sorted(single[0].x.flatten()) == sorted(drawn.x.flatten()) and not single[2].any()


def test_a_mixture_has_the_label_of_its_larger_part():
    x, y = torch.full((3, 1, 1, 1), 10, dtype=torch.uint8), torch.full((3,), 10)
    one, two = Batch(x, y, torch.zeros(3).long()), Batch(2 * x, 2 * y, torch.ones(3).long())
    mixed = mixture(one, two, torch.tensor([0.0, 0.45, 0.75]))
    assert mixed.x.flatten().tolist() == [10, 14, 17] and mixed.y.tolist() == [10, 10, 20]
    assert mixed.x.dtype == torch.uint8 and mixed.task.tolist() == [0, 0, 1]


def test_onpro_learns_five_tasks_in_one_pass():
    torch.manual_seed(0)
    stream = split(digits(), num_tasks=5, scenario="class")
    strategy = OnPro(memory_size=100, batch_size=16, instance=0.0, flip=False, scale=0.6)
    learner = build(stream, MLP, strategy, optimizer=partial(torch.optim.Adam, lr=3e-3), batch_size=10)
    learn(learner, stream).eval()
    right = []
    for task in stream:
        x, y, label = task.test.tensors()
        right.append((learner.predict(Batch(x, y, label)).argmax(1) == y).float().mean())
    assert float(torch.stack(right).mean()) > 0.6


def test_onpro_refuses_what_it_cannot_turn():
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    flat = Stream([Task(0, TaskData(x, y), TaskData(x, y))], num_classes=2, name="flat")
    with pytest.raises(InputError, match=r"OnPro crops images, but the inputs of 'flat' are \(3,\): choose another"):
        build(flat, ToyBackbone(), OnPro())
    x = torch.randn(4, 1, 2, 8)
    oblong = Stream([Task(0, TaskData(x, y), TaskData(x, y))], num_classes=2, name="wide")
    with pytest.raises(InputError, match=r"those of 'wide' are oblong: set onpro.rotate=false"):
        build(oblong, ToyBackbone(), OnPro())
    build(oblong, ToyBackbone(), OnPro(rotate=False))
    assert not OnPro.distributed and toy_stream().input_shape[1:] == (4, 4)
