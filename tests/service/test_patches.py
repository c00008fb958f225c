"""Merge patches and differences; the table is appendix A of RFC 7396."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.patches import differences, merged, patch_of

RFC_7396: list[tuple[Any, Any, Any]] = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize(("document", "patch", "expected"), RFC_7396)
def test_merge_patch(document: Any, patch: Any, expected: Any) -> None:
    before = copy.deepcopy((document, patch))
    assert merged(document, patch) == expected
    assert (document, patch) == before


@given(JSON, JSON)
def test_documents_differ_where_they_do(a: Any, b: Any) -> None:
    assert differences(a, a) == []
    assert bool(differences(a, b)) == (repr_of(a) != repr_of(b))
    swapped = [
        {"path": d["path"], **{o: d[k] for k, o in (("a", "b"), ("b", "a")) if k in d}} for d in differences(b, a)
    ]
    assert sorted(map(repr_of, swapped)) == sorted(map(repr_of, differences(a, b)))


def repr_of(value: Any) -> str:
    """JSON tells 1 from true, which Python calls equal."""
    import json

    return json.dumps(value, sort_keys=True)


def test_differences_have_paths() -> None:
    a = {"optimizer": {"lr": 0.1, "name": "sgd"}, "steps": 3, "evaluate": [{"k": 5}, {"k": 7}], "init": "x"}
    b = {"optimizer": {"lr": 0.2, "name": "sgd"}, "epochs": 2, "evaluate": [{"k": 5}, {"k": 9}], "init": None}
    assert differences(a, b) == [
        {"path": "optimizer.lr", "a": 0.1, "b": 0.2},
        {"path": "steps", "a": 3},
        {"path": "evaluate.1.k", "a": 7, "b": 9},
        {"path": "init", "a": "x", "b": None},
        {"path": "epochs", "b": 2},
    ]


def test_settings_of_a_command_line() -> None:
    given = ["optimizer.lr=1.5e-3", "steps=null", "optimizer.betas=[0.9, 0.99]", "name=a=b", "engine.compile=true"]
    assert patch_of(given) == {
        "optimizer": {"lr": 1.5e-3, "betas": [0.9, 0.99]},
        "steps": None,
        "name": "a=b",
        "engine": {"compile": True},
    }


@pytest.mark.parametrize("wrong", [["steps"], ["=3"], ["a..b=3"], ["a=1", "a.b=2"], ["a=[1"]])
def test_settings_that_mean_nothing(wrong: list[str]) -> None:
    with pytest.raises(ValueError, match="got '"):
        patch_of(wrong)
