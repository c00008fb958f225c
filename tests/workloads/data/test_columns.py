import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.data import columns
from workloads.data.columns import Keys, Manifest
from workloads.data.shards import DataError


@given(st.lists(st.text(max_size=12), max_size=30))
def test_keys_are_the_strings_that_they_were_made_of(names):
    keys = Keys.of(names)
    assert len(keys) == len(names) and list(keys) == names
    order = np.arange(len(names))[::-2]
    assert list(keys.take(order)) == [names[i] for i in order]
    with pytest.raises(IndexError):
        keys[len(names)]


def _table(manifest: Manifest) -> dict[str, list]:
    return {name: column.tolist() for name, column in manifest._columns().items()} | {"key": list(manifest.keys)}


@pytest.mark.parametrize("group", [1 << 20, 4])
def test_a_large_manifest_is_mapped_and_says_the_same(make_manifest, tmp_path, monkeypatch, group):
    monkeypatch.setattr(columns, "ROW_GROUP", group)
    manifest = make_manifest([5, 0, 6])
    path = tmp_path / "m.parquet"
    manifest.write(path)
    small = Manifest.read(path)
    monkeypatch.setattr(columns, "MAX_ROWS_IN_MEMORY", 3)
    large = Manifest.read(path)
    assert isinstance(large.label, np.memmap) and not isinstance(small.label, np.memmap)
    assert _table(large) == _table(small) == _table(manifest)
    monkeypatch.setattr(columns, "_pieces", None)  # unpacked once
    assert _table(Manifest.read(path)) == _table(manifest)
    assert len(list((tmp_path / "cache/manta/columns").iterdir())) == 1


def test_unpacking_that_was_cut_short_leaves_nothing_that_is_taken_for_whole(make_manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "MAX_ROWS_IN_MEMORY", 3)
    manifest, pieces = make_manifest([5, 6]), columns._pieces
    manifest.write(tmp_path / "m.parquet")

    def torn(file):
        yield next(pieces(file))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(columns, "_pieces", torn)
    with pytest.raises(DataError, match="No space left"):
        Manifest.read(tmp_path / "m.parquet")
    monkeypatch.setattr(columns, "_pieces", pieces)
    assert _table(Manifest.read(tmp_path / "m.parquet")) == _table(manifest)


def test_a_manifest_of_another_version_is_made_again(make_manifest, tmp_path, monkeypatch):
    from workloads.data.manifest import open_manifest

    make_manifest([3])
    pattern = str(tmp_path / "set-*.tar")
    with monkeypatch.context() as patch:
        patch.setattr(columns, "FORMAT", 1)
        open_manifest(pattern)
    assert len(open_manifest(pattern)) == 3
    (place,) = tmp_path.glob("*.manifest.parquet")
    assert columns.read_facts(place) is not None


def test_every_member_has_its_place(tmp_path, write_tar):
    from workloads.data.manifest import build_manifest

    write_tar(
        tmp_path / "x.tar",
        [
            ("a.jpg", b"1"),
            ("a.seg.png", b"22"),
            ("a.json", b"333"),
            ("b.PNG", b"4444"),
            ("b.txt", b"5"),
            ("c.txt", b"6"),
        ],
    )
    manifest = build_manifest(str(tmp_path / "x.tar"))
    assert manifest.primary == "image" and list(manifest.keys) == ["a", "b"]
    assert {name: places.length.tolist() for name, places in manifest.members.items()} == {
        "image": [1, 4],
        "json": [3, -1],
        "seg.png": [2, -1],
        "txt": [-1, 1],
    }
    assert manifest.quarantined == ["x.tar: c at offset 5120: no image, got txt"]
    with pytest.raises(DataError, match="a view of 'video', expected one of what the samples hold: image, json"):
        manifest.places("video")


@pytest.mark.parametrize(
    ("suffix", "primary"), [("mp4", "video"), ("nii.gz", "nii.gz"), ("npy", "npy"), ("txt", "txt")]
)
def test_samples_may_be_about_something_else_than_images(tmp_path, write_tar, suffix, primary):
    from workloads.data.manifest import build_manifest

    write_tar(tmp_path / "x.tar", [(f"a.{suffix}", b"1"), ("a.cls", b"0"), ("stray.jpg", b"2"), (f"b.{suffix}", b"3")])
    manifest = build_manifest(str(tmp_path / "x.tar"))
    assert manifest.primary == primary and list(manifest.keys) == ["a", "b"] and len(manifest.quarantined) == 1


def test_scans_may_run_anywhere_and_come_in_order(make_manifest, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from workloads.data.manifest import build_manifest

    whole = make_manifest([3, 0, 2, 4])

    def elsewhere(function, paths, num_classes):
        with ThreadPoolExecutor(3) as pool:
            yield from pool.map(lambda path: function(path, num_classes), paths)

    done: list[str] = []
    other = build_manifest(str(tmp_path / "set-*.tar"), done.append, elsewhere)
    assert _table(other) == _table(whole) and other.content_hash == whole.content_hash
    assert done == list(whole.shards)
