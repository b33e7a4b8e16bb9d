"""The log's blocks against a plain list of rows: contents, hash, order of closing, memory."""

from __future__ import annotations

import hashlib
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import record
from fedsim.record import EVENT_COLUMNS, Log

COLUMNS = {"a": "int64", "group": "int64", "b": "float64", "c": "string"}
Row = tuple[Any, ...]
rows_of = st.lists(
    st.tuples(
        st.none() | st.integers(-(2**63), 2**63 - 1),
        st.integers(0, 9),
        st.none() | st.floats(allow_nan=False),
        st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    ),
    max_size=23,
)


def plain_sha256(rows: list[Row]) -> str:
    """The hash as the records define it, value by value."""
    total = hashlib.sha256()
    for position, (name, kind) in enumerate(COLUMNS.items()):
        if name == "group":
            continue
        values = [row[position] for row in rows]
        total.update(f"{name}:{kind}:{len(rows)}\n".encode())
        if kind == "string":
            total.update("\n".join(map(str, values)).encode())
            continue
        total.update(bytes(value is None for value in values))
        total.update(np.array([0 if value is None else value for value in values], dtype=f"<{kind[0]}8").tobytes())
    return total.hexdigest()


def contents(table: pa.Table) -> list[Row]:
    return [tuple(row.values()) for row in table.to_pylist()]


@pytest.fixture(params=[1, 2, 5, 4096])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(record, "BLOCK", request.param)
    return int(request.param)


@given(rows=rows_of, data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("size", [1, 3, 4096])
def test_rows_closed_in_any_order_are_kept_in_theirs(size: int, rows: list[Row], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "BLOCK", size)
        log, held = Log(COLUMNS), dict[int, Row]()
        for index in data.draw(st.permutations(range(len(rows)))):
            log.put(index, rows[index])
            held[index] = rows[index]
            count = max(held) + 1
            prefix = next((each for each in range(count) if each not in held), count)
            assert (len(log), log.closed()) == (count, prefix)
            first = data.draw(st.integers(0, count))
            assert log.rows(first) == [held.get(each) for each in range(first, count)]
            assert contents(log.table(first, prefix)) == rows[first:prefix]
        assert log.sha256() == plain_sha256(rows)
        again = Log(COLUMNS)
        cut = data.draw(st.integers(0, len(rows)))
        again.load([log.table(0, cut // 2), log.table(cut // 2, cut)], log.rows(cut))
        assert (again.rows(), again.closed(), again.sha256()) == (rows, len(rows), log.sha256())


def test_open_rows_are_in_no_table_and_in_no_hash(block: int) -> None:
    log = Log({"a": "int64"})
    for index in (0, 2, 5, 6):
        log.put(index, (index,))
    assert log.frame().a.tolist() == [0, 2, 5, 6]
    assert log.rows() == [(0,), None, (2,), None, None, (5,), (6,)]
    closed = Log({"a": "int64"})
    for index in (0, 2, 5, 6):
        closed.append((index,))
    assert closed.sha256() == log.sha256()


def test_the_last_row_can_be_taken_back_at_the_edge_of_a_block(block: int) -> None:
    log = Log({"a": "int64"})
    for number in range(11):
        log.append((number,))
        log.pop()
        log.append((-number,))
    assert log.frame().a.tolist() == [-number for number in range(11)]
    assert log.closed() == 11


def test_a_column_that_comes_late_is_missing_before(block: int) -> None:
    log = Log({"a": "int64"})
    for number in range(6):
        log.append((number,))
    log.columns["b"] = "float64"
    log.append((6, 0.5))
    frame = log.frame()
    assert frame.a.tolist() == list(range(7))
    assert frame.b.isna().tolist() == [True] * 6 + [False]


def test_a_closed_row_takes_few_bytes_however_long_another_one_stays_open() -> None:
    count = 20 * record.BLOCK
    warm, log = Log(EVENT_COLUMNS), Log(EVENT_COLUMNS)
    warm.append((0, 0, "train", "", *[0.0] * 5, 0, None, None, 6, 60, 0, 0, 1, "applied"))
    warm.frame()  # arrow and pandas are loaded
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    for task in range(1, count):  # task 0 never ends
        times = [task + part for part in (0.1, 0.2, 0.3, 0.4, 0.5)]
        log.put(task, (task, task % 1000, "train", "", *times, task, task, 0, 6, 60, 10**6, 10**6, 1, "applied"))
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    print(f"{held / count:.0f} bytes per logged task")
    assert 100 < held / count < 250
