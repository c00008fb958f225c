import json
import subprocess
import sys

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from workloads.data.commands import inspect, pack_app

app = typer.Typer()
app.add_typer(pack_app, name="pack")
app.command("inspect")(inspect)


def manta(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def shards(make_manifest, tmp_path):
    make_manifest([4, 3], corrupt=[5])
    return str(tmp_path / "set-*.tar")


def test_inspect_json(shards, tmp_path):
    report = json.loads(manta("inspect", shards, "--json").stdout)
    assert {"samples", "bytes", "classes", "shards", "quarantined"} <= report.keys() and "bad" not in report
    assert report["samples"] == 7 and report["classes"] == {"0": 3, "1": 2, "2": 2} and report["quarantined"] == []
    assert report["shards"] == [str(tmp_path / f"set-00000{i}.tar") for i in range(2)]
    assert report["bytes"] == sum((tmp_path / f"set-00000{i}.tar").stat().st_size for i in range(2))


def test_inspect_lines_in_a_pipe(shards, tmp_path, write_tar):
    write_tar(tmp_path / "set-000002.tar", [("x.txt", b"1")])
    lines = manta("inspect", shards).stdout.splitlines()
    assert "samples\t7" in lines and "class\t0\t3" in lines and "quarantined\t1" in lines
    assert "quarantined\tset-000002.tar: x at offset 0: no image, got txt" in lines


def test_inspect_decode_lists_bad_members(shards):
    report = json.loads(manta("inspect", shards, "--decode", "--json").stdout)
    (bad,) = report["bad"]
    assert bad.startswith("set-000001.tar: 000005 at offset ")
    assert "bad\t1" in manta("inspect", shards, "--decode").stdout.splitlines()


def test_errors_are_one_line_and_exit_code_1(shards, tmp_path, write_tar):
    assert manta("inspect", shards).exit_code == 0
    write_tar(tmp_path / "set-000000.tar", [(f"{i}.png", b"x" * 9000) for i in range(2)])
    result = manta("inspect", shards)
    assert result.exit_code == 1 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: got ") and "expected" in line and "manta inspect --rebuild" in line
    assert manta("inspect", shards, "--rebuild").exit_code == 0
    assert manta("inspect", tmp_path / "nothing-*.tar").exit_code == 1


def test_pack_folder_and_csv(tmp_path, encoded):
    for name in ("cat/a.png", "dog/b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_bytes(encoded(np.zeros((4, 4, 3), np.uint8)))
    (tmp_path / "in/cat/broken.png").write_bytes(b"x")
    report = json.loads(manta("pack", "folder", tmp_path / "in", "--out", tmp_path / "a", "--json").stdout)
    assert report["samples"] == {"train": 2} and report["classes"] == ["cat", "dog"] and len(report["bad"]) == 1
    lines = manta("pack", "folder", tmp_path / "in", "--out", tmp_path / "b").stdout.splitlines()
    assert "split\ttrain\t2" in lines and str(tmp_path / "b/train-000000.tar") in lines
    (tmp_path / "in/list.csv").write_text("file,kind\ncat/a.png,x\n")
    options = ["--image-column", "file", "--label-column", "kind", "--out", tmp_path / "c", "--json"]
    assert json.loads(manta("pack", "csv", tmp_path / "in/list.csv", *options).stdout)["classes"] == ["x"]
    again = manta("pack", "folder", tmp_path / "in", "--out", tmp_path / "a")
    assert again.exit_code == 1 and "not empty" in again.stderr
    assert manta("pack", "folder", tmp_path / "in", "--out", tmp_path / "a", "--force").exit_code == 0


def test_commands_start_without_torch():
    code = "import sys, workloads.data.commands, workloads.data.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
