"""Weights & Biases: every R, every scalar against the tasks learned, and the training curves, in one run.

Nothing here stops a run or asks a question. Without a login, or where W&B cannot be reached, the run is kept offline
under the run directory (`wandb sync <directory>/wandb/offline-run-*` uploads it later).
"""

from __future__ import annotations

import io
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers import Logger

from cl import rundir
from cl.files import write_text
from cl.report.contract import Report
from cl.report.points import Journal, Point, steps_on_disk, steps_so_far
from cl.report.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cl.metrics.transfer import TransferMatrix

_TAG = 64  # the longest tag that W&B takes
_GROUP = 128
_PATIENCE = 10.0  # seconds in which W&B's file has not grown, after which its end is not waited for
_OPEN: dict[str, Any] = {}  # W&B's runs of this process that were not ended, by id


class WandbReport(Report):
    """Logs R as a table and a heat map, and every scalar, after each row; `logger` does the same for training curves.

    Keys: `<mask>/<scalar>` for every mask and probe, `transfer/<scalar>` for the mask of the scenario, so that runs of
    all scenarios share a name, and `measure/<name>` for what needs more than R; `<mask>/R` (table) and
    `<mask>/R_heat_map` (image); all of these against `tasks_learned`. `train/...`, `val/...` and, for evaluations
    inside tasks, `curve/<mask>/task <j>` against `train/step`. What is unmeasured is left out (null in a table), never
    0. A run that is continued in its directory keeps its W&B id, and its history has every point once, however it was
    stopped: the points come in the same order every time, `wandb/points.jsonl` of the run directory keeps them, and
    those that a kill has taken from W&B's own files are given again; see `cl.report.points`.

    Args:
        project: W&B project.
        group: Runs that stand together; by default `group` of the configuration, or else stream, dataset and scenario.
        tags: Beside `tags` of the configuration, the names of the strategies and the scenario.
        name: By default strategies and seed.
        mode: "online", "offline" or "disabled"; by default what WANDB_MODE says, or else online if logged in.
        dir: Where W&B's files go; by default the run directory.

    Example:
        >>> report = WandbReport(mode="offline", group="split-mnist")
        >>> report.logger.name
        'clsim'
    """

    def __init__(
        self,
        project: str = "clsim",
        group: str | None = None,
        tags: Sequence[str] | None = None,
        name: str | None = None,
        mode: str | None = None,
        dir: str | Path | None = None,
    ) -> None:
        self.project, self.group, self.tags, self.name, self.mode = project, group, list(tags or ()), name, mode
        self.directory = Path(dir) if dir is not None else None
        self.run: Any = None  # wandb's, while there is one
        self.logger = WandbCurves(self)
        self._looked = 0  # evaluations inside tasks that are logged
        self._journal: Journal | None = None  # while there is a run, whether W&B works or not
        self._held: Container[int] = ()  # steps of the history that W&B has from earlier sittings
        self._given: list[int] = []  # steps that W&B was given in this sitting
        self._view: Run | None = None
        self._reason = ""  # why it is not as was asked for

    def start(self, run: Run, after_task: int) -> None:
        """Begin a W&B run, or go on with the one of this directory."""
        self.directory, self._view = self.directory or run.directory, run
        own = run.directory / rundir.WANDB
        self._journal = Journal(own / rundir.WANDB_POINTS, run.config)
        goes_on = after_task >= 0 or self._journal.holds_only_the_start()
        known = _known(own / rundir.WANDB_ID) if goes_on else None
        count = run.flushed.get("wandb", {}).get("points") if after_task >= 0 else 0
        earlier = self._journal.begin(count)
        self.run = self._begin(run, known)
        self._looked = len(run.instruments["curves"]) if "curves" in run.instruments else 0
        if self.run is not None:
            self.attempt(self._sign, own / rundir.WANDB_ID)
            self.attempt(self._find_held)
            self.attempt(self._define_axes, run)
            self.attempt(self._give_again, earlier)
            self.attempt(self._announce)

    def flush(self) -> Mapping[str, Any] | None:
        """Put the points on the disk, and return how many stand before a checkpoint."""
        if self._journal is None:
            return None
        self._journal.sync()
        return {"wandb": {"points": self._journal.count}}

    def log(self, values: Mapping[str, Any], row: int | None = None) -> None:
        """Keep one point, and give it to W&B unless an earlier sitting has.

        Args:
            values: Its scalars.
            row: The row of R that it reports, whose table and heat map go with it.
        """
        if self._journal is not None:
            self.attempt(self._give, self._journal.add(values, row))

    def _give(self, point: Point) -> None:
        if point.step not in self._held:
            drawn = {} if point.row is None else _draw(self._view, point.row)
            self.run.log({**point.values, **drawn}, step=point.step)
            self._given.append(point.step)

    def _sign(self, identity: Path) -> None:
        write_text(identity, self.run.id)
        _OPEN[self.run.id] = self.run

    def _find_held(self) -> None:
        """Find what W&B has from earlier sittings: online its server tells, offline its files."""
        if self.run.disabled or not self.run.offline:
            self._held = range(0 if self.run.disabled else self.run.starting_step)
            return
        own = Path(self.run.dir).parent
        files = [file for file in own.parent.glob(f"*run-*/run-{self.run.id}.wandb") if file.parent != own]
        self._held = {step for file in files for step in steps_on_disk(file)}

    def _give_again(self, earlier: list[Point]) -> None:
        """Give W&B the points before the checkpoint that a kill has taken from it."""
        assert self._journal is not None
        if self.run.disabled:
            return
        for point in earlier:
            self._give(point)
        kept = {point.step for point in earlier}
        lost = sum(step not in self._held and step not in kept for step in range(self._journal.count))
        if lost:
            warnings.warn(
                f"Weights & Biases lacks {lost} of the {self._journal.count} points up to the checkpoint, and "
                f"{self._journal.path} does not hold them: the run was begun by an earlier version, or files were "
                "removed. All that follow are kept.",
                stacklevel=4,
            )

    def row(self, run: Run, after_task: int) -> None:
        """Log R so far, as a table and a picture, and the scalars over the tasks learned."""
        self._log_curves(run)
        self.log({"tasks_learned": after_task, **(_scalars(run) if after_task else {})}, after_task)

    def finish(self, run: Run) -> None:
        """Write the final scalars to the run's summary, and close it."""
        self.attempt(lambda: self.run.summary.update(_scalars(run)))
        self.attempt(self._close)
        self.run = self._journal = None

    def _close(self) -> None:
        """End the W&B run; offline, wait for its file, and say so where it is not whole."""
        own, offline = Path(self.run.dir).parent / f"run-{self.run.id}.wandb", self.run.offline
        _OPEN.pop(self.run.id, None)
        self.run.finish()
        if not offline or self._journal is None:
            return
        steps = _steps_of_ended(own)
        lost = sum(step not in steps and step not in self._held for step in self._given)
        if lost:
            self._say(f"has not written {lost} of the {self._journal.count} points of this run: is the disk full?")

    def _say(self, what: str) -> None:
        """Warn of what W&B lacks, and of how it comes to it."""
        kept = self._journal.path if self._journal is not None else rundir.WANDB_POINTS
        warnings.warn(
            f"Weights & Biases {what} {kept} keeps every point: once that is mended, repeat the command, without "
            f"{rundir.RESULT} where the run has finished, and those that are lacking are given.",
            stacklevel=4,
        )

    def attempt(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function that talks to W&B; if it fails, say so once and go on without W&B."""
        if self.run is None:
            return
        try:
            with _staging_in(self.directory):
                function(*arguments)
        except Exception as error:
            self.run = None
            self._say(f"failed ({_sentence(error)}): the run goes on without it.")

    def _begin(self, run: Run, known: str | None) -> Any:
        """Return a W&B run in the first mode that works, None (and one sentence) where none does."""
        try:
            import wandb

            if known in _OPEN:  # an earlier sitting in this process, ended by an exception
                _OPEN.pop(known).finish()
            mode = self._mode()
            for candidate in dict.fromkeys([mode, "offline"]):
                try:
                    return wandb.init(**self._options(run, candidate, known))
                except Exception as error:  # no network, no permission, a wrong setting: training goes on
                    self._reason = _sentence(error)
        except Exception as error:  # not installed, or its own settings are broken
            self._reason = _sentence(error)
        self._say(f"cannot start ({self._reason}): the run goes on without it.")
        return None

    def _options(self, run: Run, mode: str, known: str | None) -> dict[str, Any]:
        import wandb

        assert self.directory is not None
        (self.directory / rundir.WANDB).mkdir(parents=True, exist_ok=True)
        return {
            **self._labels(run),
            "project": self.project,
            "dir": str(self.directory),
            "config": run.config,
            "mode": mode,
            "id": known,
            "resume": "allow" if known and mode == "online" else None,  # offline, the id alone joins the parts
            "reinit": "create_new",
            # what it would say is said by `_announce`; the bars must not end up in its console log
            "settings": wandb.Settings(silent=True, console="off", init_timeout=30),
        }

    def _announce(self) -> None:
        import rich

        if self.run.disabled:
            return
        because = f" ({self._reason})" if self._reason else ""
        offline = f"offline{because}, `wandb sync {Path(self.run.dir).parent}` uploads it"
        where = offline if self.run.offline else self.run.url
        rich.get_console().print(f"W&B: {where}", soft_wrap=True, highlight=False, markup=False)

    def _mode(self) -> str:
        import wandb

        mode = self.mode or os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
        if mode != "online" or _logged_in():
            return str(mode)
        self._reason = "no login"
        return "offline"

    def _labels(self, run: Run) -> dict[str, Any]:
        config = run.config
        strategies = list(config.get("strategy") or {}) or ["fine-tuning"]
        stream = config.get("stream")
        dataset = config.get("dataset") or (stream.get("dataset") if isinstance(stream, Mapping) else None)
        parts = [_name_of(stream), _name_of(dataset), run.scenario, f"{len(run.task_names)} tasks"]
        group = self.group or config.get("group") or " ".join(part for part in parts if part)
        seed = config.get("seed")
        name = self.name or "+".join(strategies) + (f" seed {seed}" if seed is not None else "")
        tags = dict.fromkeys([*self.tags, *(config.get("tags") or ()), *strategies, run.scenario])
        return {"group": str(group)[:_GROUP], "name": name[:_GROUP], "tags": [str(tag)[:_TAG] for tag in tags]}

    def _define_axes(self, run: Run) -> None:
        self.run.define_metric("tasks_learned")
        for prefix in ("transfer", "measure", *run.matrices):
            self.run.define_metric(f"{prefix}/*", step_metric="tasks_learned")
        self.run.define_metric("train/step")
        for prefix in ("train", "val", "curve"):
            self.run.define_metric(f"{prefix}/*", step_metric="train/step")

    def _log_curves(self, run: Run) -> None:
        """Log the evaluations inside the task that has just ended: `curve/<mask>/task <j>` against `train/step`."""
        curves = run.instruments.get("curves")
        if curves is None:
            return
        points: dict[int, dict[str, float]] = {}
        for _, _, step, tested, mask, _, value in curves.records(self._looked):
            points.setdefault(step, {})[f"curve/{mask}/task {tested}"] = float(value)
        for step, point in points.items():
            self.log({**point, "train/step": step})
        self._looked = len(curves)


class WandbCurves(Logger):
    """The Lightning logger of a `WandbReport`: training curves in the same W&B run, on a step that never goes back.

    Points that come with `train/task` set the step (the learner counts over the whole stream); those of others'
    callbacks, whose Lightning step counts chunks and begins anew with every task, take the step of the last one.

    Example:
        >>> WandbReport(project="mine").logger.log_metrics({"train/loss": 0.5}, step=10)  # not begun yet: dropped
    """

    def __init__(self, report: WandbReport) -> None:
        super().__init__()
        self._report = report
        self._step = 0

    @property
    def name(self) -> str:
        """The project."""
        return self._report.project

    @property
    def version(self) -> str:
        """The id of the W&B run, empty before it has begun."""
        return "" if self._report.run is None else str(self._report.run.id)

    @property
    def save_dir(self) -> str | None:
        """Where W&B's files are."""
        return None if self._report.directory is None else str(self._report.directory)

    @property
    def experiment(self) -> Any:
        """The W&B run, None where there is none."""
        return self._report.run

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the report has logged the resolved configuration."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log one point of every curve."""
        if step is not None and "train/task" in metrics:
            self._step = step
        point = {name: value for name, value in metrics.items() if name != "epoch"}  # it begins anew with every task
        if point:
            self._report.log({**point, "train/step": self._step})


def _draw(run: Run | None, row: int) -> dict[str, Any]:
    """Return `<mask>/R` and `<mask>/R_heat_map` as they were when a row of R had just been measured."""
    import wandb

    from cl.report.picture import draw_accuracy

    assert run is not None
    matrices = {mask: _until(matrix, row) for mask, matrix in run.matrices.items()}
    run = replace(run, directory=Path(), matrices=matrices)  # W&B names the run, and a directory may be moved
    drawn: dict[str, Any] = {}
    for mask, matrix in run.matrices.items():
        columns = ["tasks learned", *(f"{j} {name}" for j, name in enumerate(run.task_names, start=1))]
        rows = [[i, *map(_or_none, values)] for i, values in enumerate(matrix.R.tolist())]
        drawn[f"{mask}/R"] = wandb.Table(columns=columns, data=rows)
        drawn[f"{mask}/R_heat_map"] = wandb.Image(_pixels(draw_accuracy(run, mask)))
    return drawn


def _until(matrix: TransferMatrix, row: int) -> TransferMatrix:
    """Return a matrix without the rows behind one."""
    matrix = deepcopy(matrix)
    matrix.R[row + 1 :] = math.nan
    return matrix


def _scalars(run: Run) -> dict[str, float]:
    """Return `<mask>/<scalar>`, `transfer/<scalar>` and `measure/<name>`, unmeasured ones left out."""
    from cl.report.scalars import measure

    named = {f"measure/{name}": value for name, value in measure(run)[0].items()}
    named |= {f"{mask}/{name}": value for mask in run.matrices for name, value in run.scalars(mask).items()}
    named.update({f"transfer/{name}": value for name, value in run.scalars(run.primary.mask).items()})
    return {name: value for name, value in named.items() if not math.isnan(value)}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _name_of(node: object) -> str:
    """Return what a part of the configuration is called: its `name`, or else the last word of its `_target_`."""
    if isinstance(node, Mapping):
        return str(node.get("name") or str(node.get("_target_", "")).rpartition(".")[2])
    return str(node or "")


def _known(identity: Path) -> str | None:
    """Return the identity of the W&B run that a file names, or None where there is none."""
    if not identity.exists():
        return None
    text = identity.read_text(encoding="utf-8", errors="replace").strip()
    if re.fullmatch(r"[\w-]{1,128}", text, flags=re.ASCII):
        return text
    warnings.warn(f"{identity} is torn or changed: another run is begun in Weights & Biases.", stacklevel=3)
    return None


def _sentence(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")


def _steps_of_ended(path: Path) -> set[int]:
    """Return the steps that a `.wandb` file holds once W&B has written its end, or writes no more."""
    steps, end = steps_so_far(path)
    grew = time.monotonic()
    while end is not None and time.monotonic() < grew + _PATIENCE:
        time.sleep(0.02)
        before, (steps, end) = end, steps_so_far(path)
        grew = time.monotonic() if end != before else grew
    return steps


def _logged_in() -> bool:
    """Return whether W&B has an API key for its host, without asking for one."""
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # before `prompt` existed
        return bool(wandb.api.api_key)
    except Exception:
        return False  # a key that W&B refuses


def _pixels(figure: Figure) -> Any:
    from PIL import Image

    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Image.open(png)


@contextmanager
def _staging_in(directory: Path | None) -> Iterator[None]:
    """Let W&B stage tables in the run directory: an offline run then holds all that `wandb sync` needs."""
    if directory is None or "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(directory / rundir.WANDB)
    try:
        yield
    finally:
        os.environ.pop("WANDB_DATA_DIR", None)
