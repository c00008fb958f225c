"""The spaces of MAE-DET: what a mutation may make of a block, by the rules of the released code (arXiv 2111.13336)."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.models.maedet import published
from workloads.models.maedet_structure import Structure, layers, parameters, parse, plain, strides, text
from workloads.search import mae_det_space
from workloads.search.mae_det_space import START, Space


@pytest.fixture
def one_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mae_det_space, "ROUNDS", 1)


def neighbours(start: Structure, space: Space, draws: int = 3000) -> dict[tuple[int, str], set[int]]:
    """(Block, key) -> the values that its mutations have in place of the start's, channels that come in left out."""
    found = defaultdict(set)
    generator = np.random.default_rng(0)
    for _ in range(draws):
        for at, (before, after) in enumerate(zip(plain(start), plain(space.mutate(start, generator)), strict=True)):
            for key in before.keys() - {"in"}:
                if before[key] != after[key]:
                    found[at, key].add(after[key])
    return dict(found)


@pytest.mark.usefixtures("one_change")
def test_neighbours_of_the_paper_s_start() -> None:
    """By hand: widths of (32), 256, 512, 768, 1024, 2048 by five ratios, to multiples of 8, within their bounds."""
    assert neighbours(START["k1kxk1"], Space(480, layers=91)) == {
        (0, "out"): {24, 16},  # at most 32
        (1, "out"): {128},  # at most 4 * 32; and at least 512 / 4
        (1, "k"): {5},
        (1, "btn"): {96, 80, 48, 40, 32},
        (1, "L"): {2, 3},
        (2, "out"): {640, 408, 304, 256, 768},  # at most the next, at least what comes in
        (2, "k"): {5},
        (2, "btn"): {192, 160, 104, 80, 64},
        (2, "L"): {2, 3},
        (3, "out"): {1024, 960, 616, 512},
        (3, "k"): {5},
        (3, "btn"): {384, 320, 208, 152, 128},
        (3, "L"): {2, 3},
        (4, "out"): {1536, 1280, 816, 768},
        (4, "k"): {5},
        (4, "btn"): {384, 320, 208, 152, 128},
        (4, "L"): {2, 3},
        (5, "out"): {1640, 1232, 1024},  # at most 2048
        (5, "k"): {5},
        (5, "btn"): {768, 640, 408, 304, 256},
        (5, "L"): {2, 3},
    }


@pytest.mark.usefixtures("one_change")
def test_neighbours_of_damo_yolo_s_start() -> None:
    """By hand: widths of (32), 48, 96, 96, 192, 384 by six ratios; a narrower block takes the next bottleneck along."""
    ranges = (None, None, (64, 128), None, (128, 256), (256, 512))
    assert neighbours(START["k1kx"], Space(640, layers=25, ranges=ranges)) == {
        (0, "out"): {24, 16},
        (1, "out"): {96, 72, 64, 40, 32},
        (1, "btn"): {48, 40, 24, 16},
        (1, "L"): {2},
        (2, "out"): {80, 64},
        (2, "btn"): {96, 72, 64, 40, 32, 24},
        (2, "L"): {2, 3},
        (3, "out"): {192, 144, 120},
        (3, "btn"): {80, 56, 48, 64},  # 80 and 64 by block 2
        (3, "L"): {2, 3},
        (4, "out"): {256, 240, 152, 128},
        (4, "btn"): {192, 144, 120, 80, 56, 48},
        (4, "L"): {2, 3},
        (5, "out"): {512, 480, 304, 256},
        (5, "btn"): {384, 288, 240, 152, 112, 96, 128},  # 152 and 128 by block 4
        (5, "L"): {2, 3},
    }


@pytest.mark.usefixtures("one_change")
def test_each_block_is_drawn_alike_the_last_one_too() -> None:
    """The released code never draws the last. With 6 blocks, of a change of layers 1/6 * 1/4 each."""
    start, generator = START["k1kxk1"], np.random.default_rng(0)
    counts: Counter[int] = Counter()
    for _ in range(4800):
        child = Space(480, layers=91).mutate(start, generator)
        counts.update(i for i in range(1, 6) if child[i].layers != start[i].layers)
    assert list(sorted(counts)) == [1, 2, 3, 4, 5]
    assert min(counts.values()) > 160 and max(counts.values()) < 240


def test_two_changes_a_child() -> None:
    start, generator = START["k1kxk1"], np.random.default_rng(0)
    changed = []
    for _ in range(300):
        child = plain(Space(480, layers=91).mutate(start, generator))
        changed.append(sum(a[k] != b[k] for a, b in zip(plain(start), child, strict=True) for k in a.keys() - {"in"}))
    assert max(changed) >= 2 and np.mean(changed) > 1.2


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from(["k1kxk1", "k1kx", "S"]))
def test_mutations_are_structures_of_their_space(seed: int, name: str) -> None:
    start = (START | published())[name]
    space, generator = Space(480, layers=91), np.random.default_rng(seed)
    structure = start
    for _ in range(20):
        structure = space.mutate(structure, generator)
        assert parse(text(structure)) == structure
    assert strides(structure) == strides(start)
    assert [block.kind for block in structure] == [block.kind for block in start]
    assert structure[0].width <= 32 and all(block.width <= 2048 for block in structure)
    for before, block in pairwise(structure):
        assert block.width >= before.width
        assert block.width % 8 == 0 and block.bottleneck is not None and block.bottleneck % 8 == 0


def test_children_with_too_many_layers_are_drawn_again() -> None:
    """The start has the 16 layers that are allowed; 5 of 24 draws add some, and six tries hardly fail."""
    generator = np.random.default_rng(0)
    children = [Space(480, layers=16).mutate(START["k1kxk1"], generator) for _ in range(300)]
    assert max(layers(child) for child in children) == 16
    assert len({text(child) for child in children}) > 100


def test_a_share_of_the_layers_at_most() -> None:
    """91 // 3 // 4 = 7 for each block behind the first of the body, which has 3 at most."""
    generator, structure, deepest = np.random.default_rng(0), START["k1kxk1"], [0] * 6
    for _ in range(2000):
        structure = Space(480, layers=91).mutate(structure, generator)
        deepest = [max(n, block.layers or 1) for n, block in zip(deepest, structure, strict=True)]
    assert deepest == [1, 3, 7, 7, 7, 7]


def test_kernels_fit_what_they_see() -> None:
    """At 32 px blocks see 32, 16, 8, 4, 2 and 2 places."""
    generator, kernels = np.random.default_rng(0), [0] * 6
    for _ in range(500):
        child: Any = Space(32, layers=91).mutate(START["k1kxk1"], generator)
        kernels = [max(k, block.kernel) for k, block in zip(kernels, child, strict=True)]
    assert kernels == [3, 5, 5, 1, 1, 1]


def test_the_smallest() -> None:
    ranges = (None, None, (64, 128), None, (128, 256), (256, 512))
    assert [block.width for block in Space(640, 25, ranges=ranges).smallest(START["k1kx"])] == [8, 8, 64, 64, 128, 256]
    smallest = Space(480, layers=91).smallest(START["k1kxk1"])
    assert {(block.width, block.bottleneck or 8, block.layers or 1) for block in smallest} == {(8, 8, 1)}
    generator, structure = np.random.default_rng(0), START["k1kxk1"]
    for _ in range(2000):
        structure = Space(480, layers=91).mutate(structure, generator)
        assert parameters(structure) >= parameters(smallest) and layers(structure) >= layers(smallest)
