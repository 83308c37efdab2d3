"""GDumb: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from by_hand import close
from cl.data.task import SCENARIOS, Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.random import derive
from cl.strategies import gdumb
from cl.strategies.gdumb import GDumb
from cl.testing import ToyBackbone, toy_stream
from draws import ALPHA, quick, seeds
from toys import learn, toy


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
