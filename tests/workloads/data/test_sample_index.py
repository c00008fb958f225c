import numpy as np
import pytest

from workloads.data.sample_index import index_samples, repeated
from workloads.data.shard_writer import SampleError
from workloads.data.shards import DataError

FILES = [("a.txt", b"A"), ("a.seg.png", b"x" * 700), ("b.txt", b"B"), ("b.cls", b"1")]


def test_columns(tmp_path, write_tar):
    write_tar(tmp_path / "s-0.tar", FILES)
    write_tar(tmp_path / "s-1.tar", [("c.cls", b"0")])
    index = index_samples(str(tmp_path / "s-*.tar"))
    assert index.keys.tolist() == ["a", "b", "c"] and index.label.tolist() == [-1, 1, 0]
    assert index.shard.tolist() == [0, 0, 1] and index.start.tolist() == [0, 2560, 0]
    assert [index.read(row) for row in range(3)] == [
        {"txt": b"A", "seg.png": b"x" * 700},
        {"txt": b"B", "cls": b"1"},
        {"cls": b"0"},
    ]
    assert index.where(1) == "s-0.tar: b at offset 2560" and index.classes == [] and not index.bad


def test_a_sample_ends_before_what_was_set_aside(tmp_path, write_tar):
    between = [("../climbs.txt", b"1"), ("a.txt", b"again"), ("bad.cls", b"x"), ("folder/.hidden", b"2")]
    write_tar(tmp_path / "s-0.tar", [*FILES, *between])
    shard = tmp_path / "s-0.tar"
    shard.write_bytes(shard.read_bytes()[:8704] + b"garbage" * 200)
    index = index_samples(str(shard))
    assert index.keys.tolist() == ["a", "b"] and index.read(1) == {"txt": b"B", "cls": b"1"}
    assert len(index.bad) >= 3


def test_long_names(tmp_path, write_tar):
    import tarfile

    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        name = "d/" * 60 + "k" * 120
        write_tar(tmp_path / "s-0.tar", [("a.txt", b"A"), (f"{name}.txt", b"B"), (f"{name}.cls", b"0")], kind)
        index = index_samples(str(tmp_path / "s-0.tar"))
        assert index.keys.tolist() == ["a", name] and index.read(1) == {"txt": b"B", "cls": b"0"}


def test_remote_shards(tmp_path, write_tar):
    pytest.importorskip("fsspec")
    write_tar(tmp_path / "s-0.tar", FILES)
    (tmp_path / "classes.txt").write_text("no\nyes\n")
    index = index_samples(f"file://{tmp_path}/s-0.tar", prefix_keys=True)
    assert index.keys.tolist() == ["s-0/a", "s-0/b"] and index.classes == ["no", "yes"]
    assert index.read(1) == {"txt": b"B", "cls": b"1"}


def test_a_shard_that_changed(tmp_path, write_tar):
    write_tar(tmp_path / "s-0.tar", FILES)
    index = index_samples(str(tmp_path / "s-0.tar"))
    (tmp_path / "s-0.tar").write_bytes(b"other bytes" * 1000)
    with pytest.raises(SampleError, match="got other bytes than before"):
        index.read(0)
    (tmp_path / "s-0.tar").unlink()
    with pytest.raises(OSError):
        index.read(0)


def test_nothing_to_index(tmp_path, write_tar):
    write_tar(tmp_path / "s-0.tar", [("folder", b"")])
    with pytest.raises(DataError, match="got no sample in 1 shard"):
        index_samples(str(tmp_path / "s-0.tar"))


def test_repeated():
    keys = np.array(["b", "a", "b", "c", "a", "b"], np.dtypes.StringDType())
    assert repeated(keys).tolist() == [2, 4, 5]
