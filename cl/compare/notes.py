"""Notes on a comparison: sentences on the differences between its runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cl.compare.align import Comparison, differing
from cl.compare.read import RunFiles
from cl.compare.tuning import chosen
from cl.rundir import FORMAT, LEARNING_CURVES, RESOURCES
from cl.settings import setting

MAX_NAMED = 4  # a sentence names at most so many items, and counts the others: "and 3 more"


def listed(items: Iterable[object]) -> str:
    """Join items to a part of a sentence; of more than four, the first four and the number of the others.

    Example:
        >>> listed("ab"), listed("abcdef")
        ('a and b', 'a, b, c, d and 2 more')
    """
    texts = list(map(str, items))
    shown, more = texts[:MAX_NAMED], len(texts) - MAX_NAMED
    if more > 0:
        return ", ".join(shown) + f" and {more} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


def sentences(
    comparison: Comparison, runs: Sequence[RunFiles], twice: Sequence[RunFiles], by: Sequence[str], left: Sequence[str]
) -> list[str]:
    """Return notes on the differences between runs, the most important first, and then the notes of the runs.

    Args:
        comparison: The aligned runs.
        runs: All runs that were found, also unfinished ones.
        twice: Runs that repeat another one.
        by: Parts of the configuration in which the runs of a group agree.
        left: Keys that differ inside a group because `by` does not name them.
    """
    notes = [*_unfinished(comparison, runs), *_streams(comparison), *_seeds(comparison), *_files(comparison)]
    if twice:
        verb = "repeats a run of the same configuration and seed and is" if len(twice) == 1 else "repeat runs and are"
        notes.append(f"{listed(run.directory for run in twice)} {verb} left out.")
    if left:
        notes.append(
            f"Grouped by {listed(by)}, runs of one group differ in {listed(left)}; tests pair runs that agree in them."
        )
    notes += _tuning(comparison)
    many = [key for key in comparison.differences if not key.startswith("strategy.")]
    if many and not by:
        notes.append(f"Groups differ in more than the strategy: {listed(many)}.")
    consequences = {
        "measured": "measurements beside R depend on it",
        "rounding": "it changes R only by rounding",
    }
    for kind, so_what in consequences.items():
        parts = {
            str(i): {key: value for key, value in run.config.items() if setting(key).kind == kind}
            for i, run in enumerate(comparison.runs)
        }
        apart = differing(parts)
        if apart:
            notes.append(f"Runs differ in {listed(sorted(apart))}: {so_what}.")
    versions = differing({str(i): run.versions for i, run in enumerate(comparison.runs)})
    for name, values in versions.items():
        if comparison.runs and len(values) == len(comparison.runs):
            notes.append(f"Versions of {name} differ: {listed(sorted(set(values.values())))}.")
    own = dict.fromkeys(note for run in comparison.runs for note in run.notes)
    return notes + list(own)


def _unfinished(comparison: Comparison, runs: Sequence[RunFiles]) -> list[str]:
    kept = {id(run) for run in comparison.runs}
    notes = []
    for run in runs:
        if run.finished:
            continue
        done = f"has learned {max(run.tasks_learned, 0)} of {run.num_tasks or '?'} tasks"
        end = "it is a row of its own" if id(run) in kept else "it is left out (--unfinished includes it)"
        notes.append(f"{run.directory} {done}: {end}.")
    more = len(notes) - MAX_NAMED
    return notes[:MAX_NAMED] + ([f"{more} more runs are unfinished."] if more > 0 else [])


def _streams(comparison: Comparison) -> list[str]:
    stages = comparison.stages
    notes = []
    if len(stages) > 1:
        lengths = sorted({run.num_tasks for run in comparison.runs})
        text = f"The runs are on {len(stages)} streams ({listed(stage.name for stage in stages)})"
        text += f" of {listed(lengths)} tasks" if len(lengths) > 1 else ""
        notes.append(f"{text}: each has its own leaderboard.")
    for stage in stages:
        where = f"On {stage.name}, tasks" if len(stages) > 1 else "Tasks"
        if len(stage.layouts) > 1:
            notes.append(
                f"{where} come in {len(stage.layouts)} orders: the scalars of runs are averaged over orders; matrices"
                " and curves of different orders are never averaged."
            )
        absent = [name for name in comparison.groups if name not in stage.runs]
        if absent:
            notes.append(f"{stage.name} has no run of {listed(absent)}.")
        masks = {group: {m for run in units.values() for m, _ in run.matrices} for group, units in stage.runs.items()}
        shared = set.intersection(*masks.values())
        for mask in sorted(set.union(*masks.values()) - shared):
            without = [group for group, has in masks.items() if mask not in has]
            notes.append(f"No scores under {mask}: {listed(without)}.")
        for group in stage.runs:
            for layout in stage.layouts:
                tested = [{key: c.steps for key, c in r.curves.items()} for r in stage.of(group, layout).values()]
                if any(steps != tested[0] for steps in tested if steps and tested[0]):
                    notes.append(
                        f"{group} was tested at different steps in each run: its curves show the steps that all share."
                    )
    return notes


def _seeds(comparison: Comparison) -> list[str]:
    notes = []
    for stage in comparison.stages:
        where = f" on {stage.name}" if len(comparison.stages) > 1 else ""
        every = dict.fromkeys(run.seed for units in stage.runs.values() for run in units.values())
        for group, units in stage.runs.items():
            missing = [seed for seed in every if seed not in {run.seed for run in units.values()}]
            if missing:
                plural = "seeds" if len(missing) > 1 else "seed"
                notes.append(
                    f"{group} has no run of {plural} {listed(missing)}{where}: tests pair runs that both groups have."
                )
        alone = [group for group, units in stage.runs.items() if len(units) == 1]
        if alone:
            verb = "has" if len(alone) == 1 else "have"
            notes.append(f"{listed(alone)} {verb} a single run{where}: no interval and no test can be given.")
    return notes


def _tuning(comparison: Comparison) -> list[str]:
    notes = []
    for stage in comparison.stages:
        where = f" on {stage.name}" if len(comparison.stages) > 1 else ""
        ways: dict[str, dict[str, None]] = {}
        budgets: dict[str, dict[str, None]] = {}
        for group, units in stage.runs.items():
            for run in units.values():
                ways.setdefault(chosen(run), {})[group] = None
                # seconds are left out, since they differ in every run
                costs = [f"{run.tuning[name]:g} {name}" for name in ("trials", "steps") if name in run.tuning]
                if costs:
                    budgets.setdefault(", ".join(costs), {})[group] = None
        for what, by in (
            ("Hyper-parameters were chosen differently", ways),
            ("Searches had different budgets", budgets),
        ):
            if len(by) > 1:
                parts = "; ".join(f"{key} ({listed(groups)})" for key, groups in by.items())
                notes.append(f"{what}{where}: {parts}.")
    return notes


def _files(comparison: Comparison) -> list[str]:
    earlier = [run.directory for run in comparison.runs if run.format < FORMAT]
    verb = "was written by an earlier version" if len(earlier) == 1 else "were written by earlier versions"
    notes = [f"{listed(earlier)} {verb} of clsim: numbers that the files lack are not shown."] * bool(earlier)
    parts: dict[str, Callable[[RunFiles], object]] = {
        LEARNING_CURVES.name: lambda run: run.curves,
        RESOURCES.name: lambda run: run.resources,
    }
    for name, has in parts.items():
        without = [run for run in comparison.runs if not has(run)]
        if len(without) == len(comparison.runs):
            notes.append(f"No run has {name}: figures of its numbers are left out.")
        elif without:
            notes.append(f"{len(without)} of {len(comparison.runs)} runs have no {name}.")
    return notes
