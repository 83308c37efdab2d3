"""Whether two finished runs are the same, bit for bit, times left out."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

_TABLES = ("transfer.csv", "training.csv", "learning_curves.csv", "estimates.csv", "resources.csv")
History = list[tuple[int, dict[str, Any]]]
_CLOCKS = ("seconds", "measuring_seconds", "peak_memory_bytes", "model_size_efficiency")


def differences(whole: Path, killed: Path) -> list[str]:
    """Return in what two finished runs differ, times left out."""
    names = [{str(f.relative_to(place)) for f in place.rglob("*") if f.is_file()} for place in (whole, killed)]
    strange = {name for name in names[0] ^ names[1] if name != "note.txt" and not _is_of_others(name)}
    found = [f"files of one alone: {sorted(strange)}"] if strange else []
    found += _other_points(history(whole / "out"), history(killed / "out"))
    for name in sorted(names[0] & names[1]):
        one, two = whole / name, killed / name
        if name.endswith(".ckpt"):
            found += [f"{name}: {key}" for key in _unequal(_checkpoint(one), _checkpoint(two))]
        elif one.name in _TABLES:
            found += [f"{name} differs"] * (_table(one) != _table(two))
        elif one.name in ("transfer.json", "references.json", "result.json"):
            found += [f"{name} differs"] * (_json(one) != _json(two))
        elif name in ("out/config.yaml", "out/command.json"):
            found += [f"{name} differs"] * (one.read_bytes() != two.read_bytes())
    return found


def _is_of_others(name: str) -> bool:
    """Return whether a file is W&B's, a folder a sitting, or the interpreter's."""
    return name.startswith("out/wandb/") or "__pycache__" in name


def _other_points(whole: History, killed: History) -> list[str]:
    """Return what two histories in Weights & Biases differ in."""
    steps, expected = Counter(step for step, _ in killed), dict(whole)
    missing, doubled = expected.keys() - steps.keys(), sum(count - 1 for count in steps.values())
    strange = steps.keys() - expected.keys()
    other = [step for step, values in killed if step in expected and values != expected[step]]
    order = [] if [step for step, _ in killed] == sorted(steps.elements()) else ["points out of order"]
    counts = (
        (len(missing), "missing"),
        (doubled, "doubled"),
        (len(strange), "too many"),
        (len(other), "of other values"),
    )
    return [f"W&B: {count} points {what} of {len(expected)}" for count, what in counts if count] + order


def history(place: Path) -> History:
    """Return the points that the files of Weights & Biases hold, of all sittings: their steps and what they say.

    Times are left out, and a table stands there as its content.
    """
    from cl.report.points import read_records

    found = []
    for path in sorted(place.glob("wandb/*run-*/run-*.wandb")):
        for record, _ in read_records(path.read_bytes()):
            if record.WhichOneof("record_type") == "history":
                found.append(_point(record.history, path.parent / "files"))
    return found


def _point(entry: Any, files: Path) -> tuple[int, dict[str, Any]]:
    values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in entry.item}
    own = {k: v for k, v in values.items() if k[0] != "_" and "/R/" not in k and "heat_map" not in k}
    own = {name: value for name, value in own.items() if name.rpartition("/")[2] not in _CLOCKS}
    for key, value in values.items():
        if key.endswith("/R/path"):
            own[key] = json.loads((files / value).read_text())["data"]
        elif key.endswith("/R_heat_map/path"):
            own[key] = hashlib.sha256((files / value).read_bytes()).hexdigest()
    return entry.step.num, own


def _checkpoint(path: Path) -> Any:
    import torch

    from cl.engine.checkpoint import is_whole

    if not is_whole(path):
        return {"whole": False}
    content = torch.load(path, weights_only=True)
    resources = content["instruments"].pop("resources._extra_state")
    return {**content, "resources": [record[2:8] + record[10:] for record in resources["records"]]}


def _unequal(a: Any, b: Any, where: str = "") -> list[str]:
    """Return the places where nested containers differ, in a bit of a tensor or otherwise."""
    import torch

    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and _raw(a) == _raw(b)
        return [] if same else [where]
    if type(a) is not type(b):
        return [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where} keys"]
        return [text for key in a for text in _unequal(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where} length"]
        return [text for i, pair in enumerate(zip(a, b, strict=True)) for text in _unequal(*pair, f"{where}[{i}]")]
    return [] if a == b or (a != a and b != b) else [where]


def _raw(x: Any) -> bytes:
    return bytes(x.detach().numpy().tobytes())


def _table(path: Path) -> list[list[str]]:
    rows = list(csv.reader(path.read_text(errors="replace").splitlines()))
    kept = [i for i, name in enumerate(rows[0] if rows else ()) if name not in _CLOCKS]
    return [[row[i] if i < len(row) else "" for i in kept] for row in rows]


def _json(path: Path) -> Any:
    try:
        return _timeless(json.loads(path.read_text()))
    except ValueError:
        return path.read_bytes()


def _timeless(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _timeless(value) for key, value in tree.items() if key not in ("seconds", "sha256")}
    return [_timeless(item) for item in tree] if isinstance(tree, list) else tree
