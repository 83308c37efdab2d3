"""What is compared with what, what is never averaged, and that the page says nothing that the CSV does not."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import cl.compare
from cl.compare.align import align, method_config, shortest_names, strategies
from cl.compare.command import main
from cl.compare.forecasts import forecasts
from cl.compare.leaderboard import cell_text, leaderboard, number, terminal_tables
from cl.compare.lines import front
from cl.compare.numbers import Number, summarise
from cl.compare.read import RunFiles, find_runs, read_run
from cl.compare.tuning import MARKS
from cl.errors import InputError
from cl.metrics.transfer import SCALARS, TransferMatrix, worked_example
from cl.report.manifest import write_manifest
from cl.report.run import Run
from cl.report.tables import FileReport

Rows = list[dict[str, str]]


def random_R(seed: int, num_tasks: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((num_tasks + 1, num_tasks), dtype=np.float32))


BOUNDS = {"joint": "upper", "finetune": "lower"}


def make_run(
    place: Path,
    strategy: str = "er",
    seed: int = 0,
    R: torch.Tensor | None = None,
    rows: int | None = None,
    order: tuple[int, ...] = (),
    config: dict | None = None,
    masks: tuple[str, ...] = ("class", "task"),
    names: tuple[str, ...] = (),
) -> Path:
    """Write a run directory by the run's own reporter; `rows` is how many rows of R it has come to."""
    R = random_R(seed) if R is None else R
    num_tasks = R.shape[1]
    matrices = {mask: TransferMatrix(num_tasks, mask) for mask in masks}
    tasks = list(names or (f"t{i}" for i in range(num_tasks)))
    run = Run(
        place, {}, tasks, "class", matrices, order=order or tuple(range(num_tasks)), bound=BOUNDS.get(strategy, "")
    )
    place.mkdir(parents=True)
    base = {
        "seed": seed,
        "epochs": 1,
        "strategy": {strategy: {"_target_": f"cl.strategies.{strategy}.X", "memory_size": 200}},
        "stream": {"_target_": "cl.streams.split.split", "num_tasks": num_tasks, "seed": seed, "order": None},
    }
    OmegaConf.save(OmegaConf.merge(base, config or {}), place / "config.yaml")
    write_manifest(run, after_task=-1)
    report = FileReport()
    report.start(run, after_task=-1)
    for i in range(len(R) if rows is None else rows):
        for k, matrix in enumerate(matrices.values()):
            matrix.record(i, R[i] if k == 0 else R[i] / 2 + 0.5)
        report.row(run, after_task=i)
    report.finish(run)
    return place


def add_extras(place: Path, seed: int, cost: float = 1.0) -> None:
    draw = np.random.default_rng(seed)
    lines = ["task,step,total_step,tested,mask,metric,value"]
    for task in (1, 2, 3):
        for step in (0, 5, 10):
            lines += [f"{task},{step},{10 * task - 10 + step},{k},class,accuracy,{draw.random()!r}" for k in (1, 2, 3)]
    (place / "learning_curves.csv").write_text("\n".join(lines) + "\n")
    table = "task,seconds,steps,flops,parameters,peak_memory_bytes\n"
    table += "".join(f"{t},{cost * t + seed},10,{cost * 1e9},{100 * t},{7 if t == 2 else 5}\n" for t in (1, 2, 3))
    (place / "resources.csv").write_text(table)
    content = json.loads((place / "transfer.json").read_text())
    entry = {
        "value": 1.2 + 0.1 * seed,
        "definition": "mean_j RP_j",
        "scale": "ratio, [0, inf)",
        "higher_is_better": True,
    }
    content["measures"] = {"relative_performance": entry}
    content["absent"] = {"intransigence": "no joint run"}
    (place / "transfer.json").write_text(json.dumps(content))


def edit(place: Path, **more: object) -> Path:
    """Put more into transfer.json."""
    path = place / "transfer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return place


Values = list[float | None]


def forecast(estimates: dict[str, Values], gain: Values, against: str = "experts") -> dict[str, object]:
    """What a run's own report says, with a tau that is of this run alone."""
    common = {"forward_transfer": gain, "against": against, "tau": 0.123, "low": None, "high": None, "p": 0.456}
    return {name: {"estimate": values, **common} for name, values in estimates.items()}


SEARCH = {"protocol": "score_rest", "optimizer.lr": 0.125, "trials": 30, "seconds": 61.5, "steps": 4711, "flops": None}


def many(place: Path, seeds: int = 3, extras: bool = True) -> Path:
    for k, strategy in enumerate(("finetune", "er", "ewc", "joint")):
        for seed in range(seeds):
            path = make_run(place / f"{strategy}-{seed}", strategy, seed, R=random_R(10 * k + seed))
            if extras:
                add_extras(path, seed, cost=k + 1)
    return place


def compare(*arguments: object) -> Rows:
    """Run the command and return its CSV."""
    main([str(a) for a in arguments])
    out = Path(str(arguments[arguments.index("--out") + 1]))
    with (out / "comparison.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def select(rows: Rows, **wanted: str) -> Rows:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def one(rows: Rows, **wanted: str) -> dict[str, str]:
    found = select(rows, **wanted)
    assert len(found) == 1, (wanted, found)
    return found[0]


# --------------------------------------------------------------------------- numbers


def test_the_worked_example_comes_through_with_its_known_answers(tmp_path, capsys):
    make_run(tmp_path / "a", R=worked_example())
    rows = compare(tmp_path / "a", "--out", tmp_path)
    known = {"average_accuracy": 0.84, "bwt_gem": -0.015, "fwt_gem": 0.2, "forgetting_chaudhry": 0.035}
    for name, value in known.items():
        row = one(rows, kind="group", quantity=name, mask="class", after_task="")
        assert float(row["mean"]) == pytest.approx(value, abs=1e-7) and row["num"] == "1"
        assert row["sd"] == row["low"] == row["high"] == "", "one run has no spread"
    row = one(rows, kind="group", quantity="accuracy", mask="class", after_task="2", task="1")
    assert float(row["mean"]) == pytest.approx(0.94)
    means = {
        k: float(one(rows, kind="group", quantity="average_accuracy", mask="class", after_task=k)["mean"])
        for k in "123"
    }
    assert means == pytest.approx({"1": 0.90, "2": 0.895, "3": 0.84})
    assert "84.0" in capsys.readouterr().out


def test_scalars_are_of_each_run_first_and_then_mean_sd_and_t_interval(tmp_path):
    from scipy import stats

    rows = compare(many(tmp_path / "runs", seeds=4), "--out", tmp_path, "--level", "0.9")
    values = [SCALARS["forgetting_chaudhry"].function(random_R(10 + seed).double()).item() for seed in range(4)]
    row = one(rows, kind="group", group="er", mask="class", quantity="forgetting_chaudhry", after_task="")
    # within [-1, 1]: a t interval of log((1 + m) / (1 - m)), whose slope is 2 / (1 - m^2)
    mean = np.mean(values)
    ends = stats.t.interval(0.9, 3, np.log((1 + mean) / (1 - mean)), stats.sem(values) * 2 / (1 - mean**2))
    low, high = np.tanh(np.array(ends) / 2)
    assert [float(row[k]) for k in ("mean", "sd", "low", "high")] == pytest.approx(
        [mean, np.std(values, ddof=1), low, high]
    )
    single = select(rows, kind="run", group="er", mask="class", quantity="forgetting_chaudhry")
    assert [float(r["mean"]) for r in single] == pytest.approx(values) and [r["seed"] for r in single] == list("0123")


def test_cells_are_means_over_seeds_and_differences_are_paired(tmp_path):
    rows = compare(many(tmp_path / "runs"), "--out", tmp_path)
    er, ewc = (np.stack([random_R(10 * k + seed).numpy() for seed in range(3)]) for k in (1, 2))
    for after, task in np.ndindex(4, 3):
        cell = {"mask": "class", "quantity": "accuracy", "after_task": str(after), "task": str(task + 1)}
        row = one(rows, kind="group", group="er", **cell)
        assert float(row["mean"]) == pytest.approx(er[:, after, task].mean(), rel=1e-6)
        assert float(row["sd"]) == pytest.approx(er[:, after, task].std(ddof=1), rel=1e-5)
        row = one(rows, kind="difference", group="ewc", base="er", **cell)
        assert float(row["mean"]) == pytest.approx((ewc - er)[:, after, task].mean(), abs=1e-6)
        assert float(row["sd"]) == pytest.approx((ewc - er)[:, after, task].std(ddof=1), rel=1e-5)


def test_a_seed_that_one_group_lacks_is_in_its_mean_and_in_no_difference(tmp_path):
    for strategy, shift, seeds in (("er", 0.0, (0, 1, 2)), ("ewc", 0.25, (0, 1))):
        for seed in seeds:
            R = torch.full((4, 3), 0.125 + 0.5 * (seed == 2) + shift)
            make_run(tmp_path / "runs" / f"{strategy}{seed}", strategy, seed, R)
    rows = compare(tmp_path / "runs", "--out", tmp_path, "--base", "er")
    cell = {"mask": "class", "quantity": "accuracy", "after_task": "1", "task": "1"}
    difference = one(rows, kind="difference", group="ewc", **cell)
    assert float(difference["mean"]) == 0.25 and difference["num"] == "2"
    assert float(one(rows, kind="group", group="er", **cell)["mean"]) == pytest.approx((0.125 * 2 + 0.625) / 3)
    notes = align([read_run(path) for path in find_runs([tmp_path / "runs"])]).notes
    assert any(note.startswith("ewc has no run of seed 2") for note in notes)


def test_cells_of_different_orders_are_never_averaged(tmp_path):
    for i, order in enumerate(((0, 1, 2), (2, 1, 0))):
        for seed in (0, 1):
            R = torch.full((4, 3), 0.25 + 0.5 * i)
            make_run(tmp_path / "runs" / f"{i}{seed}", "er", seed, R, order=order, names=("abc", "cba")[i])
    rows = compare(tmp_path / "runs", "--out", tmp_path)
    cells = select(rows, kind="group", quantity="accuracy", mask="class")
    assert {(r["layout"], r["mean"], r["num"]) for r in cells} == {
        ("order 1, 2, 3", "0.25", "2"),
        ("order 3, 2, 1", "0.75", "2"),
    }
    scalar = one(rows, kind="group", quantity="average_accuracy", mask="class", after_task="")
    assert float(scalar["mean"]) == 0.5 and scalar["num"] == "4", "a scalar is of a run, whatever its order"
    assert all(r["num"] == "4" for r in select(rows, kind="group", quantity="average_accuracy", mask="class"))


def test_other_classes_in_each_seed_keep_cells_apart_too(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / "runs" / str(seed), seed=seed, names=("xyz", "zxy")[seed])
    rows = compare(tmp_path / "runs", "--out", tmp_path)
    cells = select(rows, kind="group", quantity="accuracy", mask="class")
    assert {r["layout"] for r in cells} == {"x → y → z", "z → x → y"} and {r["num"] for r in cells} == {"1"}


def test_streams_and_lengths_have_boards_of_their_own_and_ranks_over_them(tmp_path, capsys):
    level = {("er", 2): 0.9, ("er", 3): 0.8, ("ewc", 2): 0.5, ("ewc", 3): 0.85}
    for (strategy, num_tasks), value in level.items():
        for seed in (0, 1):
            place = tmp_path / "runs" / f"{strategy}{num_tasks}{seed}"
            make_run(place, strategy, seed, torch.full((num_tasks + 1, num_tasks), value))
    rows = compare(tmp_path / "runs", "--out", tmp_path)
    scalars = select(rows, kind="group", quantity="average_accuracy", mask="class", after_task="")
    found = {(r["group"], r["stream"]): float(r["mean"]) for r in scalars}
    assert found == pytest.approx({(s, f"split tasks {t}"): v for (s, t), v in level.items()})
    assert {r["group"]: r["mean"] for r in select(rows, kind="rank", quantity="average_accuracy")} == {
        "er": "1.5",
        "ewc": "1.5",
    }
    # Nemenyi for two groups is the normal test: 1.96 sqrt(2 * 3 / (6 * 2))
    critical = one(rows, kind="rank", quantity="critical_difference")
    assert float(critical["mean"]) == pytest.approx(1.959964 * math.sqrt(0.5), rel=1e-4)
    assert "2 streams" in capsys.readouterr().out


def test_tests_are_paired_and_corrected_over_all_pairs(tmp_path):
    from scipy import stats

    rows = compare(many(tmp_path / "runs", seeds=5), "--out", tmp_path)
    values = {
        name: [random_R(10 * k + seed).double()[3].mean().item() for seed in range(5)]
        for k, name in enumerate(("finetune", "er", "ewc", "joint"))
    }
    best = max(("er", "ewc"), key=lambda name: np.mean(values[name]))
    names = list(values)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    p = [stats.ttest_rel(values[a], values[b]).pvalue for a, b in pairs]
    order = np.argsort(p)
    adjusted = dict(
        zip(
            [pairs[i] for i in order], np.maximum.accumulate([p[i] * (6 - k) for k, i in enumerate(order)]), strict=True
        )
    )
    tests = select(rows, kind="test")
    assert {r["base"] for r in tests} == {best} and len(tests) == 3
    for row in tests:
        pair = next(pair for pair in pairs if set(pair) == {row["group"], best})
        assert float(row["p"]) == pytest.approx(min(1, adjusted[pair]))
        assert float(row["mean"]) == pytest.approx(np.mean(values[row["group"]]) - np.mean(values[best]))
        assert float(row["low"]) + float(row["high"]) == pytest.approx(2 * float(row["mean"]))
        assert float(row["low"]) <= float(row["high"])


def test_learning_curves_average_only_steps_that_all_runs_have(tmp_path):
    for seed, extra in ((0, ""), (1, "1,7,7,1,class,accuracy,0.9\n")):
        place = make_run(tmp_path / "runs" / str(seed), seed=seed)
        text = f"task,step,total_step,tested,mask,metric,value\n1,0,0,1,class,accuracy,{0.25 * seed}\n{extra}"
        (place / "learning_curves.csv").write_text(text + f"1,9,9,1,class,accuracy,{0.5 + 0.25 * seed}\n")
    rows = compare(tmp_path / "runs", "--out", tmp_path)
    curve = select(rows, kind="group", quantity="accuracy_curve")
    assert [(r["step"], float(r["mean"]), r["num"]) for r in curve] == [("0", 0.125, "2"), ("9", 0.625, "2")]
    notes = align([read_run(path) for path in find_runs([tmp_path / "runs"])]).notes
    assert any(note.startswith("er was tested at different steps") for note in notes)


def test_recorded_numbers_are_drawn_at_the_steps_that_all_runs_have(tmp_path):
    for seed in (0, 1):
        place = make_run(tmp_path / "runs" / str(seed), seed=seed)
        lines = ["step,task,name,value", "5,1,train/loss,9.0", "10,1,record/alpha,"]
        lines += [f"{step},1,record/alpha,{step + 2.0 * seed}" for step in (20, 40, 60 + seed)]
        (place / "training.csv").write_text("\n".join(lines) + "\n")
    rows = compare(tmp_path / "runs", "--out", tmp_path)
    found = select(rows, kind="group", quantity="record/alpha")
    assert [(r["step"], float(r["mean"]), r["num"]) for r in found] == [("20", 21.0, "2"), ("40", 41.0, "2")]
    assert not select(rows, quantity="record/train/loss")
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "Recorded numbers" in page and "alpha by step, one line for each group" in page


def test_resources_are_summed_where_they_add_up(tmp_path):
    add_extras(make_run(tmp_path / "runs" / "a"), seed=0, cost=2.0)
    rows = compare(tmp_path / "runs", "--out", tmp_path)
    found = {r["quantity"]: float(r["mean"]) for r in select(rows, kind="group", mask="")}
    assert (
        found.items()
        >= {"seconds": 12.0, "steps": 30.0, "flops": 6e9, "parameters": 300.0, "peak_memory_bytes": 7.0}.items()
    )
    assert found["relative_performance"] == 1.2


costs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8)


@given(costs, st.booleans())
def test_the_front_holds_exactly_what_nothing_beats(points, higher):
    sign = 1 if higher else -1
    marks = [(str(i), number_of(x), number_of(y)) for i, (x, y) in enumerate(points)]
    expected = {
        (x, y) for x, y in points if not any(a <= x and sign * b >= sign * y and (a, b) != (x, y) for a, b in points)
    }
    found = front(marks, higher)
    assert set(found) == expected and found == sorted(found) and len(found) == len(expected)


def number_of(value: float) -> Number:
    return Number("group", "", "", "", "", "", "", "", mean=float(value))


# --------------------------------------------------------------------------- forecasts


def with_forecasts(place: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Write runs whose forecasts have gaps, two of them measured zero-shot, and return the whole pairs by kind."""
    draw = np.random.default_rng(5)
    pairs: dict[str, tuple[list[float], list[float]]] = {"experts": ([], []), "zero-shot": ([], [])}
    for i, (strategy, seed, against) in enumerate(
        [(s, k, "zero-shot" if k == 2 else "experts") for s in ("er", "ewc") for k in range(3)]
    ):
        run = make_run(place / str(i), strategy, seed, R=random_R(i, 5))
        guess: Values = [*(draw.random(5) + i)]  # runs lie apart: the tau of all is none of those inside runs
        gain: Values = [None, *(0.3 * i + draw.random(4))]
        if i == 0:
            guess[3] = None
        edit(run, forecasts=forecast({"vci": guess, "constant": [1.0] * 5}, gain, against))
        whole = [(x, y) for x, y in zip(guess, gain, strict=True) if x is not None and y is not None]
        pairs[against][0].extend(x for x, _ in whole)
        pairs[against][1].extend(y for _, y in whole)
    return pairs


def test_tau_is_over_the_tasks_of_all_runs_that_share_what_they_are_measured_against(tmp_path):
    from scipy import stats

    pairs = with_forecasts(tmp_path / "runs")
    rows = compare(tmp_path / "runs", "--out", tmp_path)
    for against, (x, y) in pairs.items():
        row = one(rows, kind="forecast", quantity="vci_tau", base=against)
        tau, p = stats.kendalltau(x, y)
        assert int(row["num"]) == len(x) == {"experts": 15, "zero-shot": 8}[against]
        assert (float(row["mean"]), float(row["p"])) == pytest.approx((tau, p))
        assert -1 <= float(row["low"]) < tau < float(row["high"]) <= 1
        row = one(rows, kind="forecast", quantity="constant_tau", base=against)
        assert row["mean"] == row["p"] == row["low"] == "", "what never varies orders nothing"
    assert len(select(rows, kind="forecast")) == 4


def test_every_point_of_a_forecast_stands_in_the_csv_once(tmp_path):
    pairs = with_forecasts(tmp_path / "runs")
    rows = compare(tmp_path / "runs", "--out", tmp_path)
    gains = select(rows, kind="run", quantity="forward_transfer")
    assert len(gains) == 6 * 4 and {row["task"] for row in gains} == set("2345"), "not once an estimator"
    guess = {
        (row["group"], row["seed"], row["task"]): float(row["mean"])
        for row in select(rows, kind="run", quantity="vci_estimate")
    }
    assert len(guess) == 6 * 5 - 1
    for against, (x, y) in pairs.items():
        points = {(row["group"], row["seed"], row["task"]): row["mean"] for row in gains if row["base"] == against}
        found = [(guess[at], float(value)) for at, value in points.items() if at in guess]
        assert sorted(found) == sorted(zip(x, y, strict=True))


@given(st.permutations(range(6)), st.booleans())
@settings(max_examples=20, deadline=None)
def test_tau_does_not_care_how_points_are_shared_among_runs(tmp_path_factory, order, reverse):
    place = tmp_path_factory.mktemp("runs")
    y = [-k if reverse else k for k in order]
    for seed in range(2):
        run = make_run(place / str(seed), seed=seed, R=random_R(seed, 4))
        mine = slice(3 * seed, 3 * seed + 3)
        edit(run, forecasts=forecast({"tmi": [None, *map(math.exp, order[mine])]}, [None, *y[mine]]))
    found = align([read_run(path) for path in find_runs([place])])
    (pooled,) = forecasts(found.stages[0], summarise(found, 0.95, []))
    assert pooled.tau.mean == pytest.approx(-1.0 if reverse else 1.0) and pooled.tau.num == 6
    assert pooled.tau.p == pytest.approx(2 / math.factorial(6)), "of all orders, this one and its reverse"


def test_a_page_without_forecasts_says_nothing_of_them(tmp_path):
    edit(make_run(tmp_path / "runs" / "a"), forecasts={}, tuning={})
    make_run(tmp_path / "runs" / "b", seed=1)
    rows = compare(tmp_path / "runs", "--out", tmp_path)
    source = (tmp_path / "comparison.html").read_text(encoding="utf-8").partition('<script type="application/json"')[0]
    assert "Forecasts" not in source and "Tuning" not in source
    assert not [row for row in rows if row["kind"] == "forecast" or row["quantity"].startswith("tuning")]


# --------------------------------------------------------------------------- tuning


def test_what_tunes_is_never_the_best_and_what_tuned_on_everything_is_marked(tmp_path, capsys):
    for strategy, level, protocol in (("er", 0.9, "tune_first"), ("ewc", 0.7, "tune_everything"), ("lwf", 0.5, "")):
        for seed in (0, 1):
            run = make_run(tmp_path / "runs" / f"{strategy}{seed}", strategy, seed, torch.full((4, 3), level))
            edit(run, tuning={"protocol": protocol} if protocol else {})
    found = align([read_run(path) for path in find_runs([tmp_path / "runs"])])
    board = leaderboard(found, found.stages[0], summarise(found, 0.95, []), "average_accuracy")
    assert [row.group for row in board.rows] == ["er", "ewc", "lwf"] and board.best == "ewc"
    assert [row.tuning for row in board.rows] == [MARKS["tune_first"], MARKS["tune_everything"], ""]
    assert not any(board.rows[0].best) and board.rows[1].best[0]
    compare(tmp_path / "runs", "--out", tmp_path)
    said = capsys.readouterr().out
    assert all(mark in said for mark in MARKS.values())
    source = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    for name, mark in (("er", MARKS["tune_first"]), ("ewc", MARKS["tune_everything"])):
        assert f'<th scope="row">{name}<small>{mark}</small></th>' in source
    assert "bounds and tuning left out" in source


def halves(place: Path, strategy: str, level: float, protocol: str) -> None:
    """Write runs on the first or the last two of four tasks."""
    for seed in (0, 1):
        config = {"protocol": {"name": protocol, "num_tasks": 2}, "stream": {"num_tasks": 4}}
        R = torch.full((3, 2), level + 0.01 * seed)
        edit(
            make_run(place / f"{strategy}-{protocol}-{seed}", strategy, seed, R, config=config),
            tuning={"protocol": protocol},
        )


def test_first_and_last_tasks_are_two_streams_and_only_results_are_ranked(tmp_path):
    for strategy, level in (("er", 0.5), ("ewc", 0.6)):
        for protocol in ("tune_first", "score_rest"):
            halves(tmp_path / "runs", strategy, level, protocol)
    found = align([read_run(path) for path in find_runs([tmp_path / "runs"])])
    assert [stage.name.rpartition("tasks ")[2] for stage in found.stages] == ["last 2", "first 2"]
    rows = compare(tmp_path / "runs", "--out", tmp_path)
    assert {row["stream"].rpartition(" ")[0].rpartition(" ")[2] for row in select(rows, kind="test")} == {"last"}
    assert not select(rows, kind="rank"), "one stream of results"
    for strategy, level in (("er", 0.7), ("ewc", 0.6)):  # a second one: the stream of tuning takes no part
        config = {"protocol": {"name": "score_rest", "num_tasks": 2}}
        for seed in (0, 1):
            R = torch.full((6, 5), level)
            make_run(tmp_path / "runs" / f"long-{strategy}-{seed}", strategy, seed, R, config=config)
    rows = compare(tmp_path / "runs", "--out", tmp_path)
    ranked = select(rows, kind="rank", quantity="average_accuracy")
    assert {row["mean"] for row in ranked} == {"1.5"} and {row["num"] for row in ranked} == {"2"}


def test_budgets_of_searches_are_in_the_csv_and_differences_are_said(tmp_path):
    for strategy, trials in (("er", 30), ("ewc", 10)):
        for seed in (0, 1):
            tuning = SEARCH | {"trials": trials}
            edit(make_run(tmp_path / "runs" / f"{strategy}{seed}", strategy, seed), tuning=tuning)
    rows = compare(tmp_path / "runs", "--out", tmp_path)
    for name, value in (("trials", 30.0), ("seconds", 61.5), ("steps", 4711.0)):
        row = one(rows, kind="group", group="er", quantity=f"tuning_{name}")
        assert (float(row["mean"]), float(row["sd"]), row["num"]) == (value, 0.0, "2")
    assert not select(rows, quantity="tuning_flops"), "what was not counted is absent, not 0"
    source = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert '<data value="61.5">61.5</data>' in source and "optimizer.lr = 0.125" in source

    def notes() -> list[str]:
        return align([read_run(path) for path in find_runs([tmp_path / "runs"])]).notes

    assert "Searches had different budgets: 30 trials, 4711 steps (er); 10 trials, 4711 steps (ewc)." in notes()
    assert not any(note.startswith("Hyper-parameters") for note in notes())
    for seed in (0, 1):  # other seconds are no other budget
        edit(tmp_path / "runs" / f"ewc{seed}", tuning=SEARCH | {"seconds": 1.0})
    assert not any(note.startswith(("Searches", "Hyper-parameters")) for note in notes())
    for seed in (0, 1):
        edit(tmp_path / "runs" / f"ewc{seed}", tuning={"protocol": "tune_everything"})
    said = next(note for note in notes() if note.startswith("Hyper-parameters were chosen differently"))
    assert "by a search on the first tasks, left out here (er)" in said
    assert "a trial of a search on the test sets of all tasks (ewc)" in said


def test_values_of_a_search_name_groups_in_four_digits_where_that_parts_them():
    def er(lr: float) -> dict[str, object]:
        return {"strategy.er.memory_size": 200, "optimizer.lr": lr}

    assert shortest_names([er(0.0443037524), er(0.1398196141)], strategies) == ["er lr 0.0443", "er lr 0.1398"]
    assert shortest_names([er(0.123451), er(0.123452)], strategies) == ["er lr 0.123451", "er lr 0.123452"]
    plain = method_config(RunFiles(Path("."), er(0.1) | {"protocol": None}))
    protocols = [plain, er(0.1) | {"protocol.name": "tune_everything"}]
    assert shortest_names(protocols, strategies) == ["er no protocol", "er protocol tune_everything"]


# --------------------------------------------------------------------------- groups


def test_groups_are_named_by_the_least_that_parts_them(tmp_path):
    for size in (200, 500):
        for seed in (0, 1):
            place = tmp_path / f"{size}-{seed}"
            make_run(place, seed=seed, config={"strategy": {"er": {"memory_size": size}}, "group": f"g{size}{seed}"})
    make_run(tmp_path / "ewc", "ewc", config={"epochs": 3})
    found = align([read_run(path) for path in find_runs([tmp_path])])
    assert {name: len(group.runs) for name, group in found.groups.items()} == {
        "er memory 200": 2,
        "er memory 500": 2,
        "ewc": 1,
    }
    assert any("more than the strategy: epochs" in note for note in found.notes)
    assert not any(key.startswith("group") for key in found.differences)


def test_a_cadence_of_its_own_is_named_and_other_reports_are_not(tmp_path):
    for name, other in {"cadence": {"every": 5}, "picture": {"every": 1, "html": {"_target_": "x"}}}.items():
        for seed, report in enumerate(({"every": 1}, other)):
            make_run(tmp_path / name / str(seed), seed=seed, config={"report": report})
    cadence, picture = (
        align([read_run(path) for path in find_runs([tmp_path / name])]).notes for name in ("cadence", "picture")
    )
    assert "Runs differ in report.every: measurements beside R depend on it." in cadence
    assert not any("differ in report" in note for note in picture)


values = st.sampled_from([None, 0, 1, 0.5, "a", "cl.x.A"])
configs = st.fixed_dictionaries(
    {},
    optional={"strategy.er.memory_size": values, "strategy.ewc.weight": values, "lr": values, "optimizer.lr": values},
)


@given(st.lists(configs, min_size=1, max_size=6, unique_by=repr))
def test_names_of_groups_are_always_different(drawn):
    distinct = list({tuple(sorted((k, repr(v)) for k, v in config.items())): config for config in drawn}.values())
    names = shortest_names(distinct, strategies)
    assert len(set(names)) == len(distinct) and not any("(" in name for name in names)
    for config, name in zip(distinct, names, strict=True):
        assert name.startswith(strategies(config) or "run")


def test_by_pairs_runs_that_agree_in_what_is_left_open(tmp_path):
    for strategy, shift in (("er", 0.0), ("ewc", 0.125)):
        for epochs in (1, 2):
            R = torch.full((4, 3), 0.25 * epochs + shift)
            make_run(tmp_path / "runs" / f"{strategy}{epochs}", strategy, 0, R, config={"epochs": epochs})
    rows = compare(tmp_path / "runs", "--out", tmp_path, "--by", "strategy", "--base", "er")
    difference = one(rows, kind="difference", group="ewc", mask="class", quantity="accuracy", after_task="1", task="1")
    assert (float(difference["mean"]), float(difference["sd"]), difference["num"]) == (0.125, 0.0, "2")
    with pytest.raises(SystemExit, match="'optimiser'"):
        compare(tmp_path / "runs", "--out", tmp_path, "--by", "optimiser")


def test_bounds_are_never_the_best_and_direction_is_respected(tmp_path):
    def learner(forget: float) -> torch.Tensor:
        R = torch.full((4, 3), 0.9)
        R[3, 0] -= forget
        return R

    for strategy, forget in (("joint", 0.0), ("er", 0.2), ("ewc", 0.1), ("finetune", 0.05)):
        make_run(tmp_path / strategy, strategy, R=learner(forget))
    found = align([read_run(path) for path in find_runs([tmp_path])])
    numbers = summarise(found, 0.95, [])
    board = leaderboard(found, found.stages[0], numbers, "forgetting_chaudhry")
    assert [row.group for row in board.rows] == ["joint", "finetune", "ewc", "er"] and board.best == "ewc"
    assert {row.group: row.bound for row in board.rows} == {
        "joint": "upper bound",
        "finetune": "lower bound",
        "ewc": "",
        "er": "",
    }
    for i, column in enumerate(board.columns):
        if column.quantity in ("forgetting_chaudhry", "average_accuracy", "bwt_gem"):
            assert [row.group for row in board.rows if row.best[i]] == ["ewc"], column.quantity
        # the cells above the diagonal mean nothing where classes to come have no output
        assert column.mask == ("task" if column.quantity == "fwt_gem" else "class")


def test_a_run_of_before_bounds_were_written_has_none(tmp_path):
    for strategy in ("joint", "er"):
        path = make_run(tmp_path / strategy, strategy) / "transfer.json"
        content = json.loads(path.read_text())
        assert content.pop("bound") == BOUNDS.get(strategy, "")
        path.write_text(json.dumps(content))
    found = align([read_run(path) for path in find_runs([tmp_path])])
    assert {group.bound for group in found.groups.values()} == {""}


def test_a_caveat_is_said_where_no_better_mask_exists(tmp_path, capsys):
    make_run(tmp_path / "runs" / "a", masks=("class",))
    compare(tmp_path / "runs", "--out", tmp_path)
    assert "Forward transfer, class-incremental" in " ".join(capsys.readouterr().out.split())


def test_seeds_of_the_stream_make_no_streams_but_its_own_values_do(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / "a" / str(seed), seed=seed)
    assert len(align([read_run(path) for path in find_runs([tmp_path / "a"])]).stages) == 1
    make_run(tmp_path / "a" / "other", seed=2, config={"stream": {"val_fraction": 0.1}})
    assert len(align([read_run(path) for path in find_runs([tmp_path / "a"])]).stages) == 2


def test_a_shorter_stream_of_one_configuration_is_another_stream(tmp_path):
    for num_tasks in (2, 3):  # such as a protocol that leaves the first tasks to tuning
        R = random_R(num_tasks, num_tasks)
        make_run(tmp_path / str(num_tasks), "er", num_tasks, R, config={"stream": {"num_tasks": 5}})
    assert len(align([read_run(path) for path in find_runs([tmp_path])]).stages) == 2


def test_unfinished_runs_are_named_and_kept_only_on_demand(tmp_path, capsys):
    make_run(tmp_path / "runs" / "whole", R=torch.full((4, 3), 0.5))
    make_run(tmp_path / "runs" / "part", seed=1, R=torch.full((4, 3), 0.9), rows=3)
    (tmp_path / "runs" / "begun").mkdir()
    (tmp_path / "runs" / "begun" / "config.yaml").write_text("seed: 2\n")
    (tmp_path / "runs" / "begun" / "manifest.json").write_text("{}")
    rows = compare(tmp_path / "runs", "--out", tmp_path)
    assert {r["group"] for r in rows} == {"er"} and {r["num"] for r in select(rows, kind="group")} == {"1"}
    said = " ".join(capsys.readouterr().out.split())
    assert "part has learned 2 of 3 tasks: it is left out" in said and "begun has learned 0 of ? tasks" in said
    rows = compare(tmp_path / "runs", "--out", tmp_path, "--unfinished")
    scalars = select(rows, kind="group", quantity="average_accuracy", mask="class", after_task="")
    assert {r["group"]: float(r["mean"]) for r in scalars} == pytest.approx({"er": 0.5, "er (after 2 of 3 tasks)": 0.9})
    assert not [r for r in select(rows, kind="test") if r["base"] != "er"], "what is unfinished is never the best"


def test_runs_that_repeat_another_count_once(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    found = align([read_run(path) for path in find_runs([tmp_path, tmp_path / "a"])])
    assert len(found.runs) == 1 and any("repeats a run" in note for note in found.notes)


def test_runs_are_found_in_the_order_of_their_numbers_and_never_in_hidden_folders(tmp_path):
    for name in ("10_a", "9_a", "deep/er/1_a", ".hydra/x"):
        make_run(tmp_path / name)
    assert [path.name for path in find_runs([tmp_path])] == ["9_a", "10_a", "1_a"]


def test_versions_that_differ_are_said(tmp_path):
    for seed, version in ((0, "2.1"), (1, "2.2")):
        (make_run(tmp_path / str(seed), seed=seed) / "manifest.json").write_text(
            json.dumps({"versions": {"torch": version}})
        )
    notes = align([read_run(path) for path in find_runs([tmp_path])]).notes
    assert "Versions of torch differ: 2.1 and 2.2." in notes


# --------------------------------------------------------------------------- the page


CHECKED = ("Leaderboard", "Rank correlation")


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_narrow_terminal_cuts_no_number(width, tmp_path):
    """Columns that do not fit stand in further tables, each with the groups."""
    from rich.console import Console

    for name in ("er", "a_long_name_of_a_strategy"):
        for seed in (0, 1):
            make_run(tmp_path / f"{name}{seed}", name, seed, torch.rand(4, 3))
    found = align([read_run(path) for path in find_runs([tmp_path])])
    numbers = summarise(found, 0.95, [])
    board = leaderboard(found, found.stages[0], numbers, "average_accuracy")
    console = Console(width=width, record=True, file=io.StringIO())
    for table in terminal_tables(board, width):
        console.print(table)
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    shown = [
        line
        for c, cell in zip(board.columns, board.rows[0].cells, strict=True)
        for line in cell_text(c, cell).splitlines()
    ]
    assert all(line in text for line in shown)


class Page(HTMLParser):
    """Collects the numbers of tables, the texts of cells and the figures."""

    def __init__(self) -> None:
        super().__init__()
        self.data: list[str] = []
        self.cells: list[str] = []  # of leaderboards and forecasts, without what stands in <data>
        self._caption = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = defaultdict(str)
        self._stack: list[str] = []
        self._script = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._stack.append(tag)
        if tag == "data":
            self.data.append(dict(attrs)["value"])
        if tag == "td" and self._caption.startswith(CHECKED):
            self.cells.append("")
        if tag == "caption":
            self._caption = ""
        if tag == "script":
            self._script = dict(attrs).get("id") or "code"

    def handle_endtag(self, tag):
        while self._stack and self._stack.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self._stack:
            self.scripts[self._script] += data
        elif "caption" in self._stack:
            self._caption += data
        elif "td" in self._stack and "data" not in self._stack and self._caption.startswith(CHECKED):
            self.cells[-1] += data


def parse(path: Path) -> Page:
    found = Page()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def leaves(value) -> list[float]:
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Page, Rows, Path]:
    place = tmp_path_factory.mktemp("made")
    many(place / "runs")
    draw = np.random.default_rng(8)
    for run in sorted((place / "runs").iterdir()):
        strategy, _, seed = run.name.partition("-")
        guess = {"vci": draw.random(3).tolist(), "covariance": [None, *draw.random(2).tolist()], "new": [None] * 3}
        gain = [None, *(draw.random(2) - 0.5).tolist()]
        edit(run, forecasts=forecast(guess, gain, "zero-shot" if seed == "2" else "experts"))
        edit(run, tuning={"er": SEARCH, "ewc": {"protocol": "tune_everything"}}.get(strategy, {}))
    for seed in (0, 1):  # a second stream, and a second order on it
        for strategy in ("er", "ewc"):
            R = random_R(100 + seed, num_tasks=2)
            make_run(place / "runs" / f"short-{strategy}-{seed}", strategy, seed, R, order=((0, 1), (1, 0))[seed])
    rows = compare(place / "runs", "--out", place)
    return parse(place / "comparison.html"), rows, place


def test_every_number_of_the_tables_is_in_the_csv(made):
    page, rows, _ = made
    known = {row[key] for row in rows for key in ("mean", "sd", "low", "high", "p")}
    assert len(page.data) > 300 and set(page.data) <= known
    runs = {row["num"] for row in rows}
    boards = 4 * (6 + 2) + 2 * (5 + 2)  # groups times columns, with runs and tests
    assert len(page.cells) == boards + 2 * 3 * 5  # what it is against, estimators, columns
    for cell in page.cells:
        assert not re.search(r"\d", cell) or cell in runs, f"{cell!r} is a number outside <data>"


def test_every_number_of_the_figures_is_in_the_csv(made):
    page, rows, _ = made
    known = {float(row[key]) for row in rows for key in ("mean", "sd", "low", "high") if row[key]}
    places = {float(row[key]) for row in rows for key in ("after_task", "task", "step", "num") if row[key]}
    seen = 0
    for block in json.loads(page.scripts["figures"]):
        for view in block["views"]:
            for panel in view["panels"]:
                for trace in panel["figure"]["data"]:
                    drawn = leaves(trace["x"]) + leaves(trace["y"]) + leaves(trace.get("z", []))
                    drawn += leaves(trace.get("customdata", []))
                    seen += len(drawn)
                    assert not [v for v in drawn if v not in known and v not in places], block["id"]
                    if trace["type"] == "heatmap":
                        assert set(leaves(trace["z"])) <= known
    assert seen > 1000
    assert {b["id"].partition("-")[2] for b in json.loads(page.scripts["figures"])} == {
        "intervals",
        "matrices",
        "differences",
        "over-tasks",
        "curves",
        "resources",
        "forecasts",
    }


def test_a_scatter_shows_each_task_of_each_run_as_its_group(made):
    page, rows, _ = made
    block = next(b for b in json.loads(page.scripts["figures"]) if b["id"].endswith("forecasts"))
    assert [view["choice"] for view in block["views"]] == [{"against": "experts"}, {"against": "zero-shot"}]
    colours: dict[str, set[str]] = defaultdict(set)
    for view, seeds in zip(block["views"], ("01", "2"), strict=True):
        names = [panel["title"].partition(",")[0] for panel in view["panels"]]
        assert names == ["vci", "covariance"], "the third says nothing"
        for panel in view["panels"]:
            quantity = panel["title"].partition(",")[0] + "_estimate"
            for trace in panel["figure"]["data"]:
                colours[trace["meta"]].add(trace["marker"]["color"] + trace["marker"]["symbol"])
                assert {(seed, task) for seed, task in trace["customdata"]} == {(s, t) for s in seeds for t in (2, 3)}
                for x, y, (seed, task) in zip(trace["x"], trace["y"], trace["customdata"], strict=True):
                    at = {"kind": "run", "group": trace["meta"], "seed": seed, "task": str(task)}
                    assert x == float(one(rows, quantity=quantity, **at)["mean"])
                    assert y == float(one(rows, quantity="forward_transfer", **at)["mean"])
    assert len(colours) == 4 and all(len(found) == 1 for found in colours.values())
    source = (made[2] / "comparison.html").read_text(encoding="utf-8")
    assert "never pooled" in source and "1 - tr(pinv(S_T) S_B) / min(D, C - 1)" in source


def test_a_matrix_is_drawn_where_its_cells_belong(made):
    page = made[0]
    block = next(b for b in json.loads(page.scripts["figures"]) if b["id"].endswith("matrices"))
    view = block["views"][0]
    panel = next(p for p in view["panels"] if p["title"].startswith("er "))
    trace = panel["figure"]["data"][0]
    expected = np.stack([random_R(10 + seed).numpy() for seed in range(3)]).mean(0)
    assert np.allclose(trace["z"], expected) and trace["x"] == [1, 2, 3] and trace["y"] == [0, 1, 2, 3]
    scales = {(p["figure"]["data"][0]["zmin"], p["figure"]["data"][0]["zmax"]) for p in view["panels"]}
    assert scales == {(0, 1.0)}, "one scale for all groups"


def test_scales_of_differences_are_symmetric_and_shared(made):
    for block in json.loads(made[0].scripts["figures"]):
        if block["id"].endswith("differences"):
            for view in block["views"]:
                traces = [panel["figure"]["data"][0] for panel in view["panels"]]
                limit = max([0.05, *(abs(v) for trace in traces for v in leaves(trace["z"]))])
                assert {(t["zmin"], t["zmax"]) for t in traces} == {(-limit, limit)}


def test_no_button_of_plotly_sends_a_figure_away():
    bundle = (Path(cl.compare.__file__).parent / "plotly-cartesian.min.js").read_text(encoding="utf-8")
    script = (Path(cl.compare.__file__).parent / "report.js").read_text(encoding="utf-8")
    removed = re.search(r"UPLOADS = \[(.*)\]", script).group(1)
    senders = set(re.findall(r'name:"(send\w+)"', bundle))
    assert senders <= set(re.findall(r'"(\w+)"', removed)) and "...UPLOADS" in script


def test_the_bundle_of_plotly_draws_every_kind_of_figure(made):
    """The page holds a bundle without maps and three dimensions, a third of the whole of plotly."""
    bundle = (Path(cl.compare.__file__).parent / "plotly-cartesian.min.js").read_text(encoding="utf-8")
    assert "Licensed under the MIT license" in bundle[:300] and "</script" not in bundle
    drawn = {
        t["type"]
        for b in json.loads(made[0].scripts["figures"])
        for v in b["views"]
        for p in v["panels"]
        for t in p["figure"]["data"]
    }
    known = set(re.findall(r'moduleType:"trace",name:"(\w+)"', bundle))
    assert {"scatter", "heatmap", "bar"} <= known and drawn <= known


def test_plotly_knows_every_attribute(made):
    import plotly.graph_objects as go

    for block in json.loads(made[0].scripts["figures"]):
        for panel in block["views"][0]["panels"]:
            go.Figure(panel["figure"])  # raises on what does not exist


def test_the_page_asks_nothing_of_the_network(made):
    page, _, _ = made
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert not [a for tag, a in page.tags if tag == "link" or "src" in a]
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert links and all(link.startswith("#") and link[1:] in ids for link in links), "every link leads somewhere here"


def test_tables_and_controls_can_be_read_without_seeing(made):
    tags = made[0].tags
    assert [a["lang"] for tag, a in tags if tag == "html"] == ["en"]
    assert all("scope" in a for tag, a in tags if tag == "th")
    assert sum(tag == "caption" for tag, _ in tags) == sum(tag == "table" for tag, _ in tags)
    assert all(a.get("aria-label") and a.get("tabindex") == "0" for _, a in tags if a.get("class") == "scroll")
    assert next(a for tag, a in tags if tag == "a") == {"class": "skip", "href": "#main"}
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_names_are_shown_as_they_are(tmp_path):
    evil = "<script>alert(1)</script>"
    for seed, name in ((0, evil), (1, "er")):
        make_run(tmp_path / "runs" / str(seed), name, seed=0, names=(evil, "</script>", "&amp;"))
    compare(tmp_path / "runs", "--out", tmp_path)
    source = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    code = source[source.index('<script type="application/json"') :]
    before = source[: source.index('<script type="application/json"')]
    assert "<script" not in before and html.escape(evil) in before
    assert parse(tmp_path / "comparison.html").scripts.keys() == {"figures", "code"}
    figures = json.loads(code[code.index(">") + 1 : code.index("</script>")])  # nothing ends it early
    panels = [panel for block in figures for view in block["views"] for panel in view["panels"]]
    names = {trace["name"] for panel in panels for trace in panel["figure"]["data"] if "name" in trace}
    assert names == {html.escape(evil), "er"}, "plotly reads tags in names"
    assert (tmp_path / "comparison.csv").read_text(encoding="utf-8").count(evil)


# --------------------------------------------------------------------------- bad input


def test_bad_input_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"No run was found in .*empty: a run directory holds config.yaml"):
        main([str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match=r"There is no directory .*nowhere"):
        main([str(tmp_path / "nowhere")])
    make_run(tmp_path / "part", rows=2)
    with pytest.raises(SystemExit, match="None of the 1 runs is finished"):
        main([str(tmp_path / "part")])
    make_run(tmp_path / "whole" / "a")
    with pytest.raises(SystemExit, match="no scalar called 'average_acuracy': did you mean 'average_accuracy'"):
        main([str(tmp_path / "whole"), "--scalar", "average_acuracy", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no group called 'err': did you mean 'er'"):
        main([str(tmp_path / "whole"), "--base", "err", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"level=95.0 is not between 0 and 1"):
        main([str(tmp_path / "whole"), "--level", "95"])


HEAD = "after_task,task,mask,metric,value\n"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.yaml", "seed: [", "config.yaml cannot be read"),
        ("config.yaml", "[1, 2]", r"config.yaml cannot be read \(it holds no configuration\)"),
        ("transfer.json", "{", "transfer.json cannot be read"),
        ("transfer.json", "[]", "transfer.json cannot be read: it holds no object"),
        ("transfer.json", '{"scenario": "class"}', "it lacks 'num_tasks'"),
        ("transfer.json", {"tuning": {"trials": "many"}}, "transfer.json cannot be read: .*many"),
        ("transfer.json", {"forecasts": {"vci": {"estimate": [1.0]}}}, "it lacks 'forward_transfer'"),
        ("transfer.json", {"forecasts": forecast({"vci": [1.0]}, [1, 2])}, "vci has 1 estimates"),
        ("transfer.json", {"forecasts": forecast({"vci": ["a"]}, [1])}, "transfer.json cannot be read: .*'a'"),
        ("transfer.csv", "after_task,task,mask,value\n", "has no column 'metric'"),
        (
            "transfer.csv",
            "after_task,task,mask,metric,value\n1,1,class,accuracy,x\n",
            "'x' stands in the column 'value'",
        ),
        (
            "transfer.csv",
            f"{HEAD}1,9,class,accuracy,1\n",
            r"a cell \(1, 9\) in a stream of 3",
        ),
        ("transfer.csv", f"{HEAD}1,1,class\n", "line 2 has not as many cells"),
        ("resources.csv", "task,seconds\n1,fast\n", "'fast' stands in the column 'seconds'"),
        ("manifest.json", "\xff", "manifest.json cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, sentence):
    place = make_run(tmp_path / "run")
    if isinstance(content, dict):
        edit(place, **content)
    else:
        (place / name).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=sentence) as error:
        read_run(place)
    assert str(place / name) in str(error.value) and "\n" not in str(error.value)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    place = make_run(tmp_path / "run")
    text = (place / "transfer.csv").read_text()
    (place / "transfer.csv").write_text(text + "3,3,cl")
    assert np.array_equal(read_run(place).matrices["class", "accuracy"].astype(np.float32), random_R(0))


@settings(max_examples=200)
@given(st.floats(1e-3, 1e14))
def test_a_number_is_shown_within_half_a_percent(value):
    shown, _, unit = number(value).partition(" ")
    assert float(shown) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[unit] == pytest.approx(value, rel=5.1e-3)
