import numpy as np
import pytest

from workloads.data.shards import DataError
from workloads.data.validate import validate


def test_clean(make_manifest, tmp_path):
    make_manifest([3, 2])
    before = sorted(tmp_path.iterdir())
    found = validate(str(tmp_path / "set-*.tar"), decode=True)
    assert (found.samples, found.shards, found.findings) == (5, 2, [])
    assert sorted(tmp_path.iterdir()) == before, "nothing is written"


def test_everything_that_is_wrong(tmp_path, write_tar, encoded):
    good = encoded(np.zeros((4, 4, 3), np.uint8))
    write_tar(tmp_path / "s-0.tar", [("a.png", good), ("a.cls", b"0"), ("../b.png", good), ("c.png", good[:40])])
    write_tar(tmp_path / "s-1.tar", [("a.png", good), ("d.png", good), ("d.cls", b"9"), ("e.txt", b"no image")])
    write_tar(tmp_path / "s-2.tar", [("f.png", good), ("g.png", good)])
    (tmp_path / "s-2.tar").write_bytes((tmp_path / "s-2.tar").read_bytes()[:1100])
    (tmp_path / "classes.txt").write_text("one\n")
    pattern, seen = str(tmp_path / "s-*.tar"), []
    findings = validate(pattern).findings
    for line in (
        "s-0.tar: ../b.png at offset 2048: its path climbs out of the archive",
        "s-1.tar: d at offset 1024: label 9 is out of range, expected a number below 1",
        "s-1.tar: a at offset 512: duplicate key, it is in a shard before",
        "s-1.tar: e at offset",
        "s-2.tar: - at offset 1024: ",
    ):
        assert sum(found.startswith(line) for found in findings) == 1, (line, findings)
    decoded = validate(pattern, decode=True, on_sample=seen.append).findings
    (more,) = set(decoded) - set(findings)
    assert more.startswith("s-0.tar: c at offset 3584: got ") and seen == ["a", "c", "a"]


def test_masks_arrays_and_videos_are_decoded_too(tmp_path, write_tar, encoded):
    image, mask = encoded(np.zeros((4, 4, 3), np.uint8)), encoded(np.zeros((4, 4), np.uint8))
    files = [("a.png", image), ("a.seg.png", mask), ("b.png", image), ("b.seg.png", image), ("b.depth.npy", b"x")]
    write_tar(tmp_path / "s-0.tar", [*files, ("c.png", image), ("c.mp4", b"no video")])
    findings = validate(str(tmp_path / "s-0.tar"), decode=True).findings
    assert sorted(line.split(" at offset ")[0] for line in findings) == ["s-0.tar: b", "s-0.tar: b", "s-0.tar: c"]


def test_real_data_is_clean(data_folder):
    for name, samples in (
        ("photos/test", 300),
        ("camvid/val", 24),
        ("hippocampus/val", 28),
        ("video/shapes3/test", 27),
    ):
        found = validate(str(data_folder / f"{name}-*.tar"), decode=True)
        assert (found.samples, found.findings) == (samples, [])


def test_nothing_to_validate(tmp_path, write_tar):
    write_tar(tmp_path / "s-0.tar", [])
    with pytest.raises(DataError, match="got no usable sample"):
        validate(str(tmp_path / "s-0.tar"))
