"""The provenance of a run, which is its data and the user's own code, and what of it has changed between two sessions.

A session is one process's part of a run. A run that were resumed with other pixels, other labels or another loss would
mix two experiments in one R. So the first session stores digests in `provenance.json`, and later ones compare theirs.
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

_SAMPLE = 64  # examples that are digested after a transform; the arrays before it are read whole
_STANDARD = str(Path(sysconfig.get_path("stdlib")).resolve())
_INSTALLED = {"site-packages", "dist-packages"}  # folders of packages, whose versions the manifest records
_LIBRARIES = {"cl", "torch", "torchvision", "pytorch_lightning", "timm", "avalanche"}  # wherever they are installed

Stamp = list[Any]  # size and time of modification of a file, and the digest of its content at that time
_files: dict[str, Stamp] = {}  # by path, the stamp of each mapped file that has been digested


def provenance(
    stream: Stream,
    config: Mapping[str, Any],
    objects: Iterable[Any] = (),
    starts: Mapping[str, Path] | None = None,
    sets: Iterable[str] = ("train", "val", "test", "unlabelled"),
) -> dict[str, Any]:
    """Return digests of a stream's data and of the user's own source code.

    Args:
        stream: The stream, of which every task is digested; arrays that tasks share are read once.
        config: The resolved configuration, whose `_target_`s name code.
        objects: Strategies and networks, for a run that was started from Python.
        starts: By setting, the files of initial weights; that of `weights` is found in the configuration.
        sets: Which sets of each task are digested.

    Returns:
        "data": by task and part, the number of examples and digests of labels and inputs; "code": by module, a digest
        of its file; "start": by setting, a digest of the file of initial weights; "files": by path, size, time of
        modification and digest of every mapped file, so that an unchanged file is not read again.

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
        for name in sets
        if (part := getattr(task, name)) is not None
    }
    return {
        "data": data,
        "code": _code(config, objects),
        "start": _start({"weights": config.get("weights"), **(starts or {})}),
        "files": {path: _files[path] for path in seen if path in _files},
    }


def digest(data: TaskData, seen: dict[Any, str] | None = None) -> tuple[str, str]:
    """Return a digest of the labels and one of the inputs of a set of examples.

    The inputs' digest covers the base arrays, read whole; the index of the examples in them; and, if there is a
    transform, the first examples after it. Inputs that a map-style dataset draws anew at each reading are represented
    by their shape alone.

    Args:
        data: The examples.
        seen: Digests of arrays by `id`, and of files by path, so that sets that share them digest them once; new ones
            are added to it.

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
    """Return the digest of an array; for a mapped file whose size and time are unchanged, the digest found before."""
    path = getattr(rows, "path", None)
    if path is None:
        return content_digest(rows)
    stat = os.stat(path)
    key, stamp = str(Path(path).resolve()), [stat.st_size, stat.st_mtime_ns]
    if _files.get(key, [])[:2] != stamp:
        _files[key] = [*stamp, content_digest(rows)]
    seen[key] = str(_files[key][2])
    return seen[key]


def content_digest(rows: Any) -> str:
    """Return a digest of the type, the shape and the content of inputs, which are read whole.

    A map-style dataset may draw other inputs each time, so its type and shape stand for it.

    Example:
        >>> content_digest(torch.zeros(2)) == content_digest(torch.zeros(3))
        False
    """
    found = hashlib.sha256(f"{rows.dtype}{tuple(rows.shape)}".encode())
    if isinstance(rows, Tensor) or row_bytes(rows) == 0:
        _add(found, rows)
    elif not hasattr(rows, "dataset"):  # a map-style dataset may draw other inputs each time
        for part in parts(rows):
            found.update(part.tobytes())
    return found.hexdigest()


def _add(found: Any, tensor: Tensor) -> None:
    found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _start(files: Mapping[str, Any]) -> dict[str, str]:
    """Return, by setting, the digests of the files of initial weights that still exist."""
    return {key: digest_of(Path(file))[:20] for key, file in files.items() if file and Path(file).is_file()}


# ---- code -----------------------------------------------------------------------------------------------------------


def _code(config: Mapping[str, Any], objects: Iterable[Any]) -> dict[str, str]:
    """Return, by module, a digest of the user's source files that define or use the run's classes and functions."""
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
    """Return the module of a dotted name, or ""; it is imported, since a resumed run may not have imported it yet."""
    name = target.rpartition(".")[0]
    while name:
        try:
            importlib.import_module(name)
            return name
        except ImportError:
            name = name.rpartition(".")[0]
    return ""


def _used(modules: list[ModuleType]) -> list[ModuleType]:
    """Return the user's own modules among the given ones, and those that they import in turn."""
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
    """Return the names of the modules that a module's source imports, and of imported members that may be modules."""
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
    path = Path(file).resolve()
    return not (_INSTALLED & set(path.parts) or str(path).startswith(_STANDARD))


# ---- compare two sessions -------------------------------------------------------------------------------------------


def check_and_store(
    directory: Path, found: dict[str, Any], allowed: bool, begun: bool, remarks: Iterable[str] = ()
) -> list[str]:
    """Compare the provenance of a run with that of its earlier sessions, and write it to the run's directory.

    Args:
        directory: The run's directory.
        found: The provenance of this session, from `provenance`.
        allowed: Whether a change is recorded instead of refused.
        begun: Whether an earlier session has learned or measured anything.
        remarks: Sentences of this session that later sessions repeat.

    Returns:
        A sentence on each change that was allowed, in this session or before, and the remarks of all sessions.

    Raises:
        InputError: If data or code have changed and that is not allowed.
    """
    before = read_sealed(directory / PROVENANCE) if begun else None
    history: list[str] = list(dict.fromkeys([*(before["history"] if before is not None else []), *remarks]))
    if before is not None:
        changed = changes(before, found)
        if changed and not allowed:
            raise InputError(
                f"{directory} was begun with other data or code: {listed(changed)}. Restore what was there, continue "
                "with allow_changed=true, which is reported beside the numbers, or start a new run in another "
                "directory (hydra.run.dir)."
            )
        history += [f"Changed between two sessions: {listed(changed)}."] * bool(changed)
    start = {**(before or {}).get("start", {}), **found["start"]}  # an earlier session's file may be gone
    content = {**{key: found[key] for key in ("data", "code", "files")}, "start": start, "history": history}
    if content != before:
        write_sealed(directory / PROVENANCE, content)
    return history


def stored(directory: Path) -> dict[str, Any] | None:
    """Return the provenance that a run's directory holds, or None; mapped files that it knows are not read again."""
    found = read_sealed(directory / PROVENANCE)
    _files.update({key: stamp for key, stamp in (found or {}).get("files", {}).items() if key not in _files})
    return found


def changes(there: Mapping[str, Any], here: Mapping[str, Any], code: bool = True) -> list[str]:
    """Return the differences between two provenances, a few words each.

    Args:
        there: The earlier provenance.
        here: The present provenance.
        code: Whether to compare code and files of initial weights as well as data.

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
    """Join changes to a part of a sentence; of more than four, the first four and the number of the others."""
    return ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")


def _natural(name: str) -> tuple[int, str]:
    words = name.split()
    return int(words[1]), words[2]
