import csv
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from workloads.data import shard_writer
from workloads.data.decode import decode
from workloads.data.manifest import DataError, open_manifest
from workloads.data.pack import pack_csv, pack_digits, pack_folder
from workloads.data.ranged import read_members


def grey(value: int) -> np.ndarray:
    return np.full((6, 8, 3), value, np.uint8)


@pytest.fixture
def pictures(tmp_path, encoded):
    """cat: 3 images, one of them broken; dog: 2, one with dots in its name and one in a folder below."""
    files = {
        "cat/a.png": encoded(grey(1)),
        "cat/b.JPG": encoded(grey(2), "JPEG"),
        "cat/broken.png": encoded(grey(3))[:50],
        "cat/notes.txt": b"no image",
        "dog/a.v2.final.png": encoded(grey(4)),
        "dog/deep/a.webp": encoded(grey(5), "WEBP", lossless=True),
        "dog/.hidden.png": encoded(grey(6)),
    }
    return write_files(tmp_path / "pictures", files)


def write_files(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def values(manifest):
    """[(grey value, class name)] of all samples."""
    labels = [None if label < 0 else manifest.classes[label] for label in manifest.label]
    images = read_members(manifest, "image", np.arange(len(manifest)))
    return sorted((int(decode(data)[0, 0, 0]), label) for data, label in zip(images, labels, strict=True))


def test_digits(tmp_path):
    packed = pack_digits(tmp_path / "digits")
    assert packed.samples == {"train": 1437, "test": 360} and not packed.bad
    assert packed.shards == {"train": ["train-000000.tar", "train-000001.tar"], "test": ["test-000000.tar"]}
    train = open_manifest(str(tmp_path / "digits/train-{000000..000001}.tar"))
    test = open_manifest(str(tmp_path / "digits/test-000000.tar"))
    assert train.classes == [str(i) for i in range(10)] and not train.quarantined
    assert np.bincount(test.label).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert len(list((tmp_path / "digits").glob("*.manifest.parquet"))) == 2
    stems = {key.split("_")[1] for manifest in (train, test) for key in manifest.keys}
    assert len(stems) == 1797, "no digit is in both"
    image = decode(read_members(test, "image", np.array([0]))[0])
    assert image.shape == (32, 32, 3) and image.max() > 200 and image.min() == 0


def test_digits_are_the_same_bytes_each_time(tmp_path):
    pack_digits(tmp_path / "a")
    pack_digits(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_class_folders(pictures, tmp_path):
    seen = []
    packed = pack_folder(pictures, tmp_path / "out", samples_per_shard=3, on_sample=seen.append)
    assert packed.samples == {"train": 4} and packed.classes == ["cat", "dog"] and len(seen) == 5
    assert packed.shards == {"train": ["train-000000.tar", "train-000001.tar"]}
    (bad,) = packed.bad
    assert bad.startswith("cat/broken.png: got ")
    manifest = open_manifest(str(tmp_path / "out/train-*.tar"))
    assert values(manifest) == [(1, "cat"), (2, "cat"), (4, "dog"), (5, "dog")] and not manifest.quarantined
    assert (tmp_path / "out/classes.txt").read_text() == "cat\ndog\n"


def test_bytes_are_copied_and_metadata_fixed(pictures, tmp_path):
    pack_folder(pictures, tmp_path / "a")
    pack_folder(pictures, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with tarfile.open(tmp_path / "a/train-000000.tar") as tar:
        members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o444)}
        stored = {tar.extractfile(m).read() for m in members if m.name.endswith("jpg")}
    assert stored == {(pictures / "cat/b.JPG").read_bytes()}


def test_split_folders_share_the_class_numbers(tmp_path, encoded):
    files = {"train/b/1.png": grey(1), "train/c/2.png": grey(2), "test/a/3.png": grey(3), "test/c/4.png": grey(4)}
    root = write_files(tmp_path / "in", {name: encoded(pixels) for name, pixels in files.items()})
    packed = pack_folder(root, tmp_path / "out")
    assert packed.samples == {"test": 2, "train": 2} and packed.classes == ["a", "b", "c"]
    assert values(open_manifest(str(tmp_path / "out/train-*.tar"))) == [(1, "b"), (2, "c")]
    assert values(open_manifest(str(tmp_path / "out/test-*.tar"))) == [(3, "a"), (4, "c")]


def test_flat_folder_has_no_labels(tmp_path, encoded):
    root = write_files(tmp_path / "in", {f"{i}.png": encoded(grey(i)) for i in range(3)})
    packed = pack_folder(root, tmp_path / "out")
    assert packed.classes == [] and not (tmp_path / "out/classes.txt").exists()
    assert values(open_manifest(str(tmp_path / "out/*.tar"))) == [(0, None), (1, None), (2, None)]


def test_images_beside_class_folders_are_refused(pictures, tmp_path, encoded):
    write_files(pictures, {"loose.png": encoded(grey(9))})
    with pytest.raises(DataError, match=r"got 1 files beside class folders in .*loose.png"):
        pack_folder(pictures, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def write_csv(path, rows, header=("image", "label")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_csv_with_names(pictures, tmp_path):
    rows = [
        ("cat/a.png", "kitty"),
        ("dog/a.v2.final.png", "dog"),
        ("nowhere.png", "dog"),
        ("cat/b.JPG", ""),
        ("", "dog"),
    ]
    table = write_csv(tmp_path / "list.csv", rows)
    packed = pack_csv(table, tmp_path / "out", root=pictures)
    assert packed.classes == ["dog", "kitty"] and packed.samples == {"train": 2}
    assert values(open_manifest(str(tmp_path / "out/train-*.tar"))) == [(1, "kitty"), (4, "dog")]
    assert len(packed.bad) == 3
    assert packed.bad[:2] == ["list.csv: row 5: no label", "list.csv: row 6: no path of an image"]
    assert "nowhere.png" in packed.bad[2]


def test_csv_numbers_are_ordered_as_numbers(pictures):
    rows = [("cat/a.png", "10"), ("cat/b.JPG", "9")]
    packed = pack_csv(write_csv(pictures / "list.csv", rows), pictures / "out")
    assert packed.classes == ["9", "10"]


def test_csv_without_labels_and_with_other_columns(pictures):
    table = write_csv(pictures / "list.csv", [("x", "cat/a.png")], header=("id", "path"))
    assert pack_csv(table, pictures / "out", image_column="path", label_column=None).classes == []
    with pytest.raises(DataError, match=r"no column 'image' in .*, expected one of id, path"):
        pack_csv(table, pictures / "out2")
    with pytest.raises(DataError, match="cannot be read"):
        pack_csv(pictures / "no.csv", pictures / "out2")


def test_an_existing_folder_is_only_replaced_by_force(pictures, tmp_path):
    out = tmp_path / "out"
    pack_folder(pictures, out)
    before = contents(out)
    with pytest.raises(DataError, match="not empty, expected a new folder"):
        pack_folder(pictures, out)
    (pictures / "cat/a.png").unlink()
    assert contents(out) == before
    assert pack_folder(pictures, out, force=True).samples == {"train": 3}
    assert len(open_manifest(str(out / "*.tar"))) == 3
    (out / "thesis.doc").write_bytes(b"years of work")
    with pytest.raises(DataError, match=r"thesis.doc, expected packed shards alone"):
        pack_folder(pictures, out, force=True)
    assert (out / "thesis.doc").exists()


def test_a_failure_leaves_the_old_as_it_was_and_can_be_continued(pictures, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack_folder(pictures, out)
    before = contents(out)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer, "open_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        pack_folder(pictures, out, force=True)
    with pytest.raises(OSError, match="No space left"):
        pack_folder(pictures, tmp_path / "new")
    assert contents(out) == before
    monkeypatch.undo()
    assert pack_folder(pictures, tmp_path / "new").samples == {"train": 4}, "what was written before is used"
    assert contents(tmp_path / "new") == before
    assert pack_folder(pictures, out, force=True).samples == {"train": 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out", "pictures"]


def test_nothing_to_pack(tmp_path):
    root = write_files(tmp_path / "in", {"a.png": b"broken", "b.txt": b""})
    with pytest.raises(DataError, match=r"no sample that can be packed.*a.png: got 6 bytes"):
        pack_folder(root, tmp_path / "out")
    with pytest.raises(DataError, match="got no folder"):
        pack_folder(tmp_path / "no", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_are_unique_and_hold_no_dot(pictures, tmp_path):
    pack_folder(pictures, tmp_path / "out")
    keys = list(open_manifest(str(tmp_path / "out/*.tar")).keys)
    assert len(set(keys)) == 4 and not any("." in key for key in keys)
    assert sorted(key.split("_", 1)[1] for key in keys) == ["a", "a", "a_v2_final", "b"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's own
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_what_was_packed(pictures, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pack_folder(pictures, tmp_path / "out")
    samples = list(webdataset.WebDataset(str(tmp_path / "out/train-000000.tar"), shardshuffle=False))
    assert sorted(sample["cls"] for sample in samples) == [b"0", b"0", b"1", b"1"]
    for sample in samples:
        data = next(value for name, value in sample.items() if name in ("png", "jpg", "webp"))
        assert Image.open(io.BytesIO(data)).size == (8, 6)
