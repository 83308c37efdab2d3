"""The file of a run of Weights & Biases, read by its format: a second reader beside ours."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any


def parse(data: bytes) -> Iterator[Any]:
    """Read a .wandb file: a LevelDB log of protocol buffers, a header of 7 bytes before it."""
    from wandb.proto import wandb_internal_pb2

    at, payload = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768  # in this block
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            return
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            payload = b""
            yield record


def items(entries: Any) -> dict[str, Any]:
    return {"/".join(entry.nested_key) or entry.key: json.loads(entry.value_json) for entry in entries}
