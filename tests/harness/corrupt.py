"""Damages each file of a run directory in turn, goes on with the run, and looks at what comes of it.

    python tests/harness/corrupt.py                     every file, eight ranges of bytes each, some 20 minutes
    python tests/harness/corrupt.py --ranges 1 --every 9   a ninth of the cases with one range

Three directories: of a run that was killed inside its last task, of one that was killed while its references were
trained, and of a finished one. The outcome of a case must be one of

- recovered: the run ends with the bits of the run that was never stopped, checkpoints and tables;
- told: it ends so but for the file that was damaged, which a warning names;
- stopped: one sentence that names the file, and no traceback;
- unread: what is not read again, and has a seal: a checkpoint before the one from which the run goes on, the file of a
  reference that a finished run has in its own.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import kill
from alike import differences
from attempt import Attempt, warm

ARGUMENTS = [
    *(*kill.COMMON, *kill.MLP, "strategy=er", "stream.num_tasks=2", "references=[experts]", "estimators=[log_me]"),
    *("report.points=2", "probes=[ridge]", "checkpoint.every=2", "chunk_size=1"),
]
Damage = Callable[[Path, random.Random], None]


def _range(change: Callable[[bytes, random.Random], bytes], part: int, parts: int) -> Damage:
    """Return the damage of one of so many equal ranges of bytes."""

    def damage(path: Path, draw: random.Random) -> None:
        raw = path.read_bytes()
        a, b = len(raw) * part // parts, max(len(raw) * (part + 1) // parts, len(raw) * part // parts + 1)
        path.write_bytes(raw[:a] + change(raw[a:b], draw) + raw[b:])

    return damage


def _flip(raw: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(raw)) if raw else 0
    return raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :] if raw else raw


def _digit(raw: bytes, draw: random.Random) -> bytes:
    """Change a digit into another: still a valid file."""
    places = [i for i, byte in enumerate(raw) if byte in b"0123456789"]
    if not places:
        return _flip(raw, draw)
    at = draw.choice(places)
    return raw[:at] + bytes([(raw[at] - 48 + draw.randrange(1, 10)) % 10 + 48]) + raw[at + 1 :]


def _other(path: Path, draw: random.Random) -> None:
    """Put another valid file of its kind in its place."""
    others = [p for p in path.parents[1].rglob(f"*{path.suffix}") if p != path and p.is_file()]
    path.write_bytes(draw.choice(others).read_bytes() if others else b"{}")


def _directory(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _cut(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size + 1)])


def damages(parts: int) -> Iterator[tuple[str, Damage]]:
    """Return every damage by name."""
    for part in range(parts):
        yield f"a bit of range {part}", _range(_flip, part, parts)
        yield f"a digit of range {part}", _range(_digit, part, parts)
        yield f"zeros in range {part}", _range(lambda raw, draw: bytes(len(raw)), part, parts)
        yield f"garbage in range {part}", _range(lambda raw, draw: draw.randbytes(len(raw)), part, parts)
        yield f"without range {part}", _range(lambda raw, draw: b"", part, parts)
    for name, text in {"nothing": b"", "a mapping": b"{}\n", "a list": b"[]\n", "a word": b"word\n"}.items():
        yield name, lambda path, draw, text=text: path.write_bytes(text)  # type: ignore[misc]
    yield "cut", _cut
    yield "garbage", lambda path, draw: path.write_bytes(draw.randbytes(path.stat().st_size))
    yield "another file", _other
    yield "deleted", lambda path, draw: path.unlink()
    yield "a directory", _directory


def prepare(folder: Path) -> dict[str, Path]:
    """Return the directories to damage, by the moment at which their run was killed; "whole" is the unbroken one."""
    found = {"whole": folder / "whole"}
    found["whole"].mkdir(parents=True)
    attempt = Attempt(found["whole"], ARGUMENTS, at=0)
    assert attempt.wait() == 0, attempt.log.read_text()
    found["finished"] = found["whole"]
    for moment, mark in (("inside", "in_task_002_step_00000008"), ("references", "references/expert")):
        place = found[moment] = folder / moment
        place.mkdir()
        attempt = Attempt(place, ARGUMENTS, at=mark)
        assert attempt.wait() == -9, attempt.log.read_text()
    return found


def outcome(base: Path, whole: Path, name: str, damage: Damage, draw: random.Random) -> tuple[str, str]:
    """Damage one file of a copy, go on, and return what came of it, with a word on it."""
    place = whole.parent / "damaged"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(base, place)
    damage(place / name, draw)
    command = ["resume=out"] if draw.random() < 0.5 else ARGUMENTS
    attempt = Attempt(place, command)
    from cl.engine.checkpoint import is_whole

    status, text = attempt.wait(), attempt.log.read_text()
    short = Path(name).name
    if "Traceback" in text:
        return "traceback", text
    if status == 0:
        wrong = [line for line in differences(whole, place) if not _noise(line, name)]
        if not wrong:
            return "recovered", ""
        own = all(short in line for line in wrong)
        if own and short.endswith(".ckpt") and not is_whole(place / name):
            return "unread", ""
        if base == whole and name.startswith("references/"):
            return "unread", ""
        return ("told" if own and short in text else "wrong"), "; ".join(wrong) + "\n" + text
    sentences = [line for line in text.strip().splitlines() if line and "UserWarning" not in line]
    return ("stopped", sentences[-1]) if status == 1 and short in text else ("unnamed", text)


def _noise(line: str, name: str) -> bool:
    """Return whether a difference means nothing: a lock, a log or a file that only one of the commands writes."""
    return line.startswith("files of one alone") and not any(end in line for end in (".ckpt", ".csv", ".tmp", ".json"))


def sweep(parts: int, every: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Go through the cases; return the outcomes, and those that must not be."""
    draw, found, bad = random.Random(seed), Counter[str](), list[str]()
    number = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        places = prepare(Path(folder))
        whole = places.pop("whole")
        for moment, base in places.items():
            files = sorted(str(p.relative_to(base)) for p in base.rglob("*") if p.is_file())
            for name in files:
                if name in ("log.txt", "note.txt"):
                    continue
                for how, damage in damages(parts):
                    number += 1
                    if number % every:
                        continue
                    kind, word = outcome(base, whole, name, damage, draw)
                    found[kind] += 1
                    if kind in ("traceback", "wrong", "unnamed"):
                        bad.append(f"{moment}: {name}, {how}: {kind}: {word}")
                        print(bad[-1], flush=True)
                    elif word:
                        print(f"{moment}: {name}, {how}: {kind}: {word.splitlines()[0]}", flush=True)
    print(f"{found.total()} cases: {dict(found)}")
    return found, bad


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranges", type=int, default=8)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warm()
    sys.exit(bool(sweep(options.ranges, options.every, options.seed)[1]))


if __name__ == "__main__":
    main()
