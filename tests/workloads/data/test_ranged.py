import os

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.data import ranged, sources
from workloads.data.manifest import DataError, build_manifest
from workloads.data.ranged import read_members


@pytest.fixture
def pattern(tmp_path, write_tar):
    for shard in range(3):
        members = [(f"{shard}{i}.png", bytes([shard * 50 + i]) * (i * 211)) for i in range(12)]
        write_tar(tmp_path / f"x-{shard}.tar", members)
    return str(tmp_path / "x-*.tar")


@pytest.fixture
def counted(monkeypatch):
    calls = []

    def pread(file, size, offset):
        calls.append(size)
        return os.pread(file, size, offset)

    monkeypatch.setattr(sources, "os", type("os", (), {**vars(os), "pread": staticmethod(pread)}))
    return calls


def test_any_rows_in_any_order(pattern):
    manifest = build_manifest(pattern)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, 35), max_size=40))
    def check(rows):
        images = read_members(manifest, "image", np.array(rows, np.int64))
        assert images == [bytes([row // 12 * 50 + row % 12]) * (row % 12 * 211) for row in rows]

    check()


def test_neighbours_are_read_at_once(pattern, counted):
    manifest = build_manifest(pattern)
    read_members(manifest, "image", np.arange(12))
    assert len(counted) == 1
    counted.clear()
    read_members(manifest, "image", np.array([0, 1, 11, 13]))
    assert len(counted) == 3, "two near each other, one far from them, one of another shard"


def test_a_run_has_a_limit(pattern, counted, monkeypatch):
    monkeypatch.setattr(ranged, "MAX_RUN_BYTES", 4000)
    manifest = build_manifest(pattern)
    read_members(manifest, "image", np.arange(12))
    assert len(counted) > 2 and max(counted) < 4000 + ranged.MAX_GAP_BYTES + 2500


def test_a_shard_that_vanished_or_changed_is_named(pattern, tmp_path):
    manifest = build_manifest(pattern)
    (tmp_path / "x-1.tar").unlink()
    with open(tmp_path / "x-2.tar", "r+b") as file:
        file.truncate(100)
    assert len(read_members(manifest, "image", np.arange(12))) == 12
    with pytest.raises(DataError, match=r"No such file or directory for .*x-1.tar"):
        read_members(manifest, "image", np.array([0, 12]))
    with pytest.raises(DataError, match=rf"x-2.tar of 100 bytes, expected {manifest.shard_bytes[2]}"):
        read_members(manifest, "image", np.array([24]))


def test_no_handle_is_left_open(pattern):
    manifest = build_manifest(pattern)
    process = psutil.Process()
    before = process.num_fds()
    read_members(manifest, "image", np.arange(36))
    assert process.num_fds() == before
