import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workloads.data.decode import decode
from workloads.data.manifest import open_manifest
from workloads.data.reshard import parse_bytes, reshard
from workloads.data.shard_writer import ShardLimit
from workloads.data.shards import DataError


def members(folder, pattern="*.tar"):
    """[(name, content)] of all archives of a folder, in order."""
    found = []
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]
    return found


def by_key(found):
    keys = {}
    for name, data in found:
        key, _, suffix = name.partition(".")
        keys.setdefault(key, {})[suffix] = data
    return keys


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def small_samples(count):
    """Samples of one to three members; a key and its members are recognised by their content."""
    samples = []
    for i in range(count):
        samples.append((f"k{i:03d}.txt", f"caption {i}".encode()))
        samples += [(f"k{i:03d}.seg.png", bytes([i % 256]) * (i * 37 % 700))] if i % 2 else []
        samples += [(f"k{i:03d}.cls", str(i % 3).encode())] if i % 3 else []
    return samples


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any),
    limit=st.one_of(
        st.integers(1, 9).map(lambda n: ShardLimit(samples=n)), st.integers(1, 6000).map(lambda n: ShardLimit(bytes=n))
    ),
    shuffle=st.none() | st.integers(0, 5),
)
def test_every_sample_once_with_all_its_members(tmp_path_factory, write_tar, sizes, limit, shuffle):
    folder = tmp_path_factory.mktemp("in")
    samples = by_key(small_samples(sum(sizes)))
    names = iter(samples)
    for number, size in enumerate(sizes):
        keys = [next(names) for _ in range(size)]
        write_tar(folder / f"s-{number}.tar", [(f"{k}.{s}", d) for k in keys for s, d in samples[k].items()])
    packed = reshard(str(folder / "*.tar"), folder / "out", limit=limit, shuffle=shuffle)
    assert by_key(members(folder / "out")) == samples
    assert packed.samples == {"s": len(samples)} and not packed.bad
    for shard in packed.shards["s"]:
        found = members(folder / "out", shard)
        count = len(by_key(found))
        assert count > 0
        assert limit.samples is None or count <= limit.samples
        size = sum(512 + -(-len(data) // 512) * 512 for _, data in found)
        assert limit.bytes is None or size <= limit.bytes or count == 1
    keys = [name.partition(".")[0] for name, _ in members(folder / "out")]
    assert keys == sorted(keys) if shuffle is None else True


def test_shuffled_by_its_seed_alone(tmp_path, write_tar):
    write_tar(tmp_path / "train-0.tar", small_samples(40))
    write_tar(tmp_path / "train-1.tar", [(f"x{name}", data) for name, data in small_samples(40)])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        packed = reshard(str(tmp_path / "train-*.tar"), tmp_path / name, limit=ShardLimit(samples=20), shuffle=seed)
    assert packed.shards == {"train": [f"train-{i:06d}.tar" for i in range(4)]}
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")
    first = [name[0] for name, _ in members(tmp_path / "a", "train-000000.tar")]
    assert 0 < first.count("x") < len(first), "shards are mixed"


def test_continues_after_a_kill(tmp_path, write_tar):
    write_tar(tmp_path / "train-0.tar", small_samples(12))

    def run(out, **options):
        return reshard(str(tmp_path / "train-0.tar"), out, limit=ShardLimit(samples=5), shuffle=3, **options)

    run(tmp_path / "whole")
    seen = []

    def kill(name):
        seen.append(name)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", on_sample=kill)
    seen = []
    run(tmp_path / "out", on_sample=seen.append)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and len(seen) == 7


def test_only_larger_images_become_smaller(tmp_path, write_tar, encoded):
    large, small = np.zeros((60, 90, 3), np.uint8), np.zeros((20, 90, 3), np.uint8)
    large[:, 45:] = 200
    files = [("a.png", encoded(large)), ("a.cls", b"1"), ("a.txt", b"grey"), ("b.png", encoded(small)), ("b.cls", b"0")]
    write_tar(tmp_path / "x-0.tar", [*files, ("c.jpg", b"broken"), ("c.cls", b"0")])
    (tmp_path / "classes.txt").write_text("no\nyes\n")
    out = tmp_path / "out"
    packed = reshard(str(tmp_path / "x-0.tar"), out, limit=ShardLimit(samples=9), resize_short_side=30, quality=95)
    found = by_key(members(out))
    pixels = decode(found["a"].pop("jpg")).astype(int)
    assert pixels.shape == (30, 45, 3) and pixels[:, :20].max() < 10 and abs(pixels[:, 25:] - 200).max() < 10
    assert found["a"] == {"cls": b"1", "txt": b"grey"} and found["b"] == {"png": files[3][1], "cls": b"0"}
    (bad,) = packed.bad
    assert bad.startswith("x-0.tar: c at offset ") and "got 6 bytes" in bad
    assert open_manifest(str(out / "*.tar")).classes == ["no", "yes"]


@pytest.mark.parametrize("suffix, data", [("seg.png", b"mask"), ("json", b'{"boxes": []}'), ("depth.npy", b"")])
def test_what_would_not_fit_a_smaller_image_is_refused(tmp_path, write_tar, encoded, suffix, data):
    image = encoded(np.zeros((60, 90, 3), np.uint8))
    write_tar(tmp_path / "x-0.tar", [("a.png", image), (f"a.{suffix}", data)])
    with pytest.raises(DataError, match=f"got {suffix} beside the image of x-0.tar: a at"):
        reshard(str(tmp_path / "x-0.tar"), tmp_path / "out", limit=ShardLimit(samples=9), resize_short_side=30)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_used_is_left_out_and_told(tmp_path, write_tar):
    files = [("../evil.txt", b"x"), ("a.txt", b"a"), ("a.cls", b"7"), ("b.txt", b"b"), ("b.txt", b"again")]
    write_tar(tmp_path / "x-0.tar", [*files, ("e.", b"no suffix"), ("c.txt", b"c"), ("b.json", b"{}")])
    (tmp_path / "classes.txt").write_text("one\n")
    packed = reshard(str(tmp_path / "x-0.tar"), tmp_path / "out", limit=ShardLimit(samples=9))
    assert members(tmp_path / "out") == [("b.txt", b"b"), ("c.txt", b"c")]
    told = "\n".join(packed.bad)
    for why in ("climbs out", "label 7 is out of range", "duplicate key", "expected a suffix"):
        assert why in told
    assert len(packed.bad) == 5


def test_keys_that_repeat_need_a_prefix(tmp_path, write_tar):
    for i in range(2):
        write_tar(tmp_path / f"part-{i}.tar", [("000.txt", bytes([i])), ("000.cls", b"1")])
    pattern, limit = str(tmp_path / "part-*.tar"), ShardLimit(samples=9)
    with pytest.raises(DataError, match=r"got 1 keys in more than one shard \(part-1.tar: 000 at .*--prefix-keys"):
        reshard(pattern, tmp_path / "out", limit=limit)
    reshard(pattern, tmp_path / "out", limit=limit, prefix_keys=True)
    found = by_key(members(tmp_path / "out"))
    assert found == {f"part-{i}/000": {"txt": bytes([i]), "cls": b"1"} for i in range(2)}


def test_real_photos(data_folder, tmp_path):
    shards = str(data_folder / "photos/test-*.tar")
    packed = reshard(shards, tmp_path / "out", limit=ShardLimit(bytes=2 << 20), shuffle=0)
    assert by_key(members(tmp_path / "out")) == by_key(members(data_folder / "photos", "test-*.tar"))
    assert packed.samples == {"test": 300} and all(
        (tmp_path / "out" / shard).stat().st_size <= (2 << 20) + 10240 for shard in packed.shards["test"]
    )


def test_sizes():
    assert [parse_bytes(text) for text in ("500MB", "1GiB", "12", "1.5k", "2 mb")] == [5e8, 2**30, 12, 1500, 2e6]
    for text in ("", "MB", "1TB", "-1MB"):
        with pytest.raises(DataError, match="expected one such as 500MB"):
            parse_bytes(text)
    with pytest.raises(DataError, match="either samples or bytes"):
        ShardLimit()
