"""Vectors of classes by name, from files in their true formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl.data.class_vectors import class_vectors, hierarchy
from cl.errors import InputError
from draws import quick

VECTORS = {"cat": [1.0, 0.5], "polar bear": [0.25, -1.0], "dog": [1e-3, 2.0], "7": [3.0, 4.0]}
NAMES = ["Polar_Bear", "cat", "7"]
EXPECTED = torch.tensor([VECTORS["polar bear"], VECTORS["cat"], VECTORS["7"]])


def written(place: Path, kind: str) -> Path:
    file = place / f"vectors.{kind}"
    if kind == "json":
        file.write_text(json.dumps(VECTORS))
    elif kind == "npz":
        np.savez(file, **{name: np.array(v) for name, v in VECTORS.items()})
    else:
        between = "\t" if kind == "tsv" else " "
        head = ["4 2"] if kind == "vec" else []  # word2vec's first line; GloVe has none
        lines = [between.join([name, " ".join(map(str, v))]) for name, v in VECTORS.items()]
        file.write_text("\n".join([*head, *lines]) + "\n")
    return file


@pytest.mark.parametrize("kind", ["json", "npz", "tsv", "txt", "vec"])
def test_every_format_gives_the_vectors_in_the_order_of_the_names(kind, tmp_path: Path):
    found = class_vectors(written(tmp_path, kind), NAMES)
    assert found.dtype == torch.float32 and torch.equal(found, EXPECTED)


def test_the_own_spelling_comes_before_a_similar_one(tmp_path: Path):
    file = tmp_path / "v.json"
    file.write_text('{"Polar bear": [9, 9], "polar_bear": [1, 2]}')
    assert class_vectors(file, ["polar_bear"]).tolist() == [[1, 2]]
    with pytest.raises(InputError, match="has 'Polar bear' and 'polar_bear' for the class 'polar-bear'"):
        class_vectors(file, ["polar-bear"])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("v.json", '{"cat": [1, 2]}', "no vector for 2 of the 3 classes, the first of them 'Polar_Bear'"),
        ("v.json", '{"Polar_Bears": [1, 2], "cat": [1, 2], "7": [0, 0]}', r"did you mean 'Polar_Bears'\?"),
        ("v.json", '{"polar bear": [1], "cat": [1, 2], "7": [0, 0]}', "'cat' has 2 numbers and that of 'Polar_Bear' 1"),
        ("v.json", '{"polar bear": [], "cat": [], "7": []}', "has 0 numbers"),
        ("v.json", '{"polar bear": [1, NaN], "cat": [1, 2], "7": [0, 0]}', "holds NaN or an infinite number"),
        ("v.json", '{"cat": [1, 2], "cat": [3, 4]}', "has 'cat' twice"),
        ("v.json", '{"cat": [1, "high"]}', "the vector of 'cat' is no list of numbers"),
        ("v.json", "[1, 2]", "cannot be read"),
        ("v.json", "{", "cannot be read"),
        ("v.npz", "no zip", "cannot be read"),
        ("v.txt", "cat 1 2\ncat 3 4\n", "has 'cat' twice"),
        ("v.txt", "cat 1 2\ndog 3\n", "line 2 has no name and 2 numbers"),
        ("v.txt", "cat dog\n", "line 1 has no name and any numbers"),
        ("v.tsv", "cat\t1 2\ndog\t1 2 3\n", "line 2 has no name and 2 numbers"),
        ("v.tsv", "cat\t1 2\ndog\t1 x\n", "line 2 has no name and 2 numbers"),
    ],
)
def test_what_cannot_be_right_is_one_sentence(name, content, sentence, tmp_path: Path):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(InputError, match=sentence):
        class_vectors(file, NAMES)


def test_a_missing_file_and_missing_names_are_said(tmp_path: Path):
    with pytest.raises(InputError, match="There is no file"):
        class_vectors(tmp_path / "none.json", NAMES)
    with pytest.raises(InputError, match="no names of classes"):
        class_vectors(written(tmp_path, "json"), [])


def test_a_label_of_digits_is_no_part_of_the_vector(tmp_path: Path):
    """In text, all lines have as many numbers at their end as the first: what is left over belongs to the name."""
    file = tmp_path / "v.txt"
    file.write_text("cat 1 2\nclass 7 3 4\n")
    assert class_vectors(file, ["class 7", "cat"]).tolist() == [[3, 4], [1, 2]]


def test_a_mapping_is_looked_up_as_a_file_is():
    assert torch.equal(class_vectors(VECTORS, NAMES), EXPECTED)
    with pytest.raises(InputError, match=r"The mapping has no vector for 1 .* 'cats' \(did you mean 'cat'\?\)"):
        class_vectors(VECTORS, ["cats"])
    with pytest.raises(InputError, match="The mapping: the vector of 'b' has 1 numbers and that of 'a' 2"):
        class_vectors({"a": [1, 2], "b": [1]}, ["a", "b"])


@quick
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.floats(0, 0.99))
def test_siblings_have_the_cosine_of_the_weight_and_strangers_none(sizes, weight):
    groups = {f"g{g}": [f"c{g}.{i}" for i in range(size)] for g, size in enumerate(sizes)}
    names = [name for group in groups.values() for name in group]
    rows = class_vectors(hierarchy(groups, weight), names).double()
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    expected = torch.where(group[:, None] == group, weight, 0.0).double().fill_diagonal_(1)
    torch.testing.assert_close(rows @ rows.T, expected, atol=1e-6, rtol=0)


def test_siblings_and_strangers_by_hand():
    vectors = hierarchy({"fish": ["ray", "shark"], "trees": ["oak"]}, weight=0.25)
    root, half = 0.75**0.5, 0.5
    assert vectors["ray"] == pytest.approx([root, 0, 0, half, 0])
    assert vectors["shark"] == pytest.approx([0, root, 0, half, 0])
    assert vectors["oak"] == pytest.approx([0, 0, root, 0, half])


@pytest.mark.parametrize(
    ("groups", "weight", "sentence"),
    [
        ({"a": ["x"], "b": ["x"]}, 0.5, "'x' is in two groups"),
        ({}, 0.5, "groups has no classes"),
        ({"a": ["x"]}, 1.0, r"hierarchy\.weight=1\.0 must be"),
    ],
)
def test_groups_that_cannot_be_right_are_one_sentence(groups, weight, sentence):
    with pytest.raises(InputError, match=sentence):
        hierarchy(groups, weight)
