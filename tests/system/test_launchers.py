"""Sweeps under every launcher: the same jobs in the same directories, and one that fails takes no other with it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

import cl.app.build
from cl.app import cli, sweep
from cl.compare.command import parser
from cl.compare.command import run as compare

pytestmark = pytest.mark.xdist_group(__name__)  # one worker makes what all of these look at
PLUGINS = {"joblib": "joblib", "submitit_slurm": "submitit", "submitit_local": "submitit", "ray": "ray"}
SPY = """
import os
import torch
from cl.engine.strategy import Strategy

class Spy(Strategy):
    def __init__(self, fail):
        super().__init__()
        self.fail = fail

    def before_task(self, learner, task):
        print("threads", os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads(), flush=True)
        if self.fail and task.index == 1:
            raise RuntimeError("out of luck")
"""


def installed(launcher: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.hydra_{PLUGINS[launcher]}_launcher") is not None
    except ModuleNotFoundError:
        return False


def needs(launcher: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not installed(launcher), reason=f"hydra-{PLUGINS[launcher]}-launcher is not installed")


# ------------------------------------------------------------------ what ends a sweep, in one process


class Preempted(SystemExit):
    """As a signal would raise it."""


def run_main(monkeypatch: pytest.MonkeyPatch, place: Path, *arguments: str) -> str:
    """Return the sentence with which `cl-run` ends."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["cl-run", *arguments])
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        GlobalHydra.instance().clear()
    return str(stop.value.code)


def fake(outcomes: list[object]):
    """Return a `build` whose experiments end in turn as told: with a number, or with an exception."""
    given = iter(outcomes)

    def run() -> object:
        outcome = next(given)
        if isinstance(outcome, BaseException):
            raise outcome
        scalars = {"average_accuracy": outcome}
        return SimpleNamespace(scalars=lambda mask: scalars, primary=SimpleNamespace(mask="class"))

    return lambda cfg, directory: SimpleNamespace(run=run)


@pytest.mark.parametrize(
    ("interruption", "sentence"), [(KeyboardInterrupt(), "Interrupted."), (Preempted("pre-empted"), "pre-empted")]
)
def test_an_interruption_ends_the_whole_sweep(interruption, sentence, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(
        cl.app.build, "build", fake([0.5, interruption, AssertionError("a job after the interruption")])
    )
    said = run_main(monkeypatch, tmp_path, "-m", "seed=0,1,2", "hydra.sweep.dir=out")
    assert said.startswith(sentence) and "failed" not in said
    assert len(list((tmp_path / "out").glob("*_seed*"))) == 2


def test_batches_after_a_failure_are_run(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cl.app.build, "build", fake([RuntimeError("broken"), 0.5, 0.5]))
    batches = "hydra.sweeper.max_batch_size=1"
    said = run_main(monkeypatch, tmp_path, "-m", "seed=0,1,2", "hydra.sweep.dir=out", batches)
    assert said == "1 of 3 jobs failed: out/0_seed=0 (RuntimeError: broken)."


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="Optuna is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lost", [1, 3])
def test_a_search_leaves_failed_trials_out(lost: int, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cl.app.build, "build", fake([ValueError("broken")] * lost + [0.5, 0.25][: 3 - lost]))
    search = ["hydra/sweeper=tune", "hydra.sweeper.n_trials=3", "optimizer.lr=interval(0.1,1)"]
    said = run_main(monkeypatch, tmp_path, "-m", *search, "hydra.sweep.dir=out")
    assert said.startswith(f"{lost} of 3 jobs failed")
    found = tmp_path / "out" / "optimization_results.yaml"
    assert found.exists() == (lost < 3)
    assert lost == 3 or OmegaConf.load(found).best_value == 0.5


def test_a_single_run_stays_as_it_is(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cl.app.build, "build", fake([cl.app.build.InputError("Give more.")]))
    assert run_main(monkeypatch, tmp_path, "hydra.run.dir=out") == "Give more."


def test_what_a_launcher_itself_cannot_do_is_one_sentence(monkeypatch, tmp_path) -> None:
    said = run_main(monkeypatch, tmp_path, "-m", f"hydra.sweep.subdir={'x' * 300}", "seed=0", "hydra.sweep.dir=out")
    assert said.startswith("BasicLauncher failed (OSError") and "File name too long" in said and "\n" not in said


def test_the_verdict_counts_and_lists_five() -> None:
    def job(i: int, outcome: object) -> JobReturn:
        done = JobReturn(status=JobStatus.COMPLETED)
        done.hydra_cfg = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(Path.cwd() / f"out/{i}")}}})
        done.return_value = outcome
        return done

    assert sweep.verdict([]) is None and sweep.verdict([job(0, 0.5)]) is None
    assert sweep.verdict([job(0, 0.5), job(1, "Why.")]) == "1 of 2 jobs failed: out/1 (Why)."
    many = sweep.verdict([job(i, "Why.") for i in range(7)])
    assert many is not None and many.startswith("7 of 7") and many.endswith("out/4 (Why); and 2 more.")


# ------------------------------------------------------------------ a sweep in which three of four jobs fail

JOBS = ("strategy=finetune,gpm", "+strategy.spy.fail=false,true", "+strategy.spy._target_=spy.Spy")
SMALL = ("optimizer.momentum=0.9", "epochs=1", "stream.num_tasks=2", "report=quiet", "trainer.accelerator=cpu")


def start(place: Path, threads: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the sweep in two processes at a time."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    environment |= {"PYTHONPATH": str(place)} | ({"OMP_NUM_THREADS": threads} if threads else {})
    two = ["launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=out"]
    line = [sys.executable, "-m", "cl", "-m", *JOBS, *SMALL, *two]
    return subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    if not installed("joblib"):
        pytest.skip("hydra-joblib-launcher is not installed")
    place = tmp_path_factory.mktemp("sweep")
    (place / "spy.py").write_text(SPY)
    return start(place), place


def threads(result: subprocess.CompletedProcess[str]) -> set[tuple[str, ...]]:
    """Return OMP_NUM_THREADS and torch's number, as the jobs saw them."""
    return {tuple(line.split()[1:]) for line in result.stdout.splitlines() if line.startswith("threads")}


def check_end(result: subprocess.CompletedProcess[str]) -> None:
    """Each failed job is told with its directory, what no user can mend with its traceback; then all in a sentence."""
    assert result.returncode == 1
    *before, verdict = result.stderr.strip().splitlines()
    assert verdict.startswith("3 of 4 jobs failed: out/1_") and verdict.count("GPM needs plain SGD") == 2
    assert "RuntimeError: out of luck" in verdict
    told = [line for line in before if line.startswith("out/")]
    assert sorted(line[:6] for line in told) == ["out/1_", "out/2_", "out/3_"]
    assert result.stderr.count("Traceback") == 1


@pytest.mark.slow
def test_failed_jobs_are_told_and_the_others_run(swept) -> None:
    result, place = swept
    check_end(result)
    finished = [path.parent.parent.name for path in place.glob("out/*/checkpoints/after_task_002.ckpt")]
    assert len(finished) == 1 and finished[0].startswith("0_")
    begun = sorted(path.parent.name[:2] for path in place.glob("out/*/config.yaml"))
    assert begun == ["0_", "1_"], "what cannot be built is no run to continue"


@pytest.mark.slow
def test_the_jobs_share_the_cores(swept) -> None:
    from joblib import cpu_count

    share = str(max(1, cpu_count() // 2))
    assert threads(swept[0]) == {(share, share)}


@pytest.mark.slow
def test_compare_works_on_what_is_there(swept, tmp_path: Path, capsys) -> None:
    """A finished job, one that stopped in the middle, and two that never began."""
    for more in ([], ["--unfinished"]):
        compare(parser().parse_args([str(swept[1] / "out"), "--out", str(tmp_path), *more]))
        said = capsys.readouterr().out.replace("\n", "")
        assert "average_accuracy" in (tmp_path / "comparison.csv").read_text()
        assert ("it is left out" in said) or more
        assert "out/2_" not in said and "out/3_" not in said, "what never began is no run"


@pytest.mark.slow
def test_the_same_sweep_goes_on_in_the_same_directories_with_the_users_threads(swept, monkeypatch) -> None:
    """Those of Hydra's own launcher too."""
    _, place = swept
    files = place.glob("out/*/checkpoints/*.ckpt")
    before = {path: path.stat().st_mtime_ns for path in files}
    result = start(place, threads="3")
    check_end(result)
    assert {omp for omp, _ in threads(result)} == {"3"}
    assert {path: path.stat().st_mtime_ns for path in place.glob("out/*/checkpoints/*.ckpt")} == before
    monkeypatch.setattr(cl.app.build, "build", fake([RuntimeError("Not built.")] * 4))
    run_main(monkeypatch, place, "-m", *JOBS, *SMALL, "hydra.sweep.dir=basic")
    names = {kind: {path.name for path in (place / kind).iterdir() if path.is_dir()} for kind in ("out", "basic")}
    assert len(names["basic"]) == 4 and names["basic"] == names["out"]


# ------------------------------------------------------------------ names of jobs' directories


@pytest.mark.parametrize("hydra_job", ["epochs=1", "stream.class_order=[" + ",".join(map(str, range(9, -1, -1))) + "]"])
def test_jobs_are_named_after_what_varies(hydra_job, monkeypatch, tmp_path) -> None:
    """Fifteen ordinary overrides and an order of classes are no part of a name; nor are places."""
    more = ["batch_size=11", "log_every=7", "optimizer.lr=0.05", "optimizer.momentum=0.1", "gradient_clip=1"]
    more += ["dataset=digits", "stream=split", "backbone=mlp", "backbone.hidden=[8]", "init=xavier", "report=quiet"]
    more += ["logger=none", "stream.num_tasks=5", "scenario=class", "trainer.accelerator=cpu", "reference_dir=a/b,c/d"]
    monkeypatch.setattr(cl.app.build, "build", fake([RuntimeError("Not built.")] * 4))
    run_main(monkeypatch, tmp_path, "-m", hydra_job, *more, "seed=0,1", "hydra.sweep.dir=out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert [name.partition("_")[2] for name in names] == ["seed=0", "seed=1", "seed=0", "seed=1"]


def test_names_are_flat_plain_short_and_distinct() -> None:
    orders = [f"stream.class_order=[{','.join(map(str, (*range(99), last)))}]" for last in (99, 100)]
    names = [sweep.job_name(0, [order, "stream.path=/home/a b/ü/x.csv", "seed=1"]) for order in orders]
    assert len(set(names)) == 2
    for name in names:
        assert len(name) <= 100 and "/" not in name and " " not in name
    assert sweep.job_name(7, ["stream.train_x=a/b/x.npy"]) == sweep.job_name(7, ["stream.train_x=c/x.npy"])
    assert sweep.job_name(7, ["x=../../etc"]) == "7_x=etc"


# ------------------------------------------------------------------ choosing a launcher


@pytest.mark.parametrize("launcher", [pytest.param(name, marks=needs(name)) for name in PLUGINS])
@pytest.mark.parametrize("sweeper", ["basic", "tune"])
def test_a_launcher_is_no_part_of_a_runs_configuration(launcher: str, sweeper: str) -> None:
    """Nor of the name of its directory; and it goes with either sweeper."""
    job = ["strategy=ewc", "seed=3", f"hydra/sweeper={sweeper}", "hydra.job.num=1"]
    with initialize_config_module("cl.conf", version_base="1.3"):
        alone, launched = (
            compose("config", [*job, *more], return_hydra_config=True) for more in ([], [f"launcher={launcher}"])
        )
    assert launched.hydra.launcher._target_.startswith(f"hydra_plugins.hydra_{PLUGINS[launcher]}_launcher.")
    assert launched.hydra.sweeper == alone.hydra.sweeper
    raw = [OmegaConf.to_container(cfg.hydra.sweep, resolve=False) for cfg in (launched, alone)]
    assert raw[0] == raw[1]
    for cfg in (alone, launched):
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
    assert launched == alone


@pytest.mark.parametrize(("launcher", "extra"), [*((n, n) for n in ("joblib", "ray")), ("submitit_slurm", "slurm")])
def test_a_launcher_without_its_extra_names_the_extra(launcher, extra, monkeypatch, tmp_path) -> None:
    known = ConfigStore.instance().repo["hydra"]["launcher"]
    monkeypatch.delitem(known, f"{launcher}.yaml", raising=False)
    said = run_main(monkeypatch, tmp_path, "-m", f"launcher={launcher}", "seed=0,1")
    assert f"launcher={launcher}" in said and said.endswith(f"is not installed: pip install 'clsim[{extra}]'.")


def test_an_unknown_launcher_names_the_nearest(monkeypatch, tmp_path) -> None:
    said = run_main(monkeypatch, tmp_path, "-m", "launcher=joblip", "seed=0,1")
    assert said.startswith("There is no launcher called 'joblip': did you mean 'joblib'?")
