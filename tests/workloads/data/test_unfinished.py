import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from workloads.data.pack import pack_folder
from workloads.data.shards import DataError
from workloads.data.unfinished import Complete, resumable


class KilledError(Exception):
    pass


def killed_after(samples):
    """An `on_sample` that raises when so many are done."""
    seen = []

    def on_sample(name):
        seen.append(name)
        if len(seen) == samples:
            raise KilledError

    return on_sample


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def pictures(tmp_path, encoded):
    """2 splits x 2 classes x 5 images, one broken in each class."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(5):
                data = encoded(np.full((4, 4, 3), 10 * i, np.uint8))
                (folder / f"{name}{i}.png").write_bytes(data[: 40 if i == 2 else None])
    return tmp_path / "pictures"


@pytest.mark.parametrize("samples", [1, 4, 9, 10, 14, 20])
def test_a_repeated_run_continues_and_ends_with_the_same_bytes(pictures, tmp_path, samples):
    whole = pack_folder(pictures, tmp_path / "whole", samples_per_shard=2)
    out = tmp_path / "out"
    with pytest.raises(KilledError):
        pack_folder(pictures, out, samples_per_shard=2, on_sample=killed_after(samples))
    assert not out.exists()
    complete = sorted((tmp_path / ".out.partial").glob("content/*.tar"))
    seen = []
    again = pack_folder(pictures, out, samples_per_shard=2, on_sample=seen.append)
    assert contents(out) == contents(tmp_path / "whole")
    assert len(seen) <= 20 - 2 * len(complete), "complete shards are not written again"
    assert (again.samples, again.shards, again.bad) == (whole.samples, whole.shards, whole.bad)
    assert not (tmp_path / ".out.partial").exists()


def test_killed_by_the_system(pictures, tmp_path):
    pack_folder(pictures, tmp_path / "whole", samples_per_shard=2)
    code = (
        "import sys, time; from pathlib import Path; from workloads.data.pack import pack_folder; n = []\n"
        "def wait(name):\n    n.append(name)\n    len(n) == 13 and (print('now', flush=True), time.sleep(60))\n"
        "pack_folder(Path(sys.argv[1]), Path(sys.argv[2]), samples_per_shard=2, on_sample=wait)"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, pictures, out], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"now\n"
    with pytest.raises(DataError, match=r"which another process is writing.*wait until it ends"):
        pack_folder(pictures, out, samples_per_shard=2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = {path.name for path in (tmp_path / ".out.partial/content").iterdir()}
    assert any(name.startswith(".test") or name.startswith(".train") for name in left), "killed within a shard"
    seen = []
    pack_folder(pictures, out, samples_per_shard=2, on_sample=seen.append)
    assert contents(out) == contents(tmp_path / "whole") and len(seen) < 14


def test_other_arguments_or_other_files_are_refused(pictures, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KilledError):
        pack_folder(pictures, out, samples_per_shard=2, on_sample=killed_after(9))
    with pytest.raises(DataError, match=r"got samples_per_shard=3, expected samples_per_shard=2 as in .* or --force"):
        pack_folder(pictures, out, samples_per_shard=3)
    (pictures / "train/cat/new.png").write_bytes((pictures / "train/cat/cat0.png").read_bytes())
    with pytest.raises(DataError, match="got files="):
        pack_folder(pictures, out, samples_per_shard=2)
    pack_folder(pictures, tmp_path / "whole", samples_per_shard=3)
    pack_folder(pictures, out, samples_per_shard=3, force=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_kill_while_an_old_folder_is_replaced_leaves_it(pictures, tmp_path):
    out = tmp_path / "out"
    pack_folder(pictures, out, samples_per_shard=3)
    before = contents(out)
    with pytest.raises(KilledError):
        pack_folder(pictures, out, samples_per_shard=2, force=True, on_sample=killed_after(9))
    assert contents(out) == before
    with pytest.raises(DataError, match="not empty"):
        pack_folder(pictures, out, samples_per_shard=2)
    pack_folder(pictures, out, samples_per_shard=2, force=True)
    assert len(list(out.glob("train-*.tar"))) == 4


def test_an_old_folder_that_a_kill_had_moved_away_comes_back(pictures, tmp_path):
    out = tmp_path / "out"
    pack_folder(pictures, out, samples_per_shard=3)
    before = contents(out)
    with pytest.raises(KilledError):
        pack_folder(pictures, out, samples_per_shard=2, force=True, on_sample=killed_after(9))
    out.rename(tmp_path / ".out.partial/old")
    with pytest.raises(DataError, match="not empty"):
        pack_folder(pictures, out, samples_per_shard=2)
    assert contents(out) == before


def shard(number):
    return Complete("train", f"train-{number}.tar", 1, number + 1, [])


def write(work, number):
    with work.open(shard(number).shard) as file:
        file.write(bytes([number]))
    work.add(shard(number))


def test_what_a_kill_cut_off_is_dropped(tmp_path):
    arguments = {"seed": 1, "limit": (2, None)}
    with pytest.raises(KilledError), resumable(tmp_path / "out", arguments, force=False) as work:
        write(work, 0)
        (work.folder / ".train-1.tar.tmp").write_bytes(b"half")
        (work.folder / "train-1.tar").write_bytes(b"whole, but not in the journal")
        raise KilledError
    journal = tmp_path / ".out.partial/journal.jsonl"
    with open(journal, "ab") as file:
        file.write(b'{"split": "tr')
    with resumable(tmp_path / "out", arguments, force=False) as work:
        assert work.complete == [shard(0)]
        assert [path.name for path in work.folder.iterdir()] == ["train-0.tar"]
        write(work, 1)
        assert [json.loads(line).get("shard") for line in journal.read_text().splitlines()] == [
            None,
            "train-0.tar",
            "train-1.tar",
        ]
    assert contents(tmp_path / "out") == {"train-0.tar": b"\0", "train-1.tar": b"\1"}


def test_a_run_without_a_complete_shard_leaves_nothing(tmp_path):
    with pytest.raises(KilledError), resumable(tmp_path / "a/out", {}, force=False):
        raise KilledError
    assert list((tmp_path / "a").iterdir()) == []


def test_a_file_is_there_when_it_is_whole(tmp_path):
    with resumable(tmp_path / "out", {}, force=False) as work:
        with pytest.raises(KilledError), work.open("train-0.tar") as file:
            file.write(b"half")
            raise KilledError
        assert not (work.folder / "train-0.tar").exists()
        write(work, 0)
        (work.folder / ".train-0.tar.tmp").unlink(missing_ok=True)
    assert contents(tmp_path / "out") == {"train-0.tar": b"\0"}


def test_an_out_that_appeared_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="not empty"), resumable(out, {}, force=False) as work:
        write(work, 0)
        out.mkdir()
        (out / "thesis.doc").write_bytes(b"years of work")
    assert contents(out) == {"thesis.doc": b"years of work"}
