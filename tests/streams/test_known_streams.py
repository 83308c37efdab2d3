"""Streams whose answer is known: R in closed form, and steps whose sign was designed."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st

from cl.app.build import build
from cl.backbones.networks import MLP
from cl.data.sources import digits, synthetic
from cl.engine.experiment import Experiment
from cl.engine.head import Head
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.metrics.transfer import bwt_gem, forgetting_chaudhry, fwt_gem, step_effect
from cl.strategies.finetune import Finetune
from cl.streams.linear_teachers import expected_transfer, geometry, linear_teachers
from cl.streams.mosaic import mosaic, tile
from cl.streams.transfer_by_design import KINDS, designed_signs, transfer_by_design
from cl.testing import check_stream

DIGITS = digits()
DATA = {"digits": DIGITS, "synthetic": synthetic()}
TRAINER = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)


# ------------------------------------------------------------------ linear teachers


def linear_learner(stream, seed=0, lr=0.5):
    torch.manual_seed(seed)
    net = MLP(stream.input_shape, hidden=[])
    head = Head(net.num_features, stream.num_classes, bias=False)
    optimizer = partial(torch.optim.SGD, lr=lr)
    rows = len(stream[0].train)
    return Learner(stream, net, {"finetune": Finetune()}, optimizer, head=head, batch_size=rows, seed=seed)


def measured(stream, epochs=1, seed=0, lr=0.5, **trainer):
    """R of a trained linear model, and the weights that it started from."""
    learner = linear_learner(stream, seed, lr)
    start = learner.head.weight.detach().clone()
    run = Experiment(learner, stream, partial(TRAINER, **trainer), epochs=epochs).run()
    return run.matrices["domain"].R.double(), start


def regressed(stream, start):
    """The same R with neither networks nor bases: pseudo-inverses of the raw rows, scored by scikit-learn."""
    from sklearn.metrics import r2_score

    tests = [[column.double().numpy() for column in task.test.tensors()[:2]] for task in stream]
    W = start.T.double().numpy()
    rows = [[r2_score(y, x @ W) for x, y in tests]]
    for task in stream:
        x, y = (column.double().numpy() for column in task.train.tensors()[:2])
        W = W + np.linalg.pinv(x, rcond=1e-5) @ (y - x @ W)
        rows.append([r2_score(y, x @ W) for x, y in tests])
    return torch.tensor(np.array(rows))


CASES = [
    {"overlap": 0.5, "similarity": 0.0, "seed": 0},
    {"overlap": 0.9, "similarity": -0.7, "num_outputs": 3, "seed": 1},
    {"overlap": 0.3, "similarity": 1.0, "num_outputs": 7, "seed": 2, "order": "shuffled"},
    {"overlap": 0.0, "similarity": 0.5, "num_outputs": 2, "seed": 3},
    {"overlap": 1.0, "similarity": -1.0, "num_outputs": 2, "seed": 4},
    {
        "overlap": 0.99,
        "similarity": 0.9,
        "num_tasks": 6,
        "rank": 2,
        "num_rows": 8,
        "seed": 5,
        "order": [5, 3, 1, 0, 2, 4],
    },
    {"overlap": 0.5, "similarity": -1.0, "num_tasks": 3, "rank": 1, "dimension": 4, "num_rows": 2, "seed": 6},
]


def shape_of(case):
    return {k: v for k, v in case.items() if k not in ("order", "num_rows")}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_trained_linear_model_has_the_R_of_the_closed_form(case):
    stream = linear_teachers(**case)
    U, W = (part[list(stream.order)] for part in geometry(**shape_of(case)))
    R, start = measured(stream, seed=case["seed"])
    assert (R - expected_transfer(U, W, start)).abs().max() < 1e-5


def test_a_slower_descent_arrives_at_the_same_R_geometrically():
    """At lr = 1/4 the distance halves with every step: after n epochs the weights have 1 - 2^-n of the way."""
    stream = linear_teachers(num_tasks=1, num_outputs=3)
    U, W = geometry(num_tasks=1, num_outputs=3)
    for epochs in (1, 3, 20):
        R, start = measured(stream, epochs, lr=0.25)
        R_0 = expected_transfer(U, W, start)[0]
        torch.testing.assert_close(1 - R[1], (1 - R_0) * 4.0**-epochs, atol=1e-6, rtol=1e-5)


def test_training_in_double_precision_is_exact_to_the_rows_rounding():
    case = CASES[1]
    R, start = measured(linear_teachers(**case), precision="64-true")
    assert (R - expected_transfer(*geometry(**case), start)).abs().max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    num_tasks=st.integers(1, 5),
    rank=st.integers(2, 4),
    spare=st.integers(0, 5),
    overlap=st.floats(0, 1),
    similarity=st.floats(-1, 1),
    num_outputs=st.integers(1, 3),
    copies=st.integers(1, 3),
    seed=st.integers(0, 99),
    from_zero=st.booleans(),
)
def test_closed_form_agrees_with_pseudo_inverses_of_the_rows(
    num_tasks, rank, spare, overlap, similarity, num_outputs, copies, seed, from_zero
):
    shape = {"num_tasks": num_tasks, "rank": rank, "dimension": rank * (num_tasks + 1) + spare}
    shape |= {"overlap": overlap, "similarity": similarity, "num_outputs": num_outputs, "seed": seed}
    stream = linear_teachers(**shape, num_rows=2 * rank * copies, order="shuffled")
    U, W = (part[list(stream.order)] for part in geometry(**shape))
    start = torch.zeros(num_outputs, len(U[0]))
    if not from_zero:
        start = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
    expected = expected_transfer(U, W, None if from_zero else start)
    torch.testing.assert_close(expected, regressed(stream, start), atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(2, 4), st.floats(0, 1), st.floats(-1, 1), st.integers(0, 99))
def test_overlap_is_the_cosine_of_the_angles_and_similarity_the_correlation(T, rank, overlap, similarity, seed):
    from scipy.linalg import subspace_angles

    U, W = geometry(T, rank, rank * (T + 1), overlap, similarity, 2, seed)
    identity = torch.eye(rank, dtype=torch.float64)
    for t in range(T):
        torch.testing.assert_close(U[t].T @ U[t], identity)
        torch.testing.assert_close(U[t] @ U[t].T @ W[t], W[t])  # a teacher lies in its inputs' subspace
        for s in range(t):
            # The angle is ill-conditioned near 0, its cosine is not.
            np.testing.assert_allclose(np.cos(subspace_angles(U[s].numpy(), U[t].numpy())), overlap, atol=1e-8)
    A = U.mT @ W
    torch.testing.assert_close(A.norm(dim=1), torch.ones(T, 2, dtype=torch.float64))
    torch.testing.assert_close((A[1:] * A[:-1]).sum(1), torch.full((T - 1, 2), similarity, dtype=torch.float64))


def test_second_moments_are_projectors_and_test_rows_are_others():
    stream = linear_teachers(num_outputs=2, num_rows=30)
    U, _ = geometry(num_outputs=2)
    for task in stream:
        P = U[task.index] @ U[task.index].T
        for part in (task.train, task.test):
            x, y = (column.double() for column in part.tensors()[:2])
            assert len(x) == 30
            torch.testing.assert_close(x.T @ x / len(x), 2 * P, atol=1e-6, rtol=1e-6)
            assert x.sum(0).abs().max() < 1e-5 and y.sum(0).abs().max() < 1e-5
            torch.testing.assert_close(y.var(0, correction=0), torch.full((2,), 2.0).double(), atol=1e-5, rtol=1e-5)
        train, test = ({row.numpy().tobytes() for row in part.tensors()[0]} for part in (task.train, task.test))
        assert len(train | test) == 60
    check_stream(lambda: linear_teachers(num_outputs=2, order="shuffled"))


def test_no_overlap_no_transfer_and_no_forgetting():
    R, _ = measured(linear_teachers(overlap=0.0, num_tasks=4))
    others = ~torch.eye(4, dtype=torch.bool)
    assert R.diff(dim=0)[others].abs().max() < 1e-6
    torch.testing.assert_close(R.diagonal(-1), torch.ones(4).double(), atol=1e-5, rtol=0)


def test_equal_tasks_are_known_at_once_and_opposite_ones_unlearned():
    R, _ = measured(linear_teachers(num_tasks=3, overlap=1.0, similarity=1.0))
    torch.testing.assert_close(R[1:], torch.ones(3, 3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(fwt_gem(R), (1 - R[0, 1:]).mean(), atol=1e-5, rtol=0)
    R, _ = measured(linear_teachers(num_tasks=3, overlap=1.0, similarity=-1.0))
    signs = torch.tensor([[1.0, -3.0, 1.0], [-3.0, 1.0, -3.0], [1.0, -3.0, 1.0]]).double()
    torch.testing.assert_close(R[1:], signs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("similarity", [-1.0, -0.4, 0.0, 0.6, 1.0])
def test_two_tasks_forget_and_transfer_by_the_formulas(overlap, similarity):
    R = expected_transfer(*geometry(2, overlap=overlap, similarity=similarity, num_outputs=3))
    o, rho = torch.tensor([overlap, similarity]).double()
    torch.testing.assert_close(forgetting_chaudhry(R), o**2 * (1 + o**2 - 2 * o * rho))
    torch.testing.assert_close(fwt_gem(R), o * (2 * rho - o))
    if rho == 1:  # tasks half alike forget most
        assert forgetting_chaudhry(R) <= 1 / 16 + 1e-12


def test_reversed_order_is_another_R_with_the_same_first_row():
    """Three tasks of a drifting teacher: the closed form of either direction is what is measured."""
    shape = {"num_tasks": 3, "overlap": 0.7, "similarity": 0.8, "seed": 9}
    U, W = geometry(**shape)
    forth, start = measured(linear_teachers(**shape))
    back, _ = measured(linear_teachers(**shape, order=[2, 1, 0]))
    torch.testing.assert_close(back, expected_transfer(U.flip(0), W.flip(0), start), atol=1e-5, rtol=0)
    torch.testing.assert_close(back[0].flip(0), forth[0])
    assert (back.flip(1)[1:] - forth[1:]).abs().max() > 0.1
    assert abs(bwt_gem(back) - bwt_gem(forth)) > 1e-3


def test_the_configuration_learns_linear_teachers_exactly(tmp_path):
    chosen = ["stream=linear_teachers", "strategy=finetune", "report=quiet", "logger=none", "trainer.accelerator=cpu"]
    with initialize_config_module("cl.conf", version_base="1.3"):
        cfg = compose("config", [*chosen, "stream.num_outputs=4", "stream.overlap=0.8", "seed=3"])
    experiment = build(cfg, tmp_path)
    start = experiment.learner.head.weight.detach().clone()
    R = experiment.run().matrices["domain"].R.double()
    assert (R - expected_transfer(*geometry(overlap=0.8, num_outputs=4, seed=3), start)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dimension": 29}, "dimension=29 does not hold num_tasks=5 subspaces of rank=5 .* 30 or more"),
        ({"num_tasks": 0}, "num_tasks=0"),
        ({"overlap": 1.1}, r"overlap=1.1 must be in \[0, 1\]"),
        ({"similarity": -2.0}, r"similarity=-2.0 in \[-1, 1\]"),
        ({"rank": 1, "similarity": 0.5}, "with rank=1 either -1 or 1"),
        ({"num_rows": 25}, "num_rows=25 is not a multiple of 10"),
        ({"num_rows": 0}, "num_rows=0 is not a multiple of 10"),
    ],
)
def test_linear_teachers_refuses_in_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        linear_teachers(**options)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ transfer by design


def effects(data, kind, seeds):
    """E[i, target] of each predecessor i under fine-tuning, one row a seed, which draws stream, weights and order."""
    rows = []
    for seed in range(seeds):
        stream = transfer_by_design(data, kind, seed=seed)
        torch.manual_seed(seed)
        net = MLP(stream.input_shape, hidden=[50])
        optimizer = partial(torch.optim.SGD, lr=0.1)
        learner = Learner(stream, net, {"finetune": Finetune()}, optimizer, batch_size=16, seed=seed)
        R = Experiment(learner, stream, TRAINER, epochs=3).run().matrices["domain"].R
        rows.append(step_effect(R)[:-1, -1])
    return torch.stack(rows).numpy(), designed_signs(stream)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("synthetic", "mixed"), *(pytest.param("digits", kind, marks=pytest.mark.slow) for kind in ("mixed", "negative"))],
)
def test_the_designed_sign_is_that_of_the_measured_step_effect(name, kind):
    """Over 8 seeds, by a 99 % t interval: a true 0 is missed once in a hundred, an effect this large never."""
    from scipy.stats import t as student

    E, signs = effects(DATA[name], kind, seeds=8)
    assert E.shape == (8, len(signs)) and set(signs) == ({-1, 0, 1} if kind == "mixed" else {-1, 1})
    half = student.ppf(0.995, len(E) - 1) * E.std(0, ddof=1) / len(E) ** 0.5
    for sign, mean, width in zip(signs, E.mean(0), half, strict=True):
        assert sign * mean > width if sign else abs(mean) < width < 0.1, (sign, mean, width)
        assert not sign or abs(mean) > 0.4


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", KINDS)
def test_predecessors_are_what_they_are_called(name, kind):
    data = DATA[name]
    check_stream(lambda: transfer_by_design(data, kind, seed=5))
    stream = transfer_by_design(data, kind, seed=5)
    rows = [task.train.index for task in stream]
    assert len(torch.cat(rows).unique()) == sum(map(len, rows)) == len(data.train_y), "each row is in one task"
    assert len(stream[-1].train) == 100 and torch.equal(stream[-1].test.tensors()[0], data.test_x)
    for task, index in zip(stream, rows, strict=True):
        for part, old_x, old_y in (
            ("train", data.train_x[index], data.train_y[index]),
            ("test", data.test_x, data.test_y),
        ):
            x, y, _ = getattr(task, part).tensors()
            pairs = set(zip(old_y.tolist(), y.tolist(), strict=True))
            if task.name == "neutral":
                assert torch.equal(x.flatten(1).sort(1).values, old_x.flatten(1).sort(1).values)
                assert not torch.equal(x, old_x) and len(pairs) > 80
                counts = y.bincount(minlength=10)
                assert counts.max() - counts.min() <= 1
                continue
            assert torch.equal(x, old_x) == (task.name != "positive")
            assert len(pairs) == 10 and all((a == b) == (task.name != "negative") for a, b in pairs)


def test_neutral_labels_say_nothing_of_the_classes():
    """Chi-squared on the table of true and given labels: 81 degrees of freedom, error rate 1 in 1000."""
    from scipy.stats import chi2_contingency

    task = transfer_by_design(DIGITS, "neutral", seed=1)[0]
    for index, part, old in ((task.train.index, task.train, DIGITS.train_y), (slice(None), task.test, DIGITS.test_y)):
        table = np.zeros((10, 10))
        np.add.at(table, (old[index].numpy(), part.labels.numpy()), 1)
        assert chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_vectors_are_turned_by_the_angle(size):
    """An orthogonal map that takes every vector of its planes the same angle away; a lone axis stays."""
    data = synthetic(num_classes=2, num_train=300, input_shape=(size,))
    stream = transfer_by_design(data, "positive", target_rows=100, angle=30)
    old, new = data.train_x[stream[0].train.index].double(), stream[0].train.tensors()[0].double()
    M = torch.linalg.lstsq(old, new).solution
    torch.testing.assert_close(M @ M.T, torch.eye(size).double(), atol=1e-5, rtol=0)
    cosines = torch.full((size,), np.cos(np.pi / 6)).double()
    if size % 2:
        cosines[0] = 1.0
    found = torch.linalg.eigvalsh((M + M.T) / 2).flip(0)
    torch.testing.assert_close(found, cosines, atol=1e-5, rtol=0)
    assert torch.linalg.det(M) > 0


def test_signs_are_known_for_the_designed_order_only():
    assert [designed_signs(transfer_by_design(DIGITS, kind)) for kind in KINDS] == [(1,), (1, -1), (0,), (0, 1, -1)]
    with pytest.raises(InputError, match=r"are \['target', 'positive'\]: signs are known for order=null"):
        designed_signs(transfer_by_design(DIGITS, "positive", order=[1, 0]))
    with pytest.raises(InputError, match="order=null"):
        designed_signs(transfer_by_design(DIGITS, "mixed", order=[1, 0, 2, 3]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "helpful"}, "no kind of transfer called 'helpful'"),
        ({"target_rows": 9}, "target_rows=9 of the 1438 of 'digits': give 10 to 1408"),
        ({"target_rows": 1409}, "give 10 to 1408"),
    ],
)
def test_transfer_by_design_refuses_in_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence):
        transfer_by_design(DIGITS, **options)


def test_transfer_by_design_needs_labels_that_can_conflict():
    with pytest.raises(InputError, match="needs labels of two classes or more"):
        transfer_by_design(synthetic(num_classes=1))


# ------------------------------------------------------------------ mosaics


def cells_of(images, grid):
    """Cut grids into cells again, by slices: (N, g^2, C, h, w)."""
    h, w = (size // grid for size in images.shape[2:])
    cut = [images[:, :, a * h : a * h + h, b * w : b * w + w] for a in range(grid) for b in range(grid)]
    return torch.stack(cut, dim=1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_tiles_lie_row_by_row(grid, rows, channels, height, width):
    cells = torch.arange(rows * grid**2 * channels * height * width).view(rows, grid**2, channels, height, width)
    assert torch.equal(cells_of(tile(cells, grid), grid), cells)


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@pytest.mark.parametrize("grid", [1, 2, 3])
def test_targets_are_the_annotated_classes_in_the_cells(scenario, grid):
    """Every cell is looked up among the images of its own part of the dataset."""
    stream = mosaic(DIGITS, 3, 60, 40, grid, scenario, val_fraction=0.2, seed=grid)
    known = {
        part: {image.numpy().tobytes(): int(label) for image, label in zip(x, y, strict=True)}
        for part, x, y in (("train", DIGITS.train_x, DIGITS.train_y), ("test", DIGITS.test_x, DIGITS.test_y))
    }
    shown = {"train": set(), "val": set()}
    groups = [set(range(4)), {4, 5, 6}, {7, 8, 9}] if scenario != "domain" else [set(range(10))] * 3
    for task, own in zip(stream, groups, strict=True):
        assert set(task.classes) == own
        for name, size in (("train", 48), ("val", 12), ("test", 40)):
            images, targets, label = getattr(task, name).tensors()
            assert len(images) == size and label.unique().tolist() == [task.index]
            for cells, target in zip(cells_of(images, grid), targets, strict=True):
                raw = [cell.numpy().tobytes() for cell in cells]
                classes = {known["test" if name == "test" else "train"][cell] for cell in raw}
                assert set(target.nonzero().flatten().tolist()) == classes & own != set()
                if name != "test":
                    shown[name] |= set(raw)
    assert not shown["train"] & shown["val"]


def test_classes_come_as_often_as_drawn():
    """One cell of a class of the task, three of any: each frequency within 4 standard errors."""
    stream = mosaic(DIGITS, num_images=4000, seed=2)
    share = DIGITS.train_y.bincount().double() / len(DIGITS.train_y)
    for task in stream:
        own = torch.tensor(task.classes)
        absent = (1 - share[own] / share[own].sum()) * (1 - share[own]) ** 3
        found = task.train.labels[:, own].double().mean(0)
        assert ((found - (1 - absent)).abs() < 4 * (absent * (1 - absent) / 4000).sqrt()).all()


def test_the_tasks_own_cell_lies_anywhere():
    """Each of the four places shows a class of the task as often, within 4 standard errors."""
    task = mosaic(DIGITS, num_images=2000, seed=3)[0]
    label = {image.numpy().tobytes(): int(y) for image, y in zip(DIGITS.train_x, DIGITS.train_y, strict=True)}
    cells = cells_of(task.train.tensors()[0], 2)
    own = np.array([[label[cell.numpy().tobytes()] in task.classes for cell in four] for four in cells])
    expected = 1 / 4 + 3 / 4 * float((DIGITS.train_y < 2).double().mean())
    assert (abs(own.mean(0) - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5).all()


def test_mosaics_keep_the_contract_and_are_functions_of_the_seed():
    for scenario in ("class", "task", "domain"):
        options = {"scenario": scenario, "order": "shuffled", "val_fraction": 0.2}
        check_stream(partial(mosaic, DIGITS, 3, 50, 30, **options))
    a, b = (mosaic(DIGITS, seed=seed)[0].train.tensors()[0] for seed in (0, 1))
    assert not torch.equal(a, b)


def test_fine_tuning_learns_mosaics():
    """Two tasks, class-incremental: mAP on the new task rises well above the share of positives."""
    stream = mosaic(DIGITS, num_tasks=2, num_images=600, num_test=300)
    torch.manual_seed(0)
    net = MLP(stream.input_shape, hidden=[100])
    optimizer = partial(torch.optim.SGD, lr=0.5)
    learner = Learner(stream, net, {"finetune": Finetune()}, optimizer, batch_size=16, train_mask="task")
    R = Experiment(learner, stream, TRAINER, epochs=10).run().matrices["class"].R
    assert (R.diagonal(-1) > R[0] + 0.2).all() and (R.diagonal(-1) > 0.75).all()


@pytest.mark.parametrize(
    ("data", "options", "sentence"),
    [
        ("synthetic", {}, r"inputs of shape \(16,\)"),
        ("digits", {"num_tasks": 6}, "num_tasks=6 for 10 classes: give 1 to 5 tasks"),
        ("digits", {"grid": 0}, "grid=0"),
        ("digits", {"scenario": "classes"}, "scenario='classes' is unknown"),
    ],
)
def test_mosaic_refuses_in_one_sentence(data, options, sentence):
    with pytest.raises(InputError, match=sentence):
        mosaic(DATA[data], **options)
