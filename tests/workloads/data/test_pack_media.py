import gzip
import io
import tarfile

import numpy as np
import pytest

from workloads.data import member_checks
from workloads.data.manifest import open_manifest
from workloads.data.pack_media import pack_videos, pack_volumes
from workloads.data.shards import DataError


def unpack(folder, pattern, root, suffixes):
    """Members of shards as files, those with a label in the folder of their class; the number of files."""
    count = 0
    for shard in folder.glob(pattern):
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in files.items():
            key, _, suffix = name.partition(".")
            label = files.get(f"{key}.cls")
            place = root if label is None else root / f"c{label.decode()}"
            place.mkdir(parents=True, exist_ok=True)
            if suffix in suffixes:
                (place / name).write_bytes(data)
                count += 1
    return count


def members(folder):
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key.split("_", 1)[1], {})[suffix] = tar.extractfile(member).read()
    return found


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def nifti(voxels):
    import nibabel

    return gzip.compress(nibabel.Nifti1Image(voxels, np.eye(4)).to_bytes(), mtime=0)


def test_real_videos(data_folder, tmp_path):
    pytest.importorskip("av")
    root = tmp_path / "in"
    count = unpack(data_folder / "video/shapes3", "test-*.tar", root, ["mp4"])
    first = sorted(root.glob("c0/*.mp4"))[0]
    (root / "c1/broken.MP4").write_bytes(first.read_bytes()[:1000])
    (root / "c1/notes.txt").write_text("no video")
    packed = pack_videos(root, tmp_path / "out", samples_per_shard=10)
    assert packed.samples == {"train": count} and packed.classes == ["c0", "c1", "c2"]
    (bad,) = packed.bad
    assert bad.startswith("c1/broken.MP4: got ")
    assert members(tmp_path / "out")[first.stem] == {"mp4": first.read_bytes(), "cls": b"0"}
    manifest = open_manifest(str(tmp_path / "out/*.tar"))
    assert manifest.primary == "video" and np.bincount(manifest.label).tolist() == [9, 9, 9]


def test_real_volumes_with_masks_beside(data_folder, tmp_path):
    pytest.importorskip("nibabel")
    root = tmp_path / "in"
    assert unpack(data_folder / "hippocampus", "val-*.tar", root, ["nii.gz", "seg.nii.gz"]) == 56
    packed = pack_volumes(root, tmp_path / "out")
    assert packed.samples == {"train": 28} and packed.classes == [] and not packed.bad
    found = members(tmp_path / "out")
    for path in root.glob("*.seg.nii.gz"):
        stem = path.name.removesuffix(".seg.nii.gz")
        assert found[stem] == {"nii.gz": (root / f"{stem}.nii.gz").read_bytes(), "seg.nii.gz": path.read_bytes()}


@pytest.mark.parametrize("images, labels", [("images", "labels"), ("imagesTr", "labelsTr"), (".", "labels")])
def test_masks_in_a_folder_of_labels(tmp_path, images, labels):
    pytest.importorskip("nibabel")
    root = tmp_path / "in"
    for folder in (root / images, root / labels):
        folder.mkdir(parents=True, exist_ok=True)
    voxels, mask = np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.ones((2, 3, 4), np.uint8)
    (root / images / "a.nii.gz").write_bytes(nifti(voxels))
    (root / labels / "a.nii.gz").write_bytes(nifti(mask))
    (root / images / "b.npy").write_bytes(npy(voxels))
    (root / images / "wrong.npy").write_bytes(npy(voxels))
    (root / labels / "wrong.npy").write_bytes(npy(mask[:1]))
    (root / images / "half.nii.gz").write_bytes(nifti(voxels)[:60])
    (root / labels / "nobody.nii.gz").write_bytes(nifti(mask))
    packed = pack_volumes(root, tmp_path / "out")
    found = members(tmp_path / "out")
    assert found == {"a": {"nii.gz": nifti(voxels), "seg.nii.gz": nifti(mask)}, "b": {"npy": npy(voxels)}}
    bad = {line.split(": ")[0].rsplit("/")[-1]: line for line in packed.bad}
    assert bad.keys() == {"wrong.npy", "half.nii.gz"}
    assert "got a mask wrong.npy of (1, 3, 4) voxels, expected (2, 3, 4)" in bad["wrong.npy"]


def test_classes_of_volumes(tmp_path):
    pytest.importorskip("nibabel")
    for name in ("healthy", "ill"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.npy").write_bytes(npy(np.zeros((2, 2, 2))))
    packed = pack_volumes(tmp_path / "in", tmp_path / "out")
    assert packed.classes == ["healthy", "ill"] and packed.samples == {"train": 2}


def test_a_missing_library_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(member_checks.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"got no module av, expected it to open videos; run `pip install av`"):
        pack_videos(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="got no module nibabel"):
        pack_volumes(tmp_path, tmp_path / "out")
