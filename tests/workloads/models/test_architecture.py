"""Architecture strings of mobile networks: parsed, printed, counted; the published ones build what they count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from workloads.models.architecture import ArchitectureError, Block, costs, mobile8, parse, text, walk
from workloads.models.binas import Binas, published

SMALL = (
    "[['ds_r1_k3_s1_e1_c8_nre'], ['ir_r1_k5_s2_e3_c16_nre_se0.25', 'ir_r1_k3_s1_e4_c16'], "
    "['ir_r1_k3_s1_e6_c24_se0.25'], ['cn_r1_k1_s1_c32']]"
)


@pytest.mark.parametrize("name", ["binas-a", "binas-b", "binas-c", "binas-d", "binas-e", "binas-f"])
def test_published_networks_print_as_they_came_and_count_what_they_build(name: str) -> None:
    architecture = parse(published()[name])
    assert text(architecture) == published()[name]
    counted = costs(architecture, stem=32, features=1280, classes=1000, size=224)
    with torch.device("meta"):
        network = Binas(architecture, num_classes=1000)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in network.parameters()) == counted.parameters
    assert counter.get_total_flops() == 2 * counted.flops


def test_the_published_ones_grow() -> None:
    """As their latencies do, from 37 to 59 ms; the numbers are ours."""
    found = [
        costs(parse(published()[f"binas-{letter}"]), stem=32, features=1280, classes=1000, size=224).flops
        for letter in "abcdef"
    ]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (203_997_472, 385_242_368)


@pytest.mark.parametrize("size", [32, 33])
def test_counts_of_odd_sizes_and_encoders(size: int) -> None:
    architecture = parse(SMALL)
    network = Binas(architecture, 12, 20).eval()
    with FlopCounterMode(display=False) as counter:
        assert network(torch.randn(1, 3, size, size)).shape == (1, 20)
    counted = costs(architecture, stem=12, features=20, classes=0, size=size)
    assert counted.parameters == sum(p.numel() for p in network.parameters())
    assert counted.flops == counter.get_total_flops() / 2
    places = [(width, side) for _, width, side in walk(architecture, 12, size)]
    half, quarter = -(-size // 2), -(-size // 4)
    assert places == [(12, half), (8, half), (16, quarter), (16, quarter), (24, quarter)]


blocks = st.builds(
    Block,
    kind=st.just("ir"),
    kernel=st.sampled_from([1, 3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    width=st.integers(1, 999),
    expansion=st.integers(1, 9),
    relu=st.booleans(),
    se=st.booleans(),
)
others = st.sampled_from([Block("ds", 3, 1, 16, relu=True), Block("ds", 5, 2, 8, se=True), Block("cn", 1, 1, 960)])


@given(st.lists(st.lists(blocks | others, min_size=1, max_size=4).map(tuple), min_size=1, max_size=5).map(tuple))
def test_what_is_printed_parses(architecture: Any) -> None:
    assert parse(text(architecture)) == architecture
    assert text(parse(text(architecture))) == text(architecture)


@pytest.mark.parametrize(
    ("string", "said"),
    [
        ("", r"got '' at character 0, expected \[\['ir_"),
        ("[[]]", r"got '\]\]' at character 2, expected a block such as 'ir_"),
        ("[['ir_r1_k4_s1_e3_c24']]", r"got 'ir_r1_k4_s1_e3_c24' at character 2, expected KIND_r1_kN"),
        (SMALL.replace("e4_c16'", "e4_c16x'"), r"got 'ir_r1_k3_s1_e4_c16x' at character 62, expected KIND"),
        (SMALL.replace("'], ['ir_r1_k3", "'] ['ir_r1_k3"), r"at character 82, expected ', ' or '\], \['"),
        (SMALL[:-1], r"got '\]' at character \d+, expected ', ' or .* or, last, '\]\]'"),
        (SMALL + " ", r"got '\]\] ' at character"),
        (SMALL + "\n", r"got '\]\]\\n' at character"),
        ("[['ir_r1_k3_s1_e3_c1٨']]", "at character 2, expected KIND_r1"),
        ("[['ir_r1_k3_s1_e3_c100000']]", "e 1 to 99, c 1 to 99,999"),
        (f"[['ir_r1_k3_s1_e3_c{'9' * 5000}']]", "got .{60} at character 2, expected KIND_r1"),
        ("[['ir_r1_k3_s1_c24']]", "expected eN of ir, e1 of ds, and neither"),
        ("[['ds_r1_k3_s1_e2_c24']]", "expected eN of ir, e1 of ds, and neither"),
        ("[['cn_r1_k1_s1_c24_se0.25']]", "expected eN of ir, e1 of ds, and neither"),
        ("[['ir_r2_k3_s1_e3_c24']]", "at character 2, expected KIND_r1"),
    ],
)
def test_what_does_not_parse_says_where(string: str, said: str) -> None:
    with pytest.raises(ArchitectureError, match=said):
        parse(string)


def test_channels_are_rounded_as_mobilenets_do() -> None:
    assert [mobile8(x) for x in (1, 11, 12, 18, 20, 72 / 4, 144 / 4)] == [8, 16, 16, 24, 24, 24, 40]
