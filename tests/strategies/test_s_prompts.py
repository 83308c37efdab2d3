"""S-Prompts: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.data.task import Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies.s_prompts import SPrompts, distances
from cl.testing import ToyBackbone
from draws import quick, seeds
from prompted import (
    all_rows,
    assert_backbone_is_frozen,
    assert_rows_are_independent,
    one_batch,
    prompted,
    queries,
    timm_vit,
    transformer,
)
from toys import learn, same, trainer, weights


def domains(num_rows: int = 48) -> Stream:
    """The same two classes in three domains that look different, the labels of the second exchanged."""
    draw = torch.Generator().manual_seed(0)
    tasks = []
    for t in range(3):
        place = torch.randn(1, 4, 4, generator=draw) * 2
        parts = []
        for n in (num_rows, 24):
            y = torch.arange(n) % 2
            sign = (2 * y - 1) * (-1 if t == 1 else 1)
            x = place + sign[:, None, None, None] * 0.7 + torch.randn(n, 1, 4, 4, generator=draw) * 0.3
            parts.append(TaskData(x, y, t))
        tasks.append(Task(t, train=parts[0], test=parts[1]))
    return Stream(tasks, scenario="domain", num_classes=2)


def s_prompts_learner(stream: Stream, strategy: Strategy, backbone=None, optimizer=None) -> Learner:
    torch.manual_seed(0)
    optimizer = optimizer or partial(torch.optim.SGD, lr=0.01)
    return Learner(stream, backbone or transformer(), {"method": strategy}, optimizer, batch_size=8)


def test_worked_example_34():
    f, centres = torch.tensor([[1.2, -0.1]]), torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]])
    torch.testing.assert_close(distances(f, centres, 1), torch.tensor([[1.3, 1.3]]), rtol=0, atol=1e-5)
    torch.testing.assert_close(distances(f, centres, 2), torch.tensor([[1.20416, 1.11803]]), rtol=0, atol=1e-5)


@quick
@given(seeds, st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1.0, 2.0]))
def test_distances_are_those_written_out(seed, num_rows, num_domains, num_centres, norm):
    draw = torch.Generator().manual_seed(seed)
    f, centres = torch.randn(num_rows, 5, generator=draw), torch.randn(num_domains, num_centres, 5, generator=draw)
    difference = (f[:, None, None] - centres[None]).abs()
    expected = (difference**norm).sum(3) ** (1 / norm)
    torch.testing.assert_close(distances(f, centres, norm), expected.amin(2), rtol=1e-4, atol=1e-5)


def test_centres_are_k_means_of_unit_length_features_without_prompts():
    from sklearn.cluster import KMeans

    stream = domains()
    strategy = SPrompts(length=3, num_centres=2)
    learner = learn(s_prompts_learner(stream, strategy), stream)
    for task in stream:
        features = F.normalize(queries(learner.backbone, learner.prepare(task.train.x)), dim=1).numpy()
        theirs = KMeans(2, n_init=20, random_state=0).fit(features).cluster_centers_
        ours = strategy.centres[task.index].numpy()
        gaps = np.abs(ours[:, None] - theirs[None]).max(2).min(1)
        assert gaps.max() < 1e-3, "two clear clusters, a class each"


def test_fewer_examples_than_centres_fill_the_rest_with_themselves():
    stream, strategy = domains(num_rows=3), SPrompts(num_centres=5)
    learner = s_prompts_learner(stream, strategy)
    learner.before_task(stream[0])
    rows = F.normalize(queries(learner.backbone, learner.prepare(stream[0].train.x)), dim=1)
    assert float(torch.cdist(strategy.centres[0], rows).min(1).values.max()) < 1e-5


@pytest.mark.parametrize("make", [transformer, timm_vit], ids=["vit", "timm"])
def test_s_prompts_predicts_by_the_nearest_domains_prompts_and_head(make):
    stream = domains()
    if make is timm_vit:
        parts = [[TaskData(part.x.repeat(1, 3, 8, 8), part.y, part.task) for part in (t.train, t.test)] for t in stream]
        stream = Stream([Task(t, *part) for t, part in enumerate(parts)], scenario="domain", num_classes=2)
    strategy = SPrompts(length=3, num_centres=2, norm=2.0)
    learner = learn(s_prompts_learner(stream, strategy, make()), stream).eval()
    view = all_rows(learner, stream)
    with torch.no_grad():
        query = F.normalize(queries(learner.backbone, view), dim=1)
        expected, chosen = [], []
        for row, q in zip(view, query, strict=True):
            t = min(range(3), key=lambda t: min(float((q - c).norm()) for c in strategy.centres[t]))
            embedded = learner.backbone.embed(row[None])
            tokens = torch.cat([embedded[:, :1], strategy.prompts[t][None], embedded[:, 1:]], dim=1)
            expected.append(strategy.heads[t](learner.backbone.encode(tokens)[:, 0])[0])
            chosen.append(t)
        ours = learner(view)
    assert set(chosen) == {0, 1, 2}
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert_rows_are_independent(learner, stream)


def test_s_prompts_on_one_batch_by_hand_and_replay_teaches_nothing():
    learner, stream = prompted(SPrompts(length=3), "domain")
    strategy = learner.strategies["method"]
    learn(learner, stream, [0])
    learner.before_task(stream[1])
    batch, logits, loss = one_batch(learner, stream[1])
    features = [
        learner.backbone.encode(torch.cat([learner.backbone.embed(row[None]), strategy.prompts[1][None]], dim=1))[0, 0]
        for row in batch.view
    ]
    torch.testing.assert_close(logits, strategy.heads[1](torch.stack(features)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.y))
    x, y, label = (column[5:8] for column in stream[0].train.tensors())
    both = batch.append(Batch(x, y, label))
    both.view = learner.prepare(both.x)
    logits = learner(both.view, both.task)
    torch.testing.assert_close(strategy.criterion(learner, both, logits), loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_domains_are_learned_independently(decay):
    """Prompts and head of a domain are those of learning it alone; the others stay as they are, to the bit."""
    stream, optimizer = domains(), partial(torch.optim.SGD, lr=0.01, weight_decay=decay)
    learner = s_prompts_learner(stream, SPrompts(length=3), optimizer=optimizer)
    strategy = learner.strategies["method"]
    for task in stream:
        before = weights(strategy)
        learn(learner, stream, [task.index])
        for name, value in weights(strategy).items():
            if isinstance(value, torch.Tensor) and name.startswith(("prompts", "heads")):
                assert torch.equal(value, before[name]) == (f".{task.index}" not in name.replace("weight", "")), name
    alone = s_prompts_learner(stream, SPrompts(length=3), optimizer=optimizer)
    learn(alone, stream, [2])
    assert torch.equal(alone.strategies["method"].prompts[2], strategy.prompts[2])
    assert same(weights(alone.strategies["method"].heads[2]), weights(strategy.heads[2]))


def test_s_prompts_learns_domains_that_contradict_each_other_and_forgets_none():
    stream, strategy = domains(), SPrompts(length=3)
    learner = s_prompts_learner(stream, strategy, optimizer=partial(torch.optim.Adam, lr=0.01))
    R = Experiment(learner, stream, trainer, epochs=20).run().matrices["domain"].R
    assert bool((R.diagonal(-1) > 0.9).all()), R
    for t in range(3):
        assert bool((R[t + 1 :, t] == R[t + 1, t]).all()), R


def test_in_the_midst_of_a_domain_its_rows_are_predicted_by_the_head_in_training():
    stream = domains()
    learner = s_prompts_learner(stream, SPrompts(length=3))
    learn(learner, stream, [0])
    learner.before_task(stream[1])
    learner.eval()
    head = learner.strategies["method"].heads[1]
    nn.init.constant_(head.bias, 7.0)
    nn.init.zeros_(head.weight)
    assert bool((learner(learner.prepare(stream[1].test.x)) == 7).all())
    assert not bool((learner(learner.prepare(stream[0].test.x)) == 7).any())
    learner.strategies["method"].centres[0] += 9.0  # farther than the centres of the domain to come, which are 0
    learner.strategies["method"].centres[1] += 8.0
    assert bool((learner(learner.prepare(stream[0].test.x)) == 7).all())


def test_classes_of_other_tasks_stand_below_those_of_the_one_told():
    learner, stream = prompted(SPrompts(length=2, num_centres=2), "class")
    learn(learner, stream)
    out = learner.eval()(all_rows(learner, stream)).detach()
    assert bool(torch.isfinite(out).all())
    task = out.argmax(1) // 2
    for row, t in zip(out, task.tolist(), strict=True):
        others = [c for c in range(6) if c // 2 != t]
        own = row[2 * t : 2 * t + 2]
        torch.testing.assert_close(row[others], (own.min() - 1).expand(4))


@pytest.mark.parametrize(("init", "source"), [("random", None), ("previous", 1), ("nearest", 0)])
def test_a_domain_starts_from_the_prompts_of_its_source(init, source):
    """The third domain lies where the first does, so that the first is nearest, and not the one before."""
    one, two, _ = domains()
    near = [TaskData(part.x + 0.05, part.y, 2) for part in (one.train, one.test)]
    stream = Stream([one, two, Task(2, *near)], scenario="domain", num_classes=2)
    learner = s_prompts_learner(stream, SPrompts(length=3, init=init))
    prompts = learner.strategies["method"].prompts
    first, drawn = prompts[0].clone(), prompts[2].clone()
    learner.before_task(stream[0])
    assert torch.equal(prompts[0], first), "there is no other to start from"
    learn(learner, stream, [0, 1])
    assert not torch.equal(prompts[0], prompts[1])
    learner.before_task(stream[2])
    assert torch.equal(prompts[2], drawn if source is None else prompts[source])
    assert prompts[2].data_ptr() != prompts[source or 0].data_ptr() and prompts[2].requires_grad


def test_worked_source_of_prompts():
    """Means over own centres of the distance to the nearest: to the first (0 + 6) / 2 = 3, to the second 2."""
    strategy = SPrompts(init="nearest")
    strategy.centres = torch.tensor([[[0.0], [2.0]], [[2.0], [6.0]], [[0.0], [8.0]]])
    assert strategy._source(2) == 1
    strategy.centres[0, 1] = 7.0  # (0 + 1) / 2
    assert strategy._source(2) == 0


def test_where_task_labels_are_given_no_domain_is_told_from_centres():
    learner, stream = prompted(SPrompts(length=2), "task")
    learn(learner, stream)
    learner.strategies["method"].centres.zero_()
    batch = Batch(*TaskData.concat([task.test for task in stream]).tensors())
    out = learner.eval().predict(batch).detach()
    assert bool((out.argmax(1) // 2 == batch.task).all())
    untold = learner(learner.prepare(batch.x)).detach()
    assert bool((untold.argmax(1) // 2 == 0).all()), "all centres are as far"


def test_s_prompts_leaves_the_transformer_and_refuses_other_backbones():
    assert_backbone_is_frozen(SPrompts(length=2), "domain", optimizer=partial(torch.optim.SGD, lr=0.05))
    with pytest.raises(InputError, match=r"s_prompts puts prompts .* ToyBackbone has no embed and encode"):
        prompted(SPrompts(), backbone=ToyBackbone())
    with pytest.raises(InputError, match=r"s_prompts\.norm=0\.5 must be 1 or more"):
        SPrompts(norm=0.5)
    with pytest.raises(InputError, match=r"no init of prompts called 'nearst': did you mean 'nearest'"):
        SPrompts(init="nearst")
