"""Vectors of classes by name, from a file: word vectors, text features of a CLIP model; or from groups of classes."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from zipfile import BadZipFile

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from cl.errors import InputError
from cl.files import expand_path
from cl.ranges import checked

_HINTS = 10_000  # the most names of a file that are searched for one similar to a missing one


Source = str | Path | Mapping[str, Sequence[float]]
Entries = Iterator[tuple[str, Callable[[], list[float]]]]  # names, each with a function that returns its vector


def class_vectors(path: Source, names: Sequence[str]) -> Tensor:
    """Return the vector of each class, float32 (C, D), as a file or a mapping of names to vectors gives it.

    Formats: `.json`, an object of lists of numbers by name; `.npz`, an array (D,) by name; any other ending, text with
    a name and D numbers a line, a tab after the name, or blanks as GloVe and word2vec write them (a first line with
    the two sizes is skipped). The file may hold other names, too. A name is looked up as it is, and else without
    regard to case, with "_" and "-" as blanks.

    Args:
        path: The file; or a mapping, such as `hierarchy` returns.
        names: The names of the classes, such as `stream.class_names`.

    Raises:
        InputError: If the file cannot be read, lacks a name or has it twice, or the vectors differ in length or hold a
            value that is no finite number.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "vectors.json"
        >>> _ = file.write_text('{"cat": [1, 0], "polar bear": [0, 1], "dog": [1, 1]}')
        >>> class_vectors(file, ["Polar_bear", "cat"])
        tensor([[0., 1.],
                [1., 0.]])
    """
    file = "The mapping" if isinstance(path, Mapping) else expand_path(path)
    if isinstance(file, Path) and not file.is_file():
        raise InputError(f"There is no file {file}: give a file with a vector for each class.")
    if not names:
        raise InputError(f"class_vectors({str(file)!r}, ...) was given no names of classes: the data set names none.")
    given = ((name, partial(_floats, vector)) for name, vector in path.items()) if isinstance(path, Mapping) else None
    found = _found(_entries(Path(file)) if given is None else given, str(file), names)
    vectors = [found[name] for name in names]
    for name, vector in zip(names, vectors, strict=True):
        if len(vector) != len(vectors[0]) or not len(vector):
            raise InputError(
                f"{file}: the vector of {name!r} has {len(vector)} numbers and that of {names[0]!r} {len(vectors[0])}: "
                "give all classes vectors of one length."
            )
        if not all(math.isfinite(value) for value in vector):
            raise InputError(f"{file}: the vector of {name!r} holds NaN or an infinite number: correct it.")
    return torch.tensor(np.array(vectors), dtype=torch.float32)


@checked
def hierarchy(
    groups: Mapping[str, Sequence[str]], weight: Annotated[float, Interval(ge=0, lt=1)] = 0.5
) -> dict[str, list[float]]:
    r"""Return a unit vector for each class by its place in a hierarchy of groups, which needs no text encoder.

    With an indicator for each class and one for each group, class c of group g has the vector

    .. math:: e_c = \sqrt{1 - w} \, i_c + \sqrt{w} \, i_g

    so that the cosine of two classes of one group is w, and that of two classes of different groups 0. With w = 0 the
    vectors are orthogonal, a control with the same number of dimensions.

    Args:
        groups: The names of the classes of each group.
        weight: w.

    Raises:
        InputError: If there are no classes, or one is in two groups.

    Example:
        >>> vectors = hierarchy({"pets": ["cat", "dog"], "cars": ["van"]}, weight=0.36)
        >>> [round(x, 1) for x in vectors["dog"]], [round(x, 1) for x in vectors["van"]]
        ([0.0, 0.8, 0.0, 0.6, 0.0], [0.0, 0.0, 0.8, 0.0, 0.6])
    """
    names = [name for group in groups.values() for name in group]
    twice = [name for name in names if names.count(name) > 1]
    if not names or twice:
        raise InputError(f"{twice[0]!r} is in two groups: remove one of them." if twice else "groups has no classes.")
    found = {}
    for g, group in enumerate(groups.values()):
        for name in group:
            found[name] = [0.0] * (len(names) + len(groups))
            found[name][len(found) - 1], found[name][len(names) + g] = math.sqrt(1 - weight), math.sqrt(weight)
    return found


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


def _found(entries: Entries, file: str, names: Sequence[str]) -> dict[str, list[float]]:
    """Return the vector of each class by its name as `names` writes it."""
    wanted, kept, others = {_plain(name) for name in names}, dict[str, list[float]](), list[str]()
    for name, vector in entries:
        if _plain(name) in wanted:
            if name in kept:
                raise InputError(f"{file} has {name!r} twice: remove one of the two.")
            try:
                kept[name] = vector()
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{file}: the vector of {name!r} is no list of numbers ({error}): correct it."
                ) from error
        elif len(others) < _HINTS:
            others.append(name)
    found, missing = {}, []
    for name in names:
        alike = [name] if name in kept else [spelling for spelling in kept if _plain(spelling) == _plain(name)]
        if len(alike) > 1:
            raise InputError(f"{file} has {alike[0]!r} and {alike[1]!r} for the class {name!r}: remove one of the two.")
        missing += [name] * (not alike)
        if alike:
            found[name] = kept[alike[0]]
    if missing:
        near = difflib.get_close_matches(missing[0], others, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(
            f"{file} has no vector for {len(missing)} of the {len(names)} classes, the first of them "
            f"{missing[0]!r}{hint}: add them."
        )
    return found


def _entries(file: Path) -> Entries:
    """Yield the names in a file, each with a function that returns its vector."""
    try:
        if file.suffix.lower() == ".json":
            for name, value in json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=list):
                yield name, partial(_floats, value)
        elif file.suffix.lower() == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                for name in arrays.files:
                    yield name, partial(_floats, arrays[name].astype(np.float64).reshape(-1).tolist())
        else:
            with file.open(encoding="utf-8") as lines:
                yield from _lines(lines)
    except (OSError, ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        raise InputError(f"{file} cannot be read as names and vectors ({error}): see cl.data.class_vectors.") from error


def _lines(lines: Iterable[str]) -> Entries:
    """Yield the entries of a text file, whose lines all have as many numbers as the first one."""
    width = 0
    for number, line in enumerate(lines, 1):
        name, tab, rest = line.rstrip("\r\n").partition("\t")
        cells = rest.split() if tab else line.split()
        if not cells or (number == 1 and not tab and len(cells) == 2 and all(cell.isdigit() for cell in cells)):
            continue
        width = width or (len(cells) if tab else _numbers_at_end(cells))
        values = cells[len(cells) - width :]
        if (
            not width
            or len(cells) < width + (not tab)
            or _numbers_at_end(values) < width
            or (tab and len(cells) > width)
        ):
            raise ValueError(f"line {number} has no name and {width or 'any'} numbers, as the lines before it")
        yield name if tab else " ".join(cells[:-width]), partial(_floats, values)


def _floats(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values]


def _numbers_at_end(cells: Sequence[str]) -> int:
    return next((k for k, cell in enumerate(reversed(cells)) if not _is_number(cell)), len(cells))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
