"""Align runs: which belong to one group, which learned one stream in one order of tasks, and which seeds they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cl.compare.read import RunFiles
from cl.errors import InputError
from cl.report.caption import strategies, stream_kind
from cl.settings import setting

Unit = tuple[str, ...]


@dataclass
class Group:
    """Runs that differ only in the seed, the order of tasks and the stream.

    Attributes:
        name: The shortest part of the configuration that distinguishes the group from the others.
        config: The part of the configuration that its runs share, flat, with dotted keys.
        runs: Its runs, on all streams.
        bound: "upper bound", "lower bound", or "" if it is not a bound.
        learned: The number of tasks learned if its runs are unfinished, else None.
    """

    name: str
    config: dict[str, Any]
    runs: list[RunFiles]
    bound: str = ""
    learned: int | None = None


@dataclass
class Stage:
    """One stream with the runs on it, which share a leaderboard.

    Attributes:
        name: The shortest part of the stream's configuration that distinguishes it from the others.
        runs: Its runs by group, then by unit. A unit is the seed, the order of tasks, and the keys that differ inside
            groups because `by` does not name them; a paired test pairs runs of the same unit.
        layouts: Runs with the same tasks in the same order, so that equal cells of R mean the same, by label.
    """

    name: str
    runs: dict[str, dict[Unit, RunFiles]] = field(default_factory=dict)
    layouts: dict[str, list[RunFiles]] = field(default_factory=dict)

    def of(self, group: str, layout: str) -> dict[Unit, RunFiles]:
        """Return the runs of a group that have a layout, by unit."""
        inside = {id(run) for run in self.layouts[layout]}
        return {unit: run for unit, run in self.runs.get(group, {}).items() if id(run) in inside}


@dataclass
class Comparison:
    """Aligned runs.

    Attributes:
        groups: The groups by name.
        stages: The streams, with the runs on each.
        differences: The keys in which groups differ, with the value of each group that has one.
        notes: Sentences on the differences between the runs.
    """

    groups: dict[str, Group]
    stages: list[Stage]
    differences: dict[str, dict[str, Any]]
    notes: list[str]

    @property
    def runs(self) -> list[RunFiles]:
        """All runs of the comparison, of every stream and group."""
        return [run for stage in self.stages for units in stage.runs.values() for run in units.values()]


def align(runs: Sequence[RunFiles], by: Sequence[str] = (), unfinished: bool = False) -> Comparison:
    """Sort runs into groups and streams, and note their differences.

    Args:
        runs: Runs, in any order.
        by: Parts of the configuration ("strategy", "optimizer.lr"); runs that agree in them form a group. Empty means
            the whole configuration.
        unfinished: Whether runs with tasks left to learn take part, as groups of their own.

    Raises:
        InputError: If no run is finished, or no configuration has a part of `by`.
    """
    from cl.compare.notes import sentences

    for part in by:
        if not any(under(key, [part]) for run in runs for key in run.config):
            raise InputError(f"No run has {part!r} in its configuration: give --by a part of it, such as strategy.")
    kept = [run for run in runs if run.finished or (unfinished and run.tasks_learned > 0 and run.scalars)]
    if not kept:
        some = ", ".join(str(run.directory) for run in runs[:3]) + (", …" if len(runs) > 3 else "")
        raise InputError(f"None of the {len(runs)} runs is finished ({some}): finish one, or give --unfinished.")
    groups, open_keys = _groups(kept, by)
    stages, twice = _stages(kept, groups, open_keys)
    own = {name: group.config for name, group in groups.items()}
    comparison = Comparison(groups, stages, differing(own), [])
    comparison.notes = sentences(comparison, runs, twice, by, open_keys)
    return comparison


def method_config(run: RunFiles) -> dict[str, Any]:
    """Return the part of a configuration that describes the method: not the stream, the seed, paths or reports.

    Example:
        >>> from pathlib import Path
        >>> config = {"seed": 1, "epochs": 5, "stream.seed": 1, "dataset.root": "data", "gradient_clip": None}
        >>> method_config(RunFiles(Path("."), config))
        {'epochs': 5}
    """
    return {
        key: value
        for key, value in _set(run).items()
        if setting(key).kind == "result" and setting(key).part != "stream" and key != "seed"
    }


def stream_config(run: RunFiles) -> dict[str, Any]:
    """Return the part of a configuration that describes the stream, without the order of tasks and seeds that vary.

    A seed of the stream that is equal to the run's seed varies with it, and is left out.

    Example:
        >>> from pathlib import Path
        >>> config = {"seed": 1, "epochs": 5, "stream.seed": 1, "stream.num_tasks": 5, "stream.first_task": None}
        >>> stream_config(RunFiles(Path("."), config, "class"))
        {'num_tasks': 5, 'scenario': 'class', 'tasks': 0}
    """
    config = {k.removeprefix("stream."): v for k, v in _set(run).items() if under(k, ["stream"])}
    seed = run.config.get("seed")
    kept = {
        key: value
        for key, value in config.items()
        if key != "order"
        and setting(f"stream.{key}").kind != "place"
        and not (key.rpartition(".")[2] == "seed" and value == seed and not key.startswith("dataset"))
    }
    # the first and the last tasks, which protocols of tuning select, are different streams even if equally many
    part = {"tune_first": "first", "score_rest": "last"}.get(str(run.config.get("protocol.name")))
    tasks = f"{part} {run.num_tasks}" if part and run.config.get("protocol.num_tasks") else run.num_tasks
    return {**kept, "scenario": run.scenario, "tasks": tasks}


def _set(run: RunFiles) -> dict[str, Any]:
    # a run of an earlier version lacks the settings that are new, and their default is null
    return {key: value for key, value in run.config.items() if value is not None}


def differing(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the keys whose values differ between configurations, with the value of each configuration that has one.

    Example:
        >>> differing({"a": {"lr": 0.1, "epochs": 5}, "b": {"lr": 0.2, "epochs": 5}})
        {'lr': {'a': 0.1, 'b': 0.2}}
    """
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    found = {key: {name: config[key] for name, config in configs.items() if key in config} for key in keys}
    return {
        key: values
        for key, values in found.items()
        if len(values) < len(configs) or len({repr(value) for value in values.values()}) > 1
    }


def under(key: str, parts: Iterable[str]) -> bool:
    """Return whether a dotted key is one of the parts, or inside one."""
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def _signature(config: Mapping[str, Any]) -> Unit:
    return tuple(sorted(f"{key}={value!r}" for key, value in config.items()))


def _groups(runs: Sequence[RunFiles], by: Sequence[str]) -> tuple[dict[str, Group], list[str]]:
    """Return the groups by name, and the keys that differ between runs and that `by` does not name."""
    members: dict[tuple[Unit, int | None], list[RunFiles]] = {}
    configs: dict[tuple[Unit, int | None], dict[str, Any]] = {}
    for run in runs:
        config = method_config(run)
        config = {k: v for k, v in config.items() if under(k, by)} if by else config
        key = (_signature(config), None if run.finished else run.tasks_learned)
        members.setdefault(key, []).append(run)
        configs[key] = config
    names = shortest_names(list({key[0]: configs[key] for key in members}.values()), strategies)
    name_of = dict(zip(dict.fromkeys(key[0] for key in members), names, strict=True))
    groups = {}
    for key, part in members.items():
        total = max(run.num_tasks for run in part)
        name = name_of[key[0]] + ("" if key[1] is None else f" (after {key[1]} of {total} tasks)")
        groups[name] = Group(name, configs[key], part, _bound(part), key[1])
    outside = {str(i): {k: v for k, v in method_config(run).items() if not under(k, by)} for i, run in enumerate(runs)}
    return groups, [key for key in differing(outside) if by and not under(key, ["strategy"])]


def _bound(runs: Sequence[RunFiles]) -> str:
    """Return "upper bound" or "lower bound" if the runs of a group are one, else ""."""
    found = {run.bound for run in runs} - {""}
    return f"{found.pop()} bound" if len(found) == 1 else ""


def shortest_names(configs: Sequence[Mapping[str, Any]], base: Any) -> list[str]:
    """Return a name for each configuration: its base name and, if others share that, the keys that distinguish it.

    Args:
        configs: The configurations, all different.
        base: Maps a configuration to its base name, such as that of its strategies.

    Example:
        >>> er = {"strategy.er.memory_size": 200, "lr": 0.1}
        >>> shortest_names([er, {**er, "strategy.er.memory_size": 500}, {"strategy.ewc.weight": 1.0}], strategies)
        ['er memory 200', 'er memory 500', 'ewc']
    """
    bases = [base(config) or "run" for config in configs]
    names = list(bases)
    for name in dict.fromkeys(bases):
        sharing = [i for i, other in enumerate(bases) if other == name]
        if len(sharing) == 1:
            continue
        part = {str(i): configs[i] for i in sharing}
        keys = _parting_keys(part)
        words = _words(keys)
        for digits in (4, None):  # digits of fractions; all of them if four do not distinguish the names
            for i in sharing:
                has = configs[i]
                shown = (f"{words[k]} {brief(has[k], digits)}" if k in has else f"no {words[k]}" for k in keys)
                names[i] = " ".join([name, *shown])
            if len({names[i] for i in sharing}) == len(sharing):
                break
    return [name if name not in names[:i] else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _parting_keys(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return few keys whose values together distinguish all configurations: add greedily, then remove needless ones."""
    candidates = differing(configs)

    def kinds(keys: Sequence[str]) -> int:
        return len({tuple(repr(config.get(key, ...)) for key in keys) for config in configs.values()})

    chosen: list[str] = []
    while kinds(chosen) < len(configs):
        rest = [key for key in candidates if key not in chosen]
        chosen.append(max(rest, key=lambda key: (kinds([*chosen, key]), -len(key))))
    for key in list(chosen):
        if kinds([other for other in chosen if other != key]) == len(configs):
            chosen.remove(key)
    return chosen


def _words(keys: Sequence[str]) -> dict[str, str]:
    """Return short words for keys: the last part without "num_" and "_size"; if two are equal, with the part before it.

    `_target_` and `name` at the end of a key are left out: "protocol.name" becomes "protocol".
    """

    def word(key: str, depth: int) -> str:
        parts = key.removesuffix("._target_").removesuffix(".name").split(".")
        last = parts[-1].removeprefix("num_").removesuffix("_size")
        return " ".join([*parts[-depth:-1], last]).replace("_", " ")

    short = {key: word(key, 1) for key in keys}
    return {key: text if list(short.values()).count(text) == 1 else word(key, 2) for key, text in short.items()}


def brief(value: Any, digits: int | None = None) -> str:
    """Return a value of a configuration as text: of a class only its name, of a float so many digits, or all for None.

    Example:
        >>> brief("cl.backbones.MLP"), brief(None), brief(0.1), brief(0.0123456, 4)
        ('MLP', 'null', '0.1', '0.01235')
    """
    if isinstance(value, float) and digits:
        return f"{value:.{digits}g}"
    text = "null" if value is None else str(value)
    return text.rpartition(".")[2] if isinstance(value, str) and text.count(".") > 1 else text


def _stages(
    runs: Sequence[RunFiles], groups: Mapping[str, Group], open_keys: Sequence[str]
) -> tuple[list[Stage], list[RunFiles]]:
    """Return the streams with their runs, and the runs left out because they repeat another one's configuration."""
    group_of = {id(run): name for name, group in groups.items() for run in group.runs}
    configs: dict[Unit, dict[str, Any]] = {_signature(stream_config(run)): stream_config(run) for run in runs}
    names = shortest_names(list(configs.values()), stream_kind)
    stages = {key: Stage(name) for key, name in zip(configs, names, strict=True)}
    twice = []
    for run in runs:
        stage = stages[_signature(stream_config(run))]
        units = stage.runs.setdefault(group_of[id(run)], {})
        left_open = (f"{key}={run.config.get(key)!r}" for key in open_keys)
        unit = (run.seed, "-".join(map(str, run.order)), *left_open)
        if unit in units:
            twice.append(run)
        else:
            units[unit] = run
    for stage in stages.values():
        stage.layouts = _layouts([run for units in stage.runs.values() for run in units.values()])
    return list(stages.values()), twice


def _layouts(runs: Sequence[RunFiles]) -> dict[str, list[RunFiles]]:
    """Return runs by layout; a label is the order of tasks, or the tasks' names if orders alone do not distinguish."""
    found: dict[tuple[tuple[int, ...], tuple[str, ...]], list[RunFiles]] = {}
    for run in runs:
        found.setdefault((run.order, run.task_names), []).append(run)
    if len(found) == 1:
        return {"": list(runs)}
    orders = [order for order, _ in found]
    labels: dict[str, list[RunFiles]] = {}
    for (order, names), part in found.items():
        label = "order " + ", ".join(str(i + 1) for i in order) if len(set(orders)) == len(found) else " → ".join(names)
        label = label if len(label) <= 60 else f"{label[:59]}…"
        labels[label if label not in labels else f"{label} ({len(labels) + 1})"] = part
    return labels
