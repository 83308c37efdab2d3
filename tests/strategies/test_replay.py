"""Replay methods: worked examples, loops written by hand, the laws of what they remember."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from cl.data.stream_checks import same as equal
from cl.data.task import SCENARIOS, Stream, Task, TaskData
from cl.engine import checkpoint
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.random import derive
from cl.strategies import er_ace, gdumb, mir, scr
from cl.strategies.der import DER
from cl.strategies.derpp import DERpp
from cl.strategies.er_ace import ERACE
from cl.strategies.gdumb import GDumb
from cl.strategies.icarl import ICaRL
from cl.strategies.mir import MIR
from cl.strategies.scr import SCR
from cl.testing import ToyBackbone, toy_learner, toy_stream
from cl.toolkit.herding import class_means, herding, nearness, unit_features
from toys import learn, same, toy, trainer, trunk

ALPHA = 1e-4  # error of a statistical test; seeds are fixed
quick = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**31)


def close(learner: Learner, net: nn.Module) -> None:
    for ours, theirs in zip(learner.trunk().parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ the loop by hand


class Reservoir:
    """Algorithm R on Python lists, with a memory's generator, which draws for 1024 rows at once."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.rows, self.num_seen, self.uniform = capacity, [], 0, []
        self.draw = np.random.Generator(np.random.PCG64(seed))

    def add(self, row) -> None:
        self.uniform = self.uniform or list(self.draw.random(1024))
        u = self.uniform.pop(0)
        if len(self.rows) < self.capacity:
            self.rows.append(row)
        elif (slot := int(u * (self.num_seen + 1))) < self.capacity:
            self.rows[slot] = row
        self.num_seen += 1

    def some(self, size: int):
        size = min(size, len(self.rows))
        picked = [self.rows[i] for i in self.draw.choice(len(self.rows), size, replace=False, shuffle=False)]
        return [torch.stack(column) for column in zip(*picked, strict=True)]


def by_hand(loss_of, capacity: int = 12, epochs: int = 2, every_epoch: bool = False) -> nn.Module:
    """Learn the class-incremental toy in plain PyTorch; only the draws are looked up.

    `loss_of(net, x, y, memory, seen)` returns the loss and the logits of the incoming rows, which are then offered.
    """
    stream = toy_stream(3)
    torch.manual_seed(0)
    net = nn.Sequential(ToyBackbone(), nn.Linear(16, 6))
    memory = Reservoir(capacity, derive(0, "method", "memory.random"))
    for task in stream:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        x, y, _ = task.train.tensors()
        for epoch in range(epochs):
            order = np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch)).permutation(len(y))
            for start in range(0, len(order), 8):
                rows = order[start : start + 8]
                bx, by = x[rows].float() / 255, y[rows]
                loss, logits = loss_of(net, bx, by, memory, 2 * task.index + 2)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if every_epoch or epoch == 0:
                    for row in zip(bx, by, logits.detach(), strict=True):
                        memory.add(row)
    return net


# ------------------------------------------------------------------ ER-ACE


def test_worked_example_21():
    logits, y = torch.tensor([[2.0, 1.0, 0.5, 0.0]]), torch.tensor([2])
    masked = er_ace.without(logits, torch.tensor([True, True, False, False]))
    assert float(F.cross_entropy(masked, y)) == pytest.approx(0.474077, abs=1e-5)
    assert float(F.cross_entropy(logits, y)) == pytest.approx(2.046006, abs=1e-5)


@pytest.mark.parametrize("every_epoch", [False, True])
def test_er_ace_is_the_loop_written_by_hand(every_epoch):
    def loss_of(net, x, y, memory, seen):
        old_x, old_y = memory.some(len(y))[:2] if memory.rows else (x[:0], y[:0])
        logits = net(torch.cat([x, old_x]))
        present = sorted(set(y.tolist()))  # the softmax over them alone
        loss = F.cross_entropy(logits[: len(y)][:, present], torch.tensor([present.index(c) for c in y.tolist()]))
        if len(old_y):
            loss = loss + F.cross_entropy(logits[len(y) :, :seen], old_y)
        return loss, logits[: len(y)]

    learner, _ = toy(ERACE(memory_size=12, every_epoch=every_epoch), range(3), epochs=2)
    close(learner, by_hand(loss_of, every_epoch=every_epoch))


def one_batch(strategy: Strategy, scenario: str, labels, num_old: int = 4, **options):
    """Return a learner in its third task, a batch of incoming rows of the third task with old ones behind, logits."""
    learner, stream = toy(strategy, [0, 1], scenario=scenario, **options)
    learner.before_task(stream[2])
    x, y, task = stream[2].train.tensors()
    rows = torch.tensor([int((y == c).nonzero()[i]) for i, c in enumerate(labels)])
    old = Batch(*(column[:num_old] for column in stream[0].train.tensors()))
    batch = Batch(x[rows], y[rows], task[rows]).append(old)
    batch.view = learner.prepare(batch.x)
    return learner, stream, batch, learner(batch.view)


@pytest.mark.parametrize(
    ("scenario", "train_mask", "labels", "allowed", "old"),
    [
        ("class", None, [4, 4], [4], [0, 1, 2, 3, 4, 5]),
        ("class", None, [4, 5], [4, 5], [0, 1, 2, 3, 4, 5]),
        ("task", None, [5, 5], [5], [0, 1]),
        ("domain", None, [0, 0], [0], [0, 1]),
        ("domain", None, [0, 1], [0, 1], [0, 1]),
    ],
)
def test_incoming_rows_compete_among_what_is_in_the_batch(scenario, train_mask, labels, allowed, old):
    learner, _, batch, logits = one_batch(ERACE(memory_size=12), scenario, labels, train_mask=train_mask)
    logits.retain_grad()
    loss = learner.strategies["method"].criterion(learner, batch, logits)
    expected = F.cross_entropy(logits[:2, allowed], torch.tensor([allowed.index(c) for c in labels]))
    expected = expected + F.cross_entropy(logits[2:, old], batch.y[2:])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    absent = [c for c in range(logits.shape[1]) if c not in allowed]
    assert not logits.grad[:2, absent].any(), "an absent class is not pushed away"


def test_classes_to_come_compete_on_incoming_rows_where_the_mask_says_so():
    learner, stream = toy(ERACE(memory_size=12), [0], train_mask="domain")
    learner.before_task(stream[1])  # 0-3 are seen
    x, y, task = stream[1].train.tensors()
    batch = Batch(*(column[y == 2][:3] for column in (x, y, task)))
    logits = learner(learner.prepare(batch.x))
    expected = F.cross_entropy(logits[:, [2, 4, 5]], torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(learner.strategies["method"].criterion(learner, batch, logits), expected)


@quick
@given(seeds, st.integers(2, 6), st.data())
def test_a_mask_leaves_the_cross_entropy_of_the_rest(seed, num_classes, data):
    y = data.draw(st.integers(0, num_classes - 1))
    out = data.draw(st.lists(st.booleans(), min_size=num_classes, max_size=num_classes))
    out[y] = False
    logits = torch.randn(1, num_classes, generator=torch.Generator().manual_seed(seed))
    left = [c for c in range(num_classes) if not out[c]]
    got = F.cross_entropy(er_ace.without(logits, torch.tensor(out)), torch.tensor([y]))
    torch.testing.assert_close(got, F.cross_entropy(logits[:, left], torch.tensor([left.index(y)])))


# ------------------------------------------------------------------ DER


def der_by_hand(alpha):
    def loss_of(net, x, y, memory, seen):
        logits = net(x)
        loss = F.cross_entropy(logits[:, :seen], y)
        if memory.rows and alpha:
            old_x, _, old_z = memory.some(len(y))
            loss = loss + alpha * ((net(old_x) - old_z) ** 2).mean()
        return loss, logits

    return by_hand(loss_of, every_epoch=True)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_der_is_the_loop_written_by_hand(alpha):
    close(toy(DER(memory_size=12, alpha=alpha), range(3), epochs=2)[0], der_by_hand(alpha))


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("size", [None, 5])
def test_der_is_derpp_without_beta_to_the_bit(scenario, size):
    def run(strategy):
        return toy(strategy, range(3), epochs=2, scenario=scenario)[0].state_dict()

    der = run(DER(memory_size=12, alpha=0.4, batch_size=size))
    derpp = run(DERpp(memory_size=12, alpha=0.4, beta=0.0, batch_size=size))
    assert equal(der, derpp)
    assert not equal(der, run(DERpp(memory_size=12, alpha=0.4, beta=0.5, batch_size=size)))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_der_without_alpha_is_finetuning_to_the_bit(scenario):
    plain = trunk(toy(None, range(3), scenario=scenario)[0])
    assert same(trunk(toy(DER(memory_size=12, alpha=0.0), range(3), scenario=scenario)[0]), plain)
    assert not same(trunk(toy(DER(memory_size=12, alpha=0.1), range(3), scenario=scenario)[0]), plain)


def test_worked_example_20():
    """The mean over rows and classes: 5/3, where the sum would be 5."""
    learner, stream = toy(DER(memory_size=1, alpha=1.0), num_tasks=2)
    strategy = learner.strategies["method"]
    x, y, task = (column[:1] for column in stream[0].train.tensors())
    with torch.no_grad():
        logits = learner(learner.prepare(x))
        stored = logits - torch.tensor([[0.0, 1.0, 2.0, 0.0]])
        strategy.after_step(learner, Batch(x, y, task), stored)
        loss = strategy.loss(learner, Batch(x, y, task), logits)
    assert float(loss) == pytest.approx(5 / 4), "of four classes; of three it would be 5 / 3"
    assert float(F.mse_loss(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3))) == pytest.approx(1.666667, abs=1e-5)


def test_der_uses_no_stored_label():
    learner, stream = toy(DER(memory_size=12), [0])
    strategy, batch = learner.strategies["method"], Batch(*stream[1].train.tensors())
    losses = []
    for label in (0, 3):
        strategy.memory.random.seed(0)
        strategy.memory.column("y").fill_(label)
        losses.append(strategy.loss(learner, batch, learner(learner.prepare(batch.x))))
    assert torch.equal(*losses) and float(losses[0].detach()) > 0


# ------------------------------------------------------------------ GDumb


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gdumb_is_a_training_from_scratch_on_its_memory_alone(scenario):
    learner, _ = toy(GDumb(memory_size=14), range(3), epochs=2, scenario=scenario)
    held = learner.strategies["method"].memory.rows()
    classes = learner.num_classes
    torch.manual_seed(0)
    net = nn.Sequential(ToyBackbone(), nn.Linear(16, classes))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for epoch in range(2):
        order = np.random.default_rng(derive(derive(0, "task", 2), "order", epoch)).permutation(14)
        for rows in (order[:8], order[8:]):
            logits = net(held.x[rows].float() / 255)
            if scenario == "task":
                own = torch.arange(classes) // 2 == held.task[rows][:, None]
                logits = logits.masked_fill(~own, -torch.inf)
            optimizer.zero_grad()
            F.cross_entropy(logits, held.y[rows]).backward()
            optimizer.step()
    close(learner, net)


@pytest.mark.parametrize(("scenario", "shares"), [("class", (7, 4, 3)), ("task", (7, 4, 3)), ("domain", (7, 4, 3))])
def test_gdumb_holds_its_classes_in_balance_and_is_offered_each_row_once(scenario, shares):
    learner, stream = toy(GDumb(memory_size=14), scenario=scenario)
    memory = learner.strategies["method"].memory
    for task, share in zip(stream, shares, strict=True):
        learn(learner, stream, [task.index], epochs=3)
        held = memory.rows()
        counts = torch.bincount(held.y + 2 * held.task if scenario == "domain" else held.y)
        assert counts.sum() == 14 and counts.max() <= share and counts.max() - counts.min() <= 1
        assert memory.num_seen == 48 * (task.index + 1)


def test_every_row_of_a_task_is_remembered_with_the_same_probability():
    counts, stream = np.zeros(48), toy_stream()
    position = {x.numpy().tobytes(): i for i, x in enumerate(stream[0].train.x)}
    for seed in range(300):
        learner, _ = toy(GDumb(memory_size=12), seed=seed)
        drawn = learner.strategies["method"].training_data(learner, stream[0])
        counts[[position[x.numpy().tobytes()] for x in drawn.x]] += 1
    for half in (counts[::2], counts[1::2]):  # the classes, six of 24 rows each
        p = half.sum() / 300 / 24
        assert p == 0.25 and stats.chi2.sf(((half - 75) ** 2).sum() / (75 * 0.75 * 24 / 23), 23) > ALPHA


def test_gdumb_reads_a_row_once_and_not_all_at_once():
    class Watched:
        shape, dtype, read = torch.Size([10_000, 3]), torch.float32, []

        def __len__(self):
            return 10_000

        def __getitem__(self, index):
            self.read.append(index)
            return torch.ones(len(index), 3)

    x, y = Watched(), torch.arange(10_000) % 2
    test = TaskData(torch.ones(2, 3), torch.arange(2))
    stream = Stream([Task(0, TaskData(x, y), test)], num_classes=2)
    backbone = nn.Linear(3, 3)
    backbone.num_features = 3
    learner = Learner(stream, backbone, {"method": GDumb(memory_size=20)}, partial(torch.optim.SGD, lr=0.1))
    x.read.clear()
    learn(learner, stream, epochs=3)
    assert max(map(len, x.read)) == 4096
    assert sorted(torch.cat(x.read).tolist()) == list(range(10_000))


GRID = [[(i, j) for j in range(20)] for i in range(31)]


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.floats(0.2, 5))
def test_a_mixture_keeps_one_box_and_its_share_of_the_pixels(seed, size, height, width, alpha):
    view = torch.arange(float(size)).view(-1, 1, 1, 1).expand(-1, 2, height, width)
    mixed, partner, share = gdumb.mix(view, alpha, np.random.default_rng(seed))
    assert sorted(partner.tolist()) == list(range(size)) and 0 <= share <= 1
    other = mixed != view
    for i in range(size):
        if partner[i] != i:
            assert bool((mixed[i][other[i]] == partner[i]).all())
            assert torch.equal(other[i, 0], other[i, 1]) and float(other[i].float().mean()) == pytest.approx(1 - share)
            rows, columns = other[i, 0].any(1), other[i, 0].any(0)
            assert torch.equal(other[i, 0], rows[:, None] & columns), "a box"


@pytest.mark.parametrize("seed", range(5))
def test_the_box_is_drawn_as_in_the_paper(seed):
    """Sides in proportion to the root of 1 - lambda around a uniform centre, cut at the border."""
    ours = gdumb.mix(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 31, 20), 0.7, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    ratio = math.sqrt(1 - rng.beta(0.7, 0.7))
    centre = rng.integers([31, 20])
    halves = [int(side * ratio) // 2 for side in (31, 20)]
    inside = [[all(-h <= p - c < h for p, c, h in zip(at, centre, halves, strict=True)) for at in row] for row in GRID]
    assert ours[2] == pytest.approx(1 - np.mean(inside))
    if ours[1][0] == 1:
        assert torch.equal(ours[0][0, 0] == 1, torch.tensor(inside))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_mixed_batch_has_the_loss_of_its_mixture(scenario):
    learner, stream = toy(GDumb(memory_size=20, cutmix=1.0), range(2), scenario=scenario)
    strategy = learner.strategies["method"]
    strategy.random.seed(4)
    both = TaskData.concat([stream[0].train, stream[1].train])
    batch = Batch(*both.take(torch.tensor([0, 1, 48, 49])).tensors())
    batch.view = learner.prepare(batch.x)
    got = strategy.criterion(learner, batch, learner(batch.view))
    rng = np.random.Generator(np.random.PCG64(4))
    rng.random()
    mixed, partner, share = gdumb.mix(batch.view, 1.0, rng)
    assert 0 < share < 1
    logits = learner(mixed)
    expected = 0.0
    for weight, rows in ((share, torch.arange(4)), (1 - share, partner)):
        for i in range(4):
            y, task = int(batch.y[rows[i]]), int(batch.task[rows[i]])
            some = {"class": range(4), "task": range(2 * task, 2 * task + 2), "domain": range(2)}[scenario]
            expected += weight / 4 * F.cross_entropy(logits[i, list(some)], torch.tensor(y - some.start))
    torch.testing.assert_close(got, expected)


def test_batches_are_mixed_as_often_as_asked():
    learner, stream = toy(GDumb(memory_size=20, cutmix=0.3), [0])
    strategy = learner.strategies["method"]
    batch = Batch(*(column[:4] for column in stream[0].train.tensors()))
    batch.view = learner.prepare(batch.x)
    logits = learner(batch.view)
    plain = learner.criterion(logits, batch)
    mixed = sum(not torch.equal(strategy.criterion(learner, batch, logits), plain) for _ in range(400))
    # a box of no pixels, or a permutation that moves none, leaves the loss as it is: less than a tenth
    assert stats.binom.ppf(ALPHA, 400, 0.27) <= mixed <= stats.binom.ppf(1 - ALPHA, 400, 0.3)


def test_gdumb_refuses_to_mix_what_is_no_image():
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    stream = Stream([Task(0, TaskData(x, y), TaskData(x, y))], num_classes=2)
    backbone = nn.Linear(3, 3)
    backbone.num_features = 3
    with pytest.raises(InputError, match=r"gdumb\.cutmix=0\.5 mixes images, but inputs are \(3,\): set it 0"):
        Learner(stream, backbone, {"method": GDumb(cutmix=0.5)}, partial(torch.optim.SGD, lr=0.1))


def test_the_epochs_of_gdumb_end_with_a_cycle_of_its_schedule():
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    with initialize_config_module("cl.conf", version_base="1.3"):
        cfg = compose("config", overrides=["strategy=gdumb"])
    optimizer = instantiate(cfg.optimizer)([nn.Parameter(torch.zeros(1))])
    schedule, rates = instantiate(cfg.scheduler)(optimizer), []
    for _ in range(cfg.epochs + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [i for i, rate in enumerate(rates) if rate == 0.05] == [2**k - 1 for k in range(8)]
    assert cfg.epochs == 127 and rates[126] < 0.001 and cfg.batch_size == 16 and cfg.gradient_clip == 10


# ------------------------------------------------------------------ MIR


def test_worked_example_25():
    before, after = torch.tensor([0.2, 0.5, 0.1]), torch.tensor([0.9, 0.6, 0.7])
    torch.testing.assert_close(after - before, torch.tensor([0.7, 0.1, 0.6]))
    assert mir.most_raised(before, after, 2).tolist() == [0, 2]
    assert mir.most_raised(before, after, 9).tolist() == [0, 2, 1]


def test_mir_is_the_loop_written_by_hand():
    def loss_of(net, x, y, memory, seen):
        logits = net(x)
        loss = F.cross_entropy(logits[:, :seen], y)
        if memory.rows:
            old_x, old_y, _ = memory.some(10)
            virtual = deepcopy(net)
            virtual.zero_grad()
            F.cross_entropy(virtual(x)[:, :seen], y).backward()
            torch.optim.SGD(virtual.parameters(), lr=0.1).step()
            with torch.no_grad():
                rises = [
                    float(F.cross_entropy(virtual(r[None])[:, :seen], c[None]))
                    - float(F.cross_entropy(net(r[None])[:, :seen], c[None]))
                    for r, c in zip(old_x, old_y, strict=True)
                ]
            worst = sorted(range(len(rises)), key=lambda i: -rises[i])[:4]
            loss = loss + F.cross_entropy(net(old_x[worst])[:, :seen], old_y[worst])
        return loss, logits

    learner, _ = toy(MIR(memory_size=12, batch_size=4, num_candidates=10), range(3), epochs=2)
    close(learner, by_hand(loss_of))


class Normed(ToyBackbone):
    """The toy with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.append(nn.BatchNorm1d(16))


class Recorder(Strategy):
    """Looks at what batch norm kept, and at the gradients, around another strategy's loss."""

    def loss(self, learner, batch, logits):
        norm = learner.backbone.layers[-1]
        self.kept = [*getattr(self, "kept", []), int(norm.num_batches_tracked)]
        self.grads = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in learner.parameters()]
        return None


def test_scores_leave_no_trace_in_batch_norm_nor_in_the_gradients():
    stream, first, last = toy_stream(), Recorder(), Recorder()
    strategies = {"first": first, "mir": MIR(memory_size=20), "last": last}
    learner = Learner(stream, Normed(), strategies, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    learn(learner, stream, [0])
    # A forward pass of the incoming rows, from the second step on one of the chosen rows, and none for the scores.
    assert first.kept == [1, 2, 4, 6, 8, 10] and last.kept == [1, 3, 5, 7, 9, 11]
    assert all(torch.equal(a, b) for a, b in zip(first.grads, last.grads, strict=True))


def test_candidates_are_scored_in_training_mode_with_the_rate_of_each_parameter():
    class TwoRates(MIR):
        def configure_optimizer(self, learner, factory):
            head = {"params": list(learner.head.parameters()), "lr": 0.7}
            return torch.optim.SGD([{"params": list(learner.backbone.parameters()), "lr": 0.2}, head], momentum=0.9)

        def loss(self, learner, batch, logits):
            if len(self.memory) >= 16 and not hasattr(self, "seen"):
                net = deepcopy(nn.Sequential(learner.backbone, learner.head))
                candidates = self.memory.rows()
                view, rows = learner.prepare(candidates.x), torch.arange(16)
                before = net(view)[:, :2].log_softmax(1)[rows, candidates.y]
                F.cross_entropy(net(batch.view)[:, :2], batch.y).backward()
                for part, rate in zip(net, (0.2, 0.7), strict=True):
                    torch.optim.SGD(part.parameters(), lr=rate).step()  # no momentum
                rise = before - net(view)[:, :2].log_softmax(1)[rows, candidates.y]
                self.seen = candidates.x[rise.argsort(descending=True)[:5]]
                chosen = []
                handle = learner.backbone.register_forward_pre_hook(lambda _, args: chosen.append(args[0]))
                super().loss(learner, batch, logits)
                handle.remove()
                self.chosen = chosen[-1]
                assert len(chosen) == 3 and len(chosen[0]) == len(chosen[1]) == 16
            return super().loss(learner, batch, logits)

    stream, strategy = toy_stream(), TwoRates(memory_size=16, batch_size=5)
    torch.manual_seed(0)
    learner = Learner(stream, Normed(), {"method": strategy}, partial(torch.optim.SGD, lr=9.0), batch_size=8)
    learn(learner, stream, [0])
    expected = sorted(x.numpy().tobytes() for x in learner.prepare(strategy.seen))
    assert sorted(x.numpy().tobytes() for x in strategy.chosen) == expected


def test_mir_refuses_what_leaves_no_choice():
    with pytest.raises(InputError, match=r"mir\.num_candidates=4 leaves nothing to choose of 8 rows a step: raise it"):
        toy(MIR(num_candidates=4))
    with pytest.raises(InputError, match=r"mir\.batch_size=0"):
        MIR(batch_size=0)


# ------------------------------------------------------------------ exemplars


def slow_herding(features: np.ndarray, size: int) -> list[tuple[int, float]]:
    """Algorithm 4 as it is printed."""
    chosen: list[tuple[int, float]] = []
    for k in range(1, size + 1):
        total = sum((features[i] for i, _ in chosen), np.zeros(features.shape[1]))
        left = [i for i in range(len(features)) if i not in {j for j, _ in chosen}]
        gaps = {i: float(np.linalg.norm(features.mean(0) - (features[i] + total) / k)) for i in left}
        best = min(gaps, key=gaps.__getitem__)
        chosen.append((best, gaps[best]))
    return chosen


def test_worked_example_23():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.96, 0.28]])
    assert herding(features, 3).tolist() == [2, 3, 1]
    order, gaps = zip(*slow_herding(features.double().numpy(), 3), strict=True)
    assert order == (2, 3, 1) and gaps == pytest.approx((0.2828, 0.1414, 0.2108), abs=1e-4)


@quick
@given(seeds, st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_herding_is_the_printed_algorithm_and_a_prefix_of_itself(seed, size, dim, unit):
    features = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    features = F.normalize(features, dim=1) if unit and dim > 1 else features
    order = herding(features, 99).tolist()
    assert sorted(order) == list(range(size))
    for k in range(1, size + 1):  # each is a nearest one; of two alike, as two unit vectors are, either
        total = features[order[: k - 1]].sum(0)
        gaps = [float((features.mean(0) - (features[i] + total) / k).norm()) for i in order[k - 1 :]]
        assert gaps[0] <= min(gaps) + 1e-9
    assert all(herding(features, m).tolist() == order[:m] for m in range(size + 1))


def test_herded_means_are_nearer_than_means_of_a_random_draw():
    features = F.normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) + 1, dim=1)
    rng = np.random.default_rng(0)
    for size in (5, 20, 60):
        herded = float((features[herding(features, size)].mean(0) - features.mean(0)).norm())
        drawn = [features[rng.choice(200, size, replace=False)].mean(0) - features.mean(0) for _ in range(100)]
        assert herded < min(float(gap.norm()) for gap in drawn)


@quick
@given(seeds, st.integers(1, 20), st.integers(1, 5))
def test_the_nearest_mean_is_the_nearest_centroid_on_the_sphere(seed, size, num_classes):
    draw = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(size, 3, generator=draw), dim=1)
    y = torch.randint(num_classes, (size,), generator=draw)
    query = torch.randn(4, 3, generator=draw) * 5
    near = nearness(query, class_means(features, y, num_classes))
    for c in range(num_classes):
        if (y == c).any():
            mean = features[y == c].mean(0)
            gap = (query / query.norm(dim=1, keepdim=True) - mean / mean.norm()).square().sum(1)
            torch.testing.assert_close(near[:, c], -gap, atol=1e-4, rtol=1e-4)
        else:
            assert bool((near[:, c] == -4).all())
    assert bool((near >= -4 - 1e-5).all() & (near <= 1e-5).all())


def test_features_of_exemplars_are_taken_in_evaluation_mode_and_unaugmented():
    stream = toy_stream()
    stream.augment = lambda x, rng: x * 0
    learner = Learner(stream, Normed(), {}, partial(torch.optim.SGD, lr=0.1), eval_batch_size=7)
    kept = {name: value.clone() for name, value in learner.backbone.state_dict().items()}
    features = unit_features(learner, stream[0].train)
    assert same(learner.backbone.state_dict(), kept) and learner.backbone.training
    learner.backbone.eval()
    expected = F.normalize(learner.backbone(learner.prepare(stream[0].train.x)), dim=1)
    torch.testing.assert_close(features, expected)


# ------------------------------------------------------------------ iCaRL


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
    x, y, _, rank = strategy._exemplars()
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
        x, y, label, rank = strategy._exemplars()
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
        x, y, task, _ = strategy._exemplars()
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
    kept, label, task, _ = strategy._exemplars()
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


# ------------------------------------------------------------------ SCR


def slow_contrast(z, y, temperature) -> list[float]:
    """Each row's loss, as it is printed."""
    rows = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        below = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in others)
        positive = [p for p in others if y[p] == y[i]]
        logs = [math.log(math.exp(float(z[i] @ z[p]) / temperature) / below) for p in positive]
        rows.append(-sum(logs) / len(logs) if logs else 0.0)
    return rows


def test_worked_example_22():
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    y = torch.tensor([0, 0, 1, 1])
    assert slow_contrast(z, y, 0.5) == pytest.approx([0.460373, 0.460373, 0.339178, 0.850424], abs=1e-5)
    assert float(scr.supervised_contrastive(z, y, 0.5)) == pytest.approx(0.527587, abs=1e-5)


@quick
@given(seeds, st.integers(2, 9), st.integers(1, 3), st.floats(0.05, 2))
def test_the_contrastive_loss_is_the_printed_one(seed, size, num_classes, temperature):
    draw = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(size, 4, generator=draw, dtype=torch.float64), dim=1).requires_grad_()
    y = torch.randint(num_classes, (size,), generator=draw)
    loss = scr.supervised_contrastive(z, y, temperature)
    assert float(loss.detach()) == pytest.approx(np.mean(slow_contrast(z.detach(), y, temperature)), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, z)
    assert bool(gradient.isfinite().all())
    order = torch.randperm(size, generator=draw)
    torch.testing.assert_close(scr.supervised_contrastive(z[order], y[order], temperature), loss)


def test_a_step_of_scr_by_hand():
    learner, stream = toy(SCR(memory_size=20, batch_size=7), [0])
    strategy = learner.strategies["method"]
    learner.before_task(stream[1])
    incoming = Batch(*(column[:5] for column in stream[1].train.tensors()))
    batch = strategy.extend_batch(learner, incoming)
    assert len(batch) == 12 and set(batch.y[5:].tolist()) <= {0, 1}
    batch.view = learner.prepare(batch.x)
    logits = learner(batch.view)
    strategy.random.seed(9)
    loss = strategy.criterion(learner, batch, logits)
    rng = np.random.Generator(np.random.PCG64(9))
    views = torch.cat([batch.x.float() / 255, strategy.augment(batch.x, rng)])
    z = strategy.projection(learner.backbone(views))
    z = z / z.norm(dim=1, keepdim=True)
    labels = [*batch.y.tolist(), *batch.y.tolist()]
    assert float(loss.detach()) == pytest.approx(np.mean(slow_contrast(z.detach(), labels, 0.07)), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in (*learner.backbone.parameters(), *strategy.projection.parameters()))
    assert all(p.grad is None for p in learner.head.parameters())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scr_predicts_by_the_means_of_its_memory(scenario):
    learner, stream = toy(SCR(memory_size=30), range(3), epochs=3, scenario=scenario)
    strategy = learner.strategies["method"]
    held = strategy.memory.rows()
    features = learner.backbone(learner.prepare(held.x)).detach()
    features = features / features.norm(dim=1, keepdim=True)
    means = torch.stack([features[held.y == c].mean(0) for c in range(learner.num_classes)])
    means = means / means.norm(dim=1, keepdim=True)
    torch.testing.assert_close(strategy.means, means)
    test = TaskData.concat([task.test for task in stream])
    query = learner.backbone(learner.prepare(test.tensors()[0])).detach()
    gaps = ((query / query.norm(dim=1, keepdim=True))[:, None] - means[None]).square().sum(2)
    shown = strategy.predict(learner, learner.prepare(test.tensors()[0]))
    torch.testing.assert_close(shown, -gaps, rtol=1e-4, atol=1e-4)
    if scenario == "class":
        assert float((shown.argmax(1) == test.labels).float().mean()) > 0.6


def test_scr_leaves_the_head_alone_and_starts_without_a_memory():
    learner, stream = toy(SCR(memory_size=30))
    head = {name: value.clone() for name, value in learner.head.state_dict().items()}
    before = trunk(learner)
    learn(learner, stream, [0])
    assert same(learner.head.state_dict(), head) and not same(trunk(learner), before)
    x = learner.prepare(stream[2].test.x)
    shown = learner.strategies["method"].predict(learner, x)
    assert bool((shown[:, 2:] == -4).all())


def test_scr_refuses_what_is_no_image():
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    stream = Stream([Task(0, TaskData(x, y), TaskData(x, y))], num_classes=2, name="flat")
    backbone = nn.Linear(3, 3)
    backbone.num_features = 3
    with pytest.raises(InputError, match=r"SCR crops images, but the inputs of 'flat' are \(3,\): use er"):
        Learner(stream, backbone, {"method": SCR()}, partial(torch.optim.SGD, lr=0.1))
    assert not SCR.distributed


# ------------------------------------------------------------------ beside encoders that know a row's task


class Watches(Strategy):
    """Owns `encode`, and notes of which tasks the rows are said to be."""

    def encode(self, learner, view):
        if learner.backbone.training:
            assert learner.task_labels is not None and len(learner.task_labels) == len(view)
            self.tasks = {*getattr(self, "tasks", set()), *learner.task_labels.tolist()}
        return learner.backbone(view)


@pytest.mark.parametrize("make", [DER, MIR, partial(GDumb, cutmix=1.0), ERACE])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_replayed_rows_are_encoded_under_their_own_task(make, scenario):
    watch = Watches()
    learner, stream = toy({"watch": watch, "method": make(memory_size=20)}, [0, 1], scenario=scenario)
    watch.tasks = set()
    learn(learner, stream, [2])
    assert watch.tasks == {0, 1, 2}
