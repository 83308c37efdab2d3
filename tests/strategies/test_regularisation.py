"""What the methods that hold weights near old ones compute: worked examples, closed forms, loops written by hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cl.data.task import SCENARIOS, Stream, Task, TaskData
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.random import Random, derive
from cl.report.terminal import TerminalReport
from cl.strategies import online_ewc
from cl.strategies.cumulative import Cumulative
from cl.strategies.er import ER
from cl.strategies.ewc import EWC
from cl.strategies.finetune import Finetune
from cl.strategies.l2p import L2P
from cl.strategies.lwf import LwF
from cl.strategies.mas import MAS, sensitivity
from cl.strategies.ncm import NCM
from cl.strategies.ogd import OGD
from cl.strategies.online_ewc import OnlineEWC
from cl.strategies.si import SI
from cl.testing import ToyBackbone, toy_learner, toy_stream
from cl.toolkit.fisher import diagonal_fisher, label_weights
from cl.toolkit.weights import flat
from toys import learn, toy, trainer

quick = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**31)


def vector(learner: Learner) -> torch.Tensor:
    return flat([p.detach() for p in learner.trunk().parameters()]).clone()


class Weights(nn.Module):
    """Features that are the weights."""

    def __init__(self, start) -> None:
        super().__init__()
        self.num_features = len(start)
        self.theta = nn.Parameter(torch.tensor(start))

    def forward(self, x):
        return self.theta.expand(len(x), self.num_features)


class Quadratic(Strategy):
    """A task loss of 1/2 sum h (theta - goal)^2 in place of the cross-entropy."""

    def __init__(self, h, goal) -> None:
        super().__init__()
        self.h, self.goal = torch.tensor(h), torch.tensor(goal)

    def criterion(self, learner, batch, logits):
        return 0.5 * (self.h * (learner.backbone.theta - self.goal) ** 2).sum() + 0 * logits.sum()


def quadratic(strategy: Strategy, start, h, goal, steps: int, lr: float = 0.1, **optimizer) -> tuple[Learner, Stream]:
    """A learner of weights with a quadratic loss, whose tasks have so many steps; the head gets no gradient."""
    y = torch.arange(steps) % 2
    data = TaskData(torch.zeros(steps, 1), y)
    tasks = [Task(t, TaskData(data.x, y, t), TaskData(data.x.clone(), y, t)) for t in range(3)]
    stream = Stream(tasks, scenario="domain", num_classes=2)
    strategies = {"method": strategy, "task": Quadratic(h, goal)}
    sgd = partial(torch.optim.SGD, lr=lr, **optimizer)
    return Learner(stream, Weights(start), strategies, sgd, batch_size=1), stream


def steps_by_hand(stream: Stream, task: Task, epochs: int, batch_size: int = 8):
    """The minibatches of a task of the toy, as the engine orders them."""
    x, y, _ = task.train.tensors()
    for epoch in range(epochs):
        order = np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch)).permutation(len(y))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield x[rows].float() / 255, y[rows]


# ------------------------------------------------------------------ SI


def test_si_takes_the_whole_penalty_off_a_group_of_minibatches_that_is_cut_short() -> None:
    h, goal, accumulate = torch.tensor([1.0, 3.0]), torch.tensor([2.0, -1.0]), 4
    found = []

    class Watched(SI):
        def project_gradients(self, learner: Learner) -> None:
            super().project_gradients(learner)
            found.append((self.gradient.clone(), learner.backbone.theta.detach().clone()))

    learner, stream = quadratic(Watched(weight=5.0), [0.0, 0.0], h.tolist(), goal.tolist(), steps=6)
    Experiment(learner, stream, partial(trainer, accumulate_grad_batches=accumulate)).run()
    assert len(found) == 3 * 2 and learner.strategies["method"].importance.sum() > 0
    for gradient, theta in found:
        torch.testing.assert_close(gradient[:2], h * (theta - goal))  # the head has none


def test_worked_example_17():
    """Two steps of 0.1 on th^2 / 2 from 1: omega 0.181, and the importance with xi = 0.1."""
    learner, stream = quadratic(SI(damping=0.1), [1.0], [1.0], [0.0], steps=2)
    learn(learner, stream, [0])
    strategy = learner.strategies["method"]
    assert float(learner.backbone.theta.detach()) == pytest.approx(0.81)
    assert float(strategy.path[0]) == pytest.approx(0.181)
    assert float(strategy.importance[0]) == pytest.approx(1.329904, abs=1e-5)


@pytest.mark.parametrize("h", [[1.0, 3.0], [0.5, 2.0]])
def test_the_path_integral_is_the_fall_of_the_loss(h):
    """Check 6: within O(learning rate), weight by weight; half the rate, half the error."""
    start, goal = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0])
    curve, errors = torch.tensor(h), []
    for lr, steps in ((0.01, 50), (0.005, 100)):
        learner, stream = quadratic(SI(), start.tolist(), h, goal.tolist(), steps, lr)
        learn(learner, stream, [0])
        fall = 0.5 * curve * ((start - goal) ** 2 - (learner.backbone.theta.detach() - goal) ** 2)
        errors.append((learner.strategies["method"].path[:2] - fall).abs() / fall)
        assert (errors[-1] < 2 * lr * curve).all()
    torch.testing.assert_close(errors[1], errors[0] / 2, rtol=0.1, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_si_is_the_loop_written_by_hand(momentum):
    """Three tasks; the gradient of the path is autograd's, of the loss without the penalty."""
    c, xi, stream = 2.0, 0.05, toy_stream(3)
    torch.manual_seed(0)
    net = nn.Sequential(ToyBackbone(), nn.Linear(16, 6))
    parameters = list(net.parameters())
    Omega, anchor = [torch.zeros_like(p) for p in parameters], [p.detach().clone() for p in parameters]
    for task in stream:
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=momentum)
        omega = [torch.zeros_like(p) for p in parameters]
        for x, y in steps_by_hand(stream, task, epochs=2):
            loss = F.cross_entropy(net(x)[:, : 2 * task.index + 2], y)
            g = torch.autograd.grad(loss, parameters, retain_graph=True)
            total = loss + c * sum((w * (p - a) ** 2).sum() for w, p, a in zip(Omega, parameters, anchor, strict=True))
            before = [p.detach().clone() for p in parameters]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            omega = [w - d * (p.detach() - b) for w, d, p, b in zip(omega, g, parameters, before, strict=True)]
        for i, p in enumerate(parameters):
            Omega[i] = (Omega[i] + omega[i] / ((p.detach() - anchor[i]) ** 2 + xi)).clamp(min=0)
            anchor[i] = p.detach().clone()
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=momentum)
    torch.manual_seed(0)
    learner = Learner(stream, ToyBackbone(), {"method": SI(weight=c, damping=xi)}, sgd, batch_size=8)
    learn(learner, stream, epochs=2)
    torch.testing.assert_close(vector(learner), flat([p.detach() for p in parameters]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learner.strategies["method"].importance, flat(Omega), rtol=1e-3, atol=1e-5)
    assert float(flat(Omega).max()) > 0


def test_importance_never_falls_below_zero():
    """A path that raised the loss takes importance away, down to none."""
    learner, stream = quadratic(SI(damping=0.5), [1.0, 1.0], [1.0, 1.0], [0.0, 0.0], steps=1)
    strategy = learner.strategies["method"]
    strategy.before_task(learner, stream[0])
    strategy.importance[:2], strategy.path[:2] = 3.0, torch.tensor([-1.0, -2.0])
    strategy.after_task(learner, stream[0])
    assert strategy.importance[:2].tolist() == [1.0, 0.0]


@quick
@given(seeds, st.floats(0.1, 100))
def test_the_penalty_has_no_half(seed, weight):
    draw = torch.Generator().manual_seed(seed)
    learner, _ = toy(SI(weight=weight))
    strategy = learner.strategies["method"]
    strategy.importance.copy_(torch.rand(614, generator=draw))
    strategy.anchor.copy_(torch.randn(614, generator=draw))
    assert strategy.loss(learner, None, None) is None, "nothing to hold in the first task"
    learner.tasks_learned = 1
    expected = weight * (strategy.importance * (vector(learner) - strategy.anchor) ** 2).sum()
    assert float(strategy.loss(learner, None, None).detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_large_weight_holds_what_moved_and_none_is_finetuning(scenario):
    torch.testing.assert_close(
        vector(toy(SI(weight=0.0), range(3), scenario=scenario)[0]), vector(toy(None, range(3), scenario=scenario)[0])
    )
    drift = []
    for share in (0.0, 0.9):
        learner, stream = toy(SI(damping=0.01), [0], scenario=scenario)
        strategy, before = learner.strategies["method"], vector(learner)
        importance = strategy.importance.clone()
        strategy.weight = share / (0.1 * 2 * float(importance.max()))  # under 1 each step draws a weight nearer
        learn(learner, stream, [1], epochs=3)
        drift.append(float((importance * (vector(learner) - before) ** 2).sum()))
    assert drift[1] < 0.9 * drift[0]


def test_the_path_does_not_depend_on_clipping_or_accumulating_minibatches():
    """The gradient of two minibatches at once is that of their union; clipping moves weights less, g stays."""
    paths = []
    for batch_size, accumulate in ((16, 1), (8, 2)):
        learner, stream = toy_learner({"method": SI()})
        learner.batch_size = batch_size
        make = partial(trainer, accumulate_grad_batches=accumulate)
        for index in range(2):
            Experiment(learner, stream, make, epochs=2).learn(stream[index])
        paths.append(learner.strategies["method"].path)
    torch.testing.assert_close(*paths, rtol=1e-3, atol=1e-6)
    learner, stream = quadratic(SI(), [1.0], [1.0], [0.0], steps=1)
    learner.gradient_clip = 0.5
    learn(learner, stream, [0])
    assert float(learner.strategies["method"].path[0]) == pytest.approx(1.0 * 0.05, rel=1e-3)


@pytest.mark.parametrize(("key", "method"), [("si", SI), ("mas", MAS), ("online_ewc", OnlineEWC), ("ewc", EWC)])
def test_what_cannot_be_held_is_refused(key, method):
    name = method.__name__
    with pytest.raises(InputError, match=f"{name} holds the weights .* another strategy owns encode: drop one"):
        toy_learner({"l2p": L2P(), "other": method()}, backbone="vit")
    learner, stream = toy_learner({"method": method(), "ncm": NCM()})
    with pytest.raises(InputError, match=f"{name} holds trainable weights, and all are frozen"):
        learn(learner, stream, [0])
    with pytest.raises(InputError, match=rf"{key}\.weight=-1 must be 0 or more"):
        method(weight=-1)


def test_si_refuses_no_damping():
    with pytest.raises(InputError, match=r"si\.damping=0 must be above 0"):
        SI(damping=0)


# ------------------------------------------------------------------ MAS


class Times(nn.Module):
    """Outputs w x, side by side."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        return x * self.w


def test_worked_example_18():
    """d (1.5 x)^2 / dw = 3 x^2: the mean over x in {1, -2} is 7.5, and signs do not cancel."""
    x = torch.tensor([[1.0], [-2.0]])
    assert float(sensitivity(Times(1.5), x, torch.tensor([0]))) == pytest.approx(7.5)
    assert float(sensitivity(Times(-1.5), x, torch.tensor([0]))) == pytest.approx(7.5)


def test_only_outputs_that_compete_count():
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert sensitivity(Times(1.0, 1.0, 1.0), x, torch.tensor([0, 2])).tolist() == [2.0, 0.0, 18.0]


@pytest.mark.parametrize("held", [1, 1000, 10**9])
def test_the_sensitivity_is_that_of_gradients_taken_one_by_one(held, monkeypatch):
    monkeypatch.setattr("cl.toolkit.fisher._HELD_AT_ONCE", held)
    torch.manual_seed(0)
    net, x = nn.Sequential(ToyBackbone(), nn.Linear(16, 4)), torch.randn(7, 1, 4, 4)
    parameters, expected, batch = list(net.parameters()), 0.0, 0.0
    for one in x:
        gradient = flat(torch.autograd.grad(net(one[None])[0, :3].square().sum(), parameters))
        expected, batch = expected + gradient.abs() / 7, batch + gradient / 7
    got = sensitivity(net, x, torch.arange(3))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(got, batch.abs(), rtol=1e-2), "of single examples, not of the batch's mean gradient"


@quick
@given(seeds)
def test_the_sensitivity_grows_with_the_square_of_a_linear_output(seed):
    draw = torch.Generator().manual_seed(seed)
    x, w = torch.randn(5, 2, generator=draw), torch.randn(2, generator=draw)
    single, double = (sensitivity(Times(*(factor * w).tolist()), x, torch.arange(2)) for factor in (1, 2))
    torch.testing.assert_close(double, 2 * single, rtol=1e-4, atol=1e-6)


def test_mas_sums_over_tasks_and_holds_the_last_weights():
    learner, stream = toy(MAS(weight=0.7, num_samples=None))
    strategy, total = learner.strategies["method"], 0.0
    for task in stream:
        learn(learner, stream, [task.index])
        module = nn.Sequential(learner.backbone, learner.head)
        view = learner.prepare(task.train.tensors()[0])
        total = total + sensitivity(module, view, torch.arange(2 * task.index + 2))
        torch.testing.assert_close(strategy.importance, total, rtol=1e-3, atol=1e-6)
        assert torch.equal(strategy.anchor, vector(learner))
    with torch.no_grad():
        for p in learner.trunk().parameters():
            p += 0.1
    expected = 0.7 * 0.01 * total.sum()
    assert float(strategy.loss(learner, None, None).detach()) == pytest.approx(float(expected), rel=1e-3)


def test_mas_needs_no_labels_and_measures_plain_examples_in_evaluation_mode():
    class Noisy(ToyBackbone):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    found = []
    for body in (ToyBackbone, Noisy):
        stream = toy_stream()
        torch.manual_seed(0)
        learner = Learner(stream, body(), {"method": MAS()}, partial(torch.optim.SGD, lr=0.1), batch_size=8)
        task = stream[0]
        shuffled = Task(0, TaskData(task.train.x, task.train.y.flip(0)), task.test)
        learner.before_task(task)
        learner.strategies["method"].after_task(learner, shuffled if body is Noisy else task)
        found.append(learner.strategies["method"].importance.clone())
        assert learner.backbone.training
    assert torch.equal(*found) and float(found[0].max()) > 0


# ------------------------------------------------------------------ online EWC


def scripted(monkeypatch, fishers, optima, **options) -> tuple[Learner, OnlineEWC]:
    """A learner of 614 weights whose optima and Fishers after each task are the given numbers."""
    learner, _ = toy(OnlineEWC(**options))
    strategy, script = learner.strategies["method"], iter(fishers)
    monkeypatch.setattr(online_ewc, "task_fisher", lambda *args: torch.full((614,), next(script)))
    for optimum in optima:
        nn.utils.vector_to_parameters(torch.full((614,), optimum), learner.trunk().parameters())
        strategy.after_task(learner, learner.task)
        learner.tasks_learned += 1
    return learner, strategy


def test_worked_example_16(monkeypatch):
    learner, strategy = scripted(monkeypatch, [2.0, 1.0], [0.5, -0.25], gamma=0.9, weight=4.0)
    torch.testing.assert_close(strategy.precision, torch.full((614,), 2.8))
    assert torch.equal(strategy.mean, torch.full((614,), -0.25))
    assert float(strategy.loss(learner, None, None).detach()) == 0, "the penalty is 0 at the last optimum"
    nn.utils.vector_to_parameters(torch.full((614,), 0.75), learner.trunk().parameters())
    penalty = float(strategy.loss(learner, None, None).detach())
    assert penalty == pytest.approx(614 * 4 / 2 * 0.9 * 2.8), "with a half, and gamma once more (equation 2)"


@quick
@given(st.floats(0, 1), st.lists(st.floats(0, 5), min_size=1, max_size=6))
def test_the_precision_is_a_fading_sum(gamma, fishers):
    with pytest.MonkeyPatch.context() as patch:
        _, strategy = scripted(patch, fishers, [0.0] * len(fishers), gamma=gamma)
    expected = sum(gamma ** (len(fishers) - 1 - i) * f for i, f in enumerate(fishers))
    assert float(strategy.precision[0]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_without_fading_the_second_task_is_that_of_ewc_and_the_third_is_not():
    runs = [toy(m(weight=5.0, num_samples=None, **o), [0, 1]) for m, o in ((EWC, {}), (OnlineEWC, {"gamma": 1.0}))]
    torch.testing.assert_close(*(vector(learner) for learner, _ in runs), rtol=1e-3, atol=1e-5)
    after = [vector(learn(learner, stream, [2])) for learner, stream in runs]
    assert not torch.allclose(*after)


def test_online_ewc_measures_the_fisher_of_each_task_at_its_optimum():
    learner, stream = toy(OnlineEWC(num_samples=None, gamma=0.5))
    strategy, total = learner.strategies["method"], 0.0
    for task in stream:
        learn(learner, stream, [task.index])
        module = nn.Sequential(learner.backbone, learner.head)
        view = learner.prepare(task.train.tensors()[0])
        total = 0.5 * total + diagonal_fisher(module, view, torch.arange(2 * task.index + 2))
        torch.testing.assert_close(strategy.precision, total, rtol=1e-3, atol=1e-7)
        assert torch.equal(strategy.mean, vector(learner))


def test_online_ewc_refuses_what_it_cannot_measure():
    with pytest.raises(InputError, match=r"online_ewc\.gamma=1\.5 must be between 0 and 1"):
        OnlineEWC(gamma=1.5)
    with pytest.raises(InputError, match="no kind of Fisher called 'emprical': did you mean 'empirical'"):
        OnlineEWC(fisher="emprical")
    with pytest.raises(InputError, match="batch_size=20 needs one label an example: empirical or sampled"):
        OnlineEWC(batch_size=20)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("make", [SI, MAS, OnlineEWC])
def test_on_one_task_methods_are_finetuning_to_the_bit(make, scenario):
    options = {"num_tasks": 1, "scenario": scenario, "epochs": 2}
    assert torch.equal(vector(toy(make(), [0], **options)[0]), vector(toy(None, [0], **options)[0]))


# ------------------------------------------------------------------ remarks

NEED_EXEMPLARS = {"EWC": EWC, "Online EWC": OnlineEWC, "SI": SI, "MAS": MAS, "LwF": LwF}


def notes(strategies: dict[str, Strategy], **options) -> list[str]:
    learner, stream = toy_learner(strategies, **options)
    return Experiment(learner, stream, trainer, notes=["First."]).run_view.notes


@pytest.mark.parametrize("name", NEED_EXEMPLARS)
def test_a_method_that_cannot_work_says_so_with_the_reason_and_the_paper(name):
    make = NEED_EXEMPLARS[name]
    first, remark = notes({"it": make()})
    assert first == "First." and remark.startswith(f"{name} keeps no exemplars: ")
    assert "van de Ven and Tolias 2019" in remark and "never sees the classes of different tasks together" in remark
    for scenario in ("task", "domain"):
        assert notes({"it": make()}, scenario=scenario) == ["First."]
    assert notes({"er": ER(20), "it": make()}) == ["First."], "with exemplars"
    assert notes({"it": make(), "all": Cumulative()}) == ["First."], "classes are seen together"
    assert notes({"it": make()}, num_tasks=1) == ["First."]


def test_methods_that_need_none_say_nothing_and_two_alike_say_it_once():
    assert notes({"it": Finetune()}) == ["First."] == notes({})
    assert len(notes({"one": EWC(), "two": EWC(weight=3.0)})) == 2
    assert len(notes({"one": EWC(), "two": SI()})) == 3


def test_the_terminal_shows_a_remark_once(capsys):
    learner, stream = toy_learner({"si": SI()}, num_tasks=2)
    Experiment(learner, stream, trainer, reports=[TerminalReport()]).run()
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("SI keeps no exemplars: it never sees the classes of different tasks together") == 1


class BatchNormed(ToyBackbone):
    def __init__(self) -> None:
        super().__init__()
        self.layers.append(nn.BatchNorm1d(self.num_features, track_running_stats=False))


@pytest.mark.parametrize("strategy", [EWC, OnlineEWC, MAS, OGD])
def test_gradients_of_single_examples_of_a_network_that_sees_batches_are_refused(strategy: type[Strategy]) -> None:
    with pytest.raises(InputError, match="by the rest of its batch: "):
        Learner(toy_stream(), BatchNormed(), {"method": strategy()}, partial(torch.optim.SGD, lr=0.1))


@pytest.mark.parametrize("strategy", [EWC, OnlineEWC])
def test_the_fisher_of_batches_takes_such_a_network(strategy: type[Strategy]) -> None:
    method = strategy(batch_size=8, fisher="empirical")
    learner = Learner(toy_stream(), BatchNormed(), {"method": method}, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    learn(learner, toy_stream(), [0])
    assert (
        sum(float(buffer.sum()) for name, buffer in method.named_buffers() if name in ("importance", "precision")) > 0
    )


@pytest.mark.parametrize("kind", ["true", "sampled"])
def test_the_models_own_labels_do_not_depend_on_how_many_rows_pass_at_once(kind: str) -> None:
    torch.manual_seed(0)
    net, x, classes = nn.Linear(3, 4), torch.randn(600, 3), torch.tensor([0, 2, 3])
    found = label_weights(kind, net, x, torch.zeros(600, dtype=torch.long), classes, Random())
    p = net(x)[:, classes].softmax(1).detach()
    if found is None:
        whole = diagonal_fisher(net, x, classes)
        parts = [diagonal_fisher(net, part, classes) * len(part) / 600 for part in x.split(100)]
        torch.testing.assert_close(whole, torch.stack(parts).sum(0))
    else:
        counts = found.sum(0) / 600
        assert (counts - p.mean(0)).abs().max() < 4 * (0.25 / 600) ** 0.5, "four standard errors"
