"""What fails in the middle of a run leaves the last good state, from which it goes on to the bits of the whole run."""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor

from cl.app.cli import main
from cl.data.task import Stream, Task, TaskData
from cl.engine import checkpoint
from cl.engine.experiment import Experiment
from cl.engine.finite import check_finite
from cl.engine.learner import Learner
from cl.engine.strategy import CHAINED, ONE_OWNER, Composition, Strategy
from cl.errors import DivergenceError, InputError
from cl.files import replace_file, write_text
from cl.report.contract import Report
from cl.report.run import Run
from cl.report.tables import FileReport
from cl.strategies.er import ER
from cl.testing import ToyBackbone, toy_learner, toy_stream
from cl.toolkit.memory import Memory
from cl.trainer.failures import cause

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)
TASKS = 3


class Bad(Exception):
    """What nobody foresaw."""


class Armed:
    """Goes off in the second task, as long as it is armed."""

    now = False

    def __call__(self, learner: Learner) -> None:
        if Armed.now and learner.task.index == 1:
            raise Bad("on purpose")


strike = Armed()


class Fragile(Strategy):
    """A strategy one hook of which fails; it changes nothing otherwise."""


def fragile(hook: str) -> Strategy:
    def failing(self: Strategy, learner: Learner, *arguments: object) -> object:
        strike(learner)
        return getattr(Strategy, hook)(self, learner, *arguments)

    return type("Fragile", (Fragile,), {hook: failing})()


def experiment(folder: Path, strategies: dict[str, Strategy] | None = None, **options: object) -> Experiment:
    learner, stream = toy_learner({"er": ER(memory_size=10), **(strategies or {})}, num_tasks=TASKS)
    return Experiment(learner, stream, trainer, epochs=1, directory=folder, reports=[FileReport()], **options)  # type: ignore[arg-type]


def weights(run: Experiment) -> list[Tensor]:
    return [p.detach().clone() for p in run.learner.trunk().parameters()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    folder = tmp_path_factory.mktemp("whole")
    run = experiment(folder)
    run.run()
    return folder, weights(run)


def assert_intact(folder: Path, tasks: int) -> None:
    """The newest checkpoint is of so many tasks and whole, and nothing half-written lies about."""
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None and newest.name == f"after_task_{tasks:03d}.ckpt"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir())[-1] == newest.name
    assert not list(folder.rglob("*.tmp"))


def assert_goes_on(
    folder: Path, whole: tuple[Path, list[Tensor]], strategies: dict[str, Strategy] | None = None
) -> None:
    again = experiment(folder, strategies)
    again.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(again), whole[1], strict=True))
    assert (folder / "transfer.csv").read_text() == (whole[0] / "transfer.csv").read_text()


# ------------------------------------------------------------------ an exception in the middle


@pytest.mark.parametrize("hook", [*CHAINED, *ONE_OWNER])
def test_an_exception_in_a_strategy_comes_through_as_it_is_and_the_run_goes_on_later(
    hook: str, whole: tuple[Path, list[Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Armed, "now", True)
    with pytest.raises(Bad, match="on purpose") as caught:
        experiment(tmp_path, {"bad": fragile(hook)}).run()
    assert cause(caught.value) is None, "a bug keeps its traceback"
    assert caught.traceback[-1].name == "__call__", "down to where it happened"
    assert_intact(tmp_path, tasks=1)
    monkeypatch.setattr(Armed, "now", False)
    assert_goes_on(tmp_path, whole, {"bad": fragile(hook)})


class Nervous(pl.Callback):
    """Fails in the second task."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        strike(pl_module)  # type: ignore[arg-type]


def test_an_exception_in_a_callback(
    whole: tuple[Path, list[Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Armed, "now", True)
    with pytest.raises(Bad):
        experiment(tmp_path, callbacks=[Nervous()]).run()
    assert_intact(tmp_path, tasks=1)
    assert_goes_on(tmp_path, whole)


class Torn:
    """A transform that fails on the training rows of the second task, as a damaged image would."""

    def __call__(self, x: Tensor) -> Tensor:
        if Armed.now and len(x) == 48:
            raise Bad("row 7 cannot be read")
        return x


def test_an_exception_in_a_datasets_transform(
    whole: tuple[Path, list[Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = toy_stream(TASKS)

    def build(t: int) -> Task:
        return replace(plain[t], train=plain[t].train.then(Torn())) if t == 1 else plain[t]

    def made() -> Experiment:
        torch.manual_seed(0)
        stream, sgd = plain.derive(build), partial(torch.optim.SGD, lr=0.1)
        learner = Learner(stream, ToyBackbone(), {"er": ER(memory_size=10)}, sgd, batch_size=8)
        return Experiment(learner, stream, trainer, epochs=1, directory=tmp_path, reports=[FileReport(), *arm])

    class Arm(Report):
        """Lets the transform fail from the second task on: a run looks at all data when it starts."""

        def row(self, run: Run, after_task: int) -> None:
            monkeypatch.setattr(Armed, "now", after_task == 1)

    arm = [Arm()]
    first = made()
    with pytest.raises(Bad, match="row 7"):
        first.run()
    assert_intact(tmp_path, tasks=1)
    monkeypatch.setattr(Armed, "now", False)
    arm.clear()
    again = made()
    again.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(again), whole[1], strict=True))


def test_an_exception_while_a_stream_builds_a_task_comes_before_anything_is_written(tmp_path: Path) -> None:
    plain = toy_stream(TASKS)

    def build(t: int) -> Task:
        if t == 2:
            raise Bad("no such file")
        return plain[t]

    stream = Stream(build, num_classes=6, num_tasks=TASKS)
    with pytest.raises(Bad):
        Learner(stream, ToyBackbone(), {}, partial(torch.optim.SGD, lr=0.1))


# ------------------------------------------------------------------ divergence


class Diverges(Strategy):
    """Adds a loss that is not finite in the second task."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def loss(self, learner: Learner, batch: object, logits: Tensor) -> Tensor | None:
        return logits.sum() * self.value if Armed.now and learner.task.index == 1 and learner.step == 3 else None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_loss_that_is_not_finite_stops_the_run_at_the_last_finished_task(
    value: float, whole: tuple[Path, list[Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e38 is finite in its step, and explodes in the next."""
    monkeypatch.setattr(Armed, "now", True)
    with pytest.raises(DivergenceError, match=r"task 2 of 3.*kept"):
        experiment(tmp_path, {"bad": Diverges(value)}).run()
    assert_intact(tmp_path, tasks=1)
    state = torch.load(tmp_path / "checkpoints" / "after_task_001.ckpt", weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(w).all()) for name, w in state.items() if name.startswith(("backbone", "head")))
    monkeypatch.setattr(Armed, "now", False)
    assert_goes_on(tmp_path, whole, {"bad": Diverges(value)})


class LastStep(Strategy):
    """Blows the weights up after the last loss of the second task was seen."""

    def after_epoch(self, learner: Learner, task: Task, epoch: int) -> None:
        if task.index == 1:
            learner.head.weight.data[0, 0] = torch.inf  # type: ignore[index, union-attr]


def test_weights_that_explode_in_the_last_step_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"head\.weight are not finite after task 2 of 3"):
        experiment(tmp_path, {"bad": LastStep()}).run()
    assert_intact(tmp_path, tasks=1)


def test_frozen_weights_are_not_looked_at() -> None:
    learner, _ = toy_learner()
    learner.head.weight.data.fill_(torch.nan)  # type: ignore[operator, union-attr]
    learner.requires_grad_(False)
    check_finite(learner)


# ------------------------------------------------------------------ a full disk


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there")


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_at_any_write_leaves_whole_files_and_a_run_to_go_on(
    call: str, whole: tuple[Path, list[Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write-then-rename of a run in turn finds no room; one in three here, all in a run by hand."""
    real, every = getattr(os, call), os.environ.get("CL_FUZZ")
    count = [0]

    def counted(*arguments: object, **options: object) -> object:
        count[0] += 1
        return full() if count[0] == limit[0] else real(*arguments, **options)

    monkeypatch.setattr(os, call, counted)
    limit, n = [0], 0
    while True:
        n += 1 if every else 3 if call == "replace" else 7
        folder, count[0], limit[0] = tmp_path / str(n), 0, n
        try:
            experiment(folder).run()
            break  # there are fewer writes than n
        except OSError as error:
            said = cause(error)
            assert "no room left for" in str(said) and str(folder) in str(said) and "run again" in str(said)
        limit[0] = 0
        assert not list(folder.rglob("*.tmp"))
        for file in (folder / "checkpoints").glob("*"):
            assert checkpoint.is_whole(file)
        assert_goes_on(folder, whole)
    assert n > 6


def test_a_full_disk_while_torch_writes_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps no errno: this is what it says on a full tmpfs."""
    run, save = experiment(tmp_path), torch.save

    def torn(content: object, path: Path) -> None:
        if "002" in path.name:
            path.write_bytes(b"PK half")
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 2368 vs 2262")
        save(content, path)

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="No space left") as caught:
        run.run()
    assert "no room left for" in str(cause(caught.value))
    assert_intact(tmp_path, tasks=1)


# ------------------------------------------------------------------ what the command line says

PLUGIN = """
import torch
from cl.engine.strategy import Strategy

class Ends(Strategy):
    def __init__(self, how="bug"):
        super().__init__()
        self.how = how

    def after_step(self, learner, batch, logits):
        if learner.task.index == 1 and self.how == "bug":
            raise RuntimeError("index out of bounds")
        if learner.task.index == 1 and self.how == "host":
            raise MemoryError
        if learner.task.index == 1 and self.how == "device":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if learner.task.index == 1 and self.how == "huge":
            torch.zeros(10**14)
        if learner.task.index == 1 and self.how == "handled":
            try:
                raise MemoryError
            except MemoryError:
                self.nothing
"""


@pytest.fixture
def cl_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "ends.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    quiet = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled", "~report.picture", "~report.curves"]
    small = ["dataset=synthetic", "dataset.num_train=60", "dataset.num_test=30", "epochs=1", "trainer.accelerator=cpu"]

    def call(*overrides: str) -> None:
        monkeypatch.setattr(sys, "argv", ["cl-run", "hydra.run.dir=out", "report=quiet", *quiet, *small, *overrides])
        try:
            main()
        finally:
            GlobalHydra.instance().clear()

    yield call
    sys.modules.pop("ends", None)


@pytest.mark.parametrize("how", ["host", "device", "huge"])
def test_out_of_memory_is_one_sentence_with_what_is_kept(how: str, cl_run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        cl_run("+strategy.mine._target_=ends.Ends", f"+strategy.mine.how={how}")
    said = str(stop.value.code)
    assert said.startswith("Out of memory (") and "last finished task is kept" in said and "\n" not in said
    assert_intact(tmp_path / "out", tasks=1)


@pytest.mark.parametrize(("how", "error"), [("bug", RuntimeError), ("handled", AttributeError)])
def test_a_bug_in_a_strategy_keeps_its_traceback(how: str, error: type[Exception], cl_run, tmp_path: Path) -> None:
    """Also one that happens while a full memory is handled."""
    with pytest.raises(error) as caught:
        cl_run("+strategy.mine._target_=ends.Ends", f"+strategy.mine.how={how}")
    assert any("ends.py" in str(entry.path) for entry in caught.traceback)
    assert_intact(tmp_path / "out", tasks=1)


def test_what_cannot_be_built_leaves_no_run_that_would_refuse_the_corrected_one(cl_run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"memory_size"):
        cl_run("strategy.er.memory_size=0")
    cl_run("strategy.er.memory_size=10")
    assert_intact(tmp_path / "out", tasks=5)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_run_directory_that_cannot_be_made(place: str, cl_run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=r"nowhere to write.*hydra\.run\.dir"):
        cl_run(f"hydra.run.dir={place}")
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------------ paths


@pytest.mark.parametrize("name", ["../up", "/abs/olute", "a/../../../up"])
def test_a_loggers_name_does_not_lead_out_of_the_run_directory(name: str, cl_run, tmp_path: Path) -> None:
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="outside of it"):
        cl_run(
            "+logger.mine._target_=pytorch_lightning.loggers.CSVLogger",
            "+logger.mine.save_dir=${hydra:runtime.output_dir}",
            f"+logger.mine.name={name}",
        )
    assert {p.name for p in tmp_path.iterdir()} - before <= {"out", "__pycache__"}


@pytest.mark.parametrize("name", ["a.b", "", "items", "loss", "../up", "a/b", "training", "a b", "\0"])
def test_a_strategy_has_a_name_that_can_be_a_key(name: str) -> None:
    with pytest.raises(InputError, match="cannot be called"):
        Composition({name: Strategy()})


@pytest.mark.parametrize("name", ["er", "my-er_2", "épsilon"])
def test_words_are_names(name: str) -> None:
    assert list(Composition({name: Strategy()})) == [name]


def test_names_of_tasks_and_classes_are_no_paths(tmp_path: Path) -> None:
    plain, names = toy_stream(TASKS), ["../../up", "/etc/x" + "y" * 300, "né/\n,\"'<b>"]
    stream = plain.derive(lambda t: replace(plain[t], name=names[t]), class_names=["../c"] * 6, name="../../stream")
    learner = Learner(stream, ToyBackbone(), {}, partial(torch.optim.SGD, lr=0.1))
    folder = tmp_path / "a" / "b" / "run"
    Experiment(learner, stream, trainer, epochs=1, directory=folder, reports=[FileReport()]).run()
    assert {p.relative_to(tmp_path).parts[:3] for p in tmp_path.rglob("*") if p.is_file()} == {("a", "b", "run")}
    assert all(p.name.startswith("after_task") for p in (folder / "checkpoints").iterdir())


def test_a_link_in_a_run_directory_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    run.mkdir()
    for name in ("transfer.csv", "transfer.json", "versions.json", f".transfer.csv.{os.getpid()}.tmp"):
        (run / name).symlink_to(precious)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / f".after_task_000.ckpt.{os.getpid()}.tmp").symlink_to(precious)
    experiment(run).run()
    write_text(run / "transfer.csv", "")
    assert precious.read_text() == "mine"
    assert not (run / "transfer.csv").is_symlink() and not list(run.rglob("*.tmp"))


def test_a_memory_that_no_machine_holds_is_refused_before_it_is_promised() -> None:
    for storage in ("device", "host", "disk"):
        with pytest.raises(InputError, match=r"memory_size=1000000000000 takes .* GB"):
            Memory(10**12, toy_stream(), storage=storage)
    data = TaskData(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    assert len(Memory(4, Stream([Task(0, data, data)], num_classes=1)).column("x")) == 4


def test_replace_file_keeps_the_old_file_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "a", lambda temporary: temporary.write_text("new"))
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
