"""Methods that project gradients: worked examples, what they promise, and a few lines of each written by hand."""

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
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies import adam_nscl, cuber, gem, ogd, sgp, tag
from cl.strategies.adam_nscl import AdamNSCL
from cl.strategies.agem import AGEM
from cl.strategies.cuber import CUBER
from cl.strategies.gem import GEM
from cl.strategies.gpm import GPM
from cl.strategies.l2p import L2P
from cl.strategies.ogd import OGD
from cl.strategies.sgp import SGP
from cl.strategies.tag import TAG
from cl.strategies.trgp import TRGP
from cl.testing import ToyBackbone, toy_learner, toy_stream
from cl.toolkit.memory import Memory
from cl.toolkit.subspace import Subspaces, protected_layers
from toys import learn, trainer

quick = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**31)


def build(stream: Stream, backbone: nn.Module, strategy: Strategy, lr: float = 0.05, optimizer=None, **options):
    optimizer = optimizer or partial(torch.optim.SGD, lr=lr)
    return Learner(stream, backbone, {"method": strategy}, optimizer, **{"batch_size": 4, **options})


def random_stream(
    shape=(30,), num_rows: int = 4, scenario: str = "class", num_tasks: int = 2, shared: bool | None = None
) -> Stream:
    """Random inputs, few enough that they do not span a layer."""
    shared = scenario == "domain" if shared is None else shared
    draw = torch.Generator().manual_seed(3)
    tasks = []
    for t in range(num_tasks):
        x = torch.randn(num_rows, *shape, generator=draw)
        y = torch.arange(num_rows) % 2 + (0 if shared else 2 * t)
        tasks.append(Task(t, TaskData(x, y, t), TaskData(x.clone(), y, t)))
    return Stream(tasks, scenario=scenario, num_classes=2 if shared else 2 * num_tasks, repeats=shared)


class Identity(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


class WideNet(nn.Module):
    """Three linear layers with biases, 30 -> 24, the middle one on tokens."""

    num_features = 24

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tokens, self.last = nn.Linear(30, 48), nn.Linear(24, 24), nn.Linear(48, 24)

    def forward(self, x):
        return self.last(self.tokens(self.first(x).relu().view(-1, 2, 24)).relu().flatten(1)).relu()


class ConvNet(nn.Module):
    """Two convolutions and a linear layer with biases, (16, 5, 5) -> 24."""

    num_features = 24

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.second = nn.Conv2d(16, 12, 3, stride=2, padding=1), nn.Conv2d(12, 40, 3)
        self.linear = nn.Linear(40, 24)

    def forward(self, x):
        return self.linear(self.second(self.conv(x).relu()).flatten(1).relu()).relu()


def matrix(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------ OGD


def test_worked_example_5():
    S = ogd.orthonormal(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), torch.zeros(0, 3))
    torch.testing.assert_close(ogd.project(torch.tensor([3.0, 4.0, 5.0]), S), torch.tensor([0.0, 0.0, 5.0]))


def gram_schmidt(vectors, basis):
    """The paper's procedure, one vector at a time."""
    for v in vectors:
        for u in basis:
            v = v - (v @ u) * u
        if v.norm() > 1e-8:
            basis = [*basis, v / v.norm()]
    return basis


@quick
@given(seeds, st.integers(1, 6), st.integers(0, 4), st.integers(6, 12))
def test_directions_span_what_gram_schmidt_spans(seed, count, dependent, size):
    old, new = matrix(seed, 3, size), matrix(seed + 1, count, size)
    new = torch.cat([new, matrix(seed + 2, dependent, count) @ new + matrix(seed + 3, dependent, 3) @ old])
    S = ogd.orthonormal(old, torch.zeros(0, size).double())
    S = torch.cat([S, ogd.orthonormal(new, S)])
    theirs = gram_schmidt(new, gram_schmidt(old, []))
    torch.testing.assert_close(S @ S.T, torch.eye(len(S)).double(), atol=1e-6, rtol=0)
    g = matrix(seed + 4, size)
    if len(theirs) == len(S):  # Gram and Schmidt's rounding makes a vector of its own now and then
        expected = g - sum((g @ u) * u for u in theirs)
        torch.testing.assert_close(ogd.project(g, S), expected, atol=1e-6, rtol=0)
    assert len(S) == min(3 + count, size)
    assert (torch.cat([old, new]) @ ogd.project(g, S)).abs().max() < 1e-5


@pytest.mark.parametrize("logits", ogd.LOGITS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_steps_are_orthogonal_to_the_gradients_of_old_logits(logits, scenario):
    torch.manual_seed(0)
    stream = random_stream(scenario=scenario)
    learner = learn(build(stream, WideNet(), OGD(num_samples=4, logits=logits)), stream, [0], 5)
    strategy = learner.strategies["method"]
    theta = list((learner.backbone if scenario == "task" else learner.trunk()).parameters())
    x, y, _ = stream[0].train.tensors()
    classes = learner.competing(stream[0])
    gradients = []
    for row, label in zip(learner(x), y, strict=True):
        some = {"truth": row[label][None], "mean": row[classes].mean()[None], "all": row[classes]}[logits]
        for z in some:
            parts = torch.autograd.grad(z, theta, retain_graph=True, allow_unused=True, materialize_grads=True)
            gradients.append(torch.cat([p.flatten() for p in parts]))
    gradients = torch.stack(gradients)
    used = strategy.basis.norm(dim=1) > 0.5
    assert int(used.sum()) == int(torch.linalg.matrix_rank(gradients.double(), rtol=1e-5))
    for p in learner.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    head = learner.head.weight.grad.clone()
    before = torch.cat([p.grad.flatten() for p in theta])
    strategy.project_gradients(learner)
    after = torch.cat([p.grad.flatten() for p in theta])
    assert (gradients @ before).abs().max() > 0.1 and (gradients @ after).abs().max() < 1e-4
    _, sizes, span = torch.linalg.svd(gradients.double(), full_matrices=False)
    span = span[sizes > 1e-5 * sizes.max()]
    torch.testing.assert_close(after, (before - (span @ before.double()) @ span).float(), atol=1e-4, rtol=0)
    assert torch.equal(learner.head.weight.grad, head) == (scenario == "task"), "a head of its own is free"


def test_a_linear_model_answers_the_old_examples_as_before():
    stream = random_stream(scenario="domain")
    learner = learn(build(stream, Identity(30), OGD(num_samples=4, logits="all")), stream, [0], 20)
    x = stream[0].train.x
    before = learner(x).detach()
    learn(learner, stream, [1], 20)
    assert (learner(stream[1].train.x).argmax(1) == stream[1].train.y).all()
    assert ((learner(x) - before).norm(dim=1) <= 1e-5 * x.norm(dim=1)).all()
    truth = learn(build(stream, Identity(30), OGD(num_samples=4)), stream, [0], 20)
    before, y = truth(x).detach(), stream[0].train.y
    learn(truth, stream, [1], 20)
    moved = (truth(x) - before).abs()
    assert moved.gather(1, y[:, None]).max() < 1e-4 < 1e-2 < moved.gather(1, 1 - y[:, None]).max()


def test_ogd_keeps_nothing_of_the_last_task_and_no_more_than_it_has():
    learner, stream = toy_learner({"method": OGD(num_samples=60)})
    learn(learner, stream)
    basis = learner.strategies["method"].basis
    assert basis.shape == (120, 16 * 16 * 2 + 17 * 6)
    used = basis.norm(dim=1) > 0.5
    assert 0 < int(used[:60].sum()) <= 48 and 0 < int(used[60:].sum()) <= 48
    torch.testing.assert_close(basis[used] @ basis[used].T, torch.eye(int(used.sum())), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (OGD, {"optimizer": partial(torch.optim.Adam, lr=0.1)}, "OGD needs plain SGD.*Adam"),
        (OGD, {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}, "OGD needs plain SGD.*momentum=0.9"),
        (lambda: OGD(logits="every"), {}, "no choice of logits called 'every'"),
        (lambda: OGD(num_samples=0), {}, r"ogd\.num_samples=0 must be 1 or more"),
    ],
)
def test_ogd_refuses(make, options, message):
    with pytest.raises(InputError, match=message):
        build(toy_stream(), ToyBackbone(), make(), **options)


def test_ogd_refuses_another_encoder():
    with pytest.raises(InputError, match="OGD differentiates backbone and head, but another strategy owns encode"):
        toy_learner({"l2p": L2P(4, 2, 2), "ogd": OGD()}, backbone="vit")


# ------------------------------------------------------------------ GEM


@pytest.mark.parametrize(
    ("G", "g", "margin", "ridge", "expected"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [-1.0, -2.0], 0.0, 1e-3, [-0.001, -0.002]),
        ([[1.0, 0.0], [1.0, 1.0]], [-1.0, 0.5], 0.0, 1e-12, [0.0, 0.5]),
        ([[1.0, 0.0], [1.0, 1.0]], [-1.0, 0.5], 0.5, 1e-3, [0.0, 1.0]),
        ([[1.0, 0.0], [1.0, 1.0]], [1.0, 0.5], 0.5, 1e-3, [1.0, 0.5]),
    ],
    ids=["example 2", "example 3", "example 4", "nothing violated"],
)
def test_worked_examples_of_gem(G, g, margin, ridge, expected):
    projected = gem.project(torch.tensor(g), torch.tensor(G), margin, ridge)
    torch.testing.assert_close(projected, torch.tensor(expected), atol=2e-6, rtol=0)


problems = (seeds, st.integers(1, 12), st.integers(1, 15), st.sampled_from([0.0, 0.5]), st.sampled_from([1e-3, 1, 1e3]))


def problem(seed: int, count: int, size: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    G = (matrix(seed, count, size) * scale * matrix(seed + 2, count, 1).exp()).numpy()
    return G @ G.T + 1e-3 * np.eye(count), G @ matrix(seed + 1, size).numpy()


@quick
@given(*problems)
def test_the_dual_problem_is_solved_as_karush_kuhn_and_tucker_say(seed, count, size, low, scale):
    A, b = problem(seed, count, size, scale)
    v = gem.bounded_minimum(A, b, low)
    slope = (A @ v + b) / np.sqrt(np.diag(A))
    assert (v >= low - 1e-12).all()
    tolerance = 1e-9 * (1 + np.abs(A @ v).max() + np.abs(b).max()) / np.sqrt(np.diag(A)).min()
    assert (slope >= -tolerance).all()
    assert (np.abs(slope[v > low + 1e-9]) <= tolerance).all()


@quick
@given(*problems)
def test_the_dual_problem_is_solved_as_scipy_solves_it(seed, count, size, low, scale):
    from scipy.optimize import nnls

    A, b = problem(seed, count, size, scale)
    root = np.linalg.cholesky(A)  # v = low + u: the least squares of root' u and -root^-1 (b + A low)
    u, _ = nnls(root.T, np.linalg.solve(root, -(b + A.sum(1) * low)))
    v = gem.bounded_minimum(A, b, low)

    def value(v):
        return v @ A @ v / 2 + b @ v

    rounding = 1e-12 * (np.abs(v) @ np.abs(A) @ np.abs(v) + np.abs(b) @ np.abs(v) + 1)
    assert value(v) <= value(low + u) + rounding
    np.testing.assert_allclose(A @ v, A @ (low + u), rtol=1e-5, atol=1e-9 * (np.abs(A) @ np.abs(v) + 1).max())


@quick
@given(seeds, st.integers(1, 6), st.integers(7, 20))
def test_no_earlier_task_is_violated_and_gem_of_one_task_is_agem(seed, count, size):
    from cl.strategies import agem

    g, G = matrix(seed, size), matrix(seed + 1, count, size)
    projected = gem.project(g, G, 0.0, 1e-10)
    assert (G @ projected >= -1e-6).all()
    if (G @ g >= 0).all():
        assert torch.equal(projected, g)
    other = projected + 0.1 * matrix(seed + 2, size)
    if (G @ other >= 0).all():
        assert (projected - g).norm() <= (other - g).norm() + 1e-6, "it is the nearest such vector"
    torch.testing.assert_close(gem.project(g, G[:1], 0.0, 1e-10), agem.project(g, G[0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gem_projects_the_learners_gradient_against_each_earlier_task(scenario):
    learner, stream = toy_learner({"method": GEM(memory_size=30, margin=0.3)}, scenario=scenario)
    learn(learner, stream, [0, 1])
    learner.before_task(stream[2])
    memories: list[Memory] = list(learner.strategies["method"].memories)
    assert [len(memory) for memory in memories] == [10, 10]
    parameters, rows = list(learner.parameters()), []
    for t, memory in enumerate(memories):
        batch = memory.sample(10)
        known = {(x.numpy().tobytes(), int(y)) for x, y in zip(stream[t].train.x, stream[t].train.y, strict=True)}
        assert {(x.numpy().tobytes(), int(y)) for x, y in zip(batch.x, batch.y, strict=True)} <= known
        loss = learner.criterion(learner(learner.prepare(batch.x)), batch)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    G = torch.stack(rows)
    g = torch.randn(G.shape[1], generator=torch.Generator().manual_seed(1)) - 0.5 * G[0] / G[0].norm()
    g = g - ((g @ G[0]) / (G[0] @ G[0]) + 1) * G[0]
    for p, part in zip(parameters, g.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).clone()
    learner.strategies["method"].project_gradients(learner)
    result = torch.cat([p.grad.flatten() for p in parameters])
    v = gem.bounded_minimum((G @ G.T + 1e-3 * torch.eye(2)).double().numpy(), (G @ g).double().numpy(), 0.3)
    torch.testing.assert_close(result, g + (torch.from_numpy(v).float() @ G), rtol=1e-4, atol=1e-5)
    assert float(result @ G[0]) > -1e-2 and (v >= 0.3).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_size": 2}, r"gem\.memory_size=2 is less than one exemplar for each of 3 tasks: set it to 3"),
        ({"margin": -0.1}, r"gem\.margin=-0\.1 must be 0 or more"),
        ({"ridge": 0.0}, r"gem\.ridge=0\.0 must be above 0"),
    ],
)
def test_gem_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        build(toy_stream(), ToyBackbone(), GEM(**arguments))


@pytest.mark.parametrize(("name", "make"), [("GEM", GEM), ("A-GEM", AGEM)])
def test_where_steps_do_not_follow_the_projected_gradient_a_remark_says_so(name, make):
    def remark(optimizer, **others):
        strategies = {"method": make(30), **others}
        learner = Learner(toy_stream(), ToyBackbone(), strategies, partial(optimizer, lr=0.1), batch_size=4)
        return strategies["method"].remark(learner)

    start = f"{name} projects gradients, which {{}} then rescales: a step may yet raise the loss"
    assert remark(torch.optim.SGD) is None
    for optimizer in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        assert remark(optimizer).startswith(start.format(optimizer.__name__))
    assert remark(torch.optim.SGD, tag=TAG()).startswith(start.format("another strategy"))


# ------------------------------------------------------------------ what is promised of a layer's inputs


def moved(layer: nn.Module, x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """What a change of the weight makes of inputs that were kept."""
    if isinstance(layer, nn.Linear):
        return x @ change.T
    return F.conv2d(x, change, None, layer.stride, layer.padding, layer.dilation)


def leak(learner: Learner, stream: Stream, epochs: int = 20) -> tuple[float, float, float]:
    """Learn two tasks; return the largest ||(W2 - W1) x|| / ||x||, the least ||W2 - W1||, and the drift of logits."""
    batch = Batch(*stream[0].train.tensors())
    learn(learner, stream, [0], epochs)
    layers = protected_layers(learner)
    seen: dict[nn.Module, torch.Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0].detach())) for m in layers]
    with torch.no_grad():
        before = learner.predict(batch)[:, list(stream[0].classes)]
    for hook in hooks:
        hook.remove()
    weights = [layer.weight.detach().clone() for layer in layers]
    learn(learner, stream, [1], epochs)
    change = [layer.weight.detach() - old for layer, old in zip(layers, weights, strict=True)]
    worst = max(float(moved(m, seen[m], c).norm() / seen[m].norm()) for m, c in zip(layers, change, strict=True))
    with torch.no_grad():
        drift = (learner.predict(batch)[:, list(stream[0].classes)] - before).abs().max()
    return worst, min(float(c.norm()) for c in change), float(drift)


PROTECTORS = {
    "sgp": (lambda: SGP(threshold=1.0, scale=1e9), SCENARIOS),
    "adam_nscl": (AdamNSCL, SCENARIOS),
    "trgp": (lambda: TRGP(threshold=1.0, trust=0.01), ("task",)),
    "cuber": (lambda: CUBER(threshold=1.0, sufficient=0.01, positive=2.0), ("task",)),  # no cosine is 2
}


@pytest.mark.parametrize("net", [WideNet, ConvNet])
@pytest.mark.parametrize(("method", "scenario"), [(m, s) for m, (_, some) in PROTECTORS.items() for s in some])
def test_the_span_of_old_inputs_is_left_alone(method, scenario, net):
    torch.manual_seed(0)
    stream = random_stream((30,) if net is WideNet else (16, 5, 5), scenario=scenario)
    learner = build(stream, net(), PROTECTORS[method][0]())
    leaked, change, drift = leak(learner, stream)
    assert change > 1e-3, "the second task must have moved every layer"
    assert leaked < 1e-5
    assert drift < 1e-4, "so the network answers the first task as before"


# ------------------------------------------------------------------ SGP


def test_worked_example_9():
    expected = torch.tensor([1, 0.956522, 0.846154])
    torch.testing.assert_close(sgp.importance(torch.tensor([3.0, 2.0, 1.0]), 10), expected, atol=1e-6, rtol=0)
    assert sgp.importance(torch.tensor([3.0, 2.0, 1.0]), 1e9).min() > 0.9999
    torch.testing.assert_close(sgp.importance(torch.tensor([4.0, 2.0, 1.0]), 0), torch.tensor([1.0, 0.5, 0.25]))


def test_worked_example_10():
    """A basis of e1 and an input along (0, 1, 1): sigma is 2 and 2 ** .5, and what was .3 becomes 1."""
    x = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    y = torch.tensor([0, 1])
    stream = Stream(
        [Task(t, TaskData(x, y, t), TaskData(x.clone(), y, t)) for t in range(2)], scenario="domain", num_classes=2
    )
    learner = build(stream, Identity(3), SGP(threshold=1.0, increment=0.0))
    strategy = learner.strategies["method"]
    strategy.basis_0[0, 0], strategy.importance_0[0] = 1, 0.3
    strategy.after_task(learner, stream[1])
    torch.testing.assert_close(strategy.importance_0, torch.tensor([1, 0.963711, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(strategy.basis_0[:, 1].abs(), torch.tensor([0, 0.5, 0.5]).sqrt())


def sgp_by_hand(R: list[torch.Tensor], threshold: float, scale: float):
    """The reference's procedure on one layer's representations, with the criterion's rank at the first task."""
    M, weight = R[0].new_zeros(len(R[0]), 0), R[0].new_zeros(0)
    for some in R:
        inside = M @ M.T @ some
        U, S, _ = torch.linalg.svd(inside, full_matrices=False)
        old = ((M.T @ U) ** 2 @ S**2).sqrt()
        U, S, _ = torch.linalg.svd(some - inside, full_matrices=False)
        have, rank = inside.square().sum(), 0
        while have < (threshold - 1e-9) * some.square().sum():
            have, rank = have + S[rank] ** 2, rank + 1
        M, sigma = torch.cat([M, U[:, :rank]], 1), torch.cat([old, S[:rank]])
        new = (scale + 1) * sigma / (scale * sigma + sigma.max())
        weight = torch.cat([(new[: len(weight)] + weight).clamp(0, 1), new[len(weight) :]])
    return M @ torch.diag(weight) @ M.T, weight


@quick
@given(seeds, st.sampled_from([0.5, 0.9, 0.99]), st.sampled_from([0.0, 3.0, 10.0]))
def test_sgp_projects_as_the_loop_written_by_hand(seed, threshold, scale):
    xs = [(matrix(seed + t, 6, 8) * matrix(seed + 9 + t, 1, 8).exp()).float() for t in range(3)]
    y = torch.arange(6) % 2
    tasks = [Task(t, TaskData(x, y, t), TaskData(x.clone(), y, t)) for t, x in enumerate(xs)]
    stream = Stream(tasks, scenario="domain", num_classes=2)
    learner = build(stream, Identity(8), SGP(threshold, 0.0, scale))
    strategy = learner.strategies["method"]
    for task in stream:
        strategy.after_task(learner, task)
    learner.tasks_learned = 1
    strategy.before_task(learner, stream[1])
    projector, weight = sgp_by_hand([x.double().T for x in xs], threshold, scale)
    assert int((strategy.importance_0 > 0).sum()) == len(weight) and float(strategy.importance_0.max()) <= 1
    gradient = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
    learner.head.weight.grad, learner.head.bias.grad = gradient.clone(), torch.ones(2)
    strategy.project_gradients(learner)
    expected = gradient - gradient @ projector.float()
    torch.testing.assert_close(learner.head.weight.grad, expected, atol=1e-4, rtol=1e-3)
    assert learner.head.bias.grad is None


def test_sgp_of_a_large_scale_is_gpm_and_of_a_small_one_moves_what_gpm_closes():
    stream = random_stream(num_tasks=3)
    weights, leaks = [], []
    for make in (GPM, partial(SGP, scale=1e9), partial(SGP, scale=1.0)):
        torch.manual_seed(0)
        learner = learn(build(stream, WideNet(), make(threshold=0.9)), stream, epochs=5)
        weights.append(torch.cat([p.detach().flatten() for p in learner.parameters()]))
        torch.manual_seed(0)
        leaks.append(leak(build(stream, WideNet(), make(threshold=1.0)), stream, epochs=5)[0])
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=0)
    assert (weights[2] - weights[0]).abs().max() > 1e-3 and leaks[2] > 100 * leaks[0]


@pytest.mark.parametrize(
    ("arguments", "optimizer", "message"),
    [
        ({}, partial(torch.optim.Adam, lr=0.1), "SGP needs plain SGD.*Adam"),
        ({"threshold": [0.9, 0.9]}, None, r"sgp\.threshold has 2 values for 3 layers"),
        ({"threshold": 1.1}, None, r"sgp\.threshold=1\.1 must be between 0 and 1"),
        ({"scale": -1.0}, None, r"sgp\.scale=-1\.0 must be 0 or more"),
    ],
)
def test_sgp_refuses(arguments, optimizer, message):
    with pytest.raises(InputError, match=message):
        build(toy_stream(), ToyBackbone(), SGP(**arguments), optimizer=optimizer)


# ------------------------------------------------------------------ TRGP


def test_worked_example_11():
    subspaces, W = Subspaces(2, 2), torch.tensor([[1.0, 2.0]])
    subspaces.basis[0, 0], subspaces.member[0, 0] = 1, True
    subspaces.begin(torch.tensor([True, False]))
    assert torch.equal(subspaces.weight(W, 1, True), W), "Q begins as the identity"
    subspaces.shift.data[0, 0] = 0.5
    assert subspaces.weight(W, 1, True).tolist() == [[1.5, 2.0]]
    assert torch.equal(subspaces.weight(W, 0, False), W), "the old task has none"
    subspaces.end(1, torch.tensor([[0.0], [1.0]]), 1.0)
    assert subspaces.weight(W, 1, True).tolist() == subspaces.weight(W, 1, False).tolist() == [[1.5, 2.0]]
    assert not subspaces.shift.any() and subspaces.member.tolist() == [[True, False], [False, True]]


@quick
@given(seeds, st.integers(2, 10), st.integers(1, 12), st.floats(0.1, 1.0))
def test_a_tasks_own_subspace_is_as_small_as_the_criterion_allows(seed, size, count, threshold):
    draw = torch.Generator().manual_seed(seed)
    subspaces = Subspaces(size, 3)
    for task in range(3):
        R = torch.randn(size, count, generator=draw) * torch.rand(count, generator=draw)
        before = subspaces.basis.clone()
        subspaces.end(task, R, threshold)
        basis, own = subspaces.basis, subspaces.basis[:, subspaces.member[task]]
        used = int(subspaces.member.any(0).sum())
        torch.testing.assert_close(basis.T @ basis, torch.diag((torch.arange(size) < used).float()), atol=1e-4, rtol=0)
        kept = before.any(0)
        assert torch.equal(basis[:, kept], before[:, kept]), "directions are added, never changed"
        total, energy = R.square().sum(), (own.T @ R).square().sum(1)
        assert float(energy.sum()) >= (threshold - 1e-4) * float(total)
        assert float(energy.sum() - energy.min()) < (threshold + 1e-4) * float(total), "one fewer is not enough"


def trgp_by_hand(stream: Stream, weights, lr: float, epochs: int, trust: float, threshold: float, most: int = 2):
    """Two linear layers with a ReLU each and a head, full batches, Q for each selected task as in the paper."""
    layers, head = [w.clone() for w in weights[:2]], [w.clone() for w in weights[2:]]
    union = [torch.zeros(len(w.T), 0) for w in layers]
    bases: list[list[torch.Tensor]] = []
    scales: list[list[list[tuple[int, torch.Tensor]]]] = []

    def forward(x, layers, head, scale):
        inputs = []
        for i, W in enumerate(layers):
            for j, Q in scale[i]:
                W = W + layers[i] @ bases[j][i] @ (Q - torch.eye(len(Q))) @ bases[j][i].T
            inputs.append(x.detach().T)
            x = (x @ W.T).relu()
        return x @ head[0].T + head[1], inputs

    for t, task in enumerate(stream):
        x, y, _ = task.train.tensors()
        classes = list(task.classes)

        def loss_of(layers, head, scale, x=x, y=y, classes=classes):
            return F.cross_entropy(forward(x, layers, head, scale)[0][:, classes], y - classes[0])

        live = [w.clone().requires_grad_() for w in layers]
        gradients = torch.autograd.grad(loss_of(live, head, [[], []]), live)
        scale = []
        for i, g in enumerate(gradients):
            norms = {j: float((g @ bases[j][i] @ bases[j][i].T).norm()) for j in range(t)}
            first = sorted(norms, key=lambda j: -norms[j])[:most]
            scale.append([(j, torch.eye(bases[j][i].shape[1])) for j in first if norms[j] > trust * float(g.norm())])
        for _ in range(epochs):
            live = [w.clone().requires_grad_() for w in (*layers, *head)]
            steps = [[(j, Q.clone().requires_grad_()) for j, Q in some] for some in scale]
            everything = [*live, *(Q for some in steps for _, Q in some)]
            gradients = list(torch.autograd.grad(loss_of(live[:2], live[2:], steps), everything))
            for i in range(2):
                gradients[i] = gradients[i] - gradients[i] @ union[i] @ union[i].T
            new = [p.detach() - lr * g for p, g in zip(everything, gradients, strict=True)]
            layers, head, rest = new[:2], new[2:4], iter(new[4:])
            scale = [[(j, next(rest)) for j, _ in some] for some in steps]
        own = []
        for i, R in enumerate(forward(x, layers, head, scale)[1]):
            U, S, _ = torch.linalg.svd(R - union[i] @ union[i].T @ R, full_matrices=False)
            every = torch.cat([union[i], U], 1)
            score = torch.cat([(union[i].T @ R).square().sum(1), S**2])
            taken, have = [], 0.0
            for c in score.argsort(descending=True).tolist():
                if have < threshold * float(R.square().sum()):
                    taken, have = [*taken, c], have + float(score[c])
            own.append(every[:, taken])
            union[i] = torch.cat([union[i], every[:, [c for c in taken if c >= union[i].shape[1]]]], 1)
        bases.append(own)
        scales.append(scale)
    return layers, [forward(task.train.x, layers, head, s)[0] for task, s in zip(stream, scales, strict=True)], scales


class TwoLayers(nn.Module):
    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(10, 12, bias=False), nn.Linear(12, 8, bias=False)

    def forward(self, x):
        return self.two(self.one(x).relu()).relu()


@pytest.mark.parametrize("trust", [0.0, 0.7, 2.0])
def test_trgp_is_the_loop_written_by_hand(trust):
    torch.manual_seed(0)
    stream = random_stream((10,), num_rows=6, scenario="task", num_tasks=4)
    learner = build(stream, TwoLayers(), TRGP(0.9, 0.0, trust, num_samples=6), lr=0.2, batch_size=6)
    start = [p.detach().clone() for p in learner.trunk().parameters()]
    learn(learner, stream, epochs=8)
    layers, logits, scales = trgp_by_hand(stream, start, 0.2, 8, trust, 0.9)
    sizes = [len(some) for task in scales for some in task]
    assert set(sizes) == {0.0: {0, 1, 2}, 0.7: {0, 1, 2}, 2.0: {0}}[trust]
    assert trust != 0.7 or 0 in sizes[2:] or 1 in sizes[4:], "not all that could be is trusted"
    for ours, theirs in zip((learner.backbone.one.weight, learner.backbone.two.weight), layers, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-4, rtol=1e-3)
    for task, theirs in zip(stream, logits, strict=True):
        ours = learner.predict(Batch(*task.train.tensors())).detach()
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_rows_of_several_tasks_are_each_answered_under_their_own_weights():
    stream = random_stream((10,), num_rows=6, scenario="task", num_tasks=3)
    torch.manual_seed(0)
    learner = learn(build(stream, TwoLayers(), TRGP(0.9, trust=0.0, num_samples=6), lr=0.2), stream, epochs=5)
    own = [learner.predict(Batch(*task.train.tensors())).detach() for task in stream]
    mixed = TaskData.concat([task.train for task in stream])
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    x, y, label = (column[order] for column in mixed.tensors())
    together = learner.predict(Batch(x, y, label)).detach()
    torch.testing.assert_close(together, torch.cat(own)[order], atol=1e-6, rtol=1e-5)
    plain = learner.head(learner.backbone(mixed.tensors()[0])).detach()
    changed = (plain - torch.cat(own)).abs().amax(1).view(3, 6)
    assert changed[0].max() == 0 and changed[1:].min() > 1e-3


@quick
@given(seeds)
def test_a_linear_layers_inputs_may_be_scaled_in_place_of_its_weight(seed):
    draw = torch.Generator().manual_seed(seed)
    subspaces, found = Subspaces(6, 3), []
    for task in range(2):
        subspaces.end(task, torch.randn(6, 3, generator=draw), 0.9)
    subspaces.begin(torch.tensor([True, True, False]))
    subspaces.shift.data[:] = torch.randn(6, 6, generator=draw)
    W, x = torch.randn(4, 6, generator=draw, requires_grad=True), torch.randn(5, 6, generator=draw)
    for y in (F.linear(subspaces.inputs(x, 2, True), W), F.linear(x, subspaces.weight(W, 2, True))):
        found.append((y, *torch.autograd.grad(y.square().sum(), (W, subspaces.shift))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    used = subspaces.member[:2].any(0)
    assert found[0][2][used][:, used].any() and not found[0][2][~used].any() and not found[0][2][:, ~used].any()


def test_convolutions_are_scaled_too():
    stream = random_stream((16, 5, 5), num_rows=3, scenario="task", num_tasks=3)
    torch.manual_seed(0)
    learner = build(stream, ConvNet(), TRGP(1.0, 0.0, trust=0.0, num_samples=3), lr=0.1, batch_size=3)
    first = learn(learner, stream, [0], 5).predict(Batch(*stream[0].train.tensors())).detach()[:, :2]
    now = learn(learner, stream, [1, 2], 5).predict(Batch(*stream[0].train.tensors())).detach()[:, :2]
    torch.testing.assert_close(now, first, atol=1e-5, rtol=1e-4)
    x, _, label = stream[2].train.tensors()
    assert all(part.scaling[2].any() for part in learner.strategies["method"].subspaces)
    assert (learner.features(x, label) - learner.backbone(x)).abs().max() > 1e-3


@pytest.mark.parametrize("make", [TRGP, CUBER])
def test_one_head_for_all_tasks_is_a_layer_like_the_others(make):
    stream = random_stream((10,), num_rows=3, scenario="task", num_tasks=3, shared=True)
    torch.manual_seed(0)
    never = {"trust": 0.0} if make is TRGP else {"sufficient": 0.0, "positive": 2.0}  # regime 2 alone
    learner = build(stream, TwoLayers(), make(1.0, num_samples=3, **never), lr=0.2, batch_size=3)
    assert learner.head.weight.shape == (2, 8) and len(protected_layers(learner)) == 3
    first = learn(learner, stream, [0], 5).predict(Batch(*stream[0].train.tensors())).detach()
    kept = {name: p.detach().clone() for name, p in learner.head.named_parameters()}
    learn(learner, stream, [1, 2], 20)
    own = [learner.predict(Batch(*task.train.tensors())).detach() for task in stream]
    torch.testing.assert_close(own[0], first, atol=1e-5, rtol=1e-4)
    assert torch.equal(learner.head.bias, kept["bias"]) and not torch.equal(learner.head.weight, kept["weight"])
    head = learner.strategies["method"].subspaces[2]
    assert not head.scaling[0].any() and head.scaling[1].any() and head.scaling[2].any()
    mixed = TaskData.concat([task.train for task in stream])
    torch.testing.assert_close(learner.predict(Batch(*mixed.tensors())).detach(), torch.cat(own), atol=1e-6, rtol=1e-5)
    features = learner.features(stream[2].train.tensors()[0], torch.full((3,), 2))
    assert (learner.head(features) - own[2]).abs().max() > 1e-3, "the head is scaled as well"
    assert max(F.cross_entropy(logits, task.train.labels) for logits, task in zip(own, stream, strict=True)) < 0.69


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_trgp_refuses_other_scenarios(scenario):
    message = f"TRGP works with scenario=task, but this run has scenario={scenario}, .* use scenario=task"
    with pytest.raises(InputError, match=message):
        toy_learner({"method": TRGP()}, scenario=scenario)


@pytest.mark.parametrize(
    ("arguments", "optimizer", "message"),
    [
        ({}, partial(torch.optim.SGD, lr=0.1, weight_decay=0.1), "TRGP needs plain SGD.*weight_decay=0.1"),
        ({"threshold": [0.9] * 3}, None, r"trgp\.threshold has 3 values for 2 layers"),
        ({"max_tasks": 0}, None, r"trgp\.max_tasks=0 must be 1 or more"),
        ({"trust": -1.0}, None, r"trgp\.trust=-1\.0 must be 0 or more"),
    ],
)
def test_trgp_refuses(arguments, optimizer, message):
    with pytest.raises(InputError, match=message):
        build(toy_stream(scenario="task"), ToyBackbone(), TRGP(**arguments), optimizer=optimizer)


# ------------------------------------------------------------------ CUBER


@pytest.mark.parametrize(
    ("sufficient", "positive", "regime"), [(0.5, 0.0, 3), (0.5, 0.2, 2), (0.9, 0.0, 1), (0.8, 0.14142, 3)]
)
def test_worked_example_12(sufficient, positive, regime):
    subspaces, g = Subspaces(2, 2), torch.tensor([[0.8, 0.6]])
    subspaces.basis[0, 0], subspaces.member[0, 0] = 1, True
    old = torch.tensor([[[1.0, -1.0]], [[0.0, 0.0]]]) / 2**0.5
    cosine = cuber.correlation(old, g)
    torch.testing.assert_close(cosine, torch.tensor([0.141421, 0.0]), atol=1e-6, rtol=0)
    energies, total = subspaces.energies(g), g.square().sum()
    assert cuber.regimes(energies, total, cosine, sufficient - 1e-6, positive, 2).tolist() == [regime, 1]


def test_only_the_tasks_of_most_energy_leave_regime_1():
    energies, cosine = torch.tensor([0.3, 0.5, 0.4, 0.0]), torch.tensor([0.9, -0.1, 0.2, 0.0])
    assert cuber.regimes(energies, torch.tensor(1.0), cosine, 0.5, 0.0, 2).tolist() == [1, 2, 3, 1]
    assert cuber.regimes(energies, torch.tensor(1.0), cosine, 0.5, 0.0, 1).tolist() == [1, 2, 1, 1]
    assert cuber.regimes(energies, torch.tensor(1.0), cosine, 0.5, 0.0, 9).tolist() == [3, 2, 3, 1]


def test_cuber_without_regime_3_is_trgp():
    stream, weights = random_stream((10,), num_rows=6, scenario="task", num_tasks=4), []
    for make in (TRGP(0.9, 0.0, 0.5, num_samples=6), CUBER(0.9, 0.0, 0.5, positive=2.0, num_samples=6)):
        torch.manual_seed(0)
        learner = learn(build(stream, TwoLayers(), make, lr=0.2, batch_size=6), stream, epochs=5)
        x = torch.cat([learner.predict(Batch(*task.train.tensors())).detach() for task in stream])
        weights.append(torch.cat([x.flatten(), *(p.detach().flatten() for p in learner.trunk().parameters())]))
    torch.testing.assert_close(weights[1], weights[0], atol=1e-4, rtol=1e-3)


def in_the_middle(**arguments) -> tuple[Learner, Stream]:
    """A learner at the beginning of its third task, with both old ones in regime 3."""
    stream = random_stream((10,), num_rows=4, scenario="task", num_tasks=3)
    torch.manual_seed(0)
    strategy = CUBER(0.8, 0.0, sufficient=0.0, positive=-1.0, num_samples=4, **arguments)
    learner = learn(build(stream, TwoLayers(), strategy, lr=0.1), stream, [0, 1], 3)
    learner.before_task(stream[2])
    strategy.positive = 0.0
    return learner, stream


@pytest.mark.parametrize(("smoothing", "steps"), [(0.0, 1), (0.9, 7)])
def test_a_task_falls_back_to_regime_2_when_the_mean_gradient_turns_against_it(smoothing, steps):
    """From a mean of G and steps of -G the mean is 2 * .9^n - 1, which is below 0 from the seventh on."""
    learner, _ = in_the_middle(smoothing=smoothing, penalty=0.0)
    strategy, W = learner.strategies["method"], learner.backbone.one.weight
    G = strategy.gradients_0
    G[1] = -G[0]
    strategy.mean_0.copy_(G[0])
    strategy.regime_0.copy_(torch.tensor([3, 1, 1]))
    for step in range(1, 10):
        W.grad = -G[0].clone()
        strategy.project_gradients(learner)
        assert strategy.regime_0.tolist() == [3 if step < steps else 2, 1, 1]


def test_steps_are_free_in_the_columns_of_regime_3_alone():
    learner, _ = in_the_middle(penalty=0.0)
    strategy, W = learner.strategies["method"], learner.backbone.one.weight
    own = strategy.subspaces[0]
    strategy.positive = -1.0
    for regime in ([3, 3, 1], [2, 3, 1], [1, 2, 1]):
        strategy.regime_0.copy_(torch.tensor(regime))
        g = torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
        W.grad = g.clone()
        strategy.project_gradients(learner)
        closed = [own.basis[:, own.member[j]] for j in range(2) if regime[j] < 3]
        expected = g
        if closed:
            U, S, _ = torch.linalg.svd(torch.cat(closed, 1).double(), full_matrices=False)
            U = U[:, S > 1e-6]
            expected = (g.double() - g.double() @ U @ U.T).float()
        torch.testing.assert_close(W.grad, expected, atol=1e-5, rtol=0)


def test_the_penaltys_gradient_is_that_of_the_formula():
    learner, _ = in_the_middle(penalty=0.7)
    strategy, W = learner.strategies["method"], learner.backbone.one.weight
    own, anchor = strategy.subspaces[0], strategy.anchor_0
    strategy.positive = -1.0
    with torch.no_grad():
        W += 0.1 * torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
    free = W.detach().clone().requires_grad_()
    bases = [own.basis[:, own.member[j]] for j in range(2)]
    penalty = 0.7 * sum(((free - anchor) @ B @ B.T).norm() for B in bases)
    (expected,) = torch.autograd.grad(penalty, free)
    W.grad = torch.zeros_like(W)
    strategy.project_gradients(learner)
    torch.testing.assert_close(W.grad, expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        W.copy_(anchor)
    W.grad = torch.zeros_like(W)
    strategy.project_gradients(learner)
    assert not W.grad.any(), "where it has no gradient it pulls nowhere"


def test_an_old_task_gains_from_a_new_one_that_pulls_its_way():
    """The same examples come again with other labels and the same head: TRGP leaves the old loss, CUBER lowers it."""
    gains = []
    for make in (TRGP(0.99, num_samples=4), CUBER(0.99, num_samples=4, penalty=0.0)):
        draw = torch.Generator().manual_seed(3)
        x, y = torch.randn(4, 10, generator=draw), torch.arange(4) % 2
        tasks = [Task(t, TaskData(x, y + 2 * t, t), TaskData(x.clone(), y + 2 * t, t)) for t in range(2)]
        stream = Stream(tasks, scenario="task", num_classes=4)
        torch.manual_seed(0)
        learner = learn(build(stream, TwoLayers(), make, lr=0.1), stream, [0], 5)
        with torch.no_grad():
            learner.head.weight[2:], learner.head.bias[2:] = learner.head.weight[:2], learner.head.bias[:2]
        batch = Batch(*stream[0].train.tensors())
        before = learner.criterion(learner.predict(batch), batch).item()
        learn(learner, stream, [1], 5)
        gains.append(before - learner.criterion(learner.predict(batch), batch).item())
    assert abs(gains[0]) < 1e-3 < 0.01 < gains[1]


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_cuber_refuses_other_scenarios(scenario):
    with pytest.raises(InputError, match=f"CUBER works with scenario=task, but this run has scenario={scenario}"):
        toy_learner({"method": CUBER()}, scenario=scenario)


@pytest.mark.parametrize(
    ("arguments", "optimizer", "message"),
    [
        ({}, partial(torch.optim.SGD, lr=0.1, momentum=0.1), "CUBER needs plain SGD.*momentum=0.1"),
        ({"threshold": [0.9] * 3}, None, r"cuber\.threshold has 3 values for 2 layers"),
        ({"smoothing": 1.5}, None, r"cuber\.smoothing=1\.5 must be between 0 and 1"),
        ({"positive": -2.0}, None, r"cuber\.positive=-2\.0 must be -1 or more"),
    ],
)
def test_cuber_refuses(arguments, optimizer, message):
    with pytest.raises(InputError, match=message):
        build(toy_stream(scenario="task"), ToyBackbone(), CUBER(**arguments), optimizer=optimizer)


# ------------------------------------------------------------------ Adam-NSCL


def test_worked_example_13():
    covariance = torch.diag(torch.tensor([100.0, 1.0, 0.5]))
    axes = torch.tensor([0.0, 1.0, 1.0]).double()
    torch.testing.assert_close(adam_nscl.null_projector(covariance, 10), torch.diag(axes))
    torch.testing.assert_close(adam_nscl.null_projector(covariance, 10, True), torch.diag(axes * 0.5**0.5))


@quick
@given(seeds, st.integers(2, 10), st.integers(1, 12), st.sampled_from([1.0, 10.0, 1e3]))
def test_the_null_space_is_orthogonal_to_all_larger_directions(seed, size, count, ratio):
    X = matrix(seed, size, count)
    P = adam_nscl.null_projector(X @ X.T, ratio)
    torch.testing.assert_close(P @ P, P, atol=1e-9, rtol=0)
    values = torch.linalg.svdvals(X @ X.T)
    free = int((values <= ratio * values[-1].clamp_min(1e-10 * values[0])).sum())
    assert round(float(P.trace())) == free >= max(1, size - count)
    if count < size and free == size - count:
        assert (P @ X).abs().max() < 1e-4 * X.abs().max()


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "decay": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_no_moment_and_no_decay_leaves_the_null_space(optimizer):
    torch.manual_seed(0)
    stream = random_stream((16, 5, 5))
    leaked, change, drift = leak(build(stream, ConvNet(), AdamNSCL(), optimizer=optimizer), stream)
    assert change > 1e-3 and leaked < 1e-5 and drift < 1e-4


@pytest.mark.parametrize("released", [False, True])
def test_adam_nscl_is_the_loop_written_by_hand(released):
    stream = random_stream((10,), num_rows=6, scenario="domain", num_tasks=3)
    learner = build(stream, Identity(10), AdamNSCL(1e4, released_rule=released), optimizer=OPTIMIZERS["adam"])
    learner.batch_size = 6
    W, b = learner.head.weight.detach().clone().requires_grad_(), learner.head.bias.detach().clone().requires_grad_()
    learn(learner, stream, epochs=7)
    covariance = torch.zeros(10, 10).double()
    for task in stream:
        x, y, _ = task.train.tensors()
        optimizer = torch.optim.Adam([W, b], lr=1e-2)
        for _ in range(7):
            old = W.detach().clone(), b.detach().clone()
            optimizer.zero_grad()
            F.cross_entropy(x @ W.T + b, y).backward()
            optimizer.step()
            if task.index:
                U, S, _ = torch.linalg.svd(covariance)
                U = U[:, 1e4 * max(S[-1], 1e-10 * S[0]) >= S]
                P = (U @ U.T / ((U @ U.T).norm() if released else 1)).float()
                with torch.no_grad():
                    W.copy_(old[0] + (W - old[0]) @ P)
                    b.copy_(old[1])
        covariance += x.double().T @ x.double()
    torch.testing.assert_close(learner.strategies["method"].covariance_0, covariance)
    torch.testing.assert_close(learner.head.weight.detach(), W.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(learner.head.bias.detach(), b.detach(), atol=1e-5, rtol=0)


def test_adam_nscl_refuses():
    class Normed(nn.Sequential):
        num_features = 16

    with pytest.raises(InputError, match=r"Adam-NSCL cannot protect the running statistics of backbone\.2"):
        build(toy_stream(), Normed(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16)), AdamNSCL())
    with pytest.raises(InputError, match=r"adam_nscl\.ratio=0\.5 must be 1 or more"):
        AdamNSCL(ratio=0.5)


# ------------------------------------------------------------------ TAG


@pytest.mark.parametrize(
    ("g", "agreement", "alpha", "step"),
    [([0.2, -0.1], 0.316228, 0.205741, [-0.0022, 0.0011]), ([0.2, 0.1], 0.948683, 0.008709, [-0.0107, -0.0054])],
)
def test_worked_example_of_tag(g, agreement, alpha, step):
    """One tensor in its second task, of which nothing is known but the first's V = .04 and its direction (1, 1)."""
    g, direction = torch.tensor(g), tag.unit(torch.tensor([[1.0, 1.0]]))
    m, V = 0.1 * g, 0.01 * g.square()
    assert float(direction[0] @ tag.unit(m)) == pytest.approx(agreement, abs=1e-6)
    D = tag.denominator(torch.stack([torch.full((2,), 0.04), V]), m, direction, 5.0)
    torch.testing.assert_close(D.square(), alpha * 0.04 + 0.006738 * V, atol=1e-7, rtol=1e-3)
    torch.testing.assert_close(-0.001 * g / (D + 1e-8), torch.tensor(step), atol=6e-5, rtol=0)


def test_a_direction_of_zero_agrees_with_none():
    squares, zero = torch.ones(2, 3), torch.zeros(3)
    expected = torch.full((3,), 1 + float(torch.exp(torch.tensor(-5.0)))).sqrt()
    torch.testing.assert_close(tag.denominator(squares, zero, torch.eye(3)[:1], 5.0), expected)
    torch.testing.assert_close(tag.denominator(squares, torch.ones(3), zero[None], 5.0), expected)


def tag_by_hand(stream: Stream, weights, form: str, b: float, lr: float, epochs: int):
    """The reference's procedure, tensor by tensor, on full batches of a linear model."""
    beta2 = {"rmsprop": 0.99, "adam": 0.999, "adagrad": None}[form]
    weights, kept = [w.clone() for w in weights], []
    for task in stream:
        m, v = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
        x, y, _ = task.train.tensors()
        for n in range(1, epochs + 1):
            live = [w.clone().requires_grad_() for w in weights]
            gradients = torch.autograd.grad(F.cross_entropy(x @ live[0].T + live[1], y), live)
            for k, g in enumerate(gradients):
                m[k] = 0.9 * m[k] + 0.1 * g
                v[k] = v[k] + g**2 if beta2 is None else beta2 * v[k] + (1 - beta2) * g**2
                total = v[k].clone()
                if kept:
                    total = total * torch.exp(torch.tensor(-b))
                    for old_v, old_m in kept:
                        total += torch.exp(-b * (m[k] / m[k].norm() * old_m[k]).sum()) * old_v[k]
                top, bias = (m[k] / (1 - 0.9**n), 1 - 0.999**n) if form == "adam" else (g, 1.0)
                weights[k] = weights[k] - lr * top / (total.sqrt() / bias**0.5 + 1e-8)
        kept.append((v, [one / one.norm() for one in m]))
    return weights


@pytest.mark.parametrize("b", [0.0, 5.0])
@pytest.mark.parametrize("form", tag.FORMS)
def test_tag_is_the_loop_written_by_hand(form, b):
    stream = random_stream((10,), num_rows=6, scenario="domain", num_tasks=3)
    learner = build(stream, Identity(10), TAG(form, b), lr=0.01, batch_size=6)
    expected = tag_by_hand(stream, [p.detach() for p in learner.head.parameters()], form, b, 0.01, 6)
    learn(learner, stream, epochs=6)
    for ours, theirs in zip(learner.head.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", tag.FORMS)
def test_tag_of_one_task_is_its_base_optimizer(form):
    stream = random_stream((30,), num_rows=8, num_tasks=1)
    base = {
        "rmsprop": partial(torch.optim.RMSprop, lr=0.001),
        "adam": partial(torch.optim.Adam, lr=0.001),
        "adagrad": partial(torch.optim.Adagrad, lr=0.001, eps=1e-8),
    }[form]
    weights = []
    for strategy in (TAG(form), Strategy()):
        torch.manual_seed(0)
        learner = learn(build(stream, WideNet(), strategy, optimizer=base), stream, epochs=3)
        weights.append(torch.cat([p.detach().flatten() for p in learner.trunk().parameters()]))
    torch.testing.assert_close(*weights, atol=2e-5, rtol=1e-4)


def test_tag_follows_the_schedule_and_counts_the_steps_of_a_task():
    learner, stream = toy_learner(
        {"method": TAG("adam")}, scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    )
    experiment = Experiment(learner, stream, trainer, epochs=3)
    for task in list(stream)[:2]:
        experiment.learn(task)
        (group,) = learner.trainer.optimizers[0].param_groups
        assert group["lr"] == pytest.approx(0.1 / 8) and group["num_steps"] == 18
    lengths = learner.strategies["method"].directions.norm(dim=1).square()
    assert lengths[:2].round().tolist() == [4, 4] and lengths[2] == 0, "a unit vector for each of four tensors"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: TAG("sgd"), {}, "no form of TAG called 'sgd'"),
        (lambda: TAG(b=-1.0), {}, r"tag\.b=-1\.0 must be 0 or more"),
        (
            TAG,
            {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
            r"momentum=0\.9: set optimizer\.momentum=0",
        ),
        (TAG, {"optimizer": partial(torch.optim.AdamW, lr=0.1)}, r"weight_decay=0\.01: set"),
    ],
)
def test_tag_refuses(make, options, message):
    with pytest.raises(InputError, match=message):
        build(toy_stream(), ToyBackbone(), make(), **options)


def test_tag_refuses_weights_of_others_and_projections_refuse_tag():
    learner, stream = toy_learner({"tag": TAG(), "l2p": L2P(4, 2, 2)}, backbone="vit")
    with pytest.raises(InputError, match="TAG steps backbone and head, but another strategy trains weights"):
        learn(learner, stream, [0])
    with pytest.raises(InputError, match="GPM projects gradients, but another strategy owns configure_optimizer"):
        toy_learner({"gpm": GPM(), "tag": TAG()})


@pytest.mark.parametrize("strategy", [TRGP, CUBER, OGD])
def test_nothing_to_protect_is_one_sentence(strategy: type[Strategy]) -> None:
    backbone = ToyBackbone().requires_grad_(False)
    with pytest.raises(InputError, match="protects trained weights of the backbone, which has none"):
        build(toy_stream(3, "task"), backbone, strategy())


@pytest.mark.parametrize("strategy", [TRGP, CUBER])
def test_what_is_selected_by_another_loss_than_is_trained_is_refused(strategy: type[Strategy]) -> None:
    with pytest.raises(InputError, match="train_mask=class"):
        build(toy_stream(3, "task"), ToyBackbone(), strategy(), train_mask="class")
