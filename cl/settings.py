"""The settings of a run: what each key of its configuration is for, its type, and a line of help.

One table for all who ask: whether an unfinished run may go on, whether a reference may be used again, whether a branch
fits, which runs a comparison puts into one group, how the jobs of a sweep are named, and what the help says.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

Count = Annotated[int, Ge(1)]
Text, Options = str | None, dict[str, Any] | None


@dataclass(frozen=True)
class Setting:
    """What a key of the configuration is for.

    Attributes:
        kind: `result` changes R; `rounding` changes results by rounding alone; `measured` says what is measured beside
            R, whose state a checkpoint holds; `shown` says what is written, kept and printed; `place` says where things
            lie.
        help: A line.
        type: Of the value, as an annotation with its range; None for a group, which the class that its `_target_` names
            checks.
        part: Of the learning, what a `result` belongs to: the `stream`, the `network`, the `start` (weights that
            learning begins with), the `method` (what the references do without), or all else, the `training`.
        is_path: Whether a `result` is what lies at a place; the same content elsewhere is the same.
        is_tuned: Whether a search may choose it, or what is below it.
    """

    kind: Literal["result", "rounding", "measured", "shown", "place"]
    help: str
    type: Any = None
    part: Literal["stream", "network", "start", "method", "training"] = "training"
    is_path: bool = False
    is_tuned: bool = False


def _result(help: str, type: Any = None, part: Any = "training", **flags: bool) -> Setting:
    return Setting("result", help, type, part, **flags)


# A dotted key is an exception from what its group is.
SETTINGS: Mapping[str, Setting] = {
    "stream": _result("which tasks, in which order", part="stream"),
    "dataset": _result("what most streams are made of", part="stream"),
    "scenario": _result("class, task or domain; null leaves it to the stream", Text, "stream"),
    "strategy": _result("methods by name; several are composed", Options, "method", is_tuned=True),
    "backbone": _result("the network below the head", part="network", is_tuned=True),
    "head": _result("the layer of the outputs", part="network", is_tuned=True),
    "optimizer": _result("how weights move, with the learning rate: optimizer.lr", is_tuned=True),
    "scheduler": _result("how the learning rate moves", is_tuned=True),
    "trainer": _result("device, precision and number of processes, by Lightning's Trainer"),
    "trainer.accelerator": Setting("rounding", "cpu, gpu or auto"),
    "trainer.devices": Setting("rounding", "processes of this machine, one a device"),
    "trainer.num_nodes": Setting("rounding", "machines"),
    "trainer.strategy": Setting("rounding", "auto for one process, ddp for several"),
    "trainer.deterministic": Setting("rounding", "as the setting deterministic"),
    "trainer.benchmark": Setting("rounding", "whether cuDNN chooses the fastest convolution"),
    "trainer.profiler": Setting("shown", "what Lightning times"),
    "trainer.detect_anomaly": Setting("shown", "whether the operation that made a NaN is named"),
    "seed": _result("of all that is drawn", Annotated[int, Ge(0)]),
    "epochs": _result("passes over each task's training data", Annotated[int, Ge(0)], is_tuned=True),
    "batch_size": _result("incoming rows a step", Count, is_tuned=True),
    "gradient_clip": _result(
        "largest norm of the gradient; null for any", Annotated[float, Gt(0)] | None, is_tuned=True
    ),
    "train_mask": _result(
        "classes that compete in the loss: class (all seen), task, domain (all); null: as at test", Text, is_tuned=True
    ),
    "optimizer_state": _result(
        "at a boundary of tasks: reset, or keep (momentum, Adam's moments); without boundaries it goes on",
        Literal["reset", "keep"],
        is_tuned=True,
    ),
    "scheduler_interval": _result(
        "after what the schedule moves: epoch, or step (of the optimizer)", Literal["epoch", "step"], is_tuned=True
    ),
    "init": _result(
        "xavier: Xavier-uniform weights, zero biases; null: as each layer does by itself", Text, "start", is_tuned=True
    ),
    "weights": _result("a checkpoint of clsim whose backbone to start from", Text, "start", is_path=True),
    "from": _result("a run to begin from, and the tasks that it has learned: DIR:task=3", Text, "start", is_path=True),
    "freeze": _result("whether the backbone stays as it is", bool),
    "protocol": _result("on which tasks hyper-parameters are chosen, and on which they are scored", Options, "method"),
    "protocol.name": _result("as in the results", str, "method"),
    "protocol.num_tasks": _result("how many tasks are for tuning", int | None, "method"),
    "protocol.tuned": Setting("place", "directory of the search whose values are used", Text),
    "compile": Setting(
        "rounding", "torch.compile of backbone and head: default, reduce-overhead (CUDA graphs), max-autotune", Text
    ),
    "deterministic": Setting(
        "rounding", "the same bits on a GPU too, where an operation can; on a CPU they are anyway", bool
    ),
    "eval_batch_size": Setting("rounding", "null: 256 on a CPU, 1024 elsewhere", Count | None),
    "chunk_size": Setting(
        "shown", "steps that Lightning sees as one; null chooses; results do not depend on it", Count | None
    ),
    "probes": Setting("measured", "fitted anew on the frozen features after each task: ridge, knn, cka", Sequence[str]),
    "estimators": Setting(
        "measured", "forecasts of transfer before each task: tmi, log_me, ped, vci, knn, covariance", Sequence[str]
    ),
    "instrument": Setting(
        "measured", "your own, beside R: an option, or +instrument.NAME._target_=package.module.Class", Options
    ),
    "scalar": Setting(
        "shown",
        "your own, of what a run has measured: an option, or +scalar.NAME._target_=package.module.function",
        Options,
    ),
    "references": Setting(
        "shown", "what the run is compared with: experts (each task alone), joint (tasks 1 to k)", Sequence[str]
    ),
    "reference_dir": Setting("place", "where all runs keep theirs", str),
    "report": Setting("shown", "bar, tables, pictures and files", Options),
    "report.columns": Setting(
        "shown",
        "tasks that a row of R is measured on: all, seen (and the next one), or how many of the newest",
        str | int,
    ),
    "report.every": Setting("measured", "steps between two evaluations inside tasks", Count | None),
    "report.points": Setting("measured", "evaluations inside each task", Count | None),
    "report.subset": Setting("measured", "rows of each task that those, the probes and the estimators look at", Count),
    "report.flops": Setting("measured", "count operations", bool),
    "logger": Setting(
        "shown", "of the training curves: csv, wandb, or one of Lightning by +logger.NAME._target_=...", Options
    ),
    "callbacks": _result(
        "of Lightning: early_stopping, model_summary, or +callbacks.NAME._target_=...", Options, "method"
    ),
    "log_every": Setting("shown", "steps between two points of the training curves", Count),
    "checkpoint": Setting("shown", "what is kept to go on from", dict[str, Any]),
    "checkpoint.keep": Setting(
        "shown",
        "of those at the ends of tasks, the newest that stay; null keeps all; auto, too, up to ten gibibytes",
        int | Literal["auto"] | None,
    ),
    "checkpoint.every": Setting(
        "shown",
        "between two inside a task: steps (500) or a time (30s, 10min, 2h); null keeps none there",
        int | str | None,
    ),
    "allow_changed": Setting("shown", "go on although data or your code have changed; told beside the numbers", bool),
    "group": Setting("shown", "runs of one comparison stand together under it in Weights & Biases", Text),
    "tags": Setting("shown", "of the run in Weights & Biases", Sequence[str]),
}

# Arguments of datasets, streams and loggers that say where things lie, whatever has them.
_PLACES = {"root", "cache", "cache_dir", "download", "save_dir", "storage"}


def setting(key: str) -> Setting:
    """Return what a dotted key is for: its own row, or that of the group that it stands in.

    Example:
        >>> setting("optimizer.lr").kind, setting("trainer.accelerator").kind, setting("dataset.root").kind
        ('result', 'rounding', 'place')
    """
    found, name = None, key
    while found is None and name:
        found, name = SETTINGS.get(name), name.rpartition(".")[0]
    found = found or Setting("result", "")
    is_place = found.kind == "result" and "." in key and key.rpartition(".")[2] in _PLACES
    return Setting("place", found.help, found.type, found.part) if is_place else found


def results(config: Mapping[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
    """Return the settings of a flat configuration that decide R.

    Places are left out. A path to data or weights is replaced by "a path": who compares digests their content.

    Args:
        config: By dotted key.
        without: Parts that are left out, as `Setting.part` names them.

    Example:
        >>> results({"seed": 1, "group": "a", "stream.root": "data", "stream.train_x": "data/x.npy"})
        {'seed': 1, 'stream.train_x': 'a path'}
    """
    found = {key: value for key, value in config.items() if setting(key).kind == "result"}
    return {
        key: "a path" if is_path(key, value) else value
        for key, value in found.items()
        if setting(key).part not in set(without)
    }


def is_path(key: str, value: Any) -> bool:
    """Say whether a value is a path whose content decides results, so that the same content elsewhere is the same.

    Example:
        >>> is_path("stream.train_x", "data/x.npy"), is_path("stream.name", "digits"), is_path("weights", "a.ckpt")
        (True, False, True)
    """
    found = setting(key)
    if isinstance(value, list | tuple):
        return bool(value) and any(is_path(key, item) for item in value)
    return isinstance(value, str) and (found.is_path or (found.part == "stream" and ("/" in value or "\\" in value)))


def changes(there: Mapping[str, Any], here: Mapping[str, Any], kinds: Sequence[str] = ("result", "measured")) -> str:
    """Return the first values in which two flat configurations differ so that a run cannot go on; nothing if it can.

    Args:
        there: Of before.
        here: Of now.
        kinds: Of the settings that are compared.

    Example:
        >>> changes({"seed": 0, "checkpoint.keep": 1}, {"seed": 3})
        'seed: 0 there, 3 here'
        >>> changes({"stream.root": "old", "compile": None}, {"stream.root": "new", "compile": "default"})
        ''
    """
    found = []
    for key in sorted(there.keys() | here.keys()):
        one, two = there.get(key), here.get(key)
        same = one == two or (one != one and two != two) or (is_path(key, one) and is_path(key, two))
        if not same and setting(key).kind in kinds:
            found.append(f"{key}: {one} there, {two} here")
    return "; ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by dotted key.

    Example:
        >>> flatten({"stream": {"num_tasks": 5}, "seed": 0})
        {'stream.num_tasks': 5, 'seed': 0}
    """
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, branch in tree.items() for k, v in flatten(branch, f"{prefix}.{key}".strip(".")).items()}


def nearest(key: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the known keys that a key was probably meant to be: alike as a whole, or in their last word.

    Args:
        key: Dotted, as it was written.
        known: The dotted keys of values; groups are found, too.
        count: The most that are returned.

    Example:
        >>> known = ["optimizer.lr", "strategy.er.memory_size", "probes"]
        >>> nearest("lr", known), nearest("probe", known), nearest("stratgy", known)
        (['optimizer.lr'], ['probes'], ['strategy'])
    """
    keys = {".".join(name.split(".")[: n + 1]) for name in known for n in range(name.count(".") + 1)}
    whole = difflib.get_close_matches(key, [k for k in keys if ("." in k) == ("." in key)], n=count, cutoff=0.6)
    words = difflib.get_close_matches(key.rpartition(".")[2], {k.rpartition(".")[2] for k in keys}, cutoff=0.8)
    return whole or [k for word in words for k in sorted(keys) if k.rpartition(".")[2] == word][:count]
