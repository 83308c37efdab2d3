"""The reference: pages that are made from the code while the site is built, and never written by hand."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from importlib.resources import files as resources
from typing import Any

import griffe
from formulas import markdown, prose
from hydra import compose, initialize_config_module
from hydra.utils import get_object
from mkdocs.structure.files import File, Files
from omegaconf import OmegaConf

import cl
from cl import rundir
from cl.app.listing import cards, options
from cl.engine.strategy import NEEDS as NEEDED
from cl.engine.strategy import Strategy
from cl.metrics.scalar import AnyScalar
from cl.metrics.transfer import LIBRARY_VARIANTS, SCALARS
from cl.ranges import annotation_of, range_of
from cl.report.evidence import remedy
from cl.report.scalars import MEASURES
from cl.settings import SETTINGS


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and name those of strategies and streams in the navigation."""
    for group, page in {"strategy": strategy, "stream": stream}.items():
        folder = {"strategy": "strategies", "stream": "streams"}[group]
        names = [name for name in options(group) if name != "custom"]
        for name in names:
            files.append(File.generated(config, f"reference/{folder}/{name}.md", content=page(name)))
        index = f"reference/{folder}/index.md"
        files.append(File.generated(config, index, content=listing(folder, group, names)))
        _section(config.nav, index).extend(f"reference/{folder}/{name}.md" for name in names)
    for name, make in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    return files


def _section(nav: Any, index: str) -> list[Any]:
    """Return the section of the navigation that begins with a page."""
    if isinstance(nav, list) and nav[:1] == [index]:
        return nav
    parts = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ()
    return next((found for part in parts if (found := _section(part, index))), [])


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in lines) + "\n"


def code(text: Any) -> str:
    """Return text in the type of code, also in a cell of a table; nothing for nothing."""
    return f"`{text}`" if str(text) else ""


# --------------------------------------------------------------------------- strategies and streams


def listing(title: str, group: str, names: list[str]) -> str:
    """Return the page that lists the options of a group."""
    said = cards() if group == "strategy" else {}
    head = ["name", "what it is", *(["scenarios", "needs"] if said else [])]
    rows = (
        [
            f"[`{name}`]({name}.md)",
            prose(options(group)[name]),
            *(", ".join(said[name][key]) for key in head[2:]),
        ]
        for name in names
    )
    return f"# All {title}\n\n`cl-run {group}=NAME` chooses one.\n\n" + table(head, rows)


def _composed(group: str, name: str) -> tuple[str, Any]:
    """Return the file that configures an option, and what it configures once all defaults are in."""
    with initialize_config_module("cl.conf", version_base="1.3"):
        config = compose("config", overrides=[f"{group}={name}"])
    return (resources("cl.conf") / group / f"{name}.yaml").read_text(encoding="utf-8"), config[group]


def strategy(name: str) -> str:
    """Return the card of a strategy: the header of its file, its arguments, and how it is chosen."""
    text, config = _composed("strategy", name)
    target = config[name]["_target_"]
    kind = get_object(target)
    title, _, header = (inspect.getdoc(inspect.getmodule(kind)) or "").partition("\n\n")
    values = {k: v for k, v in OmegaConf.to_container(config[name]).items() if k != "_target_" and v is not None}
    first = next((f" strategy.{name}.{k}={v}" for k, v in values.items() if isinstance(v, int | float | str)), "")
    scenario = "" if "class" in kind.scenarios else f" scenario={kind.scenarios[0]}"
    backbone = " backbone=vit" if "transformer" in kind.needs else ""
    return (
        f"# {kind.__name__}\n\n{markdown(title)}\n\n{about(kind)}\n{markdown(header)}\n\n"
        f"## Arguments\n\n{arguments(kind)}\n"
        f"## Use\n\n```bash\ncl-run strategy={name}{first}{scenario}{backbone}\n```\n\n"
        f"```python\ncl.run(stream, cl.strategies.{kind.__name__}())\n```\n\n"
        f'## Configuration\n\n```yaml title="strategy/{name}.yaml"\n{text}```\n'
    )


def about(kind: type[Strategy]) -> str:
    """Return a list of what the class of a strategy says of itself."""
    needs = "; ".join(f"{need} ({NEEDED[need]})" for need in kind.needs)
    lines = [
        f"**Scenarios:** {', '.join(kind.scenarios)}",
        f"**Targets:** {', '.join(kind.targets)}",
        f"**Needs:** {prose(needs) or 'nothing in particular'}",
        *([] if kind.distributed else ["**Processes:** one"]),
        *([f"**Bound:** {kind.bound}"] if kind.bound else []),
        *([f"**Test options** (for `score=DIR`): {', '.join(map(code, kind.test_options))}"] * bool(kind.test_options)),
    ]
    return "".join(f"- {line}\n" for line in lines)


def stream(name: str) -> str:
    """Return the card of a stream: what makes it, its arguments, and how it is chosen."""
    text, config = _composed("stream", name)
    target = config["_target_"]
    make = get_object(target)
    said = (inspect.getdoc(make) or "").split("\n\nArgs:")[0]
    module = inspect.getmodule(make)
    has_file = module is not None and module.__name__.endswith(f".{make.__name__}")  # whose header is about it alone
    header = inspect.getdoc(module) or "" if has_file else options("stream")[name]
    return (
        f"# {name}\n\n{markdown(header)}\n\n`{target}`: {markdown(said)}\n\n"
        f"## Arguments\n\n{arguments(make)}\n"
        f"## Use\n\n```bash\ncl-run stream={name}\n```\n\n"
        f'## Configuration\n\n```yaml title="stream/{name}.yaml"\n{text}```\n'
    )


def arguments(thing: Callable[..., Any]) -> str:
    """Return a table of the arguments of a class or function: types, ranges, defaults, and what its docstring says."""
    said = {}
    for section in griffe.Docstring(inspect.getdoc(thing) or "", parser="google").parse(warnings=False):
        if section.kind is griffe.DocstringSectionKind.parameters:
            said = {argument.name: argument.description for argument in section.value}
    rows = []
    for name, parameter in inspect.signature(thing).parameters.items():
        kind = "" if parameter.annotation is parameter.empty else str(parameter.annotation)
        kind = " | ".join(dict.fromkeys(re.sub(r"Annotated\[(\w+), \w+\([^)]*\)\]", r"\1", kind).split(" | ")))
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        allowed = range_of(annotation_of(thing, name))
        rows.append([code(name), prose(said.get(name, "")), code(f"{kind}{default}"), allowed])
    return table(["argument", "meaning", "type and default", "range"], rows) if rows else "None.\n"


# --------------------------------------------------------------------------- one page each


def metrics() -> str:
    """Return the page of the metrics."""
    head = ["name", "formula", "divided by", "range", "better", "source"]

    def row(name: str, scalar: AnyScalar) -> list[str]:
        better = "higher" if scalar.higher_is_better else "lower"
        return [
            code(name),
            code(scalar.formula),
            code(scalar.divisor),
            prose(scalar.scale),
            better,
            prose(scalar.source),
        ]

    def rows(scalars: Mapping[str, AnyScalar]) -> Iterator[list[str]]:
        yield from (row(name, scalar) for name, scalar in scalars.items())

    how = {name: " ".join(prose(remedy(need)) + "." for need in m.needs) for name, m in MEASURES.items()}
    measured = ([*row(name, m), how[name]] for name, m in MEASURES.items())
    functions = sorted({one.function.__name__ for one in [*SCALARS.values(), *LIBRARY_VARIANTS.values()]})
    return (
        "# Metrics\n\nTasks are numbered from 1: `R[i,j]` is the metric on task j after i tasks, and `R[0,j]` that of "
        "the untrained learner. T is the number of tasks. A sum is divided by what stands beside it.\n\n"
        f"## Scalars of R\n\n{table(head, rows(SCALARS))}\n"
        f"## What other libraries compute\n\nTo compare numbers with theirs, not to report.\n\n"
        f"{table(head, rows(LIBRARY_VARIANTS))}\n"
        "## Measured beside R\n\nEach is written when the run has measured what it needs.\n\n"
        f"{table([*head, 'needs'], measured)}\n"
        "## Definitions\n\n::: cl.metrics.transfer\n    options:\n      show_root_heading: false\n"
        f"      show_root_toc_entry: false\n      heading_level: 3\n      members: {functions}\n"
    )


def settings() -> str:
    """Return the page of the settings."""
    with initialize_config_module("cl.conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("config"), resolve=False)

    def default(key: str) -> str:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return "" if isinstance(value, dict) else code("null" if value is None else value)

    rows = ([code(key), prose(row.help), default(key), range_of(row.type), row.kind] for key, row in SETTINGS.items())
    kinds = (inspect.getdoc(type(next(iter(SETTINGS.values())))) or "").partition("kind: ")[2].partition("\nhelp:")[0]
    return (
        "# Settings\n\nEach key is set by `cl-run key=value`; a group, such as `stream`, takes the name of one of its "
        f"options. The kind of a setting: {prose(' '.join(kinds.split()).partition(' help:')[0])}\n\n"
        + table(["key", "meaning", "default", "range", "kind"], rows)
    )


def run_directory() -> str:
    """Return the page of the files of a run."""
    source = inspect.getsource(rundir)
    names = re.findall(r'^[A-Z]\w* = "([^"]+)"(?:  # (.*))?$', source, flags=re.MULTILINE)
    tables = [value for value in vars(rundir).values() if isinstance(value, rundir.Table)]
    text = [
        f"# Run directory\n\nThe format of these files has a version, now {rundir.FORMAT}, which stands in "
        f"`{rundir.MANIFEST}`.\n\n## Files\n",
        table(["name", "what it holds"], ([code(name), prose(said)] for name, said in names)),
        *(
            f"## {one.name}\n\n{prose(inspect.getdoc(one.row) or '')}\n\n"
            + table(["column", "type"], ([code(n), code(kind.__name__)] for n, kind in one.kinds.items()))
            for one in tables
        ),
    ]
    return "\n".join(text)


def commands() -> str:
    """Return the page of the command lines: what each prints with --help."""
    text = ["# Commands\n"]
    for point in sorted(entry_points(group="console_scripts"), key=lambda point: point.name):
        if point.module.startswith("cl."):
            start = f"import sys; sys.argv[0] = {point.name!r}; from {point.module} import {point.attr}; {point.attr}()"
            done = subprocess.run([sys.executable, "-c", start, "--help"], capture_output=True, text=True, check=True)
            text.append(f"## {point.name}\n\n```text\n{done.stdout.strip()}\n```\n")
    return "\n".join(text)


def python() -> str:
    """Return the page of the public names."""
    text = ["# Python\n\n`import cl` offers these names; each is imported when it is first used.\n"]
    for name in cl.__all__:
        thing = getattr(cl, name)
        heading = f"\n    options:\n      heading: cl.{name}\n      toc_label: {name}\n"
        if not inspect.ismodule(thing):
            text.append(f"::: {thing.__module__}.{thing.__qualname__}{heading}")
        elif path := vars(thing).get("__call_path__"):
            text.append(f"::: {path.replace(':', '.')}{heading}")
        else:
            offered = ", ".join(code(f"cl.{name}.{one}") for one in getattr(thing, "__all__", None) or _classes(thing))
            text.append(f"## cl.{name}\n\n{prose(inspect.getdoc(thing) or '')}\n\n{offered}.\n")
    return "\n".join(text)


def _classes(module: Any) -> list[str]:
    return [name for name, thing in vars(module).items() if inspect.isclass(thing)]


PAGES = {
    "metrics": metrics,
    "settings": settings,
    "run_directory": run_directory,
    "commands": commands,
    "python": python,
}
