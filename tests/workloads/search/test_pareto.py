"""Fronts by their definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workloads.search.pareto import Row, front, spread, unique

ROWS = st.lists(
    st.fixed_dictionaries(
        {"candidate": st.sampled_from("abcdef"), "score": st.integers(0, 5).map(float)},
        optional={"flops": st.integers(0, 5)},
    )
)


@given(ROWS)
def test_the_front_is_what_nothing_beats_at_no_more_cost(rows: list[Row]) -> None:
    found = front(rows, "flops")
    costed = [row for row in rows if "flops" in row]
    assert [row["flops"] for row in found] == sorted({row["flops"] for row in found})
    for row in costed:
        beaten = any(f["score"] >= row["score"] and f["flops"] <= row["flops"] for f in found)
        assert beaten, "each is on the front, or something of the front is as good for as little"
    for row in found:
        assert not any(other["score"] >= row["score"] and other["flops"] < row["flops"] for other in costed)


@given(ROWS)
def test_each_structure_once_with_its_higher_score(rows: list[Row]) -> None:
    found = unique(rows)
    assert {row["candidate"] for row in found} == {row["candidate"] for row in rows}
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    for row in found:
        assert row["score"] == max(one["score"] for one in rows if one["candidate"] == row["candidate"])


@given(st.integers(0, 30), st.integers(2, 12))
def test_some_are_spread_over_all(n: int, most: int) -> None:
    rows = [{"n": i} for i in range(n)]
    found = spread(rows, most)
    assert len(found) == min(n, most) and sorted({row["n"] for row in found}) == [row["n"] for row in found]
    assert found[:1] == rows[:1] and found[-1:] == rows[-1:]
