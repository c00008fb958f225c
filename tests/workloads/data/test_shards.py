import pytest

from workloads.data.shards import DataError, expand, read_classes


@pytest.fixture
def folder(tmp_path):
    for name in ("a-000.tar", "a-001.tar", "a-002.tar", "b.tar", "odd{1}.tar"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def names(paths):
    return [path.rsplit("/", 1)[1] for path in paths]


def test_braces_globs_and_lists_in_their_order(folder):
    assert names(expand(f"{folder}/a-{{000..002}}.tar")) == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert names(expand(f"{folder}/a-*.tar")) == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert names(expand([f"{folder}/b.tar", f"{folder}/a-{{002,000}}.tar"])) == ["b.tar", "a-002.tar", "a-000.tar"]
    assert names(expand(f"{folder}/odd{{1}}.tar")) == ["odd{1}.tar"]


def test_relative_paths_become_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert expand("./b.tar") == [str(folder / "b.tar")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a-{000..003}.tar", "a-003.tar, expected a shard"),
        ("c-*.tar", "no file that matches"),
        ("", "got the folder"),
        ("{000..999999999}.tar", "more than 1000000 shards"),
        (["b.tar", "b.tar"], "b.tar twice"),
        ([], "got 0 shards"),
    ],
)
def test_what_is_missing_is_named(folder, monkeypatch, pattern, message):
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match=message):
        expand(pattern)


def test_remote_shards_are_not_touched():
    assert expand("s3://bucket/a-{0..2}.tar") == [f"s3://bucket/a-{i}.tar" for i in range(3)]


@pytest.mark.parametrize(
    ("url", "why"), [("pipe:cat a.tar", "cannot be indexed"), ("s3://b/*/a.tar", "in the name of a file only")]
)
def test_what_cannot_be_expanded_is_refused(url, why):
    with pytest.raises(DataError, match=why):
        expand(url)


def test_classes_by_line(tmp_path):
    assert read_classes(str(tmp_path / "a.tar")) is None
    (tmp_path / "classes.txt").write_text("cat\ngolden retriever\n\n")
    assert read_classes(str(tmp_path / "a.tar")) == ["cat", "golden retriever"]
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(DataError, match="cat twice"):
        read_classes(str(tmp_path / "a.tar"))
