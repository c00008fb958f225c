"""Structure strings: read and written alike, counted as the released code of Zen-NAS counts, refused with a place."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.models import structure
from workloads.models.structure import (
    BODY,
    CONV,
    Conv,
    Part,
    StructureError,
    flops,
    layers,
    parameters,
    parse,
    parse_network,
    round8,
    text,
)
from workloads.models.zennet import published

TINY = "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,2,8,1)SuperResK1K3K1(16,24,2,8,1)SuperConvK1BNRELU(24,32,1,1)"


@st.composite
def structures(draw: st.DrawFn) -> tuple[Part, ...]:
    number = st.integers(1, 3000)
    widths = draw(st.lists(number, min_size=2, max_size=6))
    parts = []
    for width_in, width in pairwise(widths):
        kind = draw(st.sampled_from([*CONV, *BODY]))
        inner = None if kind in CONV else draw(number)
        parts.append(Part(kind, width_in, width, draw(st.integers(1, 2)), draw(st.integers(1, 9)), inner))
    return tuple(parts)


@given(structures())
def test_what_is_written_is_read(structure: tuple[Part, ...]) -> None:
    assert parse(text(structure)) == structure
    assert layers(structure) == sum(part.layers for part in structure)
    for part in structure:
        convs = [conv for branch in part.branches() for conv in branch.convs]
        assert convs[0].width_in == part.width_in and convs[-1].width == part.width
        assert sorted(conv.stride for conv in convs)[-1] == part.stride
        assert all(a.width == b.width_in for a, b in pairwise(convs))


@pytest.mark.parametrize("name", published())
def test_networks_of_the_paper_are_read_and_written(name: str) -> None:
    assert text(parse(published()[name]["structure"])) == published()[name]["structure"]


def test_counts_of_a_tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, parts = parse(TINY), Part.parts
    assert (parameters(tiny, 10), flops(tiny, 10, 16), layers(tiny)) == (5585, 224032, 4)
    monkeypatch.setattr(structure, "_count", structure._count.__wrapped__)  # nothing is remembered

    def unprojected(part: Part) -> list[Any]:
        return [([replace(one, projects=False) for one in layer], count) for layer, count in parts(part)]

    monkeypatch.setattr(Part, "parts", unprojected)
    assert (parameters(tiny, 10), flops(tiny, 10, 16)) == (5033, 220096)


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("imagenet-0.1ms", 1000, (30050273, 1.746e9)),
        ("imagenet-0.5ms", 1000, (118113153, 8.281e9)),
        ("imagenet-400M", 1000, (5673833, 399976216)),
        ("cifar-1M", 100, (1031185, 155216928)),
    ],
)
def test_counts_of_networks_of_the_paper(name: str, classes: int, expected: tuple[int, float]) -> None:
    network = published()[name]
    found = parse(network["structure"])
    assert parameters(found, classes) == expected[0]
    tolerance = 5e-4 if expected[1] > 1e9 else 0  # printed with four digits
    assert flops(found, classes, network["image_size"]) == pytest.approx(expected[1], rel=tolerance)


def test_layers_of_each_type() -> None:
    def convs(part: str) -> list[Conv]:
        return [conv for branch in parse(part)[0].branches() for conv in branch.convs]

    assert convs("SuperResK5K5(8,16,2,4,1)") == [Conv(8, 4, 5, 2), Conv(4, 16, 5)]
    assert convs("SuperResK1K7K1(8,16,2,4,1)") == [
        *(Conv(8, 4, 1), Conv(4, 4, 7, 2), Conv(4, 16, 1)),
        *(Conv(16, 4, 1), Conv(4, 4, 7), Conv(4, 16, 1)),
    ]
    assert convs("SuperResIDWE6K3(8,20,2,10,1)") == [
        *(Conv(8, 64, 1), Conv(64, 64, 3, 2, groups=64), Conv(64, 10, 1)),
        *(Conv(10, 120, 1), Conv(120, 120, 3, groups=120), Conv(120, 20, 1)),
    ]
    assert [round8(x) for x in (1, 11, 12.1, 60)] == [8, 8, 16, 64]


def test_shortcuts_project_first_and_where_channels_differ() -> None:
    def projects(part: str) -> list[bool]:
        return [branch.projects for branch in parse(part)[0].branches()]

    assert projects("SuperResK3K3(16,16,1,8,3)") == [True, False, False]
    assert projects("SuperResK1K3K1(16,16,1,8,2)") == [True, False, False, False]
    assert projects("SuperResIDWE1K3(16,16,1,8,2)") == [True, True, True, True]
    assert projects("SuperResIDWE1K3(16,16,1,16,2)") == [True, False, False, False]
    assert not any(branch.residual for branch in parse("SuperConvK3BNRELU(3,8,1,2)")[0].branches())


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("", "got an empty structure"),
        ("SuperConvK3BNRELU(3,8,1,1)SuperResK3K5(8,16,1,8,1)", "'SuperResK3K5' at character 26, expected one such as"),
        (TINY + "!", f"got '!' at character {len(TINY)}, expected Type"),
        (TINY + "\n", f"at character {len(TINY)}, expected Type"),
        ("x" * 10**5 + "(1)", "got type 'x{30}' at character 0"),
        ("SuperConvK3BNRELU(3,1٨,1,1)", "1 or more each"),
        ("SuperConvK3BNRELU(3,100000,1,1)", "at character 0, .* at most 999 layers and 99,999 channels"),
        ("SuperConvK3BNRELU(3,8,1,1000)", "at most 999 layers"),
        (f"SuperConvK3BNRELU(3,{'9' * 5000},1,1)", "at character 0, expected SuperConv"),
        ("SuperConvK3BNRELU(3,8,1,1", r"at character 0, expected Type\(numbers\); write parts such as SuperConv"),
        ("SuperConvK3BNRELU(3,8,1)", r"expected SuperConvK3BNRELU\(in,out,stride,layers\), 1 or more each"),
        ("SuperResK3K3(8,16,1,0,1)", r"expected SuperResK3K3\(in,out,stride,bottleneck,layers\)"),
        ("SuperConvK3BNRELU(3,8,3,1)", r"expected a stride of 1 or 2; write SuperConvK3BNRELU\(3,8,2,1\)"),
        ("SuperConvK3BNRELU(3,8,1,1)SuperConvK1BNRELU(9,8,1,1)", r"write SuperConvK1BNRELU\(8,8,1,1\)"),
    ],
)
def test_what_is_no_structure_is_told_with_its_place(string: str, message: str) -> None:
    with pytest.raises(StructureError, match=message):
        parse(string)


def test_a_network_sees_images() -> None:
    assert parse_network(TINY) == parse(TINY)
    with pytest.raises(
        StructureError, match=r"got SuperConvK3BNRELU\(5,8,1,1\) at character 0, .* write .*\(3,8,1,1\)"
    ):
        parse_network("SuperConvK3BNRELU(5,8,1,1)")


@pytest.mark.parametrize("kind", ["SuperConvK3BNRELU", "SuperResK3K3", "SuperResK1K5K1", "SuperResIDWE4K3"])
def test_layers_that_are_alike_are_counted_once(kind: str) -> None:
    """A thousand layers cost no more to count than two, and all of them count."""
    one, two, many = ((Part(kind, 24, 16, 2, n, None if kind in CONV else 8),) for n in (1, 2, 999))
    for count in (lambda s: parameters(s, 10), lambda s: flops(s, 10, 9)):
        assert count(many) - count(two) == 997 * (count(two) - count(one)) > 0
    assert len(many[0].parts()) == 2
