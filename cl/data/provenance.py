"""What a run is made from, its data and the user's own code, and what of it has changed since the last sitting.

A run that goes on with other pixels, other labels or another loss would mix two experiments in one R. So the first
sitting keeps digests in `provenance.json`, and later ones compare.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cl.data.rows import parts, row_bytes
from cl.data.task import Stream, TaskData
from cl.errors import InputError
from cl.files import digest_of, read_sealed, write_sealed
from cl.rundir import PROVENANCE
from cl.settings import setting

_SAMPLE = 64  # rows that are looked at as a transform leaves them; the arrays below it are read whole
_STANDARD = str(Path(sysconfig.get_path("stdlib")).resolve())
_INSTALLED = {"site-packages", "dist-packages"}  # folders whose packages have versions, which the manifest tells
_LIBRARIES = {"cl", "torch", "torchvision", "pytorch_lightning", "timm", "avalanche"}  # even where they lie elsewhere
_PARTS = ("train", "val", "test", "unlabelled")

Stamp = list[Any]  # size and time of change of a file, and the digest of its content then
_files: dict[str, Stamp] = {}  # of arrays that are read by rows, by path


def provenance(
    stream: Stream, config: Mapping[str, Any], objects: Iterable[Any] = (), starts: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """Return digests of a stream's data and of the source code outside the package that decides what is learned.

    Args:
        stream: Every task is looked at; arrays that tasks share are read once.
        config: The resolved configuration, whose `_target_`s name code.
        objects: Strategies and networks, for a run made from Python.
        starts: Files that learning begins from, by setting; `weights` is found in the configuration.

    Returns:
        "data": by task and part, the number of rows and digests of labels and inputs; "code": by module, a digest of
        its file; "start": by setting, a digest of the file that learning begins from; "files": of arrays that are read
        by rows, what tells without reading that they are as they were.

    Example:
        >>> from cl.testing import toy_stream
        >>> found = provenance(toy_stream(2), {})
        >>> sorted(found["data"]), found["code"]
        (['task 1 test', 'task 1 train', 'task 2 test', 'task 2 train'], {})
    """
    seen: dict[Any, str] = {}
    data = {
        f"task {task.index + 1} {name}": [len(part), *digest(part, seen)]
        for task in stream
        for name in _PARTS
        if (part := getattr(task, name)) is not None
    }
    return {
        "data": data,
        "code": _code(config, objects),
        "start": _start({"weights": config.get("weights"), **(starts or {})}),
        "files": {path: _files[path] for path in seen if path in _files},
    }


def digest(data: TaskData, seen: dict[Any, str] | None = None) -> tuple[str, str]:
    """Return digests of the labels and of the inputs of a set of examples.

    Inputs are those of the arrays below the view, read whole, with the rows that belong and the first rows as a
    transform leaves them. What a map-style dataset draws anew each time has no digest but its shape.

    Args:
        data: Examples.
        seen: Digests of arrays by `id`, for sets that share them, and of files by path; filled.

    Example:
        >>> one, other = (TaskData(torch.full((3, 2), v), torch.tensor([0, 1, 2])) for v in (0.0, 1.0))
        >>> [a == b for a, b in zip(digest(one), digest(other))]
        [True, False]
    """
    seen = {} if seen is None else seen
    labels, inputs = (hashlib.sha256() for _ in range(2))
    for column in (data.labels, data.tasks):
        _add(labels, column)
    rows: Any = getattr(data.x, "rows", data.x)
    if id(data.x) not in seen:
        seen[id(data.x)] = _base(rows, seen)
    inputs.update(seen[id(data.x)].encode())
    if data.index is not None:
        _add(inputs, data.index)
    if data.transform is not None:
        _add(inputs, data.take(torch.arange(min(_SAMPLE, len(data)))).tensors()[0])
    return labels.hexdigest()[:20], inputs.hexdigest()[:20]


def _base(rows: Any, seen: dict[Any, str]) -> str:
    """Return the digest of an array; of one that lies in a file, that of before where the file has not been touched."""
    path = getattr(rows, "path", None)
    if path is None:
        return _content(rows)
    stat = os.stat(path)
    key, stamp = str(Path(path).resolve()), [stat.st_size, stat.st_mtime_ns]
    if _files.get(key, [])[:2] != stamp:
        _files[key] = [*stamp, _content(rows)]
    seen[key] = str(_files[key][2])
    return seen[key]


def _content(rows: Any) -> str:
    found = hashlib.sha256(f"{rows.dtype}{tuple(rows.shape)}".encode())
    if isinstance(rows, Tensor) or row_bytes(rows) == 0:
        _add(found, rows)
    elif not hasattr(rows, "dataset"):  # one that draws anew has no content
        for part in parts(rows):
            found.update(part.tobytes())
    return found.hexdigest()


def _add(found: Any, tensor: Tensor) -> None:
    found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _start(files: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of those files that are still there; what they held is in the checkpoints, too."""
    return {key: digest_of(Path(file))[:20] for key, file in files.items() if file and Path(file).is_file()}


# ---- code -----------------------------------------------------------------------------------------------------------


def _code(config: Mapping[str, Any], objects: Iterable[Any]) -> dict[str, str]:
    """Return a digest of each of the user's source files that the run's classes and functions stand in or use."""
    learning = {k: v for k, v in config.items() if k not in ("callbacks", "hydra") and setting(k).kind != "shown"}
    names = {_module_of(target) for target in _targets(learning)} | {type(thing).__module__ for thing in objects}
    found: dict[str, str] = {}
    for module in _used([sys.modules[name] for name in names if name in sys.modules]):
        file = Path(str(module.__file__))
        found[module.__name__] = hashlib.sha256(file.read_bytes()).hexdigest()[:20]
    return dict(sorted(found.items()))


def _targets(tree: Any) -> set[str]:
    """Return the values of every `_target_` in nested dicts and lists."""
    if isinstance(tree, list):
        return {name for value in tree for name in _targets(value)}
    if not isinstance(tree, Mapping):
        return set()
    own = {tree["_target_"]} if isinstance(tree.get("_target_"), str) else set()
    return own | {name for value in tree.values() for name in _targets(value)}


def _module_of(target: str) -> str:
    """Return the module that a dotted name stands in; it is imported, since a resumed run may not have built it yet."""
    name = target.rpartition(".")[0]
    while name:
        try:
            importlib.import_module(name)
            return name
        except ImportError:
            name = name.rpartition(".")[0]
    return ""


def _used(modules: list[ModuleType]) -> list[ModuleType]:
    """Return those of the modules that are the user's own, and what they import that is, too."""
    found: dict[str, ModuleType] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module.__name__ in found or not _is_own(module):
            continue
        found[module.__name__] = module
        waiting += [sys.modules[name] for name in _imports(module) if name in sys.modules]
    return list(found.values())


def _imports(module: ModuleType) -> set[str]:
    """Return the names of the modules that a module's source imports, and of what could be one."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_bytes())):
        if isinstance(node, ast.Import):
            found |= {".".join(alias.name.split(".")[:n]) for alias in node.names for n in range(1, 9)}
        elif isinstance(node, ast.ImportFrom):
            package = str(module.__package__ or "").split(".")
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            name = base if node.level else str(node.module)
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    return found


def _is_own(module: ModuleType) -> bool:
    file = str(getattr(module, "__file__", None))
    if module.__name__.partition(".")[0] in _LIBRARIES or not (file.endswith(".py") and Path(file).is_file()):
        return False
    place = Path(file).resolve()
    return not (_INSTALLED & set(place.parts) or str(place).startswith(_STANDARD))


# ---- two sittings ---------------------------------------------------------------------------------------------------


def settle(directory: Path, found: dict[str, Any], allowed: bool, begun: bool, told: Iterable[str] = ()) -> list[str]:
    """Keep what a run is made from, and compare it with what it was made from before.

    Args:
        directory: Of the run.
        found: What `provenance` returned.
        allowed: Whether a change is recorded instead of refused.
        begun: Whether anything has been learned or measured there.
        told: Sentences of this sitting that later ones are to repeat.

    Returns:
        A sentence on each change that was allowed, in this sitting or before, and what was told.

    Raises:
        InputError: If something has changed and that is not allowed.
    """
    kept = read_sealed(directory / PROVENANCE) if begun else None
    history: list[str] = list(dict.fromkeys([*(kept["history"] if kept is not None else []), *told]))
    if kept is not None:
        changed = changes(kept, found)
        if changed and not allowed:
            raise InputError(
                f"{directory} was begun with other data or code: {listed(changed)}. Bring back what was there, or go "
                "on with allow_changed=true, which is told beside the numbers; another directory "
                "(hydra.run.dir) begins anew."
            )
        history += [f"Changed between two sittings: {listed(changed)}."] * bool(changed)
    start = {**(kept or {}).get("start", {}), **found["start"]}  # a file of before may be gone
    content = {**{key: found[key] for key in ("data", "code", "files")}, "start": start, "history": history}
    if content != kept:
        write_sealed(directory / PROVENANCE, content)
    return history


def recall(directory: Path) -> dict[str, Any] | None:
    """Return what a run was made from as its directory has it, None where it does not say."""
    kept = read_sealed(directory / PROVENANCE)
    _files.update({key: stamp for key, stamp in (kept or {}).get("files", {}).items() if key not in _files})
    return kept


def changes(there: Mapping[str, Any], here: Mapping[str, Any], code: bool = True) -> list[str]:
    """Return what is different between two provenances, a few words each.

    Args:
        there: Of before.
        here: Of now.
        code: Whether code and the files that learning begins from count as well as data.

    Example:
        >>> old, new = ({"data": {"task 1 train": [3, "a", v]}, "code": {"mine": v}} for v in ("x", "y"))
        >>> changes(old, new)
        ['inputs of task 1 train', 'source of mine']
    """
    found = []
    for name in sorted(there["data"].keys() | here["data"].keys(), key=_natural):
        one, two = there["data"].get(name), here["data"].get(name)
        if one is None or two is None:
            found.append(f"{name} is {'new' if one is None else 'gone'}")
        elif one[0] != two[0]:
            found.append(f"{name} had {one[0]} rows and has {two[0]}")
        elif one != two:
            what = [word for word, a, b in zip(("labels", "inputs"), one[1:], two[1:], strict=True) if a != b]
            found.append(f"{' and '.join(what)} of {name}")
    if code:
        names = sorted(there["code"].keys() | here["code"].keys())
        found += [f"source of {name}" for name in names if there["code"].get(name) != here["code"].get(name)]
        starts = there.get("start", {}), here.get("start", {})
        found += [
            f"content of {key}" for key in sorted(starts[0].keys() & starts[1]) if starts[0][key] != starts[1][key]
        ]
    return found


def listed(changed: list[str]) -> str:
    """Return what has changed as words of a sentence, the first few of many."""
    return ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")


def _natural(name: str) -> tuple[int, str]:
    words = name.split()
    return int(words[1]), words[2]
