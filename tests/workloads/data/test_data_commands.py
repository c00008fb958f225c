import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from workloads.data import shard_writer
from workloads.data.commands import TOOLS, pack_app

app = typer.Typer()
app.add_typer(pack_app, name="pack")
for command in TOOLS:
    app.command()(command)


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


def test_pack_parquet_and_hf(tmp_path, encoded):
    image = encoded(np.zeros((4, 4, 3), np.uint8))
    pq.write_table(pa.table({"pic": [image], "kind": ["x"], "words": ["hello"]}), tmp_path / "t.parquet")
    options = ["--image", "pic", "--label", "kind", "--caption", "words", "--out", tmp_path / "a", "--json"]
    report = json.loads(manta("pack", "parquet", tmp_path / "t.parquet", *options).stdout)
    assert report["samples"] == {"train": 1} and report["classes"] == ["x"]
    result = manta("pack", "parquet", tmp_path / "t.parquet", "--out", tmp_path / "b")
    assert result.exit_code == 1 and "expected one of pic, kind, words" in result.stderr
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/a.png").write_bytes(image)
    lines = manta("pack", "hf", tmp_path / "hf", "--out", tmp_path / "c").stdout.splitlines()
    assert "split\ttrain\t1" in lines
    for media in ("videos", "volumes"):
        result = manta("pack", media, tmp_path / "hf", "--out", tmp_path / "d")
        assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1, media


def test_reshard(shards, tmp_path):
    options = ["--shuffle", 1, "--json"]
    report = json.loads(manta("reshard", shards, "--out", tmp_path / "a", "--samples-per-shard", 2, *options).stdout)
    assert report["samples"] == {"set": 7} and len(report["shards"]["set"]) == 4
    report = json.loads(manta("reshard", shards, "--out", tmp_path / "b", "--bytes-per-shard", "1kB", *options).stdout)
    assert len(report["shards"]["set"]) == 7
    smaller = ["--samples-per-shard", 9, "--resize-short-side", 2, "--quality", 50]
    lines = manta("reshard", shards, "--out", tmp_path / "c", *smaller).stdout.splitlines()
    assert "split\tset\t6" in lines and "split\tbad\t1" in lines, "the broken image is left out"
    for wrong in ([], ["--samples-per-shard", 1, "--bytes-per-shard", "1MB"], ["--bytes-per-shard", "much"]):
        result = manta("reshard", shards, "--out", tmp_path / "d", *wrong)
        assert result.exit_code == 1 and result.stderr.startswith("error: got "), wrong


def test_split(shards, tmp_path):
    def run(out, *options):
        return manta("split", shards, "--out", tmp_path / out, "--fractions", "train=5/7,test=2/7", *options)

    assert json.loads(run("a", "--seed", 3, "--json").stdout)["samples"] == {"train": 5, "test": 2}
    assert "split\ttest\t2" in run("b", "--by", "sample").stdout.splitlines()
    assert json.loads(run("c", "--by", "key-prefix=0000(..)", "--json").stdout)["samples"] == {"train": 5, "test": 2}
    for wrong in ("key-prefix", "label", "class=x"):
        assert "expected class, sample or key-prefix=REGEX" in run("d", "--by", wrong).stderr
    assert "together" in manta("split", shards, "--out", tmp_path / "d", "--fractions", "a=1/2").stderr


def test_validate(shards):
    result = manta("validate", shards)
    assert result.exit_code == 0 and result.stdout.splitlines() == ["samples\t7", "shards\t2", "findings\t0"]
    result = manta("validate", shards, "--decode", "--json")
    (finding,) = json.loads(result.stdout)["findings"]
    assert result.exit_code == 1 and finding.startswith("set-000001.tar: 000005 at offset ")
    lines = manta("validate", shards, "--decode").stdout.splitlines()
    assert lines[2] == "findings\t1" and lines[3] == f"finding\t{finding}"


def test_a_killed_run_with_other_arguments_is_one_line(shards, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "open_manifest", full)
        result = manta("reshard", shards, "--out", tmp_path / "a", "--samples-per-shard", 2)
        assert result.exit_code == 1 and "No space left" in result.stderr
    result = manta("reshard", shards, "--out", tmp_path / "a", "--samples-per-shard", 3)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: got samples_per_shard=3, expected samples_per_shard=2 as in the unfinished run")
    assert manta("reshard", shards, "--out", tmp_path / "a", "--samples-per-shard", 2).exit_code == 0


def test_commands_start_without_torch():
    code = "import sys, workloads.data.commands, workloads.data.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
