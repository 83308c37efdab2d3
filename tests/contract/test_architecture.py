"""The shape of the house: who imports whom, how large a room is, and what every YAML composes to."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import get_class, get_method
from omegaconf import OmegaConf

from checkout import ROOT
from cl.app.build import _learner, _mappings
from cl.app.instantiate import instantiate_as
from cl.compare.read import PROBES
from cl.data.task import Stream, Task, TaskData
from cl.engine.strategy import Strategy

ENGINE = sorted((ROOT / "cl").rglob("*.py"))
STRATEGIES = sorted(p for p in (ROOT / "strategies").glob("*.py") if p.name != "__init__.py")
STREAMS = sorted(p for p in (ROOT / "streams").glob("*.py") if p.name != "__init__.py")
CONF = ROOT / "conf"


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> frozenset[str]:
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return frozenset(found)


FLOORS = {  # a room imports only from rooms below it, and from itself
    **{"errors": 0, "lazy": 0, "settings": 0},
    **{"distributed": 1, "ranges": 1, "rundir": 1},
    **{"files": 2, "random": 2, "trainer": 2},
    **{"data": 3, "metrics": 3},
    **{"backbones": 4, "compose": 4, "report": 4},
    **{"compare": 5, "engine": 5, "streams": 5},
    **{"testing": 6, "toolkit": 6},
    **{"measure": 7, "strategies": 7},
    **{"app": 8},
    **{"__init__": 9, "__main__": 9},  # the front door
}


def room_of(path: Path) -> str:
    """Return the package of `cl` that a file stands in, or the module that it is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "cl" else parts[0]


def test_the_house_is_small():
    """Two dozen boxes on eleven floors can be drawn on one sheet; `FLOORS` names each of them."""
    named = {room_of(path) for path in ENGINE + STRATEGIES + STREAMS}
    assert named == FLOORS.keys()
    assert len(FLOORS) <= 24 and len(set(FLOORS.values())) <= 11


def test_a_room_imports_only_from_rooms_below_it():
    """What is imported for type checking alone counts, too."""
    for path in ENGINE + STRATEGIES + STREAMS:
        own, found = room_of(path), imports(path)
        rooms = {name.split(".")[1] for name in found if name.startswith("cl.")} & FLOORS.keys() - {own}
        assert {room for room in rooms if FLOORS[room] >= FLOORS[own]} == set(), path
        whole = [a.name for n in ast.walk(parsed(path)) if isinstance(n, ast.Import) for a in n.names]
        assert "cl" not in whole, f"{path} enters by the front door, which is for users"


def test_no_file_name_stands_twice():
    names = [path.name for path in ENGINE if not path.name.startswith("__")]
    assert sorted(names) == sorted(set(names))


def test_the_engine_room_stays_small():
    assert sum(code_lines(path.read_text()) for path in (ROOT / "cl" / "engine").glob("*.py")) < 2250


def test_the_engine_knows_no_stream_and_no_strategy():
    for path in ENGINE:
        bad = {
            name for name in imports(path) if name.startswith(("cl.strategies", "cl.streams", "strategies", "streams"))
        }
        assert not bad, f"{path.name} imports {bad}"


def texts(tree: ast.AST) -> list[ast.Constant]:
    """Return the strings of a module, but for its docstrings."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
    docs = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs]
    return [node for node in constants if isinstance(node.value, str)]


def test_no_string_in_cl_names_a_strategy_or_stream():
    """What the engine has to know of one, its class says; of messages, `cl-list` knows the names.

    A word that is a parameter's name somewhere in `cl` (`split`, of a dataset), a library's that `cl` imports, or a
    probe's (`knn`) is a term of its own.
    """
    trees = {path: parsed(path) for path in ENGINE}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    terms = {node.arg for node in nodes if isinstance(node, ast.arg)}
    terms |= {name.partition(".")[0] for path in ENGINE for name in imports(path)} | set(PROBES)
    strategies, streams = ({path.stem for path in paths} - terms for paths in (STRATEGIES, STREAMS))
    found = []
    for path, tree in trees.items():
        for node in texts(tree):
            words = strategies & set(re.findall(r"\w+", node.value))
            words |= streams & {node.value, *re.findall(r"streams?[.=](\w+)", node.value)}
            found += [f"{path.relative_to(ROOT)}:{node.lineno} says {word}" for word in sorted(words)]
    assert not found


def test_what_methods_use_of_a_learner_is_what_the_contract_names():
    """That `Learner` has it all, mypy checks where it hands itself to `Composition.setup`."""
    body = next(
        node.body
        for node in ast.parse((ROOT / "cl" / "engine" / "strategy.py").read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "LearnerLike"
    )
    members = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    members |= {node.name for node in body if isinstance(node, ast.FunctionDef)}
    used = set()
    for path in STRATEGIES + sorted((ROOT / "cl" / "toolkit").glob("*.py")):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "learner":
                assert isinstance(node.ctx, ast.Load), f"{path.name}:{node.lineno} sets learner.{node.attr}"
                assert node.attr in members, f"{path.name}:{node.lineno} uses learner.{node.attr}"
                used.add(node.attr)
    offered = {"__call__", "restart_optimizer"}  # the latter for methods from outside
    assert used == members - offered, "the contract has no member that nobody uses"


def test_a_strategy_or_stream_never_imports_its_sibling():
    for path in STRATEGIES + STREAMS:
        bad = {
            name for name in imports(path) if name.startswith(("cl.strategies", "cl.streams", "strategies", "streams"))
        }
        assert not bad, f"{path.name} imports {bad}"


HEAVY = ("wandb", "timm", "matplotlib", "torchvision", "sklearn", "avalanche", "scipy", "pandas", "PIL", "plotly")


def test_heavy_libraries_are_imported_where_they_are_used():
    for path in ENGINE + STRATEGIES + STREAMS:
        top = [node for node in parsed(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for n in top if isinstance(n, ast.Import) for alias in n.names}
        names |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
        assert not [name for name in names if name.split(".")[0] in HEAVY], path


def code_lines(source: str) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docstrings |= set(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_an_engine_file_stays_under_300_lines_of_code():
    for path in ENGINE:
        assert code_lines(path.read_text()) <= 300, path


def test_a_strategy_stays_under_80_lines_of_code():
    for path in STRATEGIES:
        source = path.read_text()
        module = ast.parse(source)
        # The lines that wire a file into Python are not the method: imports and the names of arguments.
        wiring = sum(
            (node.end_lineno or 0) - node.lineno + 1
            for node in module.body
            if isinstance(node, ast.Import | ast.ImportFrom | ast.If)
        )
        assert code_lines(source) - wiring <= 80, path


def test_a_function_stays_under_40_lines_of_code():
    for path in ENGINE + STRATEGIES + STREAMS:
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                body = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
                margin = len(body) - len(body.lstrip())
                text = "\n".join(line[margin:] for line in body.splitlines())
                arguments = len(node.args.args + node.args.kwonlyargs)
                assert code_lines(text) - arguments <= 40, f"{path.name}:{node.name}"


def test_a_strategys_header_names_paper_and_differences():
    for path in STRATEGIES:
        text = ast.get_docstring(parsed(path)) or ""
        if path.stem not in ("finetune", "joint", "cumulative"):
            assert any(year in text for year in map(str, range(2010, 2030))), f"{path}: name the paper"
            assert "Differences from" in text, path


GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name != "__pycache__")


@cache
def composed(*overrides: str):
    with initialize_config_module("cl.conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))


def targets(tree):
    if isinstance(tree, dict):
        yield from (value for key, value in tree.items() if key == "_target_")
        for value in tree.values():
            yield from targets(value)


TOGETHER = pytest.mark.xdist_group("composed")  # in one process, which composes each YAML once


@TOGETHER
@pytest.mark.parametrize(
    "group", [pytest.param(group, marks=pytest.mark.slow if group == "experiment" else ()) for group in GROUPS]
)
def test_every_yaml_composes_and_its_targets_exist(group):
    for option in sorted(path.stem for path in (CONF / group).glob("*.yaml")):
        plugin = f"hydra_plugins.hydra_{option.partition('_')[0]}_launcher"
        if group == "launcher" and importlib.util.find_spec(plugin) is None:
            continue  # an extra
        extra = ["weights=none.ckpt"] if option.startswith("cifar100_vit") else []
        names = set(targets(OmegaConf.to_container(composed(f"{group}={option}", *extra), resolve=False)))
        assert names, option
        for name in names - {"???"}:  # the user's own
            try:
                get_class(name)
            except ValueError:
                get_method(name)


@TOGETHER
def test_yaml_key_file_and_class_of_a_strategy_agree():
    for path in STRATEGIES:
        cfg = composed(f"strategy={path.stem}")
        assert list(cfg.strategy) == [path.stem], path
        module, _, name = cfg.strategy[path.stem]._target_.rpartition(".")
        assert module == f"cl.strategies.{path.stem}" and name.lower() == path.stem.replace("_", ""), path


@TOGETHER
def test_a_yaml_gives_every_argument_its_default():
    import inspect

    for path in STRATEGIES:
        cfg = composed(f"strategy={path.stem}").strategy[path.stem]
        parameters = inspect.signature(get_class(cfg._target_)).parameters
        written = {k: v for k, v in OmegaConf.to_container(cfg).items() if k != "_target_"}
        defaults = {k: p.default for k, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
        assert written == {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}, path


def test_experiments_open_with_the_command_that_runs_them():
    for path in (CONF / "experiment").glob("*.yaml"):
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any(f"experiment={path.stem}" in line and "cl-run" in line for line in head), path.name


def test_experiments_say_how_long_they_train():
    def settings(path):
        found, below = OmegaConf.load(path), []
        for entry in found.get("defaults", []):
            if isinstance(entry, str):
                below.append(path.with_stem(entry))
            else:  # a strategy can bring a protocol, as GDumb's does
                below += [CONF / "strategy" / f"{name}.yaml" for name in entry.get("override /strategy", [])]
        return [found, *(entry for other in below for entry in settings(other))]

    for path in (CONF / "experiment").glob("*.yaml"):
        for key in ("epochs", "batch_size"):  # a default of conf/config.yaml is nobody's protocol
            assert any(key in found for found in settings(path)), f"{path.name} leaves {key} to the defaults"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_makes_a_learner_of_a_stream_of_its_shape(path):
    with initialize_config_module("cl.conf", version_base="1.3"):
        cfg = compose("config", overrides=[f"experiment={path.stem}", "weights=null"])
    cifar = "cifar" in path.stem
    num_tasks, num_classes = cfg.stream.get("num_tasks", 5) or 10, 100 if cifar else 10
    shared = cfg.scenario == "domain" or bool(cfg.stream.get("shared_labels"))
    tasks = []
    for t in range(num_tasks):
        each = num_classes // num_tasks
        y = torch.arange(num_classes if shared else each) + (0 if shared else each * t)
        data = TaskData(torch.zeros(len(y), *((3, 32, 32) if cifar else (1, 28, 28)), dtype=torch.uint8), y, t)
        tasks.append(Task(t, data, data, data))
    groups = OmegaConf.select(cfg, "strategy.lingocl.vectors.groups") or {}
    options = {"repeats": shared, "class_names": [name for group in groups.values() for name in group]}
    stream = Stream(tasks, scenario=cfg.scenario or "class", num_classes=num_classes, **options)
    strategies = {name: instantiate_as(node, Strategy) for name, node in _mappings(cfg, "strategy")}
    learner, _ = _learner(cfg, stream, lambda: strategies)
    assert set(learner.strategies) == set(strategies)


def test_rows_on_a_pretrained_network_name_what_is_not_there_until_weights_are_given():
    for path in (CONF / "experiment").glob("cifar100_vit*.yaml"):
        with initialize_config_module("cl.conf", version_base="1.3"):
            cfg = compose("config", overrides=[f"experiment={path.stem}"])
        assert (cfg.weights is None) == ("pretrain" in path.stem), path.stem
