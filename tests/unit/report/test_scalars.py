"""Scalars that need more than R, on the worked example; how they are absent; and the protocols of tuning."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from cl.app.protocol import Protocol, first, rest
from cl.data.task import Stream, TaskData
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.instrument import Instrument
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.measure.estimators import Estimates
from cl.measure.learning_curves import LearningCurves
from cl.measure.resources import Resources
from cl.metrics.transfer import TransferMatrix, worked_example
from cl.report.curves_picture import draw
from cl.report.l2 import L2Log
from cl.report.run import Run
from cl.report.scalars import MEASURES, NEEDS, beside, forecasts, measure
from cl.report.tables import transfer_json
from cl.testing import ToyBackbone, toy_learner, toy_stream

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)

# METRICS' running example: three evaluations inside each task, after the one at its step 0
INSIDE = [
    [0.50, 0.80, 0.90, 0.60, 0.85, 0.94, 0.55, 0.80, 0.84],
    [math.nan] * 3 + [0.45, 0.70, 0.85, 0.40, 0.75, 0.88],
    [math.nan] * 6 + [0.50, 0.70, 0.80],
]
START = [[0.10, 0.90, 0.94], [math.nan, 0.40, 0.85], [math.nan, math.nan, 0.45]]  # at step 0 of each task


def example(*, curves: bool = True, references: bool = True, flops: bool = True) -> Run:
    """A run whose every number stands in METRICS.md."""
    matrix = TransferMatrix(3, "task")
    for i, row in enumerate(worked_example()):
        matrix.record(i, row)
    calibration = TransferMatrix(3, "task", "ece")
    for i in range(4):
        calibration.record(i, torch.tensor([0.1, 0.2, 0.3]) + i / 10)
    resources = Resources()
    costs = zip([10, 12, 15], [100, 200, 300], [5e9, 10e9, 4e9] if flops else [math.nan] * 3, strict=True)
    for t, (parameters, stored, spent) in enumerate(costs, start=1):
        resources.add((t, 2.0, 5, spent, parameters, 0, 0, stored, 1.0, 0.0, 1000, 1e9))
    instruments: dict[str, Instrument] = {"resources": resources}
    if curves:
        at, values = [], []
        for task in range(3):
            for step in range(4):
                at.append((task + 1, step, 3 * task + step))
                point = [START[j][task] if step == 0 else INSIDE[j][3 * task + step - 1] for j in range(3)]
                values.append(torch.tensor([point]))
        kept = LearningCurves(toy_stream(3), points=3)
        kept.set_extra_state({"at": at, "names": [("task", "accuracy")], "values": torch.stack(values)})
        instruments["curves"] = kept
    found = {
        "experts": [
            {"task": j + 1, "value": s, "curve": [[0, 0.1], [1, 0.2], [2, 0.5], [3, s]]}
            for j, s in enumerate([0.88, 0.86, 0.83])
        ],
        "joint": [{"task": j + 1, "value": a} for j, a in enumerate([0.92, 0.89, 0.86])],
    }
    return Run(
        Path("."),
        {},
        ["a", "b", "c"],
        "task",
        {"task": matrix},
        calibration={"task": calibration},
        instruments=instruments,
        references=found if references else {},
        test_rows=(5, 1, 2),
    )


WORKED = {
    "accuracy_all_rows": (5 * 0.84 + 1 * 0.88 + 2 * 0.80) / 8,
    "average_anytime_accuracy": 0.718704,
    "min_accuracy": 0.475,
    "worst_case_accuracy": 0.583333,
    "stability_gap": (0.30 + 0.39 + 0.45) / 3,
    "recovered_gaps": 2 / 3,  # T1 in task 2 and T2 in task 3 came back, T1 in task 3 did not
    "nbt_libero": ((0.90 - 0.94 + 0.90 - 0.84) / 2 + (0.85 - 0.88)) / 3,
    "fwt_expert": -0.02,
    "intransigence_chaudhry": 0.04,
    "performance_maintenance": 0.01,
    "forward_transfer_ratio": 1.566667,
    "backward_transfer_ratio": 0.991118,
    "model_size_efficiency": 0.833333,
    "sample_storage_efficiency": 0.933333,
    "computational_efficiency": 0.183333,
    "error_nevis": 0.15,
    "flops_nevis": 19e9,
    "seconds": 6.0,
    "calibration_error": 0.5,
    # the mean of each task's own curve, flat after its first maximum
    "fwt_libero": ((0.10 + 0.50 + 0.80 + 0.90) + (0.40 + 0.45 + 0.70 + 0.85) + (0.45 + 0.50 + 0.70 + 0.80)) / 12,
    "jump_start": ((0.40 - 0.1) + (0.45 - 0.1)) / 2,
    "relative_performance": (2.40 / (0.8 + 0.86) + 2.45 / (0.8 + 0.83)) / 2,
}


def test_the_worked_example_of_every_measure() -> None:
    values, absent = measure(example())
    for name, expected in WORKED.items():
        assert values[name] == pytest.approx(expected, abs=2e-6), name
    needs_more = {"rep_bwt", "rep_fwt", "prequential_accuracy", "prequential_accuracy_by_task"}
    assert absent.keys() == needs_more and set(values) | set(absent) == set(MEASURES)
    own = [2.30 / 4, 2.40 / 4, 2.45 / 4]
    alone = [(0.8 + s) / 4 for s in (0.88, 0.86, 0.83)]
    expected = sum((a - b) / (1 - b) for a, b in zip(own, alone, strict=True)) / 3
    assert values["fwt_continual_world"] == pytest.approx(expected, abs=1e-6)


def test_accuracy_over_all_rows_is_that_of_the_union_and_is_shown_where_sizes_differ() -> None:
    """Against a count of right answers; tasks of 24 and 12 rows."""
    source = toy_stream(num_tasks=3)
    stream = source.derive(lambda t: replace(source[t], test=source[t].test.take(torch.arange(24 if t == 0 else 12))))
    learner = Learner(stream, ToyBackbone(), {}, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    run = Experiment(learner, stream, trainer, epochs=1).run()
    assert run.test_rows == (24, 12, 12)
    batches = [Batch(*task.test.tensors()) for task in stream]
    right = sum(int((learner.predict(batch).argmax(1) == batch.y).sum()) for batch in batches)
    assert measure(run)[0]["accuracy_all_rows"] == pytest.approx(right / 48)
    assert "accuracy over all rows" in beside(run) and "12 to 24 test rows" in beside(run)
    assert json.loads(transfer_json(run))["test_rows"] == [24, 12, 12]
    assert "all rows" not in beside(replace(example(), test_rows=(6, 6, 5)))
    assert "accuracy_all_rows" not in measure(replace(example(), test_rows=()))[0]


def test_what_is_not_measured_is_absent_with_the_remedy() -> None:
    values, absent = measure(example(curves=False, references=False, flops=False))
    for name, entry in MEASURES.items():
        if {"curves", "even", "experts", "joint", "flops", "ridge"} & set(entry.needs):
            assert name not in values and absent[name] in NEEDS.values(), name
        elif any(need.startswith("instrument:") for need in entry.needs):
            assert name not in values and "instrument=prequential adds it" in absent[name], name
        else:
            assert name in values, name
    written = json.loads(transfer_json(example(curves=False, references=False, flops=False)))
    assert written["absent"] == absent
    assert {name: entry["value"] for name, entry in written["measures"].items()} == values
    assert all(entry["definition"] and entry["source"] for entry in written["measures"].values())


def test_no_measure_is_a_number_before_a_task_is_learned() -> None:
    run = Run(Path("."), {}, ["a"], "task", {"task": TransferMatrix(1, "task")})
    values, absent = measure(run)
    assert not values and absent.keys() == MEASURES.keys()


def test_experts_are_compared_under_the_mask_that_they_know() -> None:
    """In a class-incremental run an expert knows no other classes, so its curve stands beside that under "task"."""
    run = example()
    class_matrix = TransferMatrix(3, "class")
    for i in range(4):
        class_matrix.record(i, torch.zeros(3))
    run.matrices = {"class": class_matrix, **run.matrices}
    run.calibration = {"class": TransferMatrix(3, "class", "ece"), **run.calibration}
    run.scenario = "class"
    curves = run.instruments["curves"]
    state = curves.get_extra_state()
    state["names"] = [("class", "accuracy"), ("task", "accuracy")]
    state["values"] = torch.cat([torch.zeros_like(state["values"]), state["values"]], 1)
    curves.set_extra_state(state)
    values, _ = measure(run)
    for name in ("jump_start", "fwt_expert"):
        assert values[name] == pytest.approx(WORKED[name])
    assert values["average_anytime_accuracy"] == 0


def test_the_log_of_l2metrics_holds_R_and_the_curves(tmp_path: Path) -> None:
    run = replace(example(), directory=tmp_path)
    report = L2Log()
    report.start(run, -1)
    report.finish(run)
    blocks = sorted(
        (tmp_path / "l2log" / "lifelong").rglob("data-log.tsv"), key=lambda p: int(p.parent.name.split("-")[0])
    )
    rows = [list(csv.DictReader(file.read_text().splitlines(), delimiter="\t")) for file in blocks]
    values = [[float(row["performance"]) for row in block] for block in rows]
    assert values[0::2] == [pytest.approx(row, abs=1e-6) for row in worked_example().tolist()]
    assert values[1::2] == [pytest.approx(curve, abs=1e-6) for curve in run.instruments["curves"].own()]
    assert len(list((tmp_path / "l2log").glob("expert_*"))) == 3


def test_an_expert_that_diverged_keeps_no_run_from_its_end(tmp_path: Path) -> None:
    run = replace(example(), directory=tmp_path)
    run.references["experts"][1] = {"task": 2, "value": math.nan, "row": [], "curve": [], "reason": "diverged"}
    L2Log().finish(run)
    assert sorted(p.name for p in (tmp_path / "l2log").glob("expert_*")) == ["expert_001", "expert_003"]


def test_the_picture_of_the_curves_draws_each_number_at_its_step() -> None:
    run = example()
    strips = draw(run).axes
    assert len(strips) == 3
    for task, axes in enumerate(strips):
        lines = [line for line in axes.get_lines() if line.get_color() == "#00224e"]
        every = [v for k in range(3) for v in [START[task][k], *INSIDE[task][3 * k : 3 * k + 3]]]
        steps = [s for k in range(3) for s in range(3 * k, 3 * k + 4)]
        measured = [(s, v) for s, v in zip(steps, every, strict=True) if not math.isnan(v)]
        assert list(zip(*lines[0].get_data(), strict=True)) == [(s, pytest.approx(v)) for s, v in measured]
        (dot,) = [line for line in axes.get_lines() if line.get_marker() == "o"]
        assert dot.get_data()[1][0] == pytest.approx(float(worked_example()[task + 1, task]))
        expert = next(line for line in axes.get_lines() if line.get_color() == "#9a9a9a")
        assert list(expert.get_xdata()) == [3 * task + s for s in range(4)]


# ------------------------------------------------------------------ forecasts


def test_forecasts_stand_beside_the_transfer_that_was_measured() -> None:
    run = example()
    estimates = Estimates(toy_stream(3), ["vci"])
    for task, value in enumerate([0.5, 0.1, 0.4], start=1):
        estimates.add((task, "vci", value))
    run.instruments = {**run.instruments, "estimates": estimates}
    found = forecasts(run)["vci"]
    assert found["estimate"] == [0.5, 0.1, 0.4] and found["against"] == "experts"
    assert math.isnan(found["forward_transfer"][0])
    assert found["forward_transfer"][1:] == pytest.approx([-0.01, -0.03], abs=1e-6)
    assert math.isnan(found["tau"]), "two points say nothing"
    run.references = {}
    assert forecasts(run)["vci"]["forward_transfer"][1:] == pytest.approx([0.2, 0.2], abs=1e-6)


def test_an_estimate_is_of_the_features_before_the_task() -> None:
    from cl.metrics.transferability import ESTIMATORS

    learner, stream = toy_learner()
    estimates = Estimates(stream, ["vci", "knn", "covariance"])
    before = []

    class Spy(Instrument):
        def before_task(self, learner: Learner, task) -> None:
            x, y, _ = task.train.tensors()
            with torch.no_grad():
                before.append(float(ESTIMATORS["vci"].function(learner.backbone(learner.prepare(x)).double(), y)))

    spied = {"spy": Spy(), "estimates": estimates}
    Experiment(learner, stream, trainer, epochs=2, instruments=spied).run()
    assert estimates.column("vci") == pytest.approx(before, abs=1e-5)
    covariance = estimates.column("covariance")
    assert math.isnan(covariance[0]) and all(0 < value <= 1 for value in covariance[1:])


# ------------------------------------------------------------------ protocols


def validated(num_tasks: int = 4) -> Stream:
    stream = toy_stream(num_tasks)

    def build(t: int):
        task = stream[t]
        rows = torch.arange(len(task.train))
        return replace(task, train=task.train.take(rows[8:]), val=task.train.take(rows[:8]))

    return stream.derive(build)


def final(stream: Stream) -> torch.Tensor:
    torch.manual_seed(0)
    learner = Learner(stream, ToyBackbone(), {}, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    return Experiment(learner, stream, trainer, epochs=2).run().primary.R


def test_tuning_looks_at_no_test_example_and_at_no_later_task() -> None:
    stream = validated()

    def other(t: int):
        task = stream[t]
        x, y, own = task.test.tensors()
        spoilt = replace(task, test=TaskData(255 - x, y, own))
        return spoilt if t < 2 else replace(spoilt, train=TaskData(*[c.flip(0) for c in task.train.tensors()]))

    assert torch.equal(final(first(stream, 2)), final(first(stream.derive(other), 2)))
    cut = first(stream, 2)
    assert [task.test.labels.tolist() for task in cut] == [stream[t].val.labels.tolist() for t in range(2)]
    assert cut[0].val is None


def test_the_rest_is_the_stream_without_the_first_tasks() -> None:
    stream = validated()
    left = rest(stream, 2)
    assert [task.classes for task in left] == [stream[2].classes, stream[3].classes]
    assert [task.index for task in left] == [0, 1]
    assert all(bool((task.train.tasks == task.index).all()) for task in left)
    alone = Stream(
        [stream[t].each(lambda part, t=t: part.renumbered(t - 2), index=t - 2) for t in (2, 3)], num_classes=8
    )
    assert torch.equal(final(left), final(alone))


@pytest.mark.parametrize("k", [0, 4, 9])
def test_a_number_of_tuning_tasks_that_leaves_nothing_is_one_sentence(k: int) -> None:
    for cut in (first, rest):
        with pytest.raises(InputError, match=f"num_tasks={k}"):
            cut(validated(), k)


def test_tuning_without_validation_examples_names_the_remedy() -> None:
    with pytest.raises(InputError, match=r"stream\.val_fraction"):
        list(first(toy_stream(3), 2))


def test_a_search_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hydra/sweeper=tune"):
        Protocol("score_rest", 2, tmp_path).found()
    with pytest.raises(InputError, match="tune_first"):
        Protocol("tune_frist", 2)


@pytest.mark.parametrize(("name", "num_tasks"), [("tune_first", None), ("score_rest", None), ("tune_everything", 2)])
def test_a_protocol_that_does_not_say_what_is_for_tuning_is_one_sentence(name: str, num_tasks: int | None) -> None:
    with pytest.raises(InputError, match=rf"protocol\.num_tasks={num_tasks}: {name}"):
        Protocol(name, num_tasks)


def test_the_budget_of_a_search_is_counted(tmp_path: Path) -> None:
    (tmp_path / "optimization_results.yaml").write_text("best_params:\n  optimizer.lr: 0.3\n")
    for trial in range(3):
        place = tmp_path / f"{trial}_stream.root=" / "data"  # a value with a slash makes a folder
        place.mkdir(parents=True)
        table = "task,seconds,steps,flops\n1,2.0,10,\n2,3.0,20,\n"
        (place / "resources.csv").write_text(table)
    protocol = Protocol("score_rest", 2, tmp_path)
    assert protocol.found() == {"optimizer.lr": 0.3}
    budget = protocol.budget()
    assert budget["trials"] == 3 and budget["seconds"] == 15.0 and budget["steps"] == 90
    assert math.isnan(budget["flops"])
