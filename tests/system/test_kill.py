"""A small part of the harness that kills runs, of the sweep that damages their files, and of the soak."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

import cl.engine.experiment
from checkout import HARNESS
from cl.app import resume
from cl.app.validate import store, validate
from cl.engine import checkpoint
from cl.engine.experiment import Experiment
from cl.errors import InputError, Preempted
from cl.files import append_text, read_sealed, remove_leftovers, replace_file, write_sealed
from cl.report.contract import Report
from cl.report.result import changed_since, read_result
from cl.report.tables import FileReport
from cl.report.training import TrainingReport
from cl.strategies.er import ER
from cl.testing import toy_learner, toy_stream
from cl.trainer.failures import cause

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)


def script(name: str, *arguments: str) -> str:
    """Run one of the scripts of the harness; in a process of its own, since it forks."""
    command = [sys.executable, str(HARNESS / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-1000:] + done.stdout[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_runs_that_are_killed_end_as_the_ones_that_are_not() -> None:
    said = script("kill.py", "--kills", "9", "--only", "er,dropout,python,own", "--seed", "3")
    assert " 0 mismatches" in said


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_damaged_run_directory_recovers_or_is_named() -> None:
    said = script("corrupt.py", "--ranges", "1", "--every", "61", "--seed", "1")
    assert "cases" in said and not {"traceback", "wrong", "unnamed"} & set(said.split("'"))


# ------------------------------------------------------------------ what the harness has found


def experiment(folder: Path, keep: int | None = None, **options: object) -> Experiment:
    learner, stream = toy_learner({"er": ER(memory_size=10)}, chunk_size=1, log_every=2)
    report = TrainingReport()
    return Experiment(
        learner, stream, trainer, epochs=2, directory=folder, keep=keep, logger=[report.logger],
        reports=[report, FileReport()], **options,  # type: ignore[arg-type]
    )  # fmt: skip


class Stop(RuntimeError):
    pass


def killed(folder: Path, after: str, monkeypatch: pytest.MonkeyPatch, make=experiment, **options: object) -> None:
    """Run until the file of that name stands in its place, and nothing behind it happens."""
    replace = os.replace

    def stop(source: str, target: str) -> None:
        replace(source, target)
        if Path(target).name == after:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(Stop):
            make(folder, **options).run()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_kill_between_the_rename_and_the_removal_leaves_nothing_for_good(tmp_path, monkeypatch):
    killed(tmp_path, "after_task_003.ckpt", monkeypatch, every=4, keep=1)
    assert [name for name in names(tmp_path) if name.startswith("in_task_003")]
    experiment(tmp_path, every=4, keep=1).run()
    assert names(tmp_path) == ["after_task_003.ckpt"]


def test_kills_inside_a_task_do_not_pile_up(tmp_path, monkeypatch):
    for step in (2, 4, 6, 8):
        killed(tmp_path, f"in_task_002_step_{step:08d}.ckpt", monkeypatch, every=2, keep=1)
        assert len(names(tmp_path)) <= 4, "one of the end of a task, two inside one, and the one that was just written"


@pytest.mark.parametrize("step", [3, 6, 9, 12], ids=lambda step: f"step {step} of 6 an epoch")
def test_a_signal_saves_wherever_it_comes_and_its_number_is_the_status(tmp_path, step):
    class Signalling(ER):
        def after_step(self, learner, batch, logits):
            super().after_step(learner, batch, logits)
            if learner.total_steps == step:
                os.kill(os.getpid(), signal.SIGTERM)

    learner, stream = toy_learner({"er": Signalling(memory_size=10)}, chunk_size=1)
    with pytest.raises(Preempted) as stop:
        Experiment(learner, stream, trainer, epochs=2, directory=tmp_path).run()
    assert stop.value.code == 143 and stop.value.saved
    assert checkpoint.steps(checkpoint.inside(tmp_path / "checkpoints", 0)) == step


def test_a_signal_whose_exception_python_drops_stops_the_run_at_the_next_place_to_save(tmp_path):
    class Dropping(ER):
        def after_task(self, learner, task):
            if task.index == 0:
                with suppress(Preempted):  # as Python does within a finalizer
                    os.kill(os.getpid(), signal.SIGTERM)

    learner, stream = toy_learner({"er": Dropping(memory_size=10)}, chunk_size=1)
    with pytest.raises(Preempted) as stop:
        Experiment(learner, stream, trainer, epochs=2, directory=tmp_path).run()
    assert stop.value.code == 143 and stop.value.saved
    assert checkpoint.steps(checkpoint.inside(tmp_path / "checkpoints", 1)) == 1


def test_a_torn_checkpoint_does_not_count_among_those_that_are_kept(tmp_path, monkeypatch):
    killed(tmp_path, "after_task_003.ckpt", monkeypatch, keep=3)
    (tmp_path / "checkpoints" / "after_task_003.ckpt").write_bytes(b"torn")
    (tmp_path / "checkpoints" / "after_task_002.ckpt").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="torn or changed"):
        killed(tmp_path, "after_task_002.ckpt", monkeypatch, keep=1)
    with pytest.warns(UserWarning, match="torn or changed"):
        assert checkpoint.latest(tmp_path / "checkpoints").name == "after_task_002.ckpt"


def test_a_checkpoint_inside_a_task_is_not_displaced_by_those_of_a_later_one(tmp_path):
    learner, _ = toy_learner()
    learner.tasks_learned, learner.step = 4, 8
    checkpoint.save_inside(learner, tmp_path, {})
    learner.tasks_learned = 2
    for step in (4, 8, 12):
        learner.step = step
        checkpoint.save_inside(learner, tmp_path, {})
    inside = sorted(path.name for path in tmp_path.iterdir())
    assert [name[:11] for name in inside] == ["in_task_003", "in_task_003", "in_task_005"]
    assert checkpoint.steps(checkpoint.inside(tmp_path, 2)) == 12


def test_a_checkpoint_in_the_place_of_another_is_told(tmp_path):
    experiment(tmp_path).run()
    first, second = (tmp_path / "checkpoints" / f"after_task_00{k}.ckpt" for k in (1, 2))
    assert checkpoint.is_whole(first)
    second.write_bytes(first.read_bytes())
    assert not checkpoint.is_whole(second)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, monkeypatch):
    killed(tmp_path, "after_task_001.ckpt", monkeypatch, config={"seed": 0, "checkpoint": {"keep": 1}})
    with pytest.raises(InputError, match=r"after_task_001.*seed: 0 there, 3 here"):
        experiment(tmp_path, config={"seed": 3}).run()
    experiment(tmp_path, config={"seed": 0, "checkpoint": {"keep": 5}}).run()


@pytest.mark.parametrize("damage", ["a digit", "cut", "deleted", "none"])
def test_training_curves_are_cut_where_the_checkpoint_stands_or_named(tmp_path, monkeypatch, damage):
    whole, place = tmp_path / "whole", tmp_path / "killed"
    experiment(whole, every=4).run()
    killed(place, "in_task_002_step_00000008.ckpt", monkeypatch, every=4)
    path = place / "training.csv"
    with path.open("a") as file:
        file.write("20,2,train/lo")  # behind the checkpoint, torn
    if damage == "none":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            experiment(place, every=4).run()
        assert path.read_text() == (whole / "training.csv").read_text()
        return
    text = path.read_text()
    line = text.splitlines()[2]
    other = {"a digit": text.replace(line, line.replace("0.", "1.")), "cut": text[:100]}.get(damage)
    path.unlink() if other is None else path.write_text(other)
    with pytest.warns(UserWarning, match=r"training\.csv is torn or changed"):
        experiment(place, every=4).run()


def test_validation_comes_at_the_end_of_an_epoch_that_was_taken_up_again(tmp_path, monkeypatch):
    """With chunks of a fixed size, too: a schedule that watches it would fail, and its curve have a gap."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    from cl.data.task import Stream, Task
    from cl.engine.learner import Learner
    from cl.testing import ToyBackbone

    def made(folder: Path) -> Experiment:
        tasks = [Task(t.index, train=t.train, val=t.test, test=t.test) for t in toy_stream(2)]
        stream, sgd = Stream(tasks, num_classes=4), partial(torch.optim.SGD, lr=0.1)
        torch.manual_seed(0)
        options = {"batch_size": 8, "chunk_size": 1, "scheduler": partial(ReduceLROnPlateau, patience=0)}
        learner, report = Learner(stream, ToyBackbone(), {}, sgd, **options), TrainingReport()
        own = {"reports": [report], "logger": [report.logger]}
        return Experiment(learner, stream, trainer, epochs=3, directory=folder, every=4, **own)

    made(tmp_path / "whole").run()
    killed(tmp_path / "killed", "in_task_001_step_00000004.ckpt", monkeypatch, made)
    made(tmp_path / "killed").run()
    curves = [(tmp_path / place / "training.csv").read_text() for place in ("whole", "killed")]
    assert curves[0] == curves[1] and curves[0].count("val/loss") == 6


# ------------------------------------------------------------------ files


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    kept = {".a.txt.tmp", "a.txt.12.tmp", ".a.txt.x.tmp", "a.txt"}
    for name in (*kept, ".a.txt.12.tmp", ".b.json.3456.tmp"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path, "b.json")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".a.txt.12.tmp"}
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_run_removes_them(tmp_path, monkeypatch):
    killed(tmp_path, "after_task_001.ckpt", monkeypatch)
    for folder in (tmp_path, tmp_path / "checkpoints"):
        (folder / ".transfer.csv.4711.tmp").write_text("torn")
    experiment(tmp_path).run()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("write", [append_text, lambda path, text: replace_file(path, lambda t: t.write_text(text))])
def test_a_file_that_cannot_be_written_is_named_in_one_sentence(tmp_path, write):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(OSError) as error:
        write(tmp_path / "a.csv", "x\n")
    assert "a.csv cannot be used (Is a directory)" in str(cause(error.value))
    assert cause(FileNotFoundError(2, "No such file", "x")) is None  # may be a mistake in somebody's code


def test_a_sealed_file_in_the_place_of_another_is_told(tmp_path):
    write_sealed(tmp_path / "a.json", {"value": 1})
    (tmp_path / "b.json").write_bytes((tmp_path / "a.json").read_bytes())
    assert read_sealed(tmp_path / "a.json") == {"value": 1} and read_sealed(tmp_path / "b.json") is None


def test_a_finished_run_tells_which_table_has_changed(tmp_path):
    experiment(tmp_path).run()
    assert read_result(tmp_path) is not None and changed_since(tmp_path) == []
    path = tmp_path / "transfer.csv"
    path.write_text(path.read_text().replace("0,1,class", "0,2,class"))
    (tmp_path / "training.csv").unlink()
    assert changed_since(tmp_path) == ["training.csv", "transfer.csv"]


def test_the_command_survives_what_hydra_left_torn(tmp_path):
    write_sealed(tmp_path / "command.json", {"overrides": ["seed=1"]})
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- see")
    assert resume.expand([f"resume={tmp_path}"])[0][0] == "seed=1"
    text = (tmp_path / "command.json").read_text()
    (tmp_path / "command.json").write_text(text.replace("seed=1", "seed=2"))
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- seed=1")
    assert resume.expand([f"resume={tmp_path}"])[0][0] == "seed=1"


def test_a_configuration_that_lost_a_null_is_written_anew_and_another_value_is_told(tmp_path):
    from hydra import compose, initialize_config_module

    with initialize_config_module("cl.conf", version_base="1.3"):
        cfg = compose("config", ["reference_dir=references"])
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "config.yaml"
    whole = OmegaConf.to_yaml(cfg, resolve=True)
    path.write_text(whole.replace("protocol: null\n", ""))
    store(validate(cfg, tmp_path), tmp_path)
    assert path.read_text() == whole
    path.write_text(whole.replace("seed: 0", "seed: 1"))
    with pytest.raises(InputError, match=r"seed: 1 there, 0 here; see config\.yaml"):
        validate(cfg, tmp_path)


def test_the_harness_kills_every_strategy():
    text = (HARNESS / "kill.py").read_text()
    killed = {name for found in re.findall(r"strategy=\[?([\w,]+)", text) for name in found.split(",")}
    known = {path.stem for path in (HARNESS.parents[1] / "conf" / "strategy").glob("*.yaml")}
    assert killed == known - {"avalanche"}, "which cannot be continued, and refuses to be"


@pytest.mark.parametrize(("keep", "left"), [("auto", [1, 2, 3]), (None, [0, 1, 2, 3]), (2, [2, 3])])
def test_of_checkpoints_that_would_take_too_much_few_are_kept_and_that_is_said(keep, left, tmp_path, monkeypatch):
    said: list[str] = []

    class Listener(Report):
        def say(self, text: str) -> None:
            said.append(text)

    monkeypatch.setattr(cl.engine.experiment, "_AMPLE", 10)
    learner, stream = toy_learner(num_tasks=3)
    Experiment(learner, stream, trainer, directory=tmp_path, reports=[Listener()], keep=keep).run()
    assert sorted(int(p.stem[-3:]) for p in (tmp_path / "checkpoints").glob("after*")) == left
    assert len(said) == 1 and "after each of 3 tasks" in said[0]


def test_few_checkpoints_that_fit_are_all_kept_without_a_word(tmp_path):
    learner, stream = toy_learner(num_tasks=3)
    Experiment(learner, stream, trainer, directory=tmp_path).run()
    assert len(list((tmp_path / "checkpoints").glob("after*"))) == 4
