"""What a job may name: attacks that must be refused, and what people write that must not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from braceexpand import UnbalancedBracesError, braceexpand
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidSpec
from service.principal import ALL, LOCAL, Principal
from service.roots import Roots
from tests.service.secured import BODY, Secured
from workloads.preflight import Problem
from workloads.spec import JobSpec

ALLOWED = ("/data", "/scratch/", "s3://bucket/sets", "https://host/data", "gs://open")
HOME = Path("/var/manta")


def check(text: str, allowed: tuple[str, ...] | None = ALLOWED, home: Path = HOME) -> list[Problem]:
    """Problems of a job that names `text` where a method reads it."""
    data = {"train": {"shards": "x.tar"}}  # looked at by others: it is relative
    spec = JobSpec.model_validate(BODY | {"data": data, "method": {"name": "m", "deep": [{"file": text}]}})
    own = {("job", "job-1"), ("folder", "ours")}
    return Roots(allowed, None, home).problems(
        spec, lambda kind, name: name != "theirs" and (kind == "model" or (kind, name) in own)
    )


@pytest.mark.parametrize(
    "text",
    [
        "/data",
        "/data/train-{000000..000009}.tar",
        "/data/a/*/[ab]?.tar",
        "/data/{train,val}/x.tar",
        "/data/.hidden/x.tar",
        "/data/v1..2/x...tar",
        "/scratch/x",
        "s3://bucket/sets/x-{0..9}.tar",
        "gs://open/x",
        "https://host/data/a%20b.tar",
        "https://host/data/x.tar?version=3",
        "job:job-1",
        "ours@3",
        "ours",
        "timm:vit_base_patch16_clip_224.openai",
        "/var/manta/runs/job-1/evaluations/scores.parquet",
        "/var/manta/registry/ours/1",
        "SuperConvK3BNRELU(3,32,1,1)",
        "cosine",
    ],
)
def test_what_is_allowed(text: str) -> None:
    assert check(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "/etc/passwd",
        "/database/x.tar",
        "/data/../etc/passwd",
        "/data/./../etc/passwd",
        "/data/{a/..,b}/../x",
        "/data/{.,x}{.,y}/etc/passwd",
        "/data/.{.,x}/etc/passwd",
        "/data/{,.}{.,}/etc",
        "{/etc/passwd,/data/x}",
        "{/data/x,/etc/passwd}",
        "/{data,etc}/passwd",
        "/*/passwd",
        "/dat[a]/x",
        "/data\\/../x",
        "relative/x.tar",
        "../x.tar",
        "~/x.tar",
        "~root/.ssh/id_rsa",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "local:///etc/passwd",
        "simplecache::file:///etc/passwd",
        "filecache::s3://bucket/sets/x",
        "s3://bucket",
        "s3://bucket/other",
        "s3://bucket/sets-of-others/x",
        "s3://bucket-evil/sets/x",
        "s3://buck{et,et-evil}/sets/x",
        "s3://bucket?endpoint_override=http:%2F%2Fevil",
        "s3://bucket/sets/../other",
        "https://host/data/%2e%2e/other",
        "https://host/data/%252e%252e/other",
        "https://host/data%2f..%2fother",
        "https://host.evil.example/data/x",
        "https://host/data\\..\\x",
        "http://169.254.169.254/latest/meta-data",
        "gs://open-evil/x",
        "/data%2Fx",
        "/var/manta/runs/theirs/artifact",
        "/var/manta/runs",
        "/var/manta/runs/*/artifact",
        "/var/manta/runs/{job-1,theirs}/artifact",
        "/var/manta/manta.db",
        "/var/manta/token",
        "job:../../etc",
        "job:/etc",
        "job:theirs",
        "job:..",
        "job:job-1@2",
        "theirs@1",
        "theirs",
        "..@1",
        ".",
        "pipe:touch /data/x",
        "{pipe:touch x,/data/y}",
        "/data/x\0",
        "/data/\ud800",
        "https://[host/data/x",
        "timm:/etc/x",
    ],
)
def test_what_is_refused(text: str) -> None:
    (problem,) = check(text)
    assert problem.loc == ["method", "deep", 0, "file"] and problem.message and problem.hint


@pytest.mark.parametrize("allowed", [ALLOWED, ("*",)])
@pytest.mark.parametrize(
    "text",
    [
        "https://user:canary@host/data/x",
        "s3://canary:canary@bucket/sets/x",
        "https://host/data/x?X-Amz-Signature=canary",
        "https://host/data/x?a=1&access_token=canary",
        "s3://bucket/sets/x?secret_key=canary",
        "{/data/x,https://user:canary@host/data/x}",
        "https://[user:canary@host",
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(text: str, allowed: tuple[str, ...]) -> None:
    (problem,) = check(text, allowed)
    assert "canary" not in str(problem) and "credentials" in problem.hint


def test_nothing_is_allowed_where_nothing_is_said_and_everything_by_a_star() -> None:
    assert "(none is)" in check("/data/x", None)[0].message
    assert check("/etc/passwd", ("*",)) == []
    assert check("anywhere/x", ("*",)) == []
    assert check("job:theirs", ("*",)) != []


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "home" / "runs" / "theirs").mkdir(parents=True)
    (tmp_path / "data" / "out").symlink_to("/etc")
    (tmp_path / "data" / "in").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "run").symlink_to(tmp_path / "home" / "runs" / "theirs")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data" / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for root in ("data", "link"):  # the root may be a link itself
        allowed = (str(tmp_path / root),)
        for name, fine in (
            ("x.tar", True),
            ("in/x.tar", True),
            ("loop", True),
            ("out/passwd", False),
            ("out/*", False),
            ("run/x", False),
        ):
            assert (check(f"{tmp_path / root}/{name}", allowed, tmp_path / "home") == []) is fine, (root, name)


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"train": {"shards": "/etc/x.tar"}}},
        {"data": {"train": {"shards": ["/data/x.tar", "/etc/x.tar"]}}},
        {"data": {"train": {"shards": "/data/x.tar", "scores": "/etc/x", "keep": 0.5}}},
        {"init": "/etc/x.safetensors"},
        {"checkpoint": {"mirror": "s3://evil/x"}},
        {"checkpoint": {"mirror": "relative/x"}},
        {"checkpoint": {"mirror": "registry"}},
        {"model": {"name": "local-dir:/etc"}},
        {"method": {"name": "dmae", "teacher": "/etc/x"}},
        {"evaluate": [{"name": "knn", "data": {"train": {"shards": "/etc/x.tar"}}}]},
    ],
)
def test_every_field_of_a_job_is_looked_at_before_it_is_opened(tmp_path: Path, change: dict[str, Any]) -> None:
    service = Secured(tmp_path)
    service.parts.jobs._check = lambda *_: pytest.fail("it was opened")  # type: ignore[assignment]
    with pytest.raises(InvalidSpec, match=r"below what is allowed|expected absolute"):
        service.parts.submissions.submit(BODY | change)
    service.close()


def test_weights_of_another_project(tmp_path: Path) -> None:
    service = Secured(tmp_path)
    service.project("one")
    service.model("theirs", "one")
    job_id = service.job(project="one")
    ours = Principal("ann", "default", "submitter", "tok-1")
    weights = [f"job:{job_id}", "theirs@1", "theirs", "job:job-none"]
    for reference in weights:
        for change in ({"init": reference}, {"method": {"name": "dmae", "teacher": reference}}):
            with pytest.raises(InvalidSpec, match="names no weights that you may read"):
                service.parts.submissions.submit(BODY | change, None, ours)
            service.parts.submissions.submit(BODY | change, None, Principal("eve", ALL, "submitter", "tok-2"))
    for reference in (f"job:{job_id}", "job:job-none"):  # of which a network would be built
        with pytest.raises(InvalidSpec, match="names no weights that you may read"):
            service.parts.submissions.submit(BODY | {"model": {"name": reference}}, None, ours)
    service.parts.submissions.submit(BODY | {"init": "resnet18", "name": "theirs"}, None, ours)
    with pytest.raises(InvalidSpec, match="got theirs, which another project has"):
        service.parts.submissions.submit(BODY | {"register": "theirs"}, None, LOCAL)
    service.parts.submissions.submit(BODY | {"register": "mine"}, None, ours)
    with pytest.raises(InvalidSpec, match="got mine"):
        service.parts.submissions.submit(BODY | {"register": "mine"}, None, LOCAL, "one")
    service.close()


PIECES = st.sampled_from(["/", "..", ".", "{", "}", ",", "a", "data", "etc", "%2e", "*", "[", "]", "\\", "~"])


@given(st.lists(PIECES, max_size=10).map("".join))
def test_no_pattern_that_passes_expands_to_outside(tail: str) -> None:
    """The check against what the library that reads the pattern makes of it."""
    if check(f"/data/{tail}"):
        return
    try:
        found = list(braceexpand(f"/data/{tail}"))
    except UnbalancedBracesError:
        return
    for path in found:
        assert (os.path.normpath(path) + "/").startswith("/data/"), (tail, path)


@given(
    st.text(st.characters(), max_size=30), st.sampled_from(["", "/data/", "https://", "s3://bucket/sets/", "job:", "/"])
)
def test_no_text_breaks_it(tail: str, start: str) -> None:
    for allowed in (ALLOWED, ("*",), None):
        assert len(check(start + tail, allowed)) <= 1
