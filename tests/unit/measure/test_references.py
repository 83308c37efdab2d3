"""References: an expert and a joint learner are what a run by hand gives, and are trained once for all who ask."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from cl.compose import relabel
from cl.data.task import Stream, Task, TaskData
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.measure.learning_curves import LearningCurves
from cl.measure.references import References
from cl.report.contract import Report
from cl.report.scalars import measure
from cl.strategies.er import ER
from cl.strategies.joint import Joint
from cl.testing import ToyBackbone, toy_stream

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)
CONFIG = {"epochs": 2, "stream": {"_target_": "toy", "order": None}, "strategy": {"er": {}}, "seed": 0}


def make(stream: Stream, strategies: dict[str, Strategy], seed: int = 0, epochs: int = 2) -> Experiment:
    torch.manual_seed(seed)
    sgd = partial(torch.optim.SGD, lr=0.1)
    learner = Learner(stream, ToyBackbone(), strategies, sgd, batch_size=8, seed=seed)
    curves = {"curves": LearningCurves(stream, points=4)} if len(stream) == 1 else {}
    return Experiment(learner, stream, trainer, epochs=epochs, instruments=curves)


class Counting(Report):
    """Says how many references were trained."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def references(
    folder: Path, kinds=("experts", "joint"), seed: int = 0, **changes: object
) -> tuple[References, Counting]:
    said = Counting()
    return References(kinds, partial(make, seed=seed), folder, CONFIG | {"seed": seed} | changes, [said]), said


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_an_expert_is_a_run_on_one_task_from_the_same_weights(tmp_path: Path, scenario: str) -> None:
    stream = toy_stream(3, scenario)
    found, _ = references(tmp_path, ["experts"])
    experts = found.measure(stream)["experts"]
    assert [expert["task"] for expert in experts] == [1, 2, 3]
    for t, expert in enumerate(experts):
        x, y, _ = stream[t].train.tensors()
        tx, ty, _ = stream[t].test.tensors()
        task = Task(0, TaskData(x, y, 0), TaskData(tx, ty, 0))
        alone = make(Stream([task], scenario=scenario, num_classes=stream.num_classes), {})
        alone.run()
        assert expert["value"] == float(alone.run_view.primary.R[1, 0])
        assert expert["untrained"] == float(alone.run_view.primary.R[0, 0])
        assert expert["steps"] == alone.learner.total_steps == 12
        assert [step for step, _ in expert["curve"]] == [0, 3, 6, 9, 12]
        assert expert["curve"][-1][1] == expert["value"]
        if scenario != "class":  # where other classes compete before the task has begun
            assert expert["curve"][0][1] == expert["untrained"]


def test_the_last_joint_reference_is_the_joint_strategy(tmp_path: Path) -> None:
    stream = toy_stream(3)
    found, _ = references(tmp_path, ["joint"])
    joint = found.measure(stream)["joint"]
    experiment = make(stream, {"joint": Joint()})
    R = experiment.run().primary.R
    assert joint[-1]["row"] == R[1].tolist() and joint[-1]["value"] == float(R[1, -1])
    assert [len(one["row"]) for one in joint] == [1, 2, 3]
    assert "curve" not in joint[-1]


def test_the_first_expert_and_the_first_joint_are_one(tmp_path: Path) -> None:
    found = references(tmp_path)[0].measure(toy_stream(3, "task"))
    assert found["experts"][0]["value"] == found["joint"][0]["value"]


def test_references_are_trained_once_for_all_strategies_and_orders(tmp_path: Path) -> None:
    first, said = references(tmp_path)
    one = first.measure(toy_stream(3))
    assert len(said.said) == 6
    again, silent = references(tmp_path, strategy={"ewc": {}}, report={"terminal": None}, log_every=3)
    assert again.measure(toy_stream(3)) == one and not silent.said
    tasks = list(toy_stream(3))
    turned = Stream(tasks, num_classes=6, order=[2, 1, 0])
    experts, silent = references(tmp_path, ["experts"], stream={"_target_": "toy", "order": [2, 1, 0]})
    values = [expert["value"] for expert in experts.measure(turned)["experts"]]
    assert values == [expert["value"] for expert in one["experts"]][::-1] and not silent.said


@pytest.mark.parametrize("what", ["seed", "epochs", "data", "weights"])
def test_what_determines_a_reference_makes_it_anew(tmp_path: Path, what: str) -> None:
    references(tmp_path, ["experts"])[0].measure(toy_stream(2))
    stream = toy_stream(2)
    if what == "data":
        stream = relabel(stream, {0: [1, 0, 2, 3]})
    changes = {"epochs": 3} if what == "epochs" else {}
    found, said = references(tmp_path, ["experts"], seed=int(what == "seed"), **changes)
    if what == "weights":
        found._make = lambda *arguments: make(*arguments, seed=7)
    found.measure(stream)
    assert len(said.said) == (1 if what == "data" else 2), "the second task's labels are as they were"


def test_a_run_writes_its_references_and_the_run_itself_is_not_moved(tmp_path: Path) -> None:
    plain = make(toy_stream(3), {"er": ER(memory_size=10)})
    plain.run()
    watched = make(toy_stream(3), {"er": ER(memory_size=10)})
    watched.references = references(tmp_path)[0].measure
    run = watched.run()
    assert torch.equal(plain.run_view.primary.R, run.primary.R)
    assert set(run.references) == {"experts", "joint"}
    for file in tmp_path.glob("*.json"):
        assert set(json.loads(file.read_text())["content"]) >= {"value", "row", "steps", "seconds"}


def test_a_reference_that_diverges_is_unmeasured_and_not_kept(tmp_path: Path) -> None:
    class Bad(Strategy):
        def loss(self, learner, batch, logits):
            return logits.sum() * torch.inf

    said = Counting()
    found = References(["experts"], lambda stream, _: make(stream, {"bad": Bad()}), tmp_path, CONFIG, [said])
    watched = make(toy_stream(2), {})
    watched.references = found.measure
    run = watched.run()
    assert all(math.isnan(expert["value"]) and "inf" in expert["reason"] for expert in run.references["experts"])
    assert "fwt_expert" in measure(run)[1] and not list(tmp_path.glob("*.json"))
    assert sum("diverged" in text for text in said.said) == 2


def test_an_unknown_reference_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="experts"):
        References(["expert"], make, tmp_path, {})
