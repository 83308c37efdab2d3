"""TENT: entropy and a hidden task by hand, what stays, and what adaptation is worth on corrupted digits."""

from __future__ import annotations

from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from by_hand import ordered
from cl.backbones.networks import MLP
from cl.compose import hide_labels
from cl.data.sources import digits
from cl.data.stream_checks import same
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies.tent import Tent, entropy
from cl.streams.corrupted import corrupted
from cl.testing import ToyBackbone, toy_stream
from cl.testing.toys import Halt, Halted, Normed, trainer
from draws import quick, seeds

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5, weight_decay=0.1)


def hidden(method: Tent, scenario="domain", tasks=(1,), **options):
    """A toy of three tasks, the second of which hides its labels."""
    stream = hide_labels(toy_stream(3, scenario), tasks)
    torch.manual_seed(0)
    return Learner(stream, Normed(), {"method": method}, SGD, batch_size=8, **options), stream


def learn(learner: Learner, stream, *tasks: int, epochs: int = 2) -> None:
    experiment = Experiment(learner, stream, trainer, epochs=epochs)
    for t in tasks:
        experiment.learn(stream[t])


# ------------------------------------------------------------------ the loss


def test_entropy_and_its_gradient_worked_by_hand():
    """p = (0.880797, 0.119203); the gradient of H is -p_c (log p_c + H)."""
    logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
    found = entropy(logits).sum()
    found.backward()
    assert found.item() == pytest.approx(0.365334, abs=1e-6)
    assert logits.grad.tolist()[0] == pytest.approx([-0.209987, 0.209987], abs=1e-6)


@quick
@given(seeds, st.integers(1, 6))
def test_entropy_of_classes_that_compete(seed, number):
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, number, generator=draw, dtype=torch.float64)
    found = entropy(logits)
    assert (found >= -1e-12).all() and (found <= torch.tensor(number + 1e-9).log()).all()
    torch.testing.assert_close(found, torch.distributions.Categorical(logits=logits).entropy())
    masked = F.pad(logits, (1, 2), value=-torch.inf).requires_grad_()
    torch.testing.assert_close(entropy(masked), found)
    entropy(masked).sum().backward()
    assert masked.grad.isfinite().all() and not masked.grad[:, 0].any()


# ------------------------------------------------------------------ the run


@pytest.mark.parametrize("lr", [None, 0.03])
@pytest.mark.parametrize(("scenario", "classes"), [("class", slice(0, 4)), ("task", slice(2, 4)), ("domain", slice(2))])
def test_the_three_tasks_are_those_written_by_hand(scenario, classes, lr):
    learner, stream = hidden(Tent(lr=lr), scenario, gradient_clip=0.05)
    net = deepcopy(nn.Sequential(learner.backbone, learner.head))
    norm = net[0].layers[-1]
    assert isinstance(norm, nn.BatchNorm1d)
    competing = {0: slice(2), 1: classes, 2: {"class": slice(6), "task": slice(4, 6), "domain": slice(2)}[scenario]}
    for t in range(3):
        weights = [norm.weight, norm.bias] if t == 1 else list(net.parameters())
        optimizer = SGD(weights, lr=lr if t == 1 and lr else 0.1)
        x, y, _ = stream[t].train.tensors()
        for rows in ordered(len(y), t, epochs=2):
            logits = net(x[rows].float() / 255)[:, competing[t]]
            p = logits.softmax(1)
            entropies = -(p * p.log()).sum(1)
            first = competing[t].start or 0
            loss = entropies.mean() if t == 1 else F.cross_entropy(logits, y[rows] - first)
            net.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 0.05)
            optimizer.step()
        learn(learner, stream, t)
        for ours, theirs in zip(learner.trunk().parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_on_a_hidden_task_nothing_but_scale_and_shift_moves_and_later_all_weights_do(statistics):
    learner, stream = hidden(Tent(statistics=statistics), gradient_clip=1.0)
    moved = []
    for t in range(3):
        before = deepcopy(dict(learner.named_parameters()))
        running = deepcopy(learner.backbone.layers[-1].running_mean)
        learn(learner, stream, t)
        moved.append({name for name, p in learner.named_parameters() if not torch.equal(p, before[name])})
        assert all(p.requires_grad for p in learner.parameters())
        now = learner.backbone.layers[-1].running_mean
        assert now is None if statistics == "batch" else not torch.equal(now, running)
    names = {name for name, _ in learner.named_parameters()}
    assert moved == [names, {"backbone.layers.4.weight", "backbone.layers.4.bias"}, names]


def test_what_is_frozen_before_stays_frozen():
    learner, stream = hidden(Tent())
    learner.head.requires_grad_(False)
    before = deepcopy(learner.head.state_dict())
    learn(learner, stream, 0, 1, 2)
    assert same(before, learner.head.state_dict())
    assert not any(p.requires_grad for p in learner.head.parameters())


def test_a_run_that_is_stopped_in_a_hidden_task_goes_on_to_the_same_bits(tmp_path: Path):
    states = []
    for folder, stop in (("whole", False), ("halted", True)):
        options = {"epochs": 2, "directory": tmp_path / folder, "every": 1}
        if stop:
            learner, stream = hidden(Tent(lr=0.03), chunk_size=1)
            with suppress(Halted):
                Experiment(learner, stream, trainer, callbacks=[Halt()], **options).run()
            assert learner.task_index == 1 and learner.step == 8
        learner, stream = hidden(Tent(lr=0.03), chunk_size=1)
        Experiment(learner, stream, trainer, **options).run()
        states.append({key: v for key, v in learner.state_dict().items() if not key.startswith("calibration.")})
    assert same(*states)


def test_predictions_use_the_statistics_of_a_batch_of_one_task():
    learner, stream = hidden(Tent())
    run = Experiment(learner, stream, trainer, epochs=2).run()
    for t, task in enumerate(stream):
        x, y, _ = task.test.tensors()
        h = learner.backbone.layers[:-1](x.float() / 255)
        norm = learner.backbone.layers[-1]
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
        right = (learner.head(h.relu()).argmax(1) == y).float().mean().item()
        assert run.primary.R[3][t].item() == pytest.approx(right)


def test_it_adapts_to_corrupted_digits():
    """Fog of severity 5 in five seeds: the network without TENT, with the statistics of the batch, and with TENT."""
    frozen, batch, adapted, certain = [], [], [], []
    for seed in range(5):
        shown = corrupted(digits(), ["clean", "fog"], 5, seed=seed)
        stream = hide_labels(shown)
        net, adam = partial(MLP, hidden=[64, 64], norm=True), partial(torch.optim.Adam, lr=1e-3)
        plain = Learner(shown, net, {}, adam, seed=seed)
        experiment = Experiment(plain, shown, trainer, epochs=5)
        experiment.learn(shown[0])
        experiment.evaluate()
        frozen.append(plain.matrices["domain"].R[1, 1].item())
        tent = Learner(stream, net, {"tent": Tent(lr=0.003)}, adam, seed=seed)
        experiment = Experiment(tent, stream, trainer, epochs=5)
        for task in stream:
            experiment.learn(task)
            experiment.evaluate()
            with torch.no_grad(), tent.evaluating():
                certain.append(entropy(tent(tent.prepare(stream[1].test.tensors()[0]))).mean().item())
        batch.append(tent.matrices["domain"].R[1, 1].item())
        adapted.append(tent.matrices["domain"].R[2, 1].item())
    gain = torch.tensor(adapted) - torch.tensor(frozen)
    error = gain.std().item() / 5**0.5
    assert gain.mean().item() - 3 * error > 0.1
    assert sum(adapted) > sum(batch) - 0.05, "the entropy does not undo what the statistics bring"
    assert all(after < before for before, after in zip(certain[::2], certain[1::2], strict=True))


# ------------------------------------------------------------------ what is refused, and what is told


def test_tent_refuses_what_cannot_adapt():
    for bare in (ToyBackbone(), _with(nn.BatchNorm1d(16, affine=False)), _with(nn.LayerNorm(16))):
        with pytest.raises(InputError, match=r"needs batch norm with scale and shift, and ToyBackbone has none: use"):
            Learner(toy_stream(2), bare, {"method": Tent()}, SGD)
    with pytest.raises(InputError, match=r"the batch norms of Normed, and they are frozen: set freeze=false"):
        Learner(toy_stream(2), Normed().requires_grad_(False), {"method": Tent()}, SGD)
    with pytest.raises(InputError, match=r"no kind of statistics called 'moving'.* Known: batch, running"):
        Tent(statistics="moving")
    with pytest.raises(InputError, match="lr"):
        Tent(lr=0.0)


def _with(layer: nn.Module) -> ToyBackbone:
    body = ToyBackbone()
    body.layers.append(layer)
    return body


@pytest.mark.parametrize(
    ("scenario", "tasks", "told"),
    [("domain", (1, 2), None), ("class", (), None), ("class", (1, 2), "task 2, 3,"), ("domain", (0,), "task 1,")],
)
def test_a_remark_names_hidden_tasks_with_classes_that_none_has_shown(scenario, tasks, told):
    learner, _ = hidden(Tent(), scenario, tasks)
    remarks = learner.strategies.remarks(learner)
    assert not remarks if told is None else told in remarks[0]
