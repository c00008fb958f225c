"""Structures of MAE-DET: read and written alike, counted as the released code counts, refused with a place."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from workloads.models.maedet import published
from workloads.models.maedet_structure import (
    Block,
    Structure,
    chained,
    flops,
    layers,
    parameters,
    parse,
    plain,
    stages,
    strides,
    text,
)
from workloads.models.structure import Branch, Conv, StructureError

STEM = '{"class": "ConvKXBNRELU", "in": 3, "out": 32, "s": 2, "k": 3}'
BODY = '{"class": "ResK1KXK1", "in": 32, "out": 48, "s": 2, "k": 5, "L": 2, "btn": 16}'


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    number = st.integers(1, 3000)
    blocks = []
    for kind in draw(st.lists(st.sampled_from(["ConvKXBNRELU", "ResK1KXK1", "ResK1KX", "ResKXKX"]), min_size=1)):
        fields = {"class": kind, "in": 3, "out": draw(number), "s": draw(st.integers(1, 2))}
        fields["k"] = draw(st.sampled_from([1, 3, 5, 7]))
        if kind != "ConvKXBNRELU":
            fields |= {"L": draw(st.integers(1, 9)), "btn": draw(number)}
        blocks.append(Block.model_validate(fields))
    return chained(blocks)


@given(structures())
def test_what_is_written_is_read(structure: Structure) -> None:
    assert parse(text(structure)) == parse(plain(structure)) == parse(structure) == structure
    assert parse(yaml.safe_load(yaml.safe_dump(plain(structure)))) == structure
    width, stride = 3, 1
    for block, behind in zip(structure, strides(structure), strict=True):
        for branch, count in block.parts():
            for conv in branch.convs if count else ():
                assert conv.width_in == width
                width, stride = conv.width, stride * conv.stride
        assert (width, stride) == (block.width, behind)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("S", (21_233_120, 10_992_870_000, 79)),
        ("M", (25_843_536, 20_299_923_000, 91)),
        ("L", (43_879_552, 34_494_619_500, 109)),
    ],
)
def test_counts_of_networks_of_the_paper(name: str, counts: tuple[int, int, int]) -> None:
    """By the released code: 1.09929e10, 2.02999e10 and 3.44946e10 FLOPs."""
    found = published()[name]
    assert (parameters(found), flops(found, 480), layers(found)) == counts
    assert (stages(found), strides(found)) == ([0, 1, 2, 3, 4], [2, 4, 8, 16, 32])


def test_layers_of_each_kind() -> None:
    def parts(kind: str, width_in: int = 8, stride: int = 2) -> list[tuple[Branch, int]]:
        fields = {"class": kind, "in": width_in, "out": 16, "s": stride, "k": 5, "L": 3, "btn": 4}
        return Block.model_validate(fields).parts()

    three = (Conv(8, 4, 1), Conv(4, 4, 5, 2), Conv(4, 16, 1))
    assert parts("ResK1KXK1")[0] == (Branch(three, residual=True, projects=True), 1)
    assert parts("ResK1KXK1")[1] == (Branch((Conv(16, 4, 1), Conv(4, 4, 5), Conv(4, 16, 1)), residual=True), 2)
    assert parts("ResK1KX")[0] == (Branch((Conv(8, 4, 1), Conv(4, 16, 5, 2)), residual=True, projects=True), 1)
    assert parts("ResKXKX")[1] == (Branch((Conv(16, 4, 5), Conv(4, 16, 5)), residual=True), 2)
    assert [kind for kind in ("ResK1KXK1", "ResK1KX", "ResKXKX") if parts(kind, 16, 1)[0][0].projects] == ["ResK1KXK1"]


def test_stages_end_where_the_next_block_has_stride_2() -> None:
    strided = [2, 2, 1, 1, 2, 1]
    blocks = [Block(kind="ConvKXBNRELU", width_in=3, width=8, stride=s, kernel=3) for s in strided]  # type: ignore[call-arg, arg-type]
    assert stages(blocks) == [0, 3, 5]
    assert strides(blocks) == [2, 4, 4, 4, 8, 8]


def test_released_files_are_read_as_they_are() -> None:
    released = [json.loads(STEM), json.loads(BODY) | {"class": "SuperResK1KXK1"}]
    assert parse(released) == parse(f"[{STEM}, {BODY}]")
    assert text(parse(released)) == f"[{STEM}, {BODY}]"


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("[]", "got no block, expected some such as"),
        (f"[{STEM}", f"at character {len(STEM) + 1}, expected a list of blocks as JSON"),
        (f"[{STEM} {BODY}]", r"""got '\{"class": "ResK1KXK1", "in": 3' at character 63, .*Expecting ',' delimiter"""),
        (f"[{','.join([STEM] * 1000)}]", "at most 999 items .*, expected a list of blocks"),
        ("[" * 200_000, "got 200,000 characters, expected at most 100,000; take fewer blocks"),
        ("[" * 50_000, r"got '\[{30}' at character 2, expected a list of blocks as JSON"),
        ('[{"class": {' * 5_000, "at character 11, expected a list of blocks"),
        (f"[{STEM}]".replace("32", "9" * 5000), "got '9{30}' at character 43, expected a list of blocks"),
        (f"[{STEM}]".replace("32", "100000"), "in block 1, out: got 100000: .*less than or equal to 99999"),
        (f"[{STEM}, {BODY}]".replace('"L": 2', '"L": 1000'), "in block 2, L: got 1000: .*less than or equal to 999"),
        (STEM, r"got \{'class': 'ConvKXBNRELU', .*expected a list of blocks"),
        (f"[{STEM}, 3]", "in block 2: got 3: .*dict"),
        (f"[{STEM}, {BODY}]".replace("KXK1", "KXKX"), "in block 2, class: got 'ResK1KXKX': Input should be 'ConvKXBN"),
        (
            f"[{STEM}, {BODY}]".replace('"k": 5', '"k": 4'),
            "in block 2, k: got 4: Input should be 1, 3, 5 or 7 .a block is such as",
        ),
        (f"[{STEM}, {BODY}]".replace('"s": 2', '"s": 3'), "in block 1, s: got 3: Input should be 1 or 2"),
        (f"[{STEM}, {BODY}]".replace("btn", "bnt"), "in block 2, bnt: got unknown key 'bnt'; did you mean 'btn'"),
        (f"[{STEM}, {BODY}]".replace(', "L": 2', ""), "in block 2: .*got btn of ResK1KXK1, expected L and btn"),
        (f"[{STEM}]".replace('"k": 3', '"k": 3, "L": 1'), "got L of ConvKXBNRELU, expected neither L nor btn"),
        (f"[{STEM}, {BODY}]".replace('"out": 32', '"out": 0'), "in block 1, out: got 0: .*greater than or equal to 1"),
        (f"[{STEM}, {BODY}]".replace('"out": 32, ', ""), "in block 1, out: got nothing for 'out', expected a value"),
        (
            f"[{STEM}, {BODY}]".replace('"in": 32', '"in": 30'),
            "got block 2 with in: 30, behind one of 32 channels, exp",
        ),
        (f"[{BODY}]", "got block 1 with in: 32, the first, which sees images, expected in: 3"),
    ],
)
def test_what_is_no_structure_is_told_with_its_place(string: str, message: str) -> None:
    with pytest.raises(StructureError, match=message):
        parse(string)
