"""What is measured beside R: it leaves the run alone, says what an independent evaluation says, and survives a stop."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from cl.compose import label_noise
from cl.data.task import Stream, TaskData
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.instrument import Instrument, features, subset, watching
from cl.engine.learner import Learner
from cl.engine.score import Accuracy
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.measure.estimators import Estimates
from cl.measure.learning_curves import LearningCurves
from cl.measure.probes import Probes
from cl.measure.resources import Resources
from cl.report.tables import FileReport
from cl.strategies.er import ER
from cl.strategies.icarl import ICaRL
from cl.strategies.ncm import NCM
from cl.strategies.supsup import SupSup
from cl.testing import ToyBackbone, toy_learner, toy_stream

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)


class Restless(nn.Module):
    """A backbone whose evaluation would show, if it left anything behind: batch norm, dropout."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def every_instrument(stream: Stream, **cadence: int) -> dict[str, Instrument]:
    return {
        "resources": Resources(flops=True),
        "curves": LearningCurves(stream, **(cadence or {"every": 1})),
        "probes": Probes(stream, ["ridge", "knn", "cka"]),
        "estimates": Estimates(stream, ["vci", "tmi", "knn", "covariance"]),
    }


def restless(instruments: bool, chunk: int | None = None, folder: Path | None = None, **options) -> Experiment:
    stream = toy_stream(3)
    torch.manual_seed(0)
    strategies = {"er": ER(memory_size=10)}
    sgd = partial(torch.optim.SGD, lr=0.05)
    learner = Learner(stream, Restless(), strategies, sgd, batch_size=8, chunk_size=chunk)
    made = every_instrument(stream) if instruments else {}
    return Experiment(learner, stream, trainer, epochs=2, instruments=made, directory=folder, **options)


@pytest.mark.parametrize("chunk", [1, 7])
def test_who_watches_changes_no_bit(chunk: int) -> None:
    plain, watched = restless(False, chunk), restless(True, chunk)
    plain.run()
    watched.run()
    for (name, a), b in zip(plain.learner.state_dict().items(), watched.learner.state_dict().values(), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a.nan_to_num(-7.0) if a.is_floating_point() else a, b.nan_to_num(-7.0)), name


def test_curves_do_not_depend_on_the_chunks() -> None:
    found = []
    for chunk in (1, 7, 64):
        experiment = restless(True, chunk)
        experiment.run()
        found.append(experiment.instruments["curves"])
    for other in found[1:]:
        assert other.at == found[0].at
        assert torch.equal(other.values().nan_to_num(-1), found[0].values().nan_to_num(-1))


def test_a_curve_begins_and_ends_where_R_does() -> None:
    experiment = restless(True)
    R = experiment.run().matrices["task"].R
    curves: LearningCurves = experiment.instruments["curves"]
    values = curves.values(1)  # under the mask "task", which does not change when a task begins
    for task in (1, 2, 3):
        rows = [n for n, at in enumerate(curves.at) if at[0] == task]
        assert torch.equal(values[rows[0], :task], R[task - 1, :task]), "step 0 is where the last task ended"
        assert torch.equal(values[rows[-1], :task], R[task, :task])
        assert bool(values[rows][:, task:].isnan().all()), "a task to come is not looked at"
        steps = [curves.at[n][1] for n in rows]
        assert steps == list(range(2 * math.ceil(len(experiment.stream[0].train) / 8) + 1))
    totals = [total for _, _, total in curves.at]
    assert totals == sorted(totals) and totals[-1] == experiment.learner.total_steps


class Replica(pl.Callback):
    """Evaluates by hand, after some step of every task."""

    def __init__(self, stream: Stream, step: int) -> None:
        self.stream, self.step = stream, step
        self.found: list[list[float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, learner: Learner, *_: object) -> None:
        if learner.step != self.step:
            return
        learner.eval()
        with torch.no_grad():
            accuracies = []
            for task in self.stream[: learner.task_index + 1]:
                x, y, t = task.test.tensors()
                logits = learner.mask(learner(learner.prepare(x)), t)
                accuracies.append(float((logits.argmax(1) == y).float().mean()))
        self.found.append(accuracies)
        learner.train()


def test_a_point_is_what_an_evaluation_by_hand_gives() -> None:
    learner, stream = toy_learner(chunk_size=1)
    replica = Replica(stream, 5)
    curves = LearningCurves(stream, every=5)
    Experiment(learner, stream, trainer, epochs=2, instruments={"curves": curves}, callbacks=[replica]).run()
    values = curves.values(0)
    rows = [n for n, at in enumerate(curves.at) if at[1] == 5]
    assert len(rows) == 3
    for n, expected in zip(rows, replica.found, strict=True):
        assert torch.allclose(values[n, : len(expected)], torch.tensor(expected))


@pytest.mark.parametrize("strategy", [ER, ICaRL])
def test_the_last_point_of_a_task_is_the_row_of_R(strategy: type[Strategy]) -> None:
    learner, stream = toy_learner({"method": strategy(memory_size=20)})
    curves = LearningCurves(stream, points=2)
    Experiment(learner, stream, trainer, epochs=2, instruments={"curves": curves}).run()
    last = {task: n for n, (task, _, _) in enumerate(curves.at)}
    assert list(last) == [1, 2, 3] and len(curves.at) == 3 * 3
    for mask, matrix in enumerate(learner.matrices.values()):
        for task, n in last.items():
            torch.testing.assert_close(curves.values(mask)[n, :task], matrix.R[task, :task])


@pytest.mark.parametrize(
    ("cadence", "steps"),
    [({"every": 4}, [0, 4, 8]), ({"points": 4}, [0, 2, 5, 8]), ({"points": 50}, list(range(10)))],
)
def test_the_cadence(cadence: dict[str, int], steps: list[int]) -> None:
    stream = toy_stream(3)

    class Told:
        num_steps = 10

    assert list(LearningCurves(stream, **cadence).steps(Told())) == steps


@pytest.mark.parametrize(
    ("cadence", "words"),
    [
        ({}, "report.every=None and report.points=None: give one"),
        ({"every": 2, "points": 2}, "report.every=2 and report.points=2: give one"),
        ({"every": 0}, "every=0 must be 1 or more"),
        ({"points": -1}, "points=-1 must be 1 or more"),
    ],
)
def test_a_cadence_that_makes_no_sense_is_one_sentence(cadence: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        LearningCurves(toy_stream(), **cadence)


def tables(folder: Path) -> dict[str, list[str]]:
    names = ("transfer.csv", "learning_curves.csv", "estimates.csv")
    return {name: (folder / name).read_text().splitlines() for name in names}


def test_a_stopped_run_leaves_no_gap_and_no_double_row(tmp_path: Path) -> None:
    whole = restless(True, folder=tmp_path / "whole", reports=[FileReport()])
    whole.run()
    (tmp_path / "part" / "checkpoints").mkdir(parents=True)
    for k in range(2):  # stopped in the second task
        name = f"checkpoints/after_task_00{k}.ckpt"
        (tmp_path / "part" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    part = restless(True, folder=tmp_path / "part", reports=[FileReport()])
    part.run()
    assert tables(tmp_path / "part") == tables(tmp_path / "whole")
    rows = list(csv.DictReader((tmp_path / "part" / "resources.csv").read_text().splitlines()))
    assert [row["task"] for row in rows] == ["1", "2", "3"]
    for a, b in zip(whole.run_view.matrices.values(), part.run_view.matrices.values(), strict=True):
        assert torch.equal(a.R.nan_to_num(-1), b.R.nan_to_num(-1)), a.mask


# ------------------------------------------------------------------ probes


def by_hand(learner: Learner, data: TaskData) -> tuple[np.ndarray, np.ndarray]:
    learner.eval()
    with torch.no_grad():
        return learner.backbone(learner.prepare(data.tensors()[0])).double().numpy(), data.labels.numpy()


def test_the_last_row_of_the_probes_is_scikit_learns() -> None:
    stream = label_noise(toy_stream(3), 0.4)  # else any probe is right everywhere
    learner = Learner(stream, ToyBackbone(), {}, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    probes = Probes(stream, ["ridge", "knn"])
    Experiment(learner, stream, trainer, epochs=2, instruments={"probes": probes}).run()
    for task in stream:
        (x, y), (tx, ty) = by_hand(learner, task.train), by_hand(learner, task.test)
        scale = np.where(x.std(0) > 1e-12, x.std(0), 1.0)
        a, b = (x - x.mean(0)) / scale, (tx - x.mean(0)) / scale
        hot = np.eye(stream.num_classes)[y][:, list(task.classes)]
        guess = np.array(task.classes)[Ridge(alpha=1e-2 * len(x)).fit(a, hot).predict(b).argmax(1)]
        assert float(probes.matrices["ridge"].R[-1, task.index]) == pytest.approx((guess == ty).mean(), abs=1e-6)
        assert 0 < (guess == ty).mean() < 1
        near = KNeighborsClassifier(5).fit(x / np.linalg.norm(x, axis=1, keepdims=True), y)
        score = near.score(tx / np.linalg.norm(tx, axis=1, keepdims=True), ty)
        assert float(probes.matrices["knn"].R[-1, task.index]) == pytest.approx(score, abs=1e-6)


def test_cka_is_one_where_a_task_was_learned_and_where_nothing_is_trained() -> None:
    learner, stream = toy_learner({"ncm": NCM()})
    learner.backbone.requires_grad_(False)
    probes = Probes(stream, ["cka"])
    Experiment(learner, stream, trainer, epochs=1, instruments={"probes": probes}).run()
    R = probes.matrices["cka"].R
    below = torch.ones(4, 3).tril(-1).bool()
    assert torch.allclose(R[below], torch.ones(int(below.sum())), atol=1e-5)
    assert bool(R[~below].isnan().all())


def test_probes_are_measured_on_the_frozen_features_of_the_row() -> None:
    """Row 0 is the untrained backbone's, so a run of no epochs repeats it in every row."""
    learner, stream = toy_learner(lr=1e-30)
    probes = Probes(stream, ["ridge"])
    Experiment(learner, stream, trainer, epochs=1, instruments={"probes": probes}).run()
    R = probes.matrices["ridge"].R
    assert bool((R[0] == R).all()) and bool(R.isfinite().all())


@pytest.mark.parametrize(("make", "name"), [(Probes, "ridg"), (Estimates, "vcy")])
def test_an_unknown_kind_names_the_nearest(make: type, name: str) -> None:
    with pytest.raises(InputError, match=name):
        make(toy_stream(), [name])


# ------------------------------------------------------------------ resources


def test_operations_of_an_mlp_are_those_of_its_matrices() -> None:
    """A multiplication by (n, m) weights takes 2 n m operations forward, as many for the weights' gradient and for the
    inputs', which the first layer does not need."""
    learner, stream = toy_learner()
    resources = Resources(flops=True)
    Experiment(learner, stream, trainer, epochs=2, instruments={"resources": resources}).run()
    layers = [m for m in learner.trunk().modules() if isinstance(m, nn.Linear)]
    shapes = [m.in_features * m.out_features for m in layers]
    a_row = 6 * sum(shapes) - 2 * shapes[0]
    rows = len(stream[0].train)
    steps = resources.column("steps")
    assert steps == [2 * math.ceil(rows / 8)] * 3
    assert resources.column("flops") == [a_row * 8 * s for s in steps], "the middle step has a full batch"
    assert resources.column("parameters") == [sum(p.numel() for p in learner.trunk().parameters())] * 3
    assert all(s > 0 for s in resources.column("seconds"))


def test_operations_count_replay_and_not_who_watches() -> None:
    found = []
    for strategies, watch in ((None, False), (None, True), ({"er": ER(memory_size=10, batch_size=8)}, True)):
        learner, stream = toy_learner(strategies)
        curves = {"curves": LearningCurves(stream, every=1)} if watch else {}
        resources = Resources(flops=True)
        Experiment(learner, stream, trainer, instruments={"resources": resources, **curves}).run()
        found.append(resources.column("flops")[1:])
    assert found[0] == found[1]
    assert found[2] == [2 * flops for flops in found[0]]


def test_what_a_memory_holds_is_counted() -> None:
    learner, stream = toy_learner({"er": ER(memory_size=50)})
    resources = Resources()
    Experiment(learner, stream, trainer, instruments={"resources": resources}).run()
    rows = len(stream[0].train)
    assert resources.column("stored_examples") == [min(50, rows * (t + 1)) for t in range(3)]
    a_row = 16 + 8 + 8  # uint8 image, label, task label
    assert resources.column("memory_bytes") == [50 * a_row] * 3
    assert all(a >= b for a, b in zip(resources.column("state_bytes"), resources.column("memory_bytes"), strict=True))


def test_time_spent_on_watching_is_not_the_methods() -> None:
    """An instrument that sleeps a tenth of a second a task shows in `measuring_seconds`, not in `seconds`."""

    class Sleeper(Instrument):
        def before_task(self, *_: object) -> None:
            import time

            time.sleep(0.3)

    learner, stream = toy_learner(num_tasks=2)
    resources = Resources()
    Experiment(learner, stream, trainer, instruments={"resources": resources, "sleeper": Sleeper()}).run()
    assert all(s >= 0.3 for s in resources.column("measuring_seconds"))
    # the rest of the task is some milliseconds; a subtraction that is missing would add 0.3 s
    assert resources.column("seconds")[1] < 0.3


# ------------------------------------------------------------------ calibration and parts


def test_calibration_errors_are_those_of_a_plain_loop() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, y = torch.randn(500, 4, generator=draw) * 3, torch.randint(4, (500,), generator=draw)
    task = torch.randint(3, (500,), generator=draw)
    score = Accuracy(4, ["domain"], lambda logits, task, name: logits, torch.device("cpu"))
    for rows in torch.arange(500).split(64):
        score.update(logits[rows], Batch(torch.zeros(len(rows), 1), y[rows], task[rows]))
    found, accuracy = score.errors()["domain"], score.rows()["domain"]
    for t in range(3):
        own = task == t
        p, guess = logits[own].double().softmax(1).max(1)
        right = (guess == y[own]).double()
        error = 0.0
        for b in range(15):
            inside = (p > b / 15) & (p <= (b + 1) / 15)
            if inside.any():
                error += float(inside.double().mean() * (right[inside].mean() - p[inside].mean()).abs())
        assert float(found[t]) == pytest.approx(error, abs=1e-5)
        assert float(accuracy[t]) == pytest.approx(float(right.mean()))
    assert math.isnan(found[3]) and math.isnan(accuracy[3])


def test_R_is_not_moved_by_the_counting_of_confidence() -> None:
    """Logits that are minus infinity but for one, ties, and huge ones."""
    inf = math.inf
    logits = torch.tensor([[-inf, 2.0, -inf], [1.0, 1.0, 0.0], [1e30, -1e30, 0.0], [-1e30, -1e30, -inf]])
    y = torch.tensor([1, 0, 0, 0])
    score = Accuracy(1, ["domain"], lambda logits, task, name: logits, torch.device("cpu"))
    score.update(logits, Batch(torch.zeros(4, 1), y, torch.zeros(4).long()))
    assert score.rows()["domain"].tolist() == [1.0]
    assert 0 <= float(score.errors()["domain"][0]) <= 1


def test_a_subset_is_the_same_in_every_run_and_fair() -> None:
    data = TaskData(torch.arange(1000.0), torch.arange(1000) % 10)
    part = subset(data, 300)
    assert len(torch.unique(part.index)) == 300
    assert part.labels.equal(subset(data, 300).labels)
    counts = torch.bincount(part.labels, minlength=10).double()
    # hypergeometric, 30 of 100 a class: chi2 with 9 degrees of freedom is below 27.9 in 99.9 % of draws
    assert float(((counts - 30) ** 2 / 30).sum()) < 27.9
    assert subset(data, 1000) is data


def test_features_come_from_the_owner_of_encode() -> None:
    learner, stream = toy_learner()
    with watching(learner):
        found = features(learner, stream[0].test, size=5)
    expected, _ = by_hand(learner, stream[0].test)
    assert np.allclose(found.numpy(), expected, atol=1e-6)


class NormedByBatch(ToyBackbone):
    """Refuses a single row, as batch norm does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x) > 1
        return super().forward(x)


@pytest.mark.parametrize("backbone", [NormedByBatch, ToyBackbone])
def test_a_row_is_counted_of_a_network_that_takes_two_or_trains_none(backbone: type[nn.Module]) -> None:
    found = []
    for strategies in ({}, {"method": SupSup()}):
        stream, resources = toy_stream(2, "task"), Resources(flops=True)
        learner = Learner(stream, backbone(), strategies, partial(torch.optim.SGD, lr=0.1), batch_size=8)
        Experiment(learner, stream, trainer, instruments={"resources": resources}).run()
        found.append(resources.column("pass_flops"))
    assert 0 < found[1][0] < found[0][0], "SupSup trains no weight, so there is nothing to derive by"
