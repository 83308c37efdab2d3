"""Memories and generators: distributions (each test errs with probability 1e-4 or less), references, state."""

from __future__ import annotations

import io
from collections import deque
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cl.data.task import Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.errors import InputError
from cl.random import Random, derive
from cl.toolkit.memory import POLICIES, STORAGES, Memory

ALPHA = 1e-4  # seeds are fixed: a test that passes once passes always
quick = settings(deadline=None, max_examples=40)


def stream(num_classes: int = 4, num_tasks: int = 2, scenario: str = "class", x: torch.Tensor | None = None) -> Stream:
    x = torch.zeros(1, 1) if x is None else x
    tasks = [
        Task(t, TaskData(x, torch.zeros(1).long(), t), TaskData(x, torch.zeros(1).long(), t)) for t in range(num_tasks)
    ]
    return Stream(tasks, scenario=scenario, num_classes=num_classes)


def rows(labels, tasks=None, first: int = 0) -> Batch:
    """Rows whose input is their number, counted from `first`."""
    y = torch.as_tensor(labels, dtype=torch.int64)
    task = torch.zeros_like(y) if tasks is None else torch.as_tensor(tasks, dtype=torch.int64)
    x = torch.arange(first, first + len(y), dtype=torch.float32)[:, None]
    return Batch(x, y, task, {"ten": 10 * x})


def memory(
    capacity: int, policy: str = "reservoir", seed: int = 0, extras: bool = False, storage: str = "device", **options
) -> Memory:
    made = Memory(capacity, stream(**options), policy, {"ten": (1,)} if extras else None, storage)
    made.random.seed(seed)
    return made


def ids(batch: Batch) -> list[int]:
    return batch.x[:, 0].int().tolist()


def held(store: Memory) -> list[int]:
    return sorted(ids(store.sample(store.capacity)))


def uniform(counts: np.ndarray, num_runs: int, size: int) -> float:
    """p-value of `size` of N rows having been chosen in each run, without replacement, all alike.

    The counts have the covariance num_runs p (1-p) N/(N-1) (I - 11'/N), so their squares are chi-square with N-1.
    """
    n, p = len(counts), size / len(counts)
    assert counts.sum() == num_runs * size
    square = ((counts - num_runs * p) ** 2).sum() / (num_runs * p * (1 - p) * n / (n - 1))
    return float(stats.chi2.sf(square, n - 1))


# ------------------------------------------------------------------ reservoir


@pytest.mark.parametrize(("capacity", "num_rows"), [(1, 30), (7, 30), (29, 30)])
def test_a_reservoir_keeps_every_row_with_the_same_probability(capacity, num_rows):
    num_runs, counts = 1500, np.zeros(num_rows)
    for seed in range(num_runs):
        store = memory(capacity, seed=seed)
        for first in range(0, num_rows, 11):
            store.insert(rows([0] * min(11, num_rows - first), first=first))
        counts[held(store)] += 1
    assert uniform(counts, num_runs, capacity) > ALPHA


def test_a_reservoir_of_10000_rows_holds_them_evenly_along_the_stream():
    kept = []
    for seed in range(200):
        store = memory(20, seed=seed)
        for first in range(0, 10_000, 1000):
            store.insert(rows([0] * 1000, first=first))
        kept += held(store)
    assert stats.kstest((np.array(kept) + 0.5) / 10_000, "uniform").pvalue > ALPHA


def test_worked_example_36_capacity_200_of_1000_keeps_a_fifth():
    num_runs, counts = 300, np.zeros(1000)
    for seed in range(num_runs):
        store = memory(200, seed=seed)
        store.insert(rows([0] * 1000))
        counts[held(store)] += 1
    assert counts.mean() / num_runs == pytest.approx(0.2)
    assert uniform(counts, num_runs, 200) > ALPHA


def test_a_reservoir_keeps_everything_until_it_is_full():
    store = memory(5)
    store.insert(rows([0] * 4))
    assert len(store) == 4 and held(store) == [0, 1, 2, 3]


# ------------------------------------------------------------------ all policies


@st.composite
def streams_of_rows(draw):
    labels = draw(st.lists(st.integers(0, 3), min_size=1, max_size=60))
    tasks = draw(st.lists(st.integers(0, 1), min_size=len(labels), max_size=len(labels)))
    cuts = sorted(draw(st.sets(st.integers(0, len(labels)), max_size=5)) | {0, len(labels)})
    return labels, tasks, cuts


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scenario", ["class", "domain"])
@quick
@given(data=streams_of_rows(), capacity=st.integers(8, 20), seed=st.integers(0, 99))
def test_inserting_a_batch_is_inserting_its_rows_one_by_one(policy, scenario, data, capacity, seed):
    labels, tasks, cuts = data
    batched, single = (memory(capacity, policy, seed, extras=True, scenario=scenario) for _ in range(2))
    for a, b in pairwise(cuts):
        batched.insert(rows(labels[a:b], tasks[a:b], first=a))
    for i in range(len(labels)):
        single.insert(rows(labels[i : i + 1], tasks[i : i + 1], first=i))
    for (name, a), b in zip(batched.state_dict().items(), single.state_dict().values(), strict=True):
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b)
        assert same, name
    everything = batched.sample(capacity)
    assert len(batched) == len(everything) == min(len(everything), capacity)
    for i, y, task, ten in zip(
        *(c.tolist() for c in (everything.x, everything.y, everything.task, everything.extras["ten"])), strict=True
    ):
        assert (y, task, ten) == (labels[int(i[0])], tasks[int(i[0])], [10 * i[0]]), "a row keeps what belongs to it"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [1, 5, 11, 12, 40])
def test_a_draw_is_without_replacement_and_from_what_is_stored(policy, size):
    store = memory(20, policy)
    store.insert(rows([0, 1, 3] * 4))
    assert len(store) == 12
    for _ in range(20):
        drawn = ids(store.sample(size))
        assert len(set(drawn)) == len(drawn) == min(size, 12) and set(drawn) <= set(range(12))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_rows", [14, 50])  # partly and wholly full
def test_every_stored_row_is_drawn_equally_often(policy, num_rows):
    store = memory(20, policy)
    store.insert(rows([3, 0, 1, 0, 1] * (num_rows // 5) + [0] * (num_rows % 5)))
    stored, counts = held(store), np.zeros(len(store))
    for _ in range(4000):
        counts[np.searchsorted(stored, ids(store.sample(3)))] += 1
    assert uniform(counts, 4000, 3) > ALPHA


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("before", [0, 5, 1500])
def test_a_filled_memory_holds_just_that_and_goes_on_as_a_reservoir_that_was_offered_it(before, storage):
    filled, offered = (memory(12, extras=True, storage=storage) for _ in range(2))
    filled.insert(rows([0] * before))
    filled.random.seed(0)
    batch = rows([1] * 9, first=5000)
    filled.fill(batch)
    offered.insert(batch)
    for store in (filled, offered):
        assert ids(store.rows()) == list(range(5000, 5009)) and len(store) == store.num_seen == 9
    offered.random.seed(0)
    offered._ahead, offered._at = offered._ahead[:0], 0
    for store in (filled, offered):
        store.insert(rows([2] * 1100, first=6000))
    assert ids(filled.rows()) == ids(offered.rows()) and filled.rows().y.tolist() == offered.rows().y.tolist()
    assert torch.equal(filled.rows().extras["ten"], 10 * filled.rows().x)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_rows", [0, 14, 50])
def test_all_rows_are_what_is_stored_and_draw_nothing(policy, num_rows):
    store = memory(20, policy, extras=True)
    store.insert(rows([3, 0, 1, 0, 1] * (num_rows // 5) + [0] * (num_rows % 5)))
    before = store.random.generator.bit_generator.state
    everything = store.rows()
    assert store.random.generator.bit_generator.state == before
    assert sorted(ids(everything)) == held(store) and torch.equal(everything.extras["ten"], 10 * everything.x)
    everything.x.zero_()
    assert sorted(ids(store.rows())) == held(store), "a copy"


def test_a_reservoir_does_not_depend_on_how_its_rows_are_cut_into_batches():
    """Over more rows than slots are drawn ahead, whose last are left over at another place for each size."""
    kept = []
    for size in (1, 7, 1000, 3000):
        store = memory(300)
        for first in range(0, 3000, size):
            store.insert(rows([0] * min(size, 3000 - first), first=first))
        kept.append(held(store))
    assert kept[0] == kept[1] == kept[2] == kept[3]
    assert abs(np.mean(kept[0]) - 1500) < 4 * 3000 / np.sqrt(12 * 300), "uniform over all rows"


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_memory_and_an_empty_batch(policy):
    store = memory(20, policy)
    assert len(store) == len(store.sample(5)) == 0
    store.insert(rows([]))
    assert len(store) == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_inputs_are_kept_as_they_came(policy, dtype):
    x = torch.randint(0, 256, (6, 1, 2, 2), generator=torch.Generator().manual_seed(0)).to(dtype)
    store = Memory(20, stream(x=x), policy)
    incoming = Batch(x.clone(), torch.arange(6) % 4, torch.zeros(6).long())
    store.insert(incoming)
    incoming.x.zero_()
    drawn = store.sample(20)
    assert drawn.x.dtype == dtype
    assert sorted(row.numpy().tobytes() for row in drawn.x) == sorted(row.numpy().tobytes() for row in x)


def test_extras_are_kept_as_float32_and_ride_along():
    store = memory(8, extras=True)
    batch = rows([0, 1, 2])
    batch.extras["ten"] = batch.extras["ten"].half()
    store.insert(batch)
    drawn = store.sample(3)
    assert drawn.extras["ten"].dtype == torch.float32 and torch.equal(drawn.extras["ten"], 10 * drawn.x)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_loaded_memory_goes_on_with_the_same_bits(policy, storage):
    def go_on(store: Memory) -> list[list[int]]:
        drawn = []
        for first in range(100, 160, 6):
            store.insert(rows([0, 1, 2, 3, 3, 3], first=first))
            drawn.append(ids(store.sample(4)))
        return drawn

    store = memory(9, policy, extras=True, storage=storage)
    for first in range(0, 30, 6):
        store.insert(rows([0, 0, 0, 1, 2, 0], first=first))
        store.sample(3)
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    file.seek(0)
    loaded = memory(9, policy, seed=123, extras=True, storage=storage)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert len(loaded) == len(store)
    assert go_on(loaded) == go_on(store)


@pytest.mark.parametrize("policy", POLICIES)
def test_where_exemplars_lie_changes_nothing(policy, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stores = [memory(9, policy, extras=True, storage=storage) for storage in STORAGES]
    assert not list(tmp_path.iterdir()), "the mapped file has no name"
    for first in range(0, 60, 6):
        drawn = []
        for store in stores:
            store.insert(rows([0, 1, 2, 3, 3, 3], first=first))
            batch = store.sample(4)
            drawn.append((ids(batch), batch.y.tolist(), batch.extras["ten"].flatten().tolist()))
        assert drawn[0] == drawn[1] == drawn[2]
    moved = [store.to(torch.float64) for store in stores]  # a module that moves takes only its buffers along
    assert [store.column("ten").dtype for store in moved] == [torch.float64, torch.float32, torch.float32]


def test_an_unknown_storage_is_named():
    with pytest.raises(InputError, match="no memory storage called 'dsk': did you mean 'disk'"):
        memory(9, storage="dsk")


@pytest.mark.parametrize("policy", ["ring", "class_balanced"])
def test_labels_on_the_host_decide_where_they_are_given(policy):
    """So that a policy by class need not wait for the device: here the two disagree, to tell which was read."""
    store = memory(4, policy)
    batch = rows([0] * 4)
    batch.host = (np.arange(4), np.zeros(4, dtype=np.int64))
    store.insert(batch)
    store.insert(rows([1] * 4, first=4))
    # Four classes with one row each: of class 1 the ring keeps the last, the balance the one it has.
    assert held(store) == ([0, 2, 3, 7] if policy == "ring" else [0, 1, 2, 3])


def test_every_row_of_the_largest_classes_gives_way_equally_often():
    """Two largest classes of five rows, one of two: the newcomer evicts each of the ten rows alike, none of the two."""
    counts = np.zeros(13)
    for seed in range(2000):
        store = memory(12, "class_balanced", seed)
        store.insert(rows([0] * 5 + [1] * 5 + [2] * 2))
        store.insert(rows([3], first=12))
        counts[sorted(set(range(12)) - set(held(store)))] += 1
    assert counts[10:].sum() == 0
    assert stats.chisquare(counts[:10]).pvalue > ALPHA


def test_a_copied_state_does_not_move_with_its_memory():
    store = memory(9, "class_balanced")
    store.insert(rows([0] * 9))
    state, loaded = store.get_extra_state(), memory(9, "class_balanced")
    loaded.set_extra_state(state)
    for one in (store, loaded):
        one.insert(rows([1] * 4))
        assert state["group"].tolist() == [0] * 9


# ------------------------------------------------------------------ greedy class balance


@quick
@given(labels=st.lists(st.integers(0, 3), max_size=80), capacity=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_greedy_rule_row_by_row(labels, capacity, seed):
    store = memory(capacity, "class_balanced", seed)
    for i, label in enumerate(labels):
        before = np.bincount(store.sample(capacity).y, minlength=4)
        store.insert(rows([label], first=i))
        after = np.bincount(store.sample(capacity).y, minlength=4)
        change = after - before
        if before.sum() < capacity:
            expected = {label: 1}
        elif before[label] < before.max():
            victim = int(np.flatnonzero(change < 0)[0])
            assert before[victim] == before.max(), "a largest class gives way"
            expected = {label: 1, victim: -1}
        else:
            expected = {}
        assert {c: int(v) for c, v in enumerate(change) if v} == expected


@quick
@given(
    labels=st.lists(st.integers(0, 3), max_size=60),
    order=st.permutations(range(4)),
    capacity=st.integers(4, 19),
    scenario=st.sampled_from(["class", "domain"]),
)
def test_shares_differ_by_one_at_most_once_every_class_was_plentiful(labels, order, capacity, scenario):
    store = memory(capacity, "class_balanced", scenario=scenario, num_tasks=2)
    store.insert(rows(labels))
    for task in range(2 if scenario == "domain" else 1):
        for label in order:
            store.insert(rows([label] * capacity, [task] * capacity))
    batch = store.sample(capacity)
    groups = batch.y + 4 * batch.task
    counts = np.bincount(groups, minlength=8 if scenario == "domain" else 4)
    assert counts.max() - counts.min() <= 1 and counts.sum() == capacity


def test_the_victim_is_any_row_of_a_largest_class_alike():
    counts = np.zeros(6)
    for seed in range(1200):
        store = memory(7, "class_balanced", seed)
        store.insert(rows([0, 0, 0, 1, 1, 1, 3]))  # classes 0 and 1 tie; 3 has too little to give
        store.insert(rows([2], first=99))
        assert {6, 99} <= set(held(store))
        counts[[i for i in range(6) if i not in held(store)]] += 1
    assert uniform(counts, 1200, 1) > ALPHA


# ------------------------------------------------------------------ ring


@pytest.mark.parametrize("scenario", ["class", "domain"])
@quick
@given(data=streams_of_rows(), capacity=st.integers(8, 21))
def test_a_ring_is_one_fifo_a_group(scenario, data, capacity):
    labels, tasks, cuts = data
    num_groups = 8 if scenario == "domain" else 4
    queues = [deque(maxlen=capacity // num_groups + (g < capacity % num_groups)) for g in range(num_groups)]
    assert sum(queue.maxlen for queue in queues) == capacity
    for i, (label, task) in enumerate(zip(labels, tasks, strict=True)):
        queues[label + (4 * task if scenario == "domain" else 0)].append(i)
    store = memory(capacity, "ring", scenario=scenario)
    for a, b in pairwise(cuts):
        store.insert(rows(labels[a:b], tasks[a:b], first=a))
    assert held(store) == sorted(i for queue in queues for i in queue)
    assert len(store) == sum(map(len, queues))


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, stream(), "fifo"), r"no memory policy called 'fifo'.*Known: class_balanced, reservoir, ring\."),
        ((10, stream(), "rign"), "did you mean 'ring'"),
        ((0, stream()), r"A memory of 0 exemplars holds nothing: set memory_size to 1 or more\."),
        ((-3, stream()), "A memory of -3 exemplars"),
        ((3, stream(), "ring"), r"memory_size=3 is smaller than the 4 groups .* set memory_size to 4 or more\."),
        ((7, stream(scenario="domain"), "ring"), "smaller than the 8 groups"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        Memory(*arguments)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ generators


@quick
@given(st.integers(0, 2**40), st.lists(st.one_of(st.integers(0, 1000), st.text(max_size=8)), max_size=4))
def test_a_derived_seed_is_a_function_of_the_whole_position(seed, position):
    assert derive(seed, *position) == derive(seed, *position) >= 0
    assert derive(seed, *position) != derive(seed + 1, *position)
    for more in (0, 1, "", "more"):
        assert derive(seed, *position, more) != derive(seed, *position)


@pytest.mark.parametrize("halves", [0, 1])
def test_a_generator_goes_on_where_its_state_was_taken(halves):
    a, b = Random(), Random()
    a.seed(7)
    a.generator.random(5)
    for _ in range(halves):  # half a word stays behind in the generator
        a.generator.integers(0, 1000, dtype=np.uint32)
    assert a.generator.bit_generator.state["has_uint32"] == halves
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    assert b.generator.bit_generator.state == a.generator.bit_generator.state
    for draw in (lambda g: g.integers(0, 1000, 3, dtype=np.uint32), lambda g: g.random(4), lambda g: g.permutation(9)):
        assert draw(a.generator).tolist() == draw(b.generator).tolist()


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_are_put_into_the_slots_that_a_strategy_names(storage):
    store = memory(4, extras=True, storage=storage)
    store.put(rows([0] * 5), np.array([0, -1, 1, 2, 1]))
    assert ids(store.rows()) == [0, 4, 3] and len(store) == 3, "of two rows for one slot the later is stored"
    store.put(rows([1] * 2, first=7), np.array([3, 0]))
    assert ids(store.rows()) == [8, 4, 3, 7] and store.rows().y.tolist() == [1, 0, 0, 1]
    again = rows([1], first=9)
    again.again = True
    store.put(again, np.array([0]))
    store.put(rows([1], first=9), np.array([-1]))
    assert ids(store.rows()) == [8, 4, 3, 7] and torch.equal(store.rows().extras["ten"], 10 * store.rows().x)
    drawn = store.draw(3)
    assert ids(store.at(drawn)) == [[8, 4, 3, 7][i] for i in drawn] and len(set(drawn.tolist())) == 3
