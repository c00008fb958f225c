import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workloads.data.decode import decode
from workloads.data.manifest import open_manifest
from workloads.data.pack_parquet import BATCH_ROWS, Columns, pack_parquet
from workloads.data.shards import DataError


@pytest.fixture
def grey(encoded):
    return lambda value: encoded(np.full((4, 5, 3), value, np.uint8))


def samples(folder, split="train"):
    """[(key, {suffix: content})] in order."""
    found = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return list(found.items())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_parquet(path, columns, features=None, **options):
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def test_hugging_face_structs_with_class_names(tmp_path, grey):
    images = [{"bytes": grey(i), "path": f"dir/pic.{i}.png"} for i in range(5)]
    features = {"label": {"names": ["zebra", "0"], "_type": "ClassLabel"}}
    columns = {"image": images, "label": [1, 0, 1, -1, None], "text": ["one", None, "a\nb", "", "d"]}
    file = write_parquet(tmp_path / "x.parquet", columns, features)
    packed = pack_parquet([file], tmp_path / "out", Columns(label="label", caption="text"), samples_per_shard=2)
    assert packed.classes == ["zebra", "0"] and packed.samples == {"train": 5} and not packed.bad
    assert packed.shards == {"train": [f"train-{i:06d}.tar" for i in range(3)]}
    found = samples(tmp_path / "out")
    assert [key for key, _ in found] == [f"{i:08d}_pic_{i}" for i in range(5)]
    assert [members["png"] for _, members in found] == [image["bytes"] for image in images]
    assert [members.get("cls") for _, members in found] == [b"1", b"0", b"1", None, None]
    assert [members.get("txt") for _, members in found] == [b"one", None, b"a\nb", b"", b"d"]
    assert open_manifest(str(tmp_path / "out/*.tar")).label.tolist() == [1, 0, 1, -1, -1]


def test_bytes_with_keys_and_names_as_labels(tmp_path, grey, encoded):
    jpeg = encoded(np.zeros((4, 4, 3), np.uint8), "JPEG")
    columns = {
        "pixels": [grey(0), jpeg, b"broken", grey(3), grey(4), grey(5)],
        "kind": ["10", "9", "9", "9", "10", "9"],
        "id": ["a/b.c", "d", "e", "d", None, "f"],
    }
    file = write_parquet(tmp_path / "x.parquet", columns)
    packed = pack_parquet([file], tmp_path / "out", Columns("pixels", "kind", "id"))
    assert packed.classes == ["9", "10"]
    expected = [("a_b_c", {"png": grey(0), "cls": b"1"}), ("d", {"jpg": jpeg, "cls": b"0"})]
    assert samples(tmp_path / "out") == [*expected, ("f", {"png": grey(5), "cls": b"0"})]
    assert [line.split(",")[0] for line in packed.bad] == [
        "x.parquet: row 2: got 6 bytes that start with b'broken'",
        "x.parquet: row 3: got the key 'd' a second time",
        "x.parquet: row 4: got no key",
    ]


def test_paths_stay_inside_the_folder(tmp_path, grey):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.png").write_bytes(grey(1))
    (tmp_path / "b.png").write_bytes(grey(2))
    names = ["a.png", "../b.png", str(tmp_path / "b.png"), "none.png"]
    file = write_parquet(tmp_path / "data/x.parquet", {"image": names})
    packed = pack_parquet([file], tmp_path / "out", Columns())
    assert samples(tmp_path / "out") == [("00000000_a", {"png": grey(1)})] and packed.classes == []
    assert ["climbs out" in line for line in packed.bad] == [True, True, False]
    assert "No such file" in packed.bad[2]


def test_files_named_as_splits(tmp_path, grey):
    for name, values in (("train-00000-of-00002", [1, 2]), ("train-00001-of-00002", [3]), ("test-00000-of-00001", [4])):
        write_parquet(tmp_path / f"{name}.parquet", {"image": [grey(v) for v in values], "label": values})
    packed = pack_parquet(sorted(tmp_path.glob("*.parquet")), tmp_path / "out", Columns(label="label"))
    assert packed.samples == {"test": 1, "train": 3} and packed.classes == ["1", "2", "3", "4"]
    assert [decode(members["png"])[0, 0, 0] for _, members in samples(tmp_path / "out")] == [1, 2, 3]


@pytest.mark.parametrize("kill_at", [1, 70, 130, 149])
def test_continues_after_a_kill_without_reading_the_rows_before(tmp_path, grey, kill_at):
    rows = [b"broken" if i % 11 == 5 else grey(i) for i in range(150)]
    files = [
        write_parquet(tmp_path / "a.parquet", {"image": rows[:90]}, row_group_size=20),
        write_parquet(tmp_path / "b.parquet", {"image": rows[90:]}, row_group_size=BATCH_ROWS + 30),
    ]

    def run(out, **options):
        return pack_parquet(files, out, Columns(), samples_per_shard=16, **options)

    whole = run(tmp_path / "whole")
    assert whole.samples == {"train": 136} and len(whole.bad) == 14
    seen = []

    def kill(name):
        seen.append(name)
        if len(seen) == kill_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", on_sample=kill)
    seen = []
    again = run(tmp_path / "out", on_sample=seen.append)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and again.bad == whole.bad
    assert len(seen) < 150 - kill_at + 2 * 16


def test_what_is_refused(tmp_path, grey):
    file = write_parquet(tmp_path / "x.parquet", {"image": [grey(1)], "label": [0]}, {"label": {"names": ["a"]}})
    other = write_parquet(tmp_path / "y.parquet", {"image": [grey(1)], "label": [0]}, {"label": {"names": ["b"]}})
    (tmp_path / "z.parquet").write_bytes(b"no parquet")
    for files, columns, message in (
        ([file], Columns("pixels"), "got no column 'pixels' in .*, expected one of image, label"),
        ([file], Columns("label"), "got int64 in the column 'label'"),
        ([file, other], Columns(label="label"), "other class names"),
        ([tmp_path / "z.parquet"], Columns(), "which cannot be read"),
        ([], Columns(), "got no files"),
    ):
        with pytest.raises(DataError, match=message):
            pack_parquet(files, tmp_path / "out", columns)
    assert not (tmp_path / "out").exists()


def test_a_label_beyond_the_classes_is_left_out(tmp_path, grey):
    columns = {"image": [grey(1), grey(2)], "label": [1, 0]}
    file = write_parquet(tmp_path / "x.parquet", columns, {"label": {"names": ["a"]}})
    packed = pack_parquet([file], tmp_path / "out", Columns(label="label"))
    assert packed.bad == ["x.parquet: row 0: got the label 1, expected one of 1 classes"]
