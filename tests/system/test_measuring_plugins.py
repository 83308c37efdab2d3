"""Instruments and scalars from outside: by `_target_`, by an installed package, from Python; and in every report."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import cl
import package
from cl.errors import InputError
from cl.report.scalars import measure
from cl.report.wandb import WandbReport
from cl.settings import changes
from cl.testing import toy_stream

pytestmark = pytest.mark.xdist_group(__name__)  # one worker makes what all of these look at
MODULE = '''\
"""An instrument and two scalars of somebody else's."""

import cl


class Online(cl.Instrument):
    """The share of right answers of each step, before the weights moved."""

    file, columns = "online", ("task", "step", "accuracy")

    def __init__(self, every=1):
        super().__init__()
        self.every = every

    def setup(self, learner, stream):
        self.matrix = cl.TransferMatrix(len(stream), "online")

    def transfer_matrices(self):
        return {"online": self.matrix}

    def after_step(self, learner, batch, logits):
        if learner.step % self.every == 0:
            right = learner.mask(logits, batch.task).argmax(1) == batch.y
            self.add((learner.task_index + 1, learner.total_steps, float(right.float().mean())))


@cl.scalar(formula="max_j R[T,j] - min_j R[T,j]", source="Somebody 2026", higher_is_better=False)
def spread(evidence):
    return evidence.R[-1].max() - evidence.R[-1].min()


@cl.scalar(formula="sum_n a_n", source="Somebody 2026", divisor="steps", needs=("instrument:online",))
def online_accuracy(evidence):
    found = [record["accuracy"] for record in evidence.records("online")]
    return sum(found) / len(found)
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the package is installed."""
    files = {
        "__init__.py": MODULE,
        "conf/instrument/online.yaml": "online:\n  _target_: measures_of_mine.Online\n  every: 1\n",
        "conf/scalar/spread.yaml": "spread:\n  _target_: measures_of_mine.spread\n",
        "conf/scalar/online.yaml": "online:\n  _target_: measures_of_mine.online_accuracy\n",
    }
    place = package.write(tmp_path_factory.mktemp("package"), "measures_of_mine", files)
    return package.install(place, tmp_path_factory.mktemp("site"))


SHORT = ("trainer.accelerator=cpu", "report=quiet", "epochs=1", "logger=none")


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_an_installed_package_measures_and_everything_shows_it(cl_run, site: Path, tmp_path: Path):
    plain = cl_run(*SHORT, "hydra.run.dir=plain", cwd=tmp_path)
    chosen = ("instrument=online", "scalar=[spread,online]", "instrument.online.every=2")
    done = cl_run(*SHORT, *chosen, "hydra.run.dir=out", cwd=tmp_path, path=site)
    assert plain.returncode == 0 and done.returncode == 0, plain.stderr + done.stderr
    out = tmp_path / "out"
    rows = table(out / "online.csv")
    assert list(rows[0]) == ["task", "step", "accuracy"] and {row["task"] for row in rows} == set("12345")
    assert table(tmp_path / "plain" / "transfer.csv") == table(out / "transfer.csv"), "R is that of a run without"
    said = json.loads((out / "transfer.json").read_text())["measures"]
    last = [
        float(row["value"])
        for row in table(out / "transfer.csv")
        if row["after_task"] == "5" and row["mask"] == "class" and row["metric"] == "accuracy"
    ]
    assert said["spread"]["value"] == pytest.approx(max(last) - min(last))
    assert said["online_accuracy"]["value"] == pytest.approx(sum(float(row["accuracy"]) for row in rows) / len(rows))
    assert said["spread"]["definition"] == "max_j R[T,j] - min_j R[T,j]" and not said["spread"]["higher_is_better"]
    assert said["spread"]["defined_in"] == "measures_of_mine" and "defined_in" not in said["error_nevis"]

    assert "measures_of_mine" not in sys.modules, "what follows reads the files alone"
    loaded = cl.load(out)
    assert loaded.measured()["spread"] == said["spread"]["value"] and measure(loaded)[1]["fwt_expert"]
    assert loaded.own_scalars["online_accuracy"].formula == "sum_n a_n"
    found = cl.compare(out, tmp_path / "plain")
    names = [column.quantity for column in found.boards[0].columns]
    assert names[-2:] == ["online_accuracy", "spread"] or names[-2:] == ["spread", "online_accuracy"]
    page = found.save(tmp_path / "page").read_text()
    assert "Somebody 2026" in page and "sum_n a_n, divided by steps" in page
    assert re.search(r"<th[^>]*>[^/]*online accuracy", page), "a column of the leaderboard"

    refused = cl_run(*SHORT, "instrument=onlin", cwd=tmp_path, path=site)
    assert "no instrument called 'onlin': did you mean 'online'" in refused.stderr


def test_what_a_target_names_must_be_of_its_kind(cl_run, tmp_path: Path):
    wrong = cl_run(*SHORT, "+instrument.mine._target_=torch.nn.Identity", "hydra.run.dir=wrong", cwd=tmp_path)
    assert (
        "gives Identity, which is no Instrument" in wrong.stderr and not (tmp_path / "wrong" / "config.yaml").exists()
    )
    wrong = cl_run(*SHORT, "+scalar.mine._target_=math.fsum", "hydra.run.dir=wrong", cwd=tmp_path)
    assert len(wrong.stderr.strip().splitlines()) == 1 and "scalar.mine" in wrong.stderr


def own() -> dict:
    names: dict = {"__name__": "somebody"}
    exec(MODULE, names)
    return names


def test_from_python_with_weights_and_biases(offline: Path):
    mine = own()
    settings = {"epochs": 1, "progress": False, "trainer": {"accelerator": "cpu"}}
    stream = toy_stream(2)
    plain = cl.run(stream, cl.strategies.ER(memory_size=20), **settings)
    extra = {"instruments": {"online": mine["Online"]()}, "scalars": [mine["spread"], mine["online_accuracy"]]}
    run = cl.run(
        stream, cl.strategies.ER(memory_size=20), directory=offline, reports=[WandbReport()], **extra, **settings
    )
    assert torch.equal(plain.R["class"].values, run.R["class"].values) and "online" in run.R
    last = run.R["class"][-1]
    assert run.measured()["spread"] == pytest.approx(float(last.max() - last.min()))
    for (name, a), b in zip(plain.learner.state_dict().items(), run.learner.state_dict().values(), strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), name
    (path,) = offline.glob("wandb/offline-run-*/run-*.wandb")
    text = path.read_bytes()
    for name in (b"measure/spread", b"measure/online_accuracy"):
        assert text.count(name) >= 3, "in the history after each task, and in the summary"
    with pytest.raises(InputError, match="instrument"):
        cl.run(stream, cl.strategies.ER(memory_size=20), directory=offline, **settings)


def test_a_scalar_without_a_number_says_why():
    mine = own()

    @cl.scalar(formula="2", source="a test")
    def outside(evidence):
        return 2.0

    @cl.scalar(formula="1 / 0", source="a test")
    def fails(evidence):
        return 1 / 0

    settings = {"epochs": 1, "progress": False, "trainer": {"accelerator": "cpu"}}
    scalars = [mine["online_accuracy"], outside, fails]
    values, absent = measure(cl.run(toy_stream(2), [], scalars=scalars, **settings))
    assert not values.keys() & {"online_accuracy", "outside", "fails"}
    assert "no instrument called online" in absent["online_accuracy"]
    assert absent["outside"] == "2 is outside of its range, fraction, [0, 1]"
    assert absent["fails"] == "its function failed (ZeroDivisionError: division by zero)"


def named(name: str, **options):
    def function(evidence):
        return math.nan

    function.__name__ = name
    return cl.scalar(formula="f", source="a test", **options)(function)


class Other(cl.Instrument):
    file, columns = "resources", ("a",)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"instruments": {"curves": cl.Instrument()}}, "cannot be called 'curves', as a built-in one is"),
        ({"instruments": {"mine": Other()}}, "cannot write resources.csv"),
        ({"scalars": [named("bwt_gem")]}, "a scalar called 'bwt_gem' already"),
        ({"scalars": [named("stability_gap")]}, "a scalar called 'stability_gap' already"),
        ({"scalars": [named("flops")]}, "a scalar called 'flops' already"),
        ({"scalars": [named("mine"), named("mine")]}, "a scalar called 'mine' already"),
        ({"scalars": [named("a/b")]}, "cannot be called 'a/b'"),
        ({"scalars": [named("mine", needs=("curve",))]}, "did you mean 'curves'"),
        ({"scalars": [math.fsum]}, "is no scalar: put @cl.scalar"),
    ],
)
def test_what_is_taken_or_unknown_is_refused(options, sentence, tmp_path: Path):
    with pytest.raises(InputError, match=re.escape(sentence)):
        cl.run(toy_stream(1), [], directory=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_an_unfinished_run_goes_on_with_other_scalars_and_not_with_other_instruments():
    assert changes({"instrument.mine._target_": "a.A"}, {}) and not changes({"scalar.mine._target_": "a.a"}, {})
