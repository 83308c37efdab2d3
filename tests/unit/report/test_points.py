"""The history in Weights & Biases over kills: a journal of ours, what W&B's files hold, and the points in neither."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from alike import history
from cl.engine.experiment import Experiment
from cl.report.points import Journal, Point, steps_on_disk
from cl.report.wandb import _OPEN, WandbReport, _steps_of_ended
from cl.strategies.er import ER
from cl.testing import toy_learner

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)


History = list[tuple[int, dict[str, Any]]]


class StopAt(pl.Callback):
    """Ends a run at a step of the stream, by an exception."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        if pl_module.total_steps == self.step:
            raise InterruptedError


def experiment(directory: Path, *callbacks: pl.Callback) -> Experiment:
    """Return a run of 3 tasks of 48 steps, with a point for each and at most one checkpoint inside a task."""
    learner, stream = toy_learner({"er": ER(memory_size=10)}, chunk_size=1, log_every=1)
    report = WandbReport()
    options: dict[str, Any] = {"reports": [report], "logger": [report.logger], "callbacks": list(callbacks)}
    return Experiment(learner, stream, trainer, epochs=8, directory=directory, every=40, **options)


def stopped(directory: Path, step: int) -> None:
    with pytest.raises(InterruptedError):
        experiment(directory, StopAt(step)).run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> History:
    """The history of the run that nobody stops."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_MODE", "offline")
        place = tmp_path_factory.mktemp("whole")
        experiment(place).run()
    found = history(place)
    assert [step for step, _ in found] == list(range(len(found))) and len(found) > 140
    return found


KILLER = """
import os, pathlib, signal
import pytorch_lightning as pl

class Killer(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *rest):
        if str(pl_module.total_steps) == pathlib.Path("kill_at.txt").read_text():
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_command_that_is_killed_has_every_point_once(tmp_path: Path, cl_run: Any) -> None:
    (tmp_path / "killer.py").write_text(KILLER)
    asked = [
        *("logger=wandb", "+logger.wandb.mode=offline", "log_every=1", "dataset=synthetic", "dataset.num_train=240"),
        *("dataset.num_classes=4", "dataset.num_test=20", "stream.num_tasks=2", "batch_size=4", "epochs=3"),
        *("backbone.hidden=[8]", "report=quiet", "~report.picture", "~report.curves", "checkpoint.every=50"),
        *("trainer.accelerator=cpu", "chunk_size=1", "strategy=er", "+callbacks.kill._target_=killer.Killer"),
    ]
    for place, step in (("killed", 160), ("killed", None), ("whole", None)):
        (tmp_path / "kill_at.txt").write_text(str(step))
        done = cl_run(*asked, f"hydra.run.dir={place}", cwd=tmp_path, path=tmp_path)
        assert done.returncode == (-signal.SIGKILL if step else 0), done.stdout + done.stderr
        if step == 160:
            assert len(history(tmp_path / place)) < step, "W&B loses with its process what it was given last"
    expected = history(tmp_path / "whole")
    assert history(tmp_path / "killed") == expected and len(expected) > 180


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "left"), [((2, 47), 0), ((60,), 9000)], ids=str)
def test_what_the_files_lack_is_given_again(offline: Path, whole: History, steps: tuple[int, ...], left: int) -> None:
    for step in steps:
        stopped(offline, step)
    cut(offline, left)
    experiment(offline).run()
    assert history(offline) == whole


def cut(directory: Path, left: int) -> None:
    """End what W&B's files hold after so many bytes, as if its process had been killed then."""
    for identity in list(_OPEN):
        _OPEN.pop(identity).finish()
    for path in directory.glob("wandb/offline-run-*/run-*.wandb"):
        _steps_of_ended(path)  # whose writer is another process
        path.write_bytes(path.read_bytes()[:left])


def test_what_w_and_b_lacks_is_given_again_when_it_works_again(offline: Path, whole: History, monkeypatch: Any) -> None:
    import wandb

    def fails(**_: Any) -> None:
        raise RuntimeError("no disk")

    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="cannot start"):
        patched.setattr(wandb, "init", fails)
        stopped(offline, 100)
    assert history(offline) == []
    experiment(offline).run()
    assert history(offline) == whole


def test_what_w_and_b_could_not_write_is_told_at_the_end(offline: Path, whole: History, monkeypatch: Any) -> None:
    def cut_short(path: Path) -> set[int]:
        path.write_bytes(path.read_bytes()[:20000])
        return steps_on_disk(path)

    with monkeypatch.context() as patched, pytest.warns(UserWarning, match=r"has not written \d+ of the \d+ points"):
        patched.setattr("cl.report.wandb._steps_of_ended", cut_short)
        experiment(offline).run()
    assert 0 < len(history(offline)) < len(whole)
    (offline / "result.json").unlink()
    experiment(offline).run()
    assert history(offline) == whole


def test_a_run_of_an_earlier_version_goes_on_and_says_what_is_lost(offline: Path, whole: History) -> None:
    stopped(offline, 100)
    cut(offline, 15000)
    held = len(history(offline))
    (offline / "wandb" / "points.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"lacks \d+ of the \d+ points up to the checkpoint"):
        experiment(offline).run()
    found = history(offline)
    steps = [step for step, _ in found]
    assert 0 < held < len(found) < len(whole) and len(set(steps)) == len(steps)
    assert found == [point for point in whole if point[0] in steps] and steps[-1] == whole[-1][0]


def test_online_the_server_tells_what_it_has(tmp_path: Path) -> None:
    class Online:
        offline, disabled, starting_step = False, False, 3

        def __init__(self) -> None:
            self.given: list[int] = []

        def log(self, values: Any, step: int) -> None:
            self.given.append(step)

    report = WandbReport(dir=tmp_path)
    report.run, report._journal = Online(), Journal(tmp_path / "points.jsonl", {})
    earlier = [report._journal.add({"train/loss": 0.1}) for _ in range(5)]
    report._find_held()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report._give_again(earlier)
    report.log({"train/loss": 0.2})
    assert report.run.given == [3, 4, 5]


# ------------------------------------------------------------------ the journal


def test_a_torn_line_ends_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    journal = Journal(path, {"seed": 0})
    journal.begin(0)
    points = [journal.add({"a": 0.1 * k, "b": float("inf")}, row=k % 3 or None) for k in range(4)]
    text = path.read_bytes()
    for length in [*range(0, len(text), 5), len(text)]:
        path.write_bytes(text[:length])
        whole = max(0, text[: length + 1].count(b"\n") - (text[: length + 1].endswith(b"\n") and length < len(text)))
        found = Journal(path, {"seed": 0}).begin(None)
        assert found == points[: len(found)]
        assert whole - 1 <= len(found) <= 4
    again = Journal(path, {"seed": 0})
    assert again.begin(2) == points[:2] and again.add({"a": 7}).step == 2
    assert Journal(path, {}).begin(None) == [*points[:2], Point(2, None, {"a": 7})]


def test_only_a_run_killed_before_it_learned_is_begun_anew_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    assert not Journal(path, {}).holds_only_the_start(), "no file"
    journal = Journal(path, {"seed": 0})
    journal.begin(0)
    journal.add({"tasks_learned": 0}, row=0)
    assert Journal(path, {"seed": 0}).holds_only_the_start() and not Journal(path, {"seed": 1}).holds_only_the_start()
    journal.add({"train/loss": 0.5})
    assert not Journal(path, {"seed": 0}).holds_only_the_start()


# ------------------------------------------------------------------ the files of W&B


@pytest.fixture(scope="module")
def w_and_b_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished file of 300 points, which is longer than a block."""
    import wandb

    place = tmp_path_factory.mktemp("run")
    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(mode="offline", dir=str(place), project="p", settings=settings, reinit="create_new")
    for step in range(300):
        run.log({"a": step / 3, "b": "x" * (step % 50)}, step=step)
    run.finish()
    (path,) = place.glob("wandb/offline-run-*/run-*.wandb")
    assert _steps_of_ended(path) == set(range(300)) and path.stat().st_size > 32768
    return path


def test_a_file_cut_anywhere_holds_what_comes_before_the_cut(w_and_b_file: Path, tmp_path: Path) -> None:
    data, path, before = w_and_b_file.read_bytes(), tmp_path / "run.wandb", 0
    assert steps_on_disk(shutil.copy(w_and_b_file, tmp_path / "whole.wandb")) == set(range(300))
    assert (tmp_path / "whole.wandb").read_bytes() == data, "a file that was ended stays as it is"
    for length in [*range(0, len(data), 4999), 32760, 32765, 32768, 32770]:
        path.write_bytes(data[:length])
        steps = steps_on_disk(path)
        assert steps == set(range(len(steps)))
        assert len(data[:length]) - path.stat().st_size < 1000 and data.startswith(path.read_bytes())
        assert steps_on_disk(path) == steps
        before = max(before, len(steps))
    assert before > 290


def test_what_a_writer_of_before_still_writes_is_not_in_the_file(w_and_b_file: Path, tmp_path: Path) -> None:
    data, path = w_and_b_file.read_bytes(), tmp_path / "run.wandb"
    with path.open("wb") as writer:
        writer.write(data[:32768])
        writer.flush()
        steps = steps_on_disk(path)
        writer.write(data[32768:])
    assert steps_on_disk(path) == steps and 0 < len(steps) < 300


def test_a_file_of_another_format_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run.wandb"
    path.write_bytes(b"SQLite format 3")
    with pytest.raises(ValueError, match="unknown format"):
        steps_on_disk(path)
    assert path.read_bytes() == b"SQLite format 3"


def test_a_point_is_written_before_it_is_given(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "points.jsonl", {})
    journal.begin(0)
    journal.add({"train/loss": 0.25, "train/step": 3})
    assert json.loads(journal.path.read_text().splitlines()[1]) == [0, None, {"train/loss": 0.25, "train/step": 3}]
