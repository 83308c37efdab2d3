"""Time a workload beside a bare loop and the peers: `python -m benchmarks online_mlp --against bare,avalanche`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import folder, forecasts, frozen, many_tasks, memory, processes, published, strategies
from benchmarks.contestant import CONTESTANTS
from benchmarks.process import take_turns
from benchmarks.workloads import WORKLOADS

OTHERS = {"memory": memory, "strategies": strategies, "many_tasks": many_tasks, "folder": folder, "frozen": frozen}
STUDIES = {"forecasts": forecasts, "processes": processes, "published": published}  # no timings, so no part of `all`


def race(name: str, against: list[str], args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure contestants on one workload."""
    runs = take_turns(
        name, against, lambda who, turn: ["benchmarks.contestant", who, name, args.data, str(turn)], args, console
    )
    return {"workload": name, "about": WORKLOADS[name].about, "threads": args.threads, "runs": runs}


def ratio(mine: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> float:
    """Return the median over the turns of the ratio within a turn."""
    return median(a[key] / b[key] for a, b in zip(mine, base, strict=True))


def show(result: dict[str, Any], console: Console) -> None:
    """Print medians, spreads and ratios to the first contestant, and say where the accuracies disagree."""
    runs: dict[str, list[dict[str, Any]]] = result["runs"]
    first, workload = next(iter(runs)), WORKLOADS[result["workload"]]
    console.print(f"\n{result['workload']}: {workload.about}\n{runs[first][0]['data']}; {result['threads']} thread(s)")
    table = Table()
    for column in ("", "wall, s", f"/ {first}", "processor, s", f"/ {first}", "steps/s", "peak MB", "accuracy, %"):
        table.add_column(column, justify="left" if not column else "right")
    for name, turns in runs.items():
        columns = {key: [turn[key] for turn in turns] for key in ("wall", "processor", "memory", "accuracy", "steps")}
        spread = {
            k: f"{median(columns[k]):.2f} ({min(columns[k]):.2f}-{max(columns[k]):.2f})" for k in ("wall", "processor")
        }
        table.add_row(
            name,
            spread["wall"],
            f"{ratio(turns, runs[first], 'wall'):.2f}",
            spread["processor"],
            f"{ratio(turns, runs[first], 'processor'):.2f}",
            f"{median(columns['steps']) / median(columns['wall']):.0f}" if columns["steps"][0] else "-",
            f"{median(columns['memory']):.0f}",
            f"{min(columns['accuracy']):.1f}-{max(columns['accuracy']):.1f}",
        )
    console.print(table)
    base = median(turn["accuracy"] for turn in runs[first])
    for name, turns in runs.items():
        gap = median(turn["accuracy"] for turn in turns) - base
        if abs(gap) > workload.tolerance:
            console.print(
                f"{name} ends {gap:+.1f} points from {first}, beyond {workload.tolerance}: not the same job.",
                style="bold red",
            )


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("workload", choices=[*WORKLOADS, *OTHERS, *STUDIES, "all"])
    parser.add_argument("--against", default="bare,avalanche,lightning", help="of " + ", ".join(CONTESTANTS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, help="a folder with MNIST and CIFAR-100 as torchvision lays them out")
    parser.add_argument("--json", type=Path, help="where to write every measurement")
    parser.add_argument("--only", default="*", help="published, processes, strategies: patterns of names, 'er*,gpm'")
    parser.add_argument("--out", type=Path, default=Path("runs/published"), help="published: where the runs are kept")
    args = parser.parse_args()
    args.data = str(args.data.resolve()) if args.data else ""
    against = list(dict.fromkeys(["bare", "clsim", *filter(None, args.against.split(","))]))
    strangers = sorted(set(against) - set(CONTESTANTS))
    if strangers or args.repeat < 1:
        parser.error(f"no contestant {strangers}" if strangers else "--repeat must be 1 or more")
    console = Console(width=140 if not sys.stdout.isatty() else None)
    libraries = ", ".join(f"{p} {version(p)}" for p in ("torch", "pytorch-lightning", "avalanche-lib"))
    console.print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}")
    results = []
    for name in [*WORKLOADS, *OTHERS] if args.workload == "all" else [args.workload]:
        if name in OTHERS | STUDIES:
            results.append((OTHERS | STUDIES)[name].measure(args, console))
        else:
            results.append(race(name, against, args, console))
            show(results[-1], console)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    for result in results:
        if "bare" in result.get("runs", {}):
            ours = ratio(result["runs"]["clsim"], result["runs"]["bare"], "processor")
            print(
                f"{result['workload']} ratio_to_bare: {ours:.3f}" if len(results) > 1 else f"ratio_to_bare: {ours:.3f}"
            )


if __name__ == "__main__":
    main()
