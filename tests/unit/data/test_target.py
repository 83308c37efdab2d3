"""Targets beyond one label: losses, scores and Fishers against independent sums, and strategies in closed form."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cl.backbones.networks import MLP
from cl.data.target import TARGETS, classes_of
from cl.data.task import Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.head import Head
from cl.engine.learner import Learner
from cl.engine.score import matrices
from cl.engine.strategy import Strategy
from cl.errors import DivergenceError, InputError
from cl.strategies.agem import AGEM
from cl.strategies.cumulative import Cumulative
from cl.strategies.derpp import DERpp
from cl.strategies.er import ER
from cl.strategies.ewc import EWC
from cl.strategies.finetune import Finetune
from cl.strategies.gpm import GPM
from cl.strategies.joint import Joint
from cl.strategies.l2p import L2P
from cl.strategies.lwf import LwF, imitation
from cl.strategies.ncm import NCM
from cl.streams.linear_teachers import expected_transfer, geometry, linear_teachers
from cl.toolkit.fisher import diagonal_fisher
from cl.toolkit.memory import Memory

LABEL, MULTILABEL, REGRESSION = (TARGETS[name] for name in ("label", "multilabel", "regression"))
TRAINER = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)
SHAPE = {"num_tasks": 2, "rank": 4, "dimension": 16, "overlap": 0.8, "similarity": -0.5, "num_outputs": 3, "seed": 0}


def binary(stream: Stream) -> Stream:
    """The regressions as questions with yes or no: which outputs are positive?"""
    return stream.derive(
        lambda t: stream[t].each(lambda part: replace(part, y=(part.y > 0).float())), target="multilabel"
    )


def toy(target: str, **changes) -> Stream:
    stream = linear_teachers(**{**SHAPE, "num_rows": 48, **changes})
    return stream if target == "regression" else binary(stream)


def learner(stream: Stream, *strategies: Strategy, lr: float = 0.5, hidden: bool = False, **options) -> Learner:
    """A linear model, or one of two layers, without biases; the same weights every time."""
    torch.manual_seed(0)
    body = MLP(stream.input_shape, hidden=[20] if hidden else [], bias=False)
    head = Head(body.num_features, stream.num_classes, bias=False)
    methods = {type(s).__name__.lower(): s for s in strategies}
    optimizer = partial(torch.optim.SGD, lr=lr)
    return Learner(stream, body, methods, optimizer, head=head, **{"batch_size": 48, **options})


def run(stream: Stream, *strategies: Strategy, epochs: int = 1, **options) -> torch.Tensor:
    learned = learner(stream, *strategies, **options)
    return Experiment(learned, stream, TRAINER, epochs=epochs).run().matrices["domain"].R.double()


def class_stream(num_classes: int = 6, num_tasks: int = 3, num_rows: int = 40) -> Stream:
    """Class-incremental multi-label: each task annotates columns of its own."""
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, num_classes, generator=draw)
    own = torch.arange(num_classes) * num_tasks // num_classes

    def part(t: int, size: int) -> TaskData:
        x = torch.randn(size, 8, generator=draw)
        return TaskData(x, ((x @ teacher > 0) & (own == t)).float(), t)

    tasks = [Task(t, part(t, num_rows), part(t, 30)) for t in range(num_tasks)]
    return Stream(tasks, num_classes=num_classes, target="multilabel")


# ------------------------------------------------------------------ losses


def test_four_of_ten_outputs_at_zero_cost_ln_2_each():
    logits = torch.full((2, 10), -torch.inf)
    logits[:, [0, 3, 4, 9]] = 0.0
    for y in (torch.zeros(2, 10), torch.ones(2, 10)):
        assert MULTILABEL.loss(logits, y).item() == pytest.approx(math.log(2), abs=1e-7)
    assert REGRESSION.loss(torch.zeros(2, 4), torch.full((2, 4), 3.0)).item() == 9.0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_multilabel_loss_is_the_mean_over_what_competes(rows, width, seed):
    """Against a sum by hand over a mask that may differ from row to row; masked columns get exactly no gradient."""
    draw = np.random.default_rng(seed)
    z, y = draw.normal(0, 5, (rows, width)), draw.integers(0, 2, (rows, width))
    competes = draw.random((rows, width)) < 0.6
    competes[0, 0] = True
    terms = [math.log1p(math.exp(-z[p] if y[p] else z[p])) for p in zip(*np.nonzero(competes), strict=True)]
    logits = torch.from_numpy(z).requires_grad_()
    bias = torch.zeros(rows, width).masked_fill(~torch.from_numpy(competes), -torch.inf)
    loss = MULTILABEL.loss(logits + bias, torch.from_numpy(y).double())
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)
    loss.backward()
    expected = (1 / (1 + np.exp(-z)) - y) * competes / len(terms)
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-12)
    assert (logits.grad[torch.from_numpy(~competes)] == 0).all()


@pytest.mark.parametrize("train_mask", ["class", "task", "domain", None])
def test_a_learner_trains_the_columns_that_compete_and_no_other(train_mask):
    stream = class_stream()
    learned = learner(stream, lr=0.3, batch_size=8, train_mask=train_mask)
    before = learned.head.weight.detach().clone()
    experiment = Experiment(learned, stream, TRAINER, epochs=1)
    trained = {"class": [2, 4, 6], "task": [2, 2, 2], "domain": [6, 6, 6], None: [2, 4, 6]}[train_mask]
    for t, width in enumerate(trained):
        experiment.learn(stream[t])
        moved = (learned.head.weight != before).any(1).nonzero().flatten().tolist()
        assert moved == list(range(2 * t + 2))[-width:] if width < 6 else moved == list(range(6))
        before = learned.head.weight.detach().clone()


def test_the_loss_of_a_replayed_row_is_over_the_classes_of_its_own_task():
    stream = class_stream()
    learned = learner(stream, train_mask="task")
    x, y = torch.randn(4, 8), torch.ones(4, 6)
    task = torch.tensor([0, 0, 1, 2])
    z = learned(x)
    own = torch.tensor([[0, 1], [0, 1], [2, 3], [4, 5]])
    expected = F.binary_cross_entropy_with_logits(z.gather(1, own), torch.ones(4, 2))
    torch.testing.assert_close(learned.criterion(z, Batch(x, y, task)), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_a_loss_that_is_not_finite_stops_the_run(target):
    if target == "label":
        x = torch.randn(8, 3)
        stream = Stream([Task(0, TaskData(x, torch.arange(8) % 2), TaskData(x, torch.arange(8) % 2))], num_classes=2)
    else:
        stream = toy(target)
    learned = learner(stream)
    with torch.no_grad():
        learned.head.weight[0, 0] = torch.nan
    with pytest.raises(DivergenceError, match="The loss is nan in task 1"):
        Experiment(learned, stream, TRAINER).learn(stream[0])


# ------------------------------------------------------------------ scores

TABLES = {"rows": st.integers(2, 12), "width": st.integers(1, 5), "seed": st.integers(0, 10**6)}


def table(rows: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits with ties, truths with a positive in each class, and some of the classes in any order."""
    draw = np.random.default_rng(seed)
    z = draw.integers(-4, 5, (rows, width)) * draw.choice([0.5, 3.0, 20.0])
    y = draw.integers(0, 2, (rows, width))
    y[draw.integers(rows), :] = 1
    classes = draw.permutation(width)[: draw.integers(1, width + 1)]
    return torch.from_numpy(z).float(), torch.from_numpy(y).float(), torch.from_numpy(classes)


@settings(max_examples=40, deadline=None)
@given(**TABLES)
def test_mAP_is_scikit_learns(rows, width, seed):
    from sklearn.metrics import average_precision_score

    z, y, classes = table(rows, width, seed)
    expected = np.mean([average_precision_score(y[:, c], z[:, c]) for c in classes.tolist()])
    assert MULTILABEL.scores(z, y, classes)["mAP"].item() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(**TABLES)
def test_CF1_and_OF1_are_harmonic_means_of_scikit_learns(rows, width, seed):
    """CF1 joins mean precision and mean recall: it is not the mean of the classes' F1."""
    from sklearn.metrics import precision_score, recall_score

    z, y, classes = table(rows, width, seed)
    truth, said = y[:, classes].numpy().astype(int), (z[:, classes] > 0).numpy().astype(int)
    scores = MULTILABEL.scores(z, y, classes)
    columns = list(zip(truth.T, said.T, strict=True))
    for key, pairs in (("CF1", columns), ("OF1", [(truth.ravel(), said.ravel())])):
        p, r = (np.mean([f(*pair, zero_division=0) for pair in pairs]) for f in (precision_score, recall_score))
        assert scores[key].item() == pytest.approx(2 * p * r / (p + r) if p + r else 0.0, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 30), st.integers(1, 4), st.floats(0.01, 100), st.integers(0, 10**6))
def test_R2_is_scikit_learns(rows, width, scale, seed):
    from sklearn.metrics import r2_score

    draw = np.random.default_rng(seed)
    y = torch.from_numpy(draw.normal(3, scale, (rows, width))).float()
    z = y + torch.from_numpy(draw.normal(0, scale, (rows, width))).float()
    found = REGRESSION.scores(z, y, torch.arange(width))["R2"].item()
    assert found == pytest.approx(r2_score(y.double(), z.double()), rel=1e-9, abs=1e-9)
    mean = y.double().mean(0).expand_as(y)
    assert REGRESSION.scores(mean, y, torch.arange(width))["R2"].item() == pytest.approx(0, abs=1e-9)


def test_a_class_without_positives_counts_in_no_mean():
    y = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    scores = MULTILABEL.scores(4 * y - 2, y, torch.arange(3))
    assert {name: value.item() for name, value in scores.items()} == {"mAP": 1.0, "CF1": 1.0, "OF1": 1.0}
    assert MULTILABEL.scores(y[:, 1:2] - 1, y[:, 1:2], torch.tensor([0]))["mAP"].isnan()


def test_confident_outputs_are_still_ranked():
    """In double precision the sigmoid is 1 from 37 on; ranks are those of the logits."""
    y = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    z = torch.tensor([[60.0, -60.0], [50.0, -50.0]])
    assert MULTILABEL.scores(z, y, torch.tensor([0, 1]))["mAP"].item() == pytest.approx((1 + 0.5) / 2)


def test_R_is_each_tasks_score_of_the_final_predictions():
    """The last row of every matrix, computed again by scikit-learn from what the trained network says."""
    from sklearn.metrics import average_precision_score, r2_score

    stream = class_stream()
    learned = learner(stream, lr=0.1)
    scored = Experiment(learned, stream, TRAINER, epochs=3).run().matrices
    assert len(scored) == 3 and [m.metric for m in scored.values()] == ["mAP", "CF1", "OF1"]
    with torch.no_grad():
        for task in stream:
            z, y = learned(task.test.tensors()[0]), task.test.labels
            expected = average_precision_score(y[:, list(task.classes)], z[:, list(task.classes)])
            assert scored["class"].R[-1, task.index].item() == pytest.approx(expected, abs=1e-6)
    stream = toy("regression")
    learned = learner(stream, lr=0.1, batch_size=5, eval_batch_size=7)
    R = Experiment(learned, stream, TRAINER, epochs=2).run().matrices["domain"].R
    with torch.no_grad():
        for task in stream:
            x, y, _ = task.test.tensors()
            assert R[-1, task.index].item() == pytest.approx(r2_score(y, learned(x)), abs=1e-5)


def test_matrices_are_one_a_metric():
    metrics = {target: [m.metric for m in matrices(toy(target)).values()] for target in ("multilabel", "regression")}
    assert metrics == {"multilabel": ["mAP", "CF1", "OF1"], "regression": ["R2"]}


# ------------------------------------------------------------------ what may stand in y


@pytest.mark.parametrize(
    ("target", "y", "sentence"),
    [
        ("multilabel", torch.tensor([[0.0, 1.0], [0.5, 0.0]]), r"has the target \[0.5, 0.0\] in row 1: give 0 or 1"),
        ("multilabel", torch.tensor([[0.0, torch.nan], [0.0, 0.0]]), "in row 0: give 0 or 1"),
        ("regression", torch.tensor([[0.0, 1.0], [torch.inf, 0.0]]), "in row 1: give finite numbers"),
        ("regression", torch.zeros(2, 3), r"shape \(2, 3\): target=regression needs float32 \(N, 2\)"),
        ("multilabel", torch.zeros(2, 2).long(), r"torch.int64 .* target=multilabel needs float32 \(N, 2\)"),
        ("multilabel", torch.zeros(2), r"shape \(2,\)"),
        ("label", torch.zeros(2, 2), "target=multilabel or target=regression"),
        ("label", torch.zeros(2), "target=multilabel or target=regression"),
    ],
)
def test_targets_of_another_kind_are_refused(target, y, sentence):
    x = torch.randn(2, 3)
    stream = Stream([Task(0, TaskData(x, y), TaskData(x, y))], scenario="domain", num_classes=2, target=target)
    with pytest.raises(InputError, match=sentence) as error:
        stream.check()
    assert "\n" not in str(error.value)


def test_numbers_belong_to_no_class():
    with pytest.raises(InputError, match="numbers as targets, which have no classes: set scenario=domain"):
        toy("regression").derive(lambda t: toy("regression")[t], scenario="class").check()
    with pytest.raises(InputError, match="no target called 'multi_label': did you mean 'multilabel'"):
        Stream([Task(0, TaskData(torch.zeros(1, 1), torch.zeros(1)), None)], num_classes=1, target="multi_label")
    assert classes_of(torch.tensor([[0.0, -2.0, 0.0], [0.0, 0.0, 1.0]])) == (1, 2)


# ------------------------------------------------------------------ Fisher


def gradients(module: nn.Module, x: torch.Tensor, scalar) -> torch.Tensor:
    """The gradient of a scalar of the logits of one row, as one vector."""
    found = torch.autograd.grad(scalar(module(x[None])[0]), list(module.parameters()))
    return torch.cat([g.flatten() for g in found])


def small_net(width: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, width))


def test_multilabel_fisher_is_the_sum_over_all_label_vectors():
    """K = 3 of 5 outputs compete: 2^3 label vectors y, each with p(y|x) times its squared score."""
    module, x, classes = small_net(5), torch.randn(6, 4), torch.tensor([4, 0, 2])
    expected = 0
    for row, y in itertools.product(x, itertools.product((0.0, 1.0), repeat=3)):
        truth = torch.tensor(y)

        def log_p(z, truth=truth):
            return -F.binary_cross_entropy_with_logits(z[classes], truth, reduction="sum")

        p = log_p(module(row[None])[0]).exp().item()
        expected = expected + p * gradients(module, row, log_p).square() / len(x)
    found = diagonal_fisher(module, x, classes, target="multilabel")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_regression_fisher_is_the_gauss_newton_diagonal():
    """E over y ~ N(z, I) of squared scores, exact at the 2K points z +- sqrt(K) e_c; and the squared Jacobian's sum."""
    module, x, classes = small_net(3), torch.randn(6, 4), torch.arange(3)
    expected = jacobian = 0
    for row, c in itertools.product(x, range(3)):
        for sign in (1.0, -1.0):
            y = module(row[None])[0].detach() + sign * math.sqrt(3) * torch.eye(3)[c]
            score = gradients(module, row, lambda z, y=y: -((z - y) ** 2).sum() / 2)
            expected = expected + score.square() / 6 / len(x)
        jacobian = jacobian + gradients(module, row, lambda z, c=c: z[c]).square() / len(x)
    torch.testing.assert_close(expected, jacobian, rtol=1e-4, atol=1e-6)
    found = diagonal_fisher(module, x, classes, target="regression")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", ["multilabel", "regression"])
def test_fisher_of_a_linear_model_is_its_losss_second_derivative(target):
    """Of the loss summed over outputs, half the squared error or the cross-entropy; whatever the targets are."""
    module, x, y = nn.Linear(4, 3, bias=False), torch.randn(9, 4), torch.randint(0, 2, (9, 3)).float()

    def loss(weight):
        z = x @ weight.view(3, 4).T
        if target == "regression":
            return F.mse_loss(z, y, reduction="sum") / 2 / len(x)
        return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(x)

    hessian = torch.autograd.functional.hessian(loss, module.weight.detach().flatten())
    found = diagonal_fisher(module, x, torch.arange(3), target=target)
    torch.testing.assert_close(found, hessian.diagonal(), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ strategies in closed form


def teachers() -> tuple[torch.Tensor, torch.Tensor]:
    return geometry(**SHAPE)


def scored(rows: list[torch.Tensor]) -> torch.Tensor:
    """R of a list of weights (K, D)."""
    U, W = teachers()
    return torch.stack([expected_transfer(U, W, weights)[0] for weights in rows])


def start_of(stream: Stream) -> torch.Tensor:
    return learner(stream).head.weight.detach().double()


def test_lwf_goes_part_of_the_way():
    """|P (W - W*)|^2 + alpha |P (W - W_1)|^2 has its minimum 1 / (1 + alpha) of the way from W_1 to W*."""
    stream, (U, W), alpha = toy("regression"), teachers(), 0.5
    R = run(stream, LwF(alpha=alpha), epochs=30, lr=0.25)
    first = start_of(stream)
    first = first + (W[0].T - first) @ U[0] @ U[0].T
    second = first + (W[1].T - first) @ U[1] @ U[1].T / (1 + alpha)
    torch.testing.assert_close(R, scored([start_of(stream), first, second]), atol=1e-5, rtol=0)
    assert R[2, 0] > run(stream)[2, 0] + 0.1


def test_ewc_solves_its_quadratic():
    """2 P (W - W*) + lambda F (W - W_1) = 0, where the Fisher of a linear model is the inputs' second moment."""
    stream, (U, W), weight = toy("regression"), teachers(), 0.5
    R = run(stream, EWC(weight=weight), epochs=200, lr=0.5)
    first = start_of(stream)
    first = first + (W[0].T - first) @ U[0] @ U[0].T
    fisher = SHAPE["num_outputs"] * (U[0] @ U[0].T).diagonal()
    step = torch.linalg.solve(2 * U[1] @ U[1].T + weight * fisher.diag(), 2 * U[1] @ U[1].T @ (W[1] - first.T))
    torch.testing.assert_close(R, scored([start_of(stream), first, first + step.T]), atol=1e-4, rtol=0)
    assert R[2, 0] > run(stream)[2, 0] + 0.1


def test_gpm_learns_beside_what_it_knows_and_forgets_nothing():
    """With the threshold 1 the whole input space of task 1 is protected; what is left of task 2's solves it."""
    R = run(toy("regression"), GPM(threshold=1.0, increment=0.0), epochs=150)
    torch.testing.assert_close(R[1:, 0], torch.ones(2).double(), atol=1e-4, rtol=0)
    assert R[2, 1] > 0.999


def test_er_that_keeps_every_row_arrives_at_a_common_solution():
    """There is one for every overlap below 1, and no noise at it: nothing is forgotten in the end."""
    R = run(toy("regression"), ER(memory_size=96), epochs=150)
    torch.testing.assert_close(R[2], torch.ones(2).double(), atol=1e-3, rtol=0)
    assert run(toy("regression"))[2, 0] < 0


@pytest.mark.parametrize("make", [Joint, Cumulative])
def test_the_union_of_regressions_is_solved(make):
    R = run(toy("regression"), make(), epochs=150)
    torch.testing.assert_close(R[-1], torch.ones(2).double(), atol=1e-3, rtol=0)


# ------------------------------------------------------------------ strategies that must help

HELPS = {
    "er": lambda: ER(memory_size=48),
    "ewc": lambda: EWC(weight=3.0),
    "derpp": lambda: DERpp(memory_size=48, alpha=0.1, beta=1.0),
    "gpm": lambda: GPM(threshold=0.9),
    "lwf": lambda: LwF(alpha=6.0),
}


@pytest.mark.parametrize("target", ["multilabel", "regression"])
@pytest.mark.parametrize("name", HELPS)
def test_methods_forget_less_than_fine_tuning_where_teachers_disagree(target, name):
    """Neighbouring teachers of correlation -1/2 on inputs of overlap 0.8: plain training unlearns the first."""
    strategy = HELPS[name]()
    if (target, name) == ("multilabel", "ewc"):
        strategy.weight *= 10  # the Fisher of a sigmoid is at most a quarter, and less the surer it is
    stream, options = toy(target), {"epochs": 30, "hidden": True, "lr": 0.1}
    plain, helped = (run(stream, method, **options) for method in (Finetune(), strategy))
    assert torch.equal(plain[0], helped[0]) and plain[1, 0] - plain[2, 0] > 0.2
    assert helped[1, 0] - helped[2, 0] < 0.8 * (plain[1, 0] - plain[2, 0])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_imitation_is_least_and_flat_at_the_teacher(rows, width, seed):
    """For sigmoids it is KL divergence and the teacher's entropy; for numbers half the squared distance, doubled."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, width, generator=draw, dtype=torch.float64) for _ in range(2))
    p, q = teacher.sigmoid(), student.sigmoid()
    divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    entropy = imitation(teacher, teacher, "multilabel")
    torch.testing.assert_close(imitation(student, teacher, "multilabel"), divergence + entropy)
    torch.testing.assert_close(imitation(student, teacher, "regression"), (student - teacher).square().mean())
    for target in ("multilabel", "regression"):
        z = teacher.clone().requires_grad_()
        imitation(z, teacher, target).backward()
        assert z.grad.abs().max() < 1e-12


@pytest.mark.parametrize("target", ["multilabel", "regression"])
def test_a_memory_keeps_whole_targets(target):
    stream = toy(target)
    memory = Memory(30, stream)
    x, y, task = stream[0].train.tensors()
    memory.insert(Batch(x, y, task))
    drawn = memory.sample(30)
    known = {a.numpy().tobytes(): b for a, b in zip(x, y, strict=True)}
    assert len(drawn) == 30 and drawn.y.dtype == torch.float32
    assert all(torch.equal(known[a.numpy().tobytes()], b) for a, b in zip(drawn.x, drawn.y, strict=True))


# ------------------------------------------------------------------ strategies that cannot

CANNOT = {"ncm": NCM, "agem": AGEM, "l2p": L2P}


@pytest.mark.parametrize("target", ["multilabel", "regression"])
@pytest.mark.parametrize("name", CANNOT)
def test_methods_of_one_label_refuse_before_training(target, name):
    with pytest.raises(InputError, match=f"learns from targets of kind label, but .* are {target}") as error:
        learner(toy(target), CANNOT[name]())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["multilabel", "regression"])
@pytest.mark.parametrize("policy", ["class_balanced", "ring"])
def test_a_memory_that_counts_classes_refuses_other_targets(target, policy):
    with pytest.raises(InputError, match=f"A {policy} memory counts classes, .* {target}: use policy=reservoir"):
        learner(toy(target), ER(policy=policy))


@pytest.mark.parametrize("target", ["multilabel", "regression"])
@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_a_fisher_of_one_label_refuses_other_targets(target, kind):
    with pytest.raises(InputError, match=f"ewc.fisher={kind} needs labels, .* use fisher=true"):
        learner(toy(target), EWC(fisher=kind))
