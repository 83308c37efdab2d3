"""Weights & Biases: every number in the offline run, one run over restarts, and what it costs when it fails."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cl.metrics.transfer import (
    SCALARS,
)
from cl.report.contract import Report
from cl.report.picture import PictureReport
from cl.report.progress import ProgressBar
from cl.report.run import Run
from cl.report.tables import FileReport
from cl.report.terminal import TerminalReport
from cl.report.wandb import WandbReport
from cl.report.wording import headline
from example_runs import make_run, plain, refuse
from wandb_file import items, parse


def records(directory: Path) -> list[Any]:
    """Read the records of a finished offline run; W&B's own process may still be writing the last ones."""
    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(600):
        found = list(parse(path.read_bytes()))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def learn(run: Run, report: WandbReport, full: dict[str, torch.Tensor], rows: range) -> None:
    for i in rows:
        if i:
            for step in (10, 20):
                point = {"train/loss": i + step / 100, "train/task": i, "epoch": 0}
                report.logger.log_metrics(point, step=20 * (i - 1) + step)
            report.logger.log_metrics({"val/loss": 0.1 * i}, step=1)
        for mask, R in full.items():
            run.matrices[mask].record(i, R[i])
        report.row(run, i)


def test_every_number_is_in_the_offline_run(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = {mask: matrix.R.clone() for mask, matrix in make_run(3).matrices.items()}
    run = make_run(3, rows=0, directory=offline)
    run.config = {
        "seed": 7,
        "strategy": {"er": {"_target_": "cl.strategies.er.ER", "memory_size": 200}, "gpm": {}},
        "stream": {"_target_": "cl.streams.split.split"},
        "dataset": {"_target_": "cl.streams.data.mnist"},
        "tags": ["mine"],
        "group": None,
    }
    report = WandbReport(tags=["paper"])
    assert report.logger.version == ""
    report.start(run, -1)
    assert report.logger.version and report.logger.save_dir == str(offline)
    learn(run, report, full, range(4))
    report.finish(run)

    found: dict[str, list[Any]] = {}
    for record in records(offline):
        found.setdefault(record.WhichOneof("record_type"), []).append(record)
    begun = found["run"][0].run
    assert (begun.project, begun.run_group, begun.display_name) == (
        "clsim",
        "split mnist class 3 tasks",
        "er+gpm seed 7",
    )
    assert set(begun.tags) == {"paper", "mine", "er", "gpm", "class"}
    config = {entry.key: json.loads(entry.value_json) for entry in begun.config.update}
    assert {key: config[key] for key in run.config} == run.config

    axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in found["metric"]}
    for prefix in ("transfer", "class", "task"):
        assert axes[f"{prefix}/*"] == "tasks_learned"
    assert axes["train/*"] == axes["val/*"] == "train/step"

    history = [items(record.history.item) for record in found["history"]]
    curve = [(point["train/step"], point["train/loss"]) for point in history if "train/loss" in point]
    assert curve == [(20 * (i - 1) + s, i + s / 100) for i in (1, 2, 3) for s in (10, 20)]
    validation = [(point["train/step"], point["val/loss"]) for point in history if "val/loss" in point]
    assert validation == [(20 * i, 0.1 * i) for i in (1, 2, 3)]
    assert not any("epoch" in point for point in history)

    rows = [point for point in history if "tasks_learned" in point]
    assert [point["tasks_learned"] for point in rows] == [0, 1, 2, 3]
    (folder,) = offline.glob("wandb/offline-run-*/files")
    for i, point in enumerate(rows):
        for mask, R in full.items():
            table = json.loads((folder / point[f"{mask}/R/path"]).read_text(), parse_constant=refuse)
            assert table["columns"] == ["tasks learned", "1 part-0", "2 part-1", "3 part-2"]
            assert [row[0] for row in table["data"]] == [0, 1, 2, 3]
            back = [[math.nan if value is None else value for value in row[1:]] for row in table["data"]]
            seen = torch.where((torch.arange(4) <= i)[:, None], R, torch.tensor(math.nan))
            torch.testing.assert_close(torch.tensor(back), seen, rtol=0, atol=0, equal_nan=True)
            assert (folder / point[f"{mask}/R_heat_map/path"]).stat().st_size > 1000
            scalars = run.matrices[mask].scalars(i) if i else dict.fromkeys(SCALARS, math.nan)
            for prefix in {mask, "transfer"} if mask == "class" else {mask}:
                named = {k: v for k, v in point.items() if k.startswith(f"{prefix}/") and k.split("/")[1] in SCALARS}
                assert named == {f"{prefix}/{k}": v for k, v in scalars.items() if not math.isnan(v)}

    summary: dict[str, Any] = {}
    for record in found["summary"]:
        summary.update(items(record.summary.update))
    final = {f"task/{k}": v for k, v in run.matrices["task"].scalars().items()}
    final |= {f"{p}/{k}": v for p in ("class", "transfer") for k, v in run.matrices["class"].scalars().items()}
    assert final.items() <= summary.items()
    assert "wandb sync" in capsys.readouterr().out
    assert "WANDB_DATA_DIR" not in os.environ


@pytest.mark.slow
def test_an_offline_run_of_the_command_line_says_what_transfer_json_says(offline: Path) -> None:
    asked = ["references=[experts]", "probes=[ridge]", "report.points=3", "epochs=1", "stream.num_tasks=2"]
    offline.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "cl", "logger=wandb", "hydra.run.dir=out", *asked]
    result = subprocess.run(command, cwd=offline, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    summary: dict[str, Any] = {}
    curve: dict[str, list[float]] = {}
    for record in records(offline / "out"):
        if record.WhichOneof("record_type") == "summary":
            summary.update(items(record.summary.update))
        if record.WhichOneof("record_type") == "history":
            for key, value in items(record.history.item).items():
                if key.startswith("curve/"):
                    curve.setdefault(key, []).append(value)
    written = json.loads((offline / "out" / "transfer.json").read_text())
    expected = {f"measure/{name}": entry["value"] for name, entry in written["measures"].items()}
    for mask, entries in written["masks"].items():
        expected |= {f"{mask}/{name}": entry["value"] for name, entry in entries["scalars"].items()}
    expected = {name: value for name, value in expected.items() if value is not None}
    assert {"measure/fwt_expert", "ridge/bwt_gem", "measure/worst_case_accuracy"} <= expected.keys()
    assert expected.items() <= summary.items()
    with (offline / "out" / "learning_curves.csv").open() as file:
        table: dict[str, list[float]] = {}
        for row in csv.DictReader(file):
            table.setdefault(f"curve/{row['mask']}/task {row['tested']}", []).append(float(row["value"]))
    assert curve.keys() == table.keys()
    for key, values in curve.items():
        assert values == pytest.approx(table[key], abs=1e-6), key


def test_a_run_that_was_complete_still_gets_its_summary(offline: Path) -> None:
    report, run = WandbReport(), make_run(2, directory=offline)
    report.start(run, 2)
    report.finish(run)
    summary: dict[str, Any] = {}
    for record in records(offline):
        if record.WhichOneof("record_type") == "summary":
            summary.update(items(record.summary.update))
    assert {f"task/{k}": v for k, v in run.matrices["task"].scalars().items()}.items() <= summary.items()


def test_a_continued_run_keeps_its_id_and_a_fresh_one_does_not(offline: Path) -> None:
    run = make_run(2, rows=1, directory=offline)
    identities = []
    for after_task in (-1, 0, -1):
        report = WandbReport(project="p")
        report.start(run, after_task)
        identities.append(report.logger.version)
        report.logger.log_metrics({"train/loss": 1.0}, step=1)
        report.finish(run)
    first, second, third = identities
    assert first == second != third


def test_without_a_login_it_is_offline_and_nobody_is_asked(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "login", lambda **options: asked.append(options))
    monkeypatch.delenv("WANDB_MODE")
    assert WandbReport(mode="online")._mode() == "offline"
    assert asked == [{"prompt": False, "verify": False}]
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    assert WandbReport(mode="online")._mode() == "online"
    assert WandbReport(mode="disabled")._mode() == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert WandbReport()._mode() == "offline"


def test_a_w_and_b_that_fails_online_goes_offline(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    tried: list[str] = []

    def init(mode: str, **_: object) -> str:
        tried.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no network")
        return "the run"

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    report = WandbReport(mode="online", dir=offline)
    assert report._begin(make_run(2), known=None) == "the run"
    assert tried == ["online", "offline"]


def test_a_w_and_b_that_cannot_start_costs_one_sentence(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def init(**_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(wandb, "init", init)
    report, run = WandbReport(), make_run(2, directory=offline)
    with pytest.warns(UserWarning, match="cannot start .RuntimeError: disk full.") as caught:
        report.start(run, -1)
    assert len(caught) == 1
    report.row(run, 1)
    report.logger.log_metrics({"train/loss": 1.0}, 1)
    report.finish(run)


def test_a_w_and_b_that_dies_on_the_way_costs_one_sentence(offline: Path) -> None:
    class Dying:
        def log(self, values: object, step: int) -> None:
            raise BrokenPipeError("gone")

    report, run = WandbReport(dir=offline), make_run(2, directory=offline)
    report.start(run, -1)
    report.run.finish()
    report.run = Dying()
    with pytest.warns(UserWarning, match="BrokenPipeError: gone") as caught:
        report.logger.log_metrics({"train/loss": 1.0}, 1)
        report.row(run, 1)
        report.finish(run)
    assert len(caught) == 1


def test_the_group_of_the_configuration_and_of_the_call_come_first() -> None:
    run = make_run(2)
    run.config = {"group": "table 1", "strategy": None}
    assert WandbReport()._labels(run)["group"] == "table 1"
    assert WandbReport(group="mine")._labels(run)["group"] == "mine"
    assert WandbReport()._labels(run)["tags"] == ["fine-tuning", "class"]
    assert WandbReport(tags=["x" * 99])._labels(run)["tags"][0] == "x" * 64


def test_all_reports_follow_a_real_run(offline: Path) -> None:
    from functools import partial

    import pytorch_lightning as pl

    from cl.engine.experiment import Experiment
    from cl.testing import toy_learner

    console, text = plain()
    toy, stream = toy_learner(num_tasks=2)
    wandb_report = WandbReport()
    reports: list[Report] = [FileReport(), PictureReport(), wandb_report, TerminalReport(console)]
    trainer = partial(pl.Trainer, accelerator="cpu")
    run = Experiment(
        toy,
        stream,
        trainer,
        directory=offline,
        reports=reports,
        logger=[wandb_report.logger],
        callbacks=[ProgressBar(console)],
    ).run()
    assert {"transfer.csv", "transfer.json", "transfer.png", "manifest.json", "wandb"} <= {
        p.name for p in offline.iterdir()
    }
    lines = text.getvalue().splitlines()
    assert sum(line.startswith("task ") and " steps in " in line for line in lines) == 2
    assert headline(run, run.primary.mask) in lines
    history = [items(r.history.item) for r in records(offline) if r.WhichOneof("record_type") == "history"]
    assert any("train/loss" in point for point in history)
    assert wandb_report.run is None


@pytest.mark.parametrize("torn", [b"\xff\xfe", b"", b"../other", b"a" * 200])
def test_a_torn_identity_begins_another_run_and_says_so(tmp_path: Path, torn: bytes) -> None:
    from cl.report.wandb import _known

    path = tmp_path / "run_id.txt"
    assert _known(path) is None
    path.write_text("a1b2-c3\n")
    assert _known(path) == "a1b2-c3"
    path.write_bytes(torn)
    with pytest.warns(UserWarning, match=r"run_id\.txt is torn or changed"):
        assert _known(path) is None
