import json
import tarfile

import numpy as np
import pytest

from workloads.data.manifest import open_manifest
from workloads.data.pack_hf import pack_hf
from workloads.data.shards import DataError


@pytest.fixture
def folder(tmp_path, encoded):
    """`folder({"train/a.png": 3, "train/metadata.csv": "..."})`: grey images and texts."""

    def write(files):
        for name, content in files.items():
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content)
            else:
                path.write_bytes(encoded(np.full((4, 4, 3), content, np.uint8)))
        return tmp_path / "in"

    return write


def members(folder, split):
    """{stem: {suffix: content}}"""
    found = {}
    for path in folder.glob(f"{split}-*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key.split("_", 1)[1], {})[suffix] = tar.extractfile(member).read()
    return found


def test_a_table_in_each_split(folder, tmp_path):
    lines = [
        {"file_name": "a.png", "label": "dog", "text": ["one", "two"], "objects": {"boxes": [[1, 2, 3, 4]]}},
        {"file_name": "deep/b.png", "label": None, "text": None},
    ]
    table = "file_name,label,caption,photographer\nc.png,cat,a cat,\u00c4nne\n../train/a.png,cat,,\n"
    root = folder(
        {
            "train/a.png": 1,
            "train/deep/b.png": 2,
            "train/metadata.jsonl": "\n".join(map(json.dumps, lines)),
            "test/c.png": 3,
            "test/metadata.csv": table,
        }
    )
    packed = pack_hf(root, tmp_path / "out")
    assert packed.classes == ["cat", "dog"] and packed.samples == {"test": 1, "train": 2}
    (bad,) = packed.bad
    assert bad.startswith("test: got the path '../train/a.png', which climbs out")
    train, test = members(tmp_path / "out", "train"), members(tmp_path / "out", "test")
    assert train["a"].pop("png") and train["b"].keys() == {"png"}
    assert train["a"].pop("cls") == b"1" and train["a"].pop("txt") == b"one\ntwo"
    assert json.loads(train["a"].pop("json")) == {"objects": {"boxes": [[1, 2, 3, 4]]}} and not train["a"]
    assert test["c"]["cls"] == b"0" and test["c"]["txt"] == b"a cat"
    assert json.loads(test["c"]["json"]) == {"photographer": "\u00c4nne"}


def test_one_table_for_all_splits(folder, tmp_path):
    table = "file_name,label\ntrain/a.png,10\ntest/b.png,9\n"
    packed = pack_hf(folder({"train/a.png": 1, "test/b.png": 2, "metadata.csv": table}), tmp_path / "out")
    assert packed.samples == {"test": 1, "train": 1} and packed.classes == ["9", "10"]
    assert members(tmp_path / "out", "train")["a"]["cls"] == b"1"


def test_a_table_without_splits(folder, tmp_path):
    packed = pack_hf(folder({"a.png": 1, "metadata.csv": "file_name,text\na.png,hello\n"}), tmp_path / "out")
    assert packed.samples == {"train": 1} and packed.classes == []
    assert members(tmp_path / "out", "train")["a"]["txt"] == b"hello"


def test_class_folders(folder, tmp_path):
    packed = pack_hf(folder({"train/dog/a.png": 1, "train/cat/b.png": 2, "validation/cat/c.png": 3}), tmp_path / "out")
    assert packed.samples == {"train": 2, "validation": 1} and packed.classes == ["cat", "dog"]
    assert open_manifest(str(tmp_path / "out/validation-*.tar")).label.tolist() == [0]


def test_what_is_refused(folder, tmp_path):
    root = folder({"train/a.png": 1, "train/metadata.csv": "file_name\na.png\n", "test/b.png": 2})
    with pytest.raises(DataError, match="got a metadata table in train, none in test"):
        pack_hf(root, tmp_path / "out")
    for text, message in (("name\nb.png\n", "got no file_name in row 1 of"), ('file_name\n""\n', "got no file_name")):
        folder({"test/metadata.csv": text})
        with pytest.raises(DataError, match=message):
            pack_hf(root, tmp_path / "out")
    (root / "test/metadata.csv").unlink()
    folder({"test/metadata.jsonl": "{"})
    with pytest.raises(DataError, match="expected one JSON object a line"):
        pack_hf(root, tmp_path / "out")
