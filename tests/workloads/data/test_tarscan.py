import gzip
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.data.tarscan import MAX_NAME_BYTES, first_sample, scan, split_name


def archive(members, format=tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def scan_bytes(tmp_path: Path, data: bytes, **options):
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    found = scan(str(path), **options)
    found.require("image")
    return found


def images(found) -> list[tuple[int, int]]:
    """Offset and length of the image of each sample."""
    return [found.members["image"][i] for i in range(len(found.keys))]


TWO = [("a.jpg", b"A" * 700), ("a.cls", b"3"), ("b.jpg", b"B" * 9), ("b.cls", b" 0\n")]

long_names = st.text(st.characters(codec="utf-8", exclude_characters="\0./\\\n"), min_size=1, max_size=150)


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(long_names, min_size=1, max_size=6, unique=True),
    sizes=st.lists(st.integers(0, 1500), min_size=6, max_size=6),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_scan_finds_what_tarfile_wrote(tmp_path_factory, names, sizes, format):
    names = [name for name in names if not (name.startswith("__") and name.endswith("__"))]
    members = [(f"{name}.png", bytes([i]) * size) for i, (name, size) in enumerate(zip(names, sizes, strict=False))]
    data = archive(members, format)
    found = scan_bytes(tmp_path_factory.mktemp("t"), data)
    assert found.keys == names and not found.quarantined
    for (_, content), (offset, length) in zip(members, images(found), strict=True):
        assert data[offset : offset + length] == content


def test_ustar_prefix_carries_folders(tmp_path):
    name = "/".join(["folder"] * 20) + "/image"
    assert scan_bytes(tmp_path, archive([(f"{name}.jpg", b"x")])).keys == [name]


def test_labels_and_order_of_members(tmp_path):
    found = scan_bytes(tmp_path, archive(TWO))
    assert (found.keys, found.labels, images(found)) == (["a", "b"], [3, 0], [(512, 700), (2560 + 512, 9)])
    found = scan_bytes(tmp_path, archive([("a.cls", b"3"), ("a.JPEG", b"x"), ("b.png", b"y")]))
    assert (found.keys, found.labels) == (["a", "b"], [3, -1])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.seg.png", ("a/b", "seg.png")),
        ("a.b/c.JPG", ("a.b/c", "jpg")),
        ("./c.jpg", ("./c", "jpg")),
        ("README", None),
        (".hidden.jpg", None),
        ("__info__/x.jpg", None),
    ],
)
def test_split_name_is_webdatasets_rule(name, parts):
    assert split_name(name) == parts


def test_mask_alone_is_no_image(tmp_path):
    found = scan_bytes(tmp_path, archive([("a.seg.png", b"x"), ("b.jpg", b"y"), ("b.seg.png", b"z")]))
    assert found.keys == ["b"] and found.quarantined == ["a at offset 0: no image, got seg.png"]


@pytest.mark.parametrize(
    ("members", "line"),
    [
        ([("../a.jpg", b"x")], "../a.jpg at offset 0: its path climbs out"),
        ([("c/../../a.jpg", b"x")], "climbs out"),
        ([("/etc/a.jpg", b"x")], "/etc/a.jpg at offset 0: its path climbs out"),
        ([("a.txt", b"x")], "a at offset 0: no image, got txt"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "a at offset 0: label 'cat' is no class number"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "label '-1' is no class number"),
        ([("a.jpg", b"x"), ("a.cls", b"1" * 40)], "is no class number"),
        ([("a.jpg", b"x"), ("a.cls", b"7")], "label 7 is out of range, expected a number below 5"),
    ],
)
def test_bad_samples_are_set_aside_and_the_others_kept(tmp_path, members, line):
    found = scan_bytes(tmp_path, archive([*members, ("good.jpg", b"g"), ("good.cls", b"1")]), num_classes=5)
    assert found.keys == ["good"]
    assert len(found.quarantined) == 1 and line in found.quarantined[0]


def test_duplicate_keys_keep_the_first(tmp_path):
    found = scan_bytes(tmp_path, archive([("a.jpg", b"1"), ("a.jpg", b"22"), ("b.jpg", b"3"), ("a.jpg", b"44")]))
    assert (found.keys, [length for _, length in images(found)]) == (["a", "b"], [1, 1])
    assert found.quarantined == ["a.jpg at offset 1024: duplicate key", "a at offset 3072: duplicate key"]


def test_links_are_set_aside(tmp_path):
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    found = scan_bytes(tmp_path, archive([(link, b""), ("b.jpg", b"x")]))
    assert found.keys == ["b"] and "a.jpg at offset 0: a link or special file" in found.quarantined[0]


TORN = "its shard is torn behind it, members may be missing"


@pytest.mark.parametrize(
    ("cut", "keys", "quarantined"),
    [
        (0, [], ["- at offset 0: truncated: the archive has no end mark"]),
        (600, [], ["a.jpg at offset 0: truncated: got 88 of 700 bytes"]),
        (1536, [], [f"a at offset 0: {TORN}", "- at offset 1536: truncated: the archive has no end mark"]),
        (3080, ["a"], ["b.jpg at offset 2560: truncated: got 8 of 9 bytes"]),
        (3584, ["a"], [f"b at offset 2560: {TORN}", "- at offset 3584: truncated: the archive has no end mark"]),
        (4096, ["a"], [f"b at offset 2560: {TORN}", "b.cls at offset 3584: truncated: got 0 of 3 bytes"]),
        (4608, ["a", "b"], ["- at offset 4608: truncated: the archive has no end mark"]),
        (5120, ["a", "b"], []),
    ],
)
def test_truncated_archive_keeps_whole_samples_and_says_where_it_ends(tmp_path, cut, keys, quarantined):
    found = scan_bytes(tmp_path, archive(TWO)[:cut])
    assert (found.keys, found.quarantined) == (keys, quarantined)


def test_what_follows_the_end_mark_is_not_lost_silently(tmp_path):
    found = scan_bytes(tmp_path, archive(TWO) + archive([("c.jpg", b"x")]))
    assert found.keys == ["a", "b"] and "after the end mark" in found.quarantined[0]
    hole = archive(TWO)[:2560] + bytes(2 << 20)  # a download that was preallocated and never finished
    assert "after the end mark" in scan_bytes(tmp_path, hole).quarantined[-1]


def test_compressed_and_foreign_files_are_named(tmp_path):
    assert "it is compressed: decompress it" in scan_bytes(tmp_path, gzip.compress(archive(TWO)) * 9).quarantined[0]
    assert "expected a tar header" in scan_bytes(tmp_path, b"no tar at all" * 99).quarantined[0]


def test_giant_name_record_is_not_read(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, MAX_NAME_BYTES + 1
    found = scan_bytes(tmp_path, info.tobuf() + bytes(1024))
    assert f"got a name of {MAX_NAME_BYTES + 1} bytes" in found.quarantined[0]


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 5119), value=st.integers(0, 255), cut=st.integers(0, 5120))
def test_no_byte_makes_the_scan_fail(tmp_path_factory, at, value, cut):
    data = bytearray(archive(TWO))
    data[at] = value
    found = scan_bytes(tmp_path_factory.mktemp("t"), bytes(data[:cut]))
    assert all(offset + length <= cut for offset, length in images(found))
    assert len(found.keys) == len(found.offsets) == len(images(found)) == len(found.labels)


def test_first_sample_stops_at_the_first(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(archive([("a.cls", b"1"), ("a.jpg", b"x"), ("b.jpg", b"x")]))
    assert first_sample(str(path), 10) == (True, 2)
    assert first_sample(str(path), 1) == (False, 1)
