"""The settings of a run: the purpose of each key of its configuration, its type, and a line of help.

This table decides whether an unfinished run may resume, whether a reference can be reused, whether a branch fits, which
runs a comparison groups together, how the jobs of a sweep are named, and what the help shows.
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
    """The purpose and the type of a key of the configuration.

    Attributes:
        kind: `result`: the key changes R. `rounding`: it changes results by rounding alone. `measured`: it chooses what
            is measured beside R, and checkpoints hold state for it. `shown`: it chooses what is written or printed.
            `place`: it says where files are stored, which does not affect results.
        help: A line of help.
        type: The type of the value, as an annotation with its range; None for a group, whose values the class in its
            `_target_` checks.
        part: The part of learning that a `result` belongs to: the `stream`, the `network`, the `start` (initial
            weights), the `method` (which references leave out), or else the `training`.
        is_path: Whether the value is a path whose content decides the result, so that the same content at another path
            counts as equal.
        is_tuned: Whether a search may choose the key, or keys below it.
    """

    kind: Literal["result", "rounding", "measured", "shown", "place"]
    help: str
    type: Any = None
    part: Literal["stream", "network", "start", "method", "training"] = "training"
    is_path: bool = False
    is_tuned: bool = False


def _result(help: str, type: Any = None, part: Any = "training", **flags: bool) -> Setting:
    return Setting("result", help, type, part, **flags)


# A dotted key is an exception from the row of its group.
SETTINGS: Mapping[str, Setting] = {
    "stream": _result("which tasks, in which order", part="stream"),
    "dataset": _result("the data that most streams divide into tasks", part="stream"),
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
    "trainer.detect_anomaly": Setting("shown", "whether to name the operation that produced a NaN"),
    "seed": _result("the seed of all random draws", Annotated[int, Ge(0)]),
    "epochs": _result("passes over each task's training data", Annotated[int, Ge(0)], is_tuned=True),
    "batch_size": _result("incoming examples per step", Count, is_tuned=True),
    "updates_per_batch": _result(
        "updates of the weights on each incoming batch, each with new replayed examples; null: 1",
        Count | None,
        is_tuned=True,
    ),
    "gradient_clip": _result(
        "largest norm of the gradient; null for any", Annotated[float, Gt(0)] | None, is_tuned=True
    ),
    "train_mask": _result(
        "classes that compete in the loss: class (all seen), task, domain (all); null: as at test", Text, is_tuned=True
    ),
    "optimizer_state": _result(
        "at a boundary between tasks: reset, or keep (momentum, Adam's moments); without boundaries it continues",
        Literal["reset", "keep"],
        is_tuned=True,
    ),
    "scheduler_interval": _result(
        "when the schedule moves: after each epoch, or each step of the optimizer",
        Literal["epoch", "step"],
        is_tuned=True,
    ),
    "init": _result(
        "xavier: Xavier-uniform weights, zero biases; null: as each layer does by itself", Text, "start", is_tuned=True
    ),
    "weights": _result("a checkpoint of clsim whose backbone to start from", Text, "start", is_path=True),
    "from": _result("start from a run after some of its tasks: DIR:task=3", Text, "start", is_path=True),
    "freeze": _result(
        "whether the weights of the backbone stay fixed; a number: those of so many first blocks", bool | Count
    ),
    "protocol": _result("on which tasks hyper-parameters are chosen, and on which they are scored", Options, "method"),
    "protocol.name": _result("the name that the results show", str, "method"),
    "protocol.num_tasks": _result("how many tasks are for tuning", int | None, "method"),
    "protocol.tuned": Setting("place", "directory of the search whose values are used", Text),
    "compile": Setting(
        "rounding", "torch.compile of backbone and head: default, reduce-overhead (CUDA graphs), max-autotune", Text
    ),
    "deterministic": Setting(
        "rounding", "the same bits on a GPU too, for operations that can; on a CPU they are the same anyway", bool
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
        "measured",
        "your own instruments, beside R: an option, or +instrument.NAME._target_=package.module.Class",
        Options,
    ),
    "scalar": Setting(
        "shown",
        "your own scalars of a run: an option, or +scalar.NAME._target_=package.module.function",
        Options,
    ),
    "references": Setting(
        "shown", "what the run is compared with: experts (each task alone), joint (tasks 1 to k)", Sequence[str]
    ),
    "reference_dir": Setting("place", "directory of the references, which all runs share", str),
    "feature_dir": Setting(
        "place", "directory of the outputs of frozen networks, which all runs share; null: they are not kept", Text
    ),
    "report": Setting("shown", "bar, tables, pictures and files", Options),
    "report.columns": Setting(
        "shown",
        "tasks that a row of R is measured on: all, seen (with the next one), or a number of the newest",
        str | int,
    ),
    "report.every": Setting("measured", "steps between two evaluations inside tasks", Count | None),
    "report.points": Setting("measured", "evaluations inside each task", Count | None),
    "report.subset": Setting(
        "measured", "examples of each task for the evaluations inside tasks, the probes and the estimators", Count
    ),
    "report.flops": Setting("measured", "count operations", bool),
    "logger": Setting(
        "shown", "of the training curves: csv, wandb, or one of Lightning by +logger.NAME._target_=...", Options
    ),
    "callbacks": _result(
        "of Lightning: early_stopping, model_summary, or +callbacks.NAME._target_=...", Options, "method"
    ),
    "log_every": Setting("shown", "steps between two points of the training curves", Count),
    "checkpoint": Setting("shown", "which checkpoints are written, to resume from", dict[str, Any]),
    "checkpoint.keep": Setting(
        "shown",
        "how many checkpoints of ends of tasks stay; null: all; auto: all up to ten gibibytes, else three",
        int | Literal["auto"] | None,
    ),
    "checkpoint.every": Setting(
        "shown",
        "interval between checkpoints inside a task: steps (500) or a time (30s, 10min, 2h); null: none",
        int | str | None,
    ),
    "score": Setting(
        "shown",
        "score a saved learner on test sets, without training: DIR:task=3, or DIR for the one after the last task",
        Text,
    ),
    "allow_changed": Setting(
        "shown", "resume although data or your code have changed; a note beside the results says so", bool
    ),
    "group": Setting("shown", "group of the run in Weights & Biases, such as the name of a comparison", Text),
    "tags": Setting("shown", "tags of the run in Weights & Biases", Sequence[str]),
}

# Arguments, of whatever class, that are paths or concern storage, and so are of kind `place`.
_PLACES = {"root", "cache", "cache_dir", "download", "save_dir", "storage"}


def setting(key: str) -> Setting:
    """Return the setting of a dotted key: its own row of the table, or that of the nearest group above it.

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

    Settings of kind `place` are left out. A path to data or weights is replaced by "a path": the caller compares the
    digest of the content instead.

    Args:
        config: The values by dotted key.
        without: Parts to leave out, as in `Setting.part`.

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


def differing(there: Mapping[str, Any], here: Mapping[str, Any], kinds: Sequence[str] = ("result",)) -> list[str]:
    """Return the keys in which two flat configurations differ, of settings of some kinds, in alphabetical order.

    Example:
        >>> differing({"seed": 0, "group": "a"}, {"seed": 3, "group": "b", "epochs": 5})
        ['epochs', 'seed']
    """
    found = []
    for key in sorted(there.keys() | here.keys()):
        one, two = there.get(key), here.get(key)
        same = one == two or (one != one and two != two) or (is_path(key, one) and is_path(key, two))
        if not same and setting(key).kind in kinds:
            found.append(key)
    return found


def changes(there: Mapping[str, Any], here: Mapping[str, Any], kinds: Sequence[str] = ("result", "measured")) -> str:
    """Return the differences of two flat configurations in some kinds of settings, the first five; "" if there is none.

    With the default kinds, a difference means that a run cannot resume.

    Args:
        there: The configuration of the earlier run.
        here: The present configuration.
        kinds: The kinds of settings to compare.

    Example:
        >>> changes({"seed": 0, "checkpoint.keep": 1}, {"seed": 3})
        'seed: 0 there, 3 here'
        >>> changes({"stream.root": "old", "compile": None}, {"stream.root": "new", "compile": "default"})
        ''
    """
    found = [f"{key}: {there.get(key)} there, {here.get(key)} here" for key in differing(there, here, kinds)]
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
    """Return the known keys that are similar to a misspelt one: as a whole, or else in the last word.

    Args:
        key: The dotted key as it was written.
        known: The dotted keys of values; their groups are candidates too.
        count: How many keys to return at most.

    Example:
        >>> known = ["optimizer.lr", "strategy.er.memory_size", "probes"]
        >>> nearest("lr", known), nearest("probe", known), nearest("stratgy", known)
        (['optimizer.lr'], ['probes'], ['strategy'])
    """
    keys = {".".join(name.split(".")[: n + 1]) for name in known for n in range(name.count(".") + 1)}
    whole = difflib.get_close_matches(key, [k for k in keys if ("." in k) == ("." in key)], n=count, cutoff=0.6)
    words = difflib.get_close_matches(key.rpartition(".")[2], {k.rpartition(".")[2] for k in keys}, cutoff=0.8)
    return whole or [k for word in words for k in sorted(keys) if k.rpartition(".")[2] == word][:count]
