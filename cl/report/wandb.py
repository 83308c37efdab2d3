"""Weights & Biases: every R, every scalar against the tasks learned, and the training curves, in one run.

An error of W&B never stops the run, and W&B asks no question. Without a login or a connection, its files are written
offline under the run directory; `wandb sync <directory>/wandb/offline-run-*` uploads them later.
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

_TAG = 64  # the most characters of a tag in W&B
_GROUP = 128  # the most characters of a group or name in W&B
_PATIENCE = 10.0  # seconds to wait for the end of W&B's file while it does not grow
_OPEN: dict[str, Any] = {}  # runs of W&B in this process that were not finished, by id


class WandbReport(Report):
    """Logs R as a table and a heat map, and every scalar, after each row; `logger` logs the training curves.

    Against `tasks_learned` it logs `<mask>/<scalar>` for every mask and probe; `transfer/<scalar>` for the mask of the
    scenario, so that runs of all scenarios share a name; `measure/<name>` for scalars that need more than R; and
    `<mask>/R` (table) and `<mask>/R_heat_map` (image). Against `train/step` it logs `train/...`, `val/...` and, for
    evaluations inside tasks, `curve/<mask>/task <j>`. Unmeasured values are left out (null in a table), never 0.

    A run that resumes in its directory keeps its W&B id, and its history has every point once, even after a kill: the
    file `wandb/points.jsonl` of the run directory holds all points, and those that W&B lost are logged again; see
    `cl.report.points`.

    Args:
        project: W&B project.
        group: W&B group; by default `group` of the configuration, else stream, dataset and scenario.
        tags: Added to `tags` of the configuration, the names of the strategies and the scenario.
        name: Name of the run; by default strategies and seed.
        mode: "online", "offline" or "disabled"; by default that of WANDB_MODE, else online if logged in.
        dir: Directory of W&B's files; by default the run directory.

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
        self.run: Any = None  # the run of wandb, while W&B works
        self.logger = WandbCurves(self)
        self._logged = 0  # number of evaluations inside tasks that are logged
        self._journal: Journal | None = None  # during a run, also if W&B does not work
        self._held: Container[int] = ()  # steps of the history that W&B has from earlier sessions
        self._given: list[int] = []  # steps that were logged to W&B in this session
        self._view: Run | None = None
        self._reason = ""  # why W&B does not run in the mode that was asked for

    def start(self, run: Run, after_task: int) -> None:
        """Start a W&B run, or resume the one of this directory."""
        self.directory, self._view = self.directory or run.directory, run
        own = run.directory / rundir.WANDB
        self._journal = Journal(own / rundir.WANDB_POINTS, run.config)
        goes_on = after_task >= 0 or self._journal.holds_only_the_start()
        known = _known(own / rundir.WANDB_ID) if goes_on else None
        count = run.flushed.get("wandb", {}).get("points") if after_task >= 0 else 0
        earlier = self._journal.begin(count)
        self.run = self._begin(run, known)
        self._logged = len(run.instruments["curves"]) if "curves" in run.instruments else 0
        if self.run is not None:
            self.attempt(self._sign, own / rundir.WANDB_ID)
            self.attempt(self._find_held)
            self.attempt(self._define_axes, run)
            self.attempt(self._give_again, earlier)
            self.attempt(self._announce)

    def flush(self) -> Mapping[str, Any] | None:
        """Sync the journal to the disk, and return the number of its points."""
        if self._journal is None:
            return None
        self._journal.sync()
        return {"wandb": {"points": self._journal.count}}

    def log(self, values: Mapping[str, Any], row: int | None = None) -> None:
        """Write one point to the journal, and log it to W&B unless an earlier session has.

        Args:
            values: The scalars of the point.
            row: The row of R that it reports, which is logged as table and heat map too; None for training curves.
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
        """Find the points that W&B has from earlier sessions: online on its server, offline in its files."""
        if self.run.disabled or not self.run.offline:
            self._held = range(0 if self.run.disabled else self.run.starting_step)
            return
        own = Path(self.run.dir).parent
        files = [file for file in own.parent.glob(f"*run-*/run-{self.run.id}.wandb") if file.parent != own]
        self._held = {step for file in files for step in steps_on_disk(file)}

    def _give_again(self, earlier: list[Point]) -> None:
        """Log again the points before the checkpoint that W&B lost in a kill."""
        assert self._journal is not None
        if self.run.disabled:
            return
        for point in earlier:
            self._give(point)
        stored = {point.step for point in earlier}
        lost = sum(step not in self._held and step not in stored for step in range(self._journal.count))
        if lost:
            warnings.warn(
                f"Weights & Biases lacks {lost} of the {self._journal.count} points up to the checkpoint, and "
                f"{self._journal.path} does not hold them: the run was begun by an earlier version, or files were "
                "removed. All that follow are kept.",
                stacklevel=4,
            )

    def row(self, run: Run, after_task: int) -> None:
        """Log R so far, as a table and a picture, and the scalars."""
        self._log_curves(run)
        self.log({"tasks_learned": after_task, **(_scalars(run) if after_task else {})}, after_task)

    def finish(self, run: Run) -> None:
        """Write the final scalars to the run's summary, and close it."""
        self.attempt(lambda: self.run.summary.update(_scalars(run)))
        self.attempt(self._close)
        self.run = self._journal = None

    def _close(self) -> None:
        """Finish the W&B run; offline, wait for its file, and warn if points are missing from it."""
        own, offline = Path(self.run.dir).parent / f"run-{self.run.id}.wandb", self.run.offline
        _OPEN.pop(self.run.id, None)
        self.run.finish()
        if not offline or self._journal is None:
            return
        steps = _steps_of_ended(own)
        lost = sum(step not in steps and step not in self._held for step in self._given)
        if lost:
            self._warn(f"has not written {lost} of the {self._journal.count} points of this run: is the disk full?")

    def _warn(self, problem: str) -> None:
        """Warn of a problem of W&B, and say how its missing points can be logged later."""
        path = self._journal.path if self._journal is not None else rundir.WANDB_POINTS
        warnings.warn(
            f"Weights & Biases {problem} {path} keeps every point. To log the missing ones later, repeat the command; "
            f"if the run has finished, remove {rundir.RESULT} first.",
            stacklevel=4,
        )

    def attempt(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function that uses W&B; if it fails, warn once and go on without W&B."""
        if self.run is None:
            return
        try:
            with _staging_in(self.directory):
                function(*arguments)
        except Exception as error:
            self.run = None
            self._warn(f"failed ({_sentence(error)}): the run goes on without it.")

    def _begin(self, run: Run, known: str | None) -> Any:
        """Return a W&B run in the first mode that works; if none does, warn and return None."""
        try:
            import wandb

            if known in _OPEN:  # an earlier session in this process, ended by an exception
                _OPEN.pop(known).finish()
            mode = self._mode()
            for candidate in dict.fromkeys([mode, "offline"]):
                try:
                    return wandb.init(**self._options(run, candidate, known))
                except Exception as error:  # no network, no permission, a wrong setting: training goes on
                    self._reason = _sentence(error)
        except Exception as error:  # not installed, or its own settings are broken
            self._reason = _sentence(error)
        self._warn(f"cannot start ({self._reason}): the run goes on without it.")
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
            # silent, as `_announce` prints the path; console off, as progress bars would fill its console log
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
        for _, _, step, tested, mask, _, value in curves.records(self._logged):
            points.setdefault(step, {})[f"curve/{mask}/task {tested}"] = float(value)
        for step, point in points.items():
            self.log({**point, "train/step": step})
        self._logged = len(curves)


class WandbCurves(Logger):
    """The Lightning logger of a `WandbReport`: training curves in the same W&B run, with steps over the whole stream.

    A point with `train/task` comes from the learner and sets the step. Points of Lightning callbacks, whose step counts
    chunks and restarts with every task, get the step of the learner's last point.

    Example:
        >>> WandbReport(project="mine").logger.log_metrics({"train/loss": 0.5}, step=10)  # dropped: no run has started
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
        """The id of the W&B run; empty before the start."""
        return "" if self._report.run is None else str(self._report.run.id)

    @property
    def save_dir(self) -> str | None:
        """The directory of W&B's files."""
        return None if self._report.directory is None else str(self._report.directory)

    @property
    def experiment(self) -> Any:
        """The W&B run, or None."""
        return self._report.run

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the report has logged the resolved configuration."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log one point of every curve."""
        if step is not None and "train/task" in metrics:
            self._step = step
        point = {name: value for name, value in metrics.items() if name != "epoch"}  # epochs restart with every task
        if point:
            self._report.log({**point, "train/step": self._step})


def _draw(run: Run | None, row: int) -> dict[str, Any]:
    """Return `<mask>/R` and `<mask>/R_heat_map` as they were when a row of R had just been measured."""
    import wandb

    from cl.report.picture import draw_accuracy

    assert run is not None
    matrices = {mask: _until(matrix, row) for mask, matrix in run.matrices.items()}
    run = replace(run, directory=Path(), matrices=matrices)  # without the path: a directory may be moved
    drawn: dict[str, Any] = {}
    for mask, matrix in run.matrices.items():
        columns = ["tasks learned", *(f"{j} {name}" for j, name in enumerate(run.task_names, start=1))]
        rows = [[i, *map(_or_none, values)] for i, values in enumerate(matrix.R.tolist())]
        drawn[f"{mask}/R"] = wandb.Table(columns=columns, data=rows)
        drawn[f"{mask}/R_heat_map"] = wandb.Image(_pixels(draw_accuracy(run, mask)))
    return drawn


def _until(matrix: TransferMatrix, row: int) -> TransferMatrix:
    """Return a copy of a matrix in which all rows after one are unmeasured."""
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
    """Return the name of a part of the configuration: its `name`, or else the last word of its `_target_`."""
    if isinstance(node, Mapping):
        return str(node.get("name") or str(node.get("_target_", "")).rpartition(".")[2])
    return str(node or "")


def _known(identity: Path) -> str | None:
    """Return the id of the W&B run that a file holds, or None if there is none."""
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
    """Return the steps that a `.wandb` file holds, once W&B has written its end or has stopped writing."""
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
    """In this context, W&B stores tables in the run directory, which makes it complete for `wandb sync`."""
    if directory is None or "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(directory / rundir.WANDB)
    try:
        yield
    finally:
        os.environ.pop("WANDB_DATA_DIR", None)
