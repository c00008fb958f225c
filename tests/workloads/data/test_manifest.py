import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from workloads.data import indexing
from workloads.data.manifest import DataError, Manifest, build_manifest, open_manifest, peek


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.manifest.parquet"))


def same(a: Manifest, b: Manifest) -> bool:
    facts = ("shards", "shard_bytes", "primary", "classes", "content_hash", "total_bytes", "quarantined")
    columns, others = a._columns(), b._columns()
    assert columns.keys() == others.keys()
    return (
        list(a.keys) == list(b.keys)
        and all((columns[name] == others[name]).all() for name in columns)
        and all(getattr(a, fact) == getattr(b, fact) for fact in facts)
    )


def test_columns_and_facts(make_manifest):
    manifest = make_manifest([3, 0, 2])
    assert len(manifest) == 5 and list(manifest.keys) == [f"{i:06d}" for i in range(5)]
    assert manifest.shard.tolist() == [0, 0, 0, 2, 2] and manifest.label.tolist() == [0, 1, 2, 0, 1]
    assert manifest.classes == ["0", "1", "2"] and manifest.num_classes == 3
    assert manifest.where(3) == "set-000002.tar: 000003 at offset 512"
    with pytest.raises(ValueError, match="read-only"):
        manifest.label[0] = 1


def test_written_read_and_pickled_it_is_the_same(make_manifest, tmp_path):
    manifest = make_manifest([3, 2])
    manifest.write(tmp_path / "m.parquet")
    assert same(Manifest.read(tmp_path / "m.parquet"), manifest)
    assert same(pickle.loads(pickle.dumps(manifest)), manifest)
    assert not list(tmp_path.glob(".*.tmp"))


def test_data_error_pickles():
    error = pickle.loads(pickle.dumps(DataError("got a, expected b")))
    assert isinstance(error, ValueError) and str(error) == "got a, expected b"


def test_class_names_from_classes_txt(make_manifest, tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    manifest = make_manifest([4])
    assert manifest.classes == ["cat", "dog"] and manifest.label.tolist() == [0, 1, 0]
    assert manifest.quarantined == [
        "set-000000.tar: 000002 at offset 4096: label 2 is out of range, expected a number below 2"
    ]


def test_kept_beside_the_shards_and_not_built_again(make_manifest, tmp_path, monkeypatch):
    make_manifest([3, 2])
    first = open_manifest(str(tmp_path / "set-*.tar"))
    (place,) = kept(tmp_path)
    assert place.parent == tmp_path and place.name.startswith("set.")
    monkeypatch.setattr(indexing, "scan", None)  # a second scan would fail
    assert same(open_manifest(str(tmp_path / "set-{000000..000001}.tar")), first)


def test_moves_with_its_folder(make_manifest, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    make_manifest([3])
    (tmp_path / "set-000000.tar").rename(tmp_path / "a/set-000000.tar")
    open_manifest(str(tmp_path / "a/*.tar"))
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.setattr(indexing, "scan", None)
    assert open_manifest(str(tmp_path / "b/*.tar")).shards == (str(tmp_path / "b/set-000000.tar"),)


def test_read_only_folder_uses_the_cache(make_manifest, tmp_path):
    make_manifest([3])
    shards = tmp_path / "shards"
    shards.mkdir()
    (tmp_path / "set-000000.tar").rename(shards / "set-000000.tar")
    shards.chmod(0o555)
    try:
        open_manifest(str(shards / "*.tar"))
        (place,) = kept(tmp_path)
        assert place.parent == tmp_path / "cache/manta/manifests"
        assert len(open_manifest(str(shards / "*.tar"))) == 3
    finally:
        shards.chmod(0o755)


def test_refuses_shards_that_changed_until_rebuilt(make_manifest, tmp_path, write_tar):
    pattern = str(tmp_path / "set-*.tar")
    make_manifest([3])
    open_manifest(pattern)
    before = (tmp_path / "set-000000.tar").stat().st_size
    write_tar(tmp_path / "set-000000.tar", [(f"{i}.png", b"x" * 9000) for i in range(4)])
    after = (tmp_path / "set-000000.tar").stat().st_size
    message = f"set-000000.tar of {after} bytes, expected {before} by .*manta inspect --rebuild"
    for check in (open_manifest, peek):
        with pytest.raises(DataError, match=message):
            check(pattern)
    assert len(open_manifest(pattern, rebuild=True)) == 4
    assert len(open_manifest(pattern)) == 4


def test_refuses_other_class_names(make_manifest, tmp_path):
    pattern = str(tmp_path / "set-*.tar")
    make_manifest([3])
    open_manifest(pattern)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=r"got a classes.txt beside"):
        open_manifest(pattern)


def test_a_manifest_of_other_shards_is_made_anew(make_manifest, tmp_path):
    make_manifest([3, 2])
    open_manifest(str(tmp_path / "set-*.tar"))
    (place,) = kept(tmp_path)
    manifest = Manifest.read(place)
    manifest.take(np.arange(3)).write(place)
    other = build_manifest(str(tmp_path / "set-000000.tar"))
    other.write(place)
    assert len(open_manifest(str(tmp_path / "set-*.tar"))) == len(manifest) > len(other)


@pytest.mark.parametrize("damage", [b"", b"PAR1 no", None])
def test_damaged_manifest_is_named(make_manifest, tmp_path, damage):
    make_manifest([3])
    open_manifest(str(tmp_path / "set-*.tar"))
    (place,) = kept(tmp_path)
    place.write_bytes(place.read_bytes()[:-20] if damage is None else damage)
    with pytest.raises(DataError, match=f"got {place}, which cannot be read.*--rebuild"):
        open_manifest(str(tmp_path / "set-*.tar"))


def test_no_image_lists_what_was_set_aside(tmp_path, write_tar):
    write_tar(tmp_path / "x.tar", [("a.xyz", b"1"), ("../b.jpg", b"2")])
    for check in (build_manifest, open_manifest):
        with pytest.raises(DataError, match=r"no usable sample.*climbs out"):
            check(str(tmp_path / "x.tar"))


def test_content_hash_follows_the_content(make_manifest, tmp_path):
    first = make_manifest([3, 2])
    assert make_manifest([3, 2]).content_hash == first.content_hash
    assert make_manifest([3, 2], classes=2).content_hash != first.content_hash


def test_select_takes_so_many_of_each_class(make_manifest):
    manifest = make_manifest([40], classes=4)
    subset = manifest.select(3, seed=1)
    assert np.bincount(subset.label).tolist() == [3, 3, 3, 3] and len(set(list(subset.keys))) == 12
    assert list(subset.keys) == sorted(list(subset.keys))
    assert same(manifest.select(3, seed=1), subset)
    assert list(manifest.select(3, seed=2).keys) != list(subset.keys)
    assert subset.content_hash not in (manifest.content_hash, manifest.select(3, seed=2).content_hash)


def test_select_is_pinned(make_manifest):
    """Published few-label numbers name a seed: what it draws must not change with a version of numpy."""
    rows = [int(key) for key in make_manifest([40], classes=4).select(2, seed=0).keys]
    assert rows == [0, 2, 11, 17, 20, 21, 35, 38]


def test_select_says_which_class_is_short(make_manifest):
    with pytest.raises(DataError, match="got per_class=3, expected at most what each class has: 2 has 2; lower"):
        make_manifest([8], classes=3).select(3, seed=0)


def test_select_needs_labels(tmp_path, write_tar):
    write_tar(tmp_path / "x.tar", [("a.jpg", b"1")])
    with pytest.raises(DataError, match="no labels"):
        build_manifest(str(tmp_path / "x.tar")).select(1, seed=0)


def test_peek_looks_no_further_than_the_first_image(tmp_path, write_tar, monkeypatch):
    write_tar(tmp_path / "x.tar", [("a.cls", b"1"), ("a.jpg", b"x")])
    monkeypatch.setattr(indexing, "scan", None)
    peek(str(tmp_path / "x.tar"))
    assert not kept(tmp_path)


def test_peek_refuses_shards_with_no_image_or_none_at_all(tmp_path, write_tar):
    write_tar(tmp_path / "x.tar", [("a.xyz", b"1")])
    with pytest.raises(DataError, match="no sample in the headers"):
        peek(str(tmp_path / "x.tar"))
    with pytest.raises(DataError, match="no file"):
        peek(str(tmp_path / "y.tar"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_shard_is_named(make_manifest, tmp_path):
    make_manifest([3])
    (tmp_path / "set-000000.tar").chmod(0)
    for check in (peek, open_manifest):
        with pytest.raises(DataError, match=r"set-000000.tar, which cannot be read"):
            check(str(tmp_path / "set-*.tar"))


@pytest.mark.parametrize(("name", "samples", "classes"), [("cifar10", 10_000, 10), ("photos", 1225, 25)])
def test_real_shards(real_data, name, samples, classes):
    manifest = build_manifest(str(real_data(name) / "train-*.tar"))
    assert len(manifest) == samples and manifest.num_classes == classes and not manifest.quarantined
    assert np.bincount(manifest.label).tolist() == [samples // classes] * classes
