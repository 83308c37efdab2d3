"""The points of a run's history, kept in a file of ours, and which of them the files of Weights & Biases hold.

What W&B has been given is not on the disk yet: its own process collects 32 KB before it writes, and loses them when it
is killed. So each point is written to a journal first, and the next sitting gives W&B what its files lack.
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

_HEAD = b":W&B\xe1\xbe\x00"  # of a `.wandb` file
_BLOCK = 32768


@dataclass(frozen=True)
class Point:
    """One point of the history.

    Attributes:
        step: How many points came before it.
        row: The number of the row of R that it reports, None where it belongs to a training curve.
        values: Its scalars by name.
    """

    step: int
    row: int | None
    values: dict[str, Any]


class Journal:
    """A run's points as lines of JSON, `points.jsonl`, the digest of its configuration before them.

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
        """Cut the file behind `count` points, all of them where it is None, and go on counting there; return them."""
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
        """Append a point; it is in the file, if not on the disk, when this returns."""
        point = Point(self.count, row, {name: _plain(value) for name, value in values.items()})
        append_text(self.path, _line(point) + "\n")
        self.count += 1
        return point

    def sync(self) -> None:
        """Wait until the points are on the disk."""
        sync(self.path)

    def _read(self) -> tuple[str, list[Point]]:
        """Return the first line and the points, up to the first that is torn or does not follow the one before it."""
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
    """Return the steps of the history that the `.wandb` file of an earlier sitting holds.

    A file whose run was not ended is cut behind its last whole record, as a new file in the place of the old one: W&B's
    own process may outlive ours for a moment, and what it writes now would come twice.

    Raises:
        ValueError: If the file is of a format that is not known here.
    """
    remove_leftovers(path.parent, path.name)
    steps, end = steps_so_far(path)
    if end is not None:
        whole = path.read_bytes()[:end]
        with suppress(OSError):  # no room, or on Windows, where the file is still open: it is read as far as it goes
            replace_file(path, lambda temporary: temporary.write_bytes(whole))
    return steps


def steps_so_far(path: Path) -> tuple[set[int], int | None]:
    """Return the steps that a `.wandb` file holds, and where its last whole record ends, None where it has its end."""
    data = path.read_bytes()
    steps: set[int] = set()
    last, end = "", min(len(data), len(_HEAD))
    for record, end in read_records(data):  # noqa: B007  (the end of the last one is wanted)
        last = record.WhichOneof("record_type")
        if last == "history":
            steps.add(record.history.step.num)
    return steps, None if last == "exit" else end


def read_records(data: bytes) -> Iterator[tuple[Any, int]]:
    """Yield the records of a `.wandb` file with where each ends, up to the first that is torn.

    It is a log of LevelDB (its "log format" document): blocks of 32 KB; each part of a record has a checksum (4 bytes),
    a length (2) and a kind (1: whole, 2: first, 3: middle, 4: last), and no head of a part crosses a block.
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
