"""A journal of the points that a run logs to Weights & Biases, and which of them W&B's own files hold.

A point that W&B has received is not on the disk yet: its process collects 32 KB before it writes, and loses them when
it is killed. So each point is written to the journal first, and the next session logs those that W&B's files lack.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from cl.files import append_text, remove_leftovers, replace_file, sync, write_text

_HEAD = b":W&B\xe1\xbe\x00"  # the first bytes of a `.wandb` file
_BLOCK = 32768


@dataclass(frozen=True)
class Point:
    """One point of the history.

    Attributes:
        step: The number of the point, from 0.
        row: The row of R that the point reports; None for a point of a training curve.
        values: The scalars of the point by name.
    """

    step: int
    row: int | None
    values: dict[str, Any]


class Journal:
    """The points of a run as lines of JSON, `points.jsonl`; the first line is the digest of the configuration.

    Args:
        path: The file.
        config: The run's configuration.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "points.jsonl"
        >>> journal = Journal(path, {})
        >>> journal.begin(0)
        []
        >>> journal.add({"train/loss": 0.5}).step
        0
        >>> Journal(path, {}).begin(None)
        [Point(step=0, row=None, values={'train/loss': 0.5})]
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.count = path, 0
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
        self._head = json.dumps({"config_sha256": digest})

    def begin(self, count: int | None) -> list[Point]:
        """Cut the file after `count` points (None retains all), count on from there, and return the points."""
        remove_leftovers(self.path.parent)
        points = self._read()[1]
        points = [point for point in points if count is None or point.step < count]
        self.count = count if count is not None else points[-1].step + 1 if points else 0
        write_text(self.path, "".join(f"{line}\n" for line in (self._head, *map(_line, points))))
        return points

    def holds_only_the_start(self) -> bool:
        """Return whether a run of the same configuration was killed before it had learned anything."""
        head, points = self._read()
        return head == self._head and all(point.row == 0 for point in points)

    def add(self, values: Mapping[str, Any], row: int | None = None) -> Point:
        """Append a point to the file, without waiting for the disk, and return it."""
        point = Point(self.count, row, {name: _plain(value) for name, value in values.items()})
        append_text(self.path, _line(point) + "\n")
        self.count += 1
        return point

    def sync(self) -> None:
        """Wait until the points are on the disk."""
        sync(self.path)

    def _read(self) -> tuple[str, list[Point]]:
        """Return the first line and the points, up to the first one that is damaged or out of order."""
        try:
            head, *lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return "", []
        points: list[Point] = []
        for line in lines:
            try:
                step, row, values = json.loads(line)
            except (ValueError, TypeError):
                break
            if points and step != points[-1].step + 1:
                break
            points.append(Point(step, row, values))
        return head, points


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else float(value)


def _line(point: Point) -> str:
    return json.dumps(astuple(point))


def steps_on_disk(path: Path) -> set[int]:
    """Return the steps of the history that the `.wandb` file of an earlier session holds.

    A file without an end record is replaced by a copy that is cut after its last whole record: W&B's process may
    outlive ours for a moment, and its late points would otherwise appear twice.

    Raises:
        ValueError: If the format of the file is unknown.
    """
    remove_leftovers(path.parent, path.name)
    steps, end = steps_so_far(path)
    if end is not None:
        whole = path.read_bytes()[:end]
        with suppress(OSError):  # a full disk, or Windows while the file is open: then the file stays as it is
            replace_file(path, lambda temporary: temporary.write_bytes(whole))
    return steps


def steps_so_far(path: Path) -> tuple[set[int], int | None]:
    """Return the steps that a `.wandb` file holds, and the byte after its last whole record; None if it is complete."""
    data = path.read_bytes()
    steps: set[int] = set()
    last, end = "", min(len(data), len(_HEAD))
    for record, end in read_records(data):  # noqa: B007  (`end` of the last record is used below)
        last = record.WhichOneof("record_type")
        if last == "history":
            steps.add(record.history.step.num)
    return steps, None if last == "exit" else end


def read_records(data: bytes) -> Iterator[tuple[Any, int]]:
    """Yield each record of a `.wandb` file and the byte after it, up to the first damaged record.

    The file is a log of LevelDB (its "log format" document) in blocks of 32 KB. Each part of a record has a header with
    a checksum (4 bytes), a length (2) and a kind (1: whole, 2: first, 3: middle, 4: last); no header crosses a block.

    Raises:
        ValueError: If the format of the file is unknown.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    if not data.startswith(_HEAD[: len(data)]):
        raise ValueError("a .wandb file of an unknown format, perhaps of a newer wandb")
    at, parts = len(_HEAD), b""
    while at + 7 <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += 7 + length
        if at > len(data) or kind not in (1, 2, 3, 4):
            return
        parts += data[at - length : at]
        if kind in (1, 4):
            record, content, parts = wandb_internal_pb2.Record(), parts, b""
            try:
                record.ParseFromString(content)
            except DecodeError:
                return
            yield record, at
