"""X-DER: what it renews, what it stores, and its loss term by term."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.data.task import Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.errors import InputError
from cl.random import Random
from cl.strategies.xder import XDER
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.logit_memory import balanced, renewed
from draws import quick, seeds
from toys import Identity, build, float_stream, toy, vector


@quick
@given(seeds, st.floats(0.1, 1.0))
def test_renewed_logits_are_the_fresh_ones_and_below_that_of_the_label(seed, gamma):
    draw = torch.Generator().manual_seed(seed)
    stored, fresh = torch.randn(5, 6, generator=draw), 3 * torch.randn(5, 6, generator=draw)
    y, columns = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([False, False, True, True, True, False])
    found = renewed(stored, fresh, y, columns, gamma)
    assert torch.equal(found[:, ~columns], stored[:, ~columns])
    for row in range(5):
        truth, most, now = float(stored[row, y[row]]), float(fresh[row, 2:5].max()), found[row, 2:5]
        if most <= truth or most <= 0:
            assert torch.equal(now, fresh[row, 2:5])
        else:
            assert float(now.max()) == pytest.approx(gamma * max(truth, 0), abs=1e-5)
            torch.testing.assert_close(now, fresh[row, 2:5] * (gamma * max(truth, 0) / most))


@quick
@given(st.lists(st.integers(0, 2), min_size=0, max_size=12), st.integers(6, 20), seeds)
def test_each_class_gets_as_many_exemplars(old, capacity, seed):
    random = Random()
    random.seed(seed)
    new = torch.tensor([3, 4] * 20)
    before = torch.tensor(old, dtype=torch.int64)
    kept, added = balanced(before, new, capacity, random)
    each = capacity // (len(set(old)) + 2)
    for c in set(old):
        assert kept[before[kept] == c].tolist() == [i for i, v in enumerate(old) if v == c][:each]
    sizes = new[added].bincount(minlength=5)[3:]
    assert len(kept) + len(added) == capacity and len(set(added.tolist())) == len(added)
    assert abs(int(sizes[0] - sizes[1])) <= 1


def test_without_weights_it_is_finetuning_by_heads():
    off = {"alpha": 0.0, "beta": 0.0, "weight": 0.0, "eta": 0.0, "num_views": 2}
    learner, _ = toy(XDER(20, **off), range(3))
    torch.testing.assert_close(vector(learner), vector(toy(None, range(3), train_mask="task")[0]))


class Plain(nn.Module):
    """No augmentation, where a view is drawn."""

    def forward(self, x, rng):
        return x


def test_the_loss_term_by_term():
    options = {"alpha": 0.7, "beta": 1.3, "weight": 0.4, "eta": 0.6, "margin": 0.1, "temperature": 0.8}
    learner, stream = toy(XDER(20, batch_size=6, num_views=2, num_contrasted=3, **options), [0], epochs=3)
    method = learner.strategies["method"]
    method.view = Plain()
    learner.before_task(stream[1])
    batch = Batch(*stream[1].train.tensors()).take(slice(5))
    drawn, draw, sample = [], method.memory.draw, []
    method.memory.draw = lambda size: drawn.append(draw(size)) or drawn[-1]
    with torch.no_grad():
        logits = learner(learner.prepare(batch.x), batch.task)
        found = float(method.loss(learner, batch, logits))
        first, second, third = (method.memory.at(rows) for rows in drawn)

        def f(x):
            return learner.head(learner.backbone(x / 255))

        expected = 0.7 * float((f(first.x) - first.extras["logits"]).square().mean())
        expected += 1.3 * float(F.cross_entropy(f(second.x)[:, :2], second.y))
        x, y = torch.cat([batch.x, third.x]).repeat(2, 1, 1, 1), torch.cat([batch.y, third.y]).repeat(2)
        z = F.normalize(f(x)[:, 4:6], dim=1)  # of three tasks the second is learned: there is one head to come
        for i in range(len(y)):
            others = [j for j in range(len(y)) if j != i]
            total = math.log(sum(math.exp(float(z[i] @ z[j]) / 0.8) for j in others))
            same = [float(z[i] @ z[j]) / 0.8 - total for j in others if y[j] == y[i]]
            sample.append(-sum(same) / len(same))
        expected += 0.4 * sum(sample) / len(sample)
        gaps = []
        for rows, label in ((batch.x, 1), (first.x, 0), (second.x, 0)):
            for out in f(rows):
                gaps.append(float(out[4:6].max()) + 0.1 - float(out[2 * label : 2 * label + 2].max()))
        over = [gap for gap in gaps if gap > 0]
        expected += 0.6 * sum(over) / len(over)
    assert 0 < len(over) < len(gaps) and found == pytest.approx(expected, rel=1e-4)
    assert float(method.criterion(learner, batch, logits)) == pytest.approx(
        float(F.cross_entropy(logits[:, 2:4], batch.y - 2))
    )


def test_the_first_time_in_a_task_renews_and_the_kth_with_probability_one_in_k():
    learner, stream = toy(XDER(40, num_views=2), [0])
    method = learner.strategies["method"]
    learner.before_task(stream[1])
    where = method.memory.draw(40)
    renewals = torch.zeros(40)
    for k in range(1, 5):
        fresh = torch.full((40, 6), -float(k))  # below each label's logit, so that they are not divided
        method.memory.overwrite("logits", where, torch.zeros(40, 6))
        method._drawn = [(where, fresh), (where[:3], fresh[:3])]
        method.after_step(learner, None, fresh)
        held = method.memory.at(where).extras
        assert (held["count"] == k).all() and (held["logits"][:, :2] == 0).all()
        changed = (held["logits"][:, 2:] == -k).all(1)
        assert ((held["logits"][:, 2:] == 0).all(1) | changed).all()
        assert k > 1 or changed.all()
        renewals += changed
    assert float(renewals.mean()) == pytest.approx(1 + 1 / 2 + 1 / 3 + 1 / 4, abs=0.35)


def test_the_memory_holds_as_many_of_each_class_with_the_logits_of_the_end_of_a_task():
    learner, _ = toy(XDER(24, num_views=2, num_contrasted=8), range(2))
    held = learner.strategies["method"].memory.rows()
    assert held.y.bincount().tolist() == [6, 6, 6, 6] and (held.extras["count"] == 0).all()
    learner.eval()
    with torch.no_grad():
        now = learner(learner.prepare(held.x), held.task)
    old, z = held.y < 2, held.extras["logits"]
    torch.testing.assert_close(z[~old][:, 2:], now[~old][:, 2:])
    for rows, others in ((old, slice(2, 6)), (~old, slice(0, 2))):
        truth = z[rows].gather(1, held.y[rows][:, None])
        assert (z[rows][:, others].amax(1, keepdim=True) <= truth.clamp_min(0) + 1e-6).all()
        ratio = z[rows][:, others] / now[rows][:, others]
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)
    assert (z[old][:, :2] != now[old][:, :2]).any(), "what the old task has taught stays as it was"


def test_xder_refuses_what_leaves_no_head_to_prepare():
    with pytest.raises(InputError, match=r"xder\.memory_size=5 leaves some of the 6 classes without an exemplar"):
        toy(XDER(5))
    x, y = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(InputError, match="XDER crops images, but the inputs"):
        build(float_stream([x, x], [y, y + 2]), Identity(3), XDER())
    data = [TaskData(torch.zeros(4, 1, 4, 4), y + t, t) for t in range(2)]
    shared = Stream([Task(t, one, one) for t, one in enumerate(data)], num_classes=3, repeats=True)
    with pytest.raises(InputError, match=r"classes of its own, and tasks of .* share some: use der"):
        build(shared, ToyBackbone(), XDER(8))
    with pytest.raises(InputError, match="scenario=class or task"):
        build(toy_stream(2, "domain"), ToyBackbone(), XDER(8))
