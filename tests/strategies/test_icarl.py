"""iCaRL: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from by_hand import close, slow_herding
from cl.data.task import Stream, Task, TaskData
from cl.engine import checkpoint
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.random import derive
from cl.strategies.icarl import ICaRL
from cl.testing import ToyBackbone, toy_learner, toy_stream
from cl.toolkit.herding import class_means, unit_features
from toys import learn, same, toy, trainer, trunk


def icarl_by_hand(memory_size: int, epochs: int, num_tasks: int = 3):
    """Algorithms 1 to 5 on the class-incremental toy; only the order of rows is looked up."""
    stream = toy_stream(num_tasks)
    torch.manual_seed(0)
    net = nn.Sequential(ToyBackbone(), nn.Linear(16, 2 * num_tasks))
    lists: dict[int, list[torch.Tensor]] = {}

    def phi(x):
        with torch.no_grad():
            features = net[0](torch.stack(list(x)).float() / 255)
        return features / features.norm(dim=1, keepdim=True).clamp_min(1e-12)

    for task in stream:
        teacher, old = deepcopy(net), sorted(lists)
        rows = [(x, int(y)) for x, y in zip(task.train.x, task.train.y, strict=True)]
        rank_first = [(x, c, k) for c in lists for k, x in enumerate(lists[c])]
        rows += [(x, c) for x, c, _ in rank_first]
        seen = list(range(2 * task.index + 2))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for epoch in range(epochs):
            order = np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch)).permutation(len(rows))
            for start in range(0, len(rows), 8):
                some = [rows[i] for i in order[start : start + 8]]
                x = torch.stack([r for r, _ in some]).float() / 255
                g, q = net(x).sigmoid(), teacher(x).sigmoid().detach()
                loss = 0.0
                for b, (_, label) in enumerate(some):
                    for c in seen:
                        target = q[b, c] if c in old else torch.tensor(float(label == c))
                        loss = loss - target * g[b, c].log() - (1 - target) * (1 - g[b, c]).log()
                optimizer.zero_grad()
                (loss / (len(some) * 2 * num_tasks)).backward()
                optimizer.step()
        size = memory_size // len(seen)
        lists = {c: kept[:size] for c, kept in lists.items()}
        for c in seen[-2:]:
            own = [x for x, label in zip(task.train.x, task.train.y.tolist(), strict=True) if label == c]
            lists[c] = [own[i] for i, _ in slow_herding(phi(own).double().numpy(), min(size, len(own)))]
    means = torch.stack([phi(lists[c]).mean(0) for c in sorted(lists)])
    return net, lists, means / means.norm(dim=1, keepdim=True), phi


def test_icarl_is_the_loop_written_by_hand():
    learner, stream = toy(ICaRL(memory_size=14), range(3), epochs=2)
    net, lists, means, phi = icarl_by_hand(14, 2)
    strategy = learner.strategies["method"]
    close(learner, net)
    x, y, _, rank = strategy.memory.ranked()
    assert {c: len(kept) for c, kept in lists.items()} == dict.fromkeys(range(6), 2)
    for c, kept in lists.items():
        ours = x[y == c][rank[y == c].argsort()]
        assert torch.equal(ours, torch.stack(kept)), f"the list of class {c}, in order"
    torch.testing.assert_close(strategy.means, means, rtol=1e-4, atol=1e-5)
    test = torch.cat([task.test.x for task in stream])
    ours = strategy.predict(learner, learner.prepare(test)).argmax(1)
    gaps = ((phi(test)[:, None] - means[None]) ** 2).sum(2)
    assert (
        torch.equal(ours, gaps.argmin(1))
        and float((ours == torch.cat([t.test.y for t in stream])).float().mean()) > 0.5
    )


def test_worked_example_24_a_class_keeps_its_share_and_the_first_of_its_list():
    assert (2000 // 20, 2000 // 100) == (100, 20)
    learner, stream = toy(ICaRL(memory_size=20))
    strategy, lists = learner.strategies["method"], []
    for task, size in zip(stream, (10, 5, 3), strict=True):
        learn(learner, stream, [task.index])
        x, y, label, rank = strategy.memory.ranked()
        assert torch.bincount(y).tolist() == [size] * (2 * task.index + 2)
        assert torch.equal(label, y // 2)
        lists.append({c: x[y == c][rank[y == c].argsort()] for c in set(y.tolist())})
    for earlier, later in pairwise(lists):
        for c, kept in earlier.items():
            assert torch.equal(later[c], kept[: len(later[c])])


def test_the_means_are_right_after_loading_a_checkpoint(tmp_path):
    learner, stream = toy_learner({"method": ICaRL(memory_size=20)}, num_tasks=2)
    experiment = Experiment(learner, stream, trainer, epochs=2, directory=tmp_path)
    experiment.run()
    for tasks in (1, 2):
        loaded, _ = toy_learner({"method": ICaRL(memory_size=20)}, num_tasks=2)
        checkpoint.load(loaded, tmp_path / "checkpoints" / f"after_task_{tasks:03d}.ckpt")
        strategy = loaded.strategies["method"]
        x, y, task, _ = strategy.memory.ranked()
        assert len(y) == 20
        torch.testing.assert_close(strategy.means, class_means(unit_features(loaded, TaskData(x, y, task)), y, 4))
        assert strategy.means.any(1).tolist() == [True, True, tasks == 2, tasks == 2]
        shown = loaded.strategies["method"].predict(loaded, loaded.prepare(stream[0].test.x))
        assert float((shown.argmax(1) == stream[0].test.y).float().mean()) > 0.8


def test_old_classes_are_taught_by_the_network_of_before_the_task():
    learner, stream = toy(ICaRL(memory_size=20), [0])
    before = deepcopy(nn.Sequential(learner.backbone, learner.head)).eval()
    learn(learner, stream, [1], epochs=2)
    view = learner.prepare(stream[1].train.x[:6])
    batch = Batch(*(column[:6] for column in stream[1].train.tensors()), view=view)
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    learner.tasks_learned = 1
    strategy = learner.strategies["method"]
    got = strategy.criterion(learner, batch, logits)
    targets = torch.cat([before(view).sigmoid()[:, :2], F.one_hot(batch.y - 2, 2)], 1)
    expected = F.binary_cross_entropy_with_logits(logits[:, :4], targets) * 4 / 6
    torch.testing.assert_close(got, expected)


def test_a_class_that_comes_again_is_labelled_and_herded_anew():
    base = toy_stream(2)
    x, y, _ = TaskData.concat([base[0].train, base[1].train]).tensors()
    rows = [torch.cat([torch.arange(0, 40)]), torch.cat([torch.arange(40, 96)])]  # classes 0 and 1 in both tasks
    test = TaskData(base[0].test.x, base[0].test.y, 0)
    tasks = [
        Task(t, TaskData(x[r], y[r], t), test if t == 0 else TaskData(test.x, test.y, 1)) for t, r in enumerate(rows)
    ]
    stream = Stream(tasks, num_classes=4, repeats=True)
    torch.manual_seed(0)
    learner = Learner(stream, ToyBackbone(), {"method": ICaRL(12)}, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    learn(learner, stream)
    strategy = learner.strategies["method"]
    kept, label, task, _ = strategy.memory.ranked()
    assert torch.bincount(label).tolist() == [3, 3, 3, 3] and set(task.tolist()) == {1}
    assert not strategy._old.any()
    present = {row.numpy().tobytes() for row in x[40:]}
    assert all(row.numpy().tobytes() in present for row in kept)


class OwnsEncode(Strategy):
    def encode(self, learner, view):
        return learner.backbone(view)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toy(ICaRL(), scenario="domain"), "=domain, where all tasks .* use scenario=class or task"),
        (lambda: toy(ICaRL(memory_size=5)), r"icarl\.memory_size=5 leaves some of the 6 classes .* to 6 or more"),
        (lambda: toy({"other": OwnsEncode(), "icarl": ICaRL()}), "another strategy owns encode"),
    ],
)
def test_icarl_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("storage", ["host", "disk"])
def test_where_exemplars_of_icarl_lie_changes_nothing(storage):
    one, other = (toy(ICaRL(memory_size=20, storage=s), range(2))[0] for s in ("device", storage))
    assert same(trunk(one), trunk(other))
    assert torch.equal(one.strategies["method"].means, other.strategies["method"].means)
