"""Which checkpoints stay, and which are whole."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from workloads import checkpoint_folder as files
from workloads.checkpoint_folder import FileSum, HashingFile, Seal, kept
from workloads.checkpoint_newest import newest
from workloads.spec_training import CheckpointPolicy


def seal(step: int, metric: float | None = None, suspect: bool = False) -> Seal:
    sums = {f"{files.stem(step)}.pt": FileSum(bytes=0, sha256="")}
    return Seal(step=step, files=sums, metric=metric, time=0, suspect=suspect)


@given(
    metrics=st.dictionaries(st.integers(0, 50), st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1),
    suspects=st.sets(st.integers(0, 50)),
    keep=st.integers(1, 4),
    keep_best=st.integers(0, 3),
    mode=st.sampled_from(["min", "max"]),
    data=st.data(),
)
def test_newest_best_and_newest_good_stay_in_any_history(metrics, suspects, keep, keep_best, mode, data):
    newest = data.draw(st.sampled_from(sorted(metrics)))
    policy = CheckpointPolicy(keep=keep, keep_best=keep_best, mode=mode)
    stay = kept([seal(step, metric, step in suspects) for step, metric in metrics.items()], policy, newest)
    past = [step for step in metrics if step <= newest]
    assert newest in stay <= set(past)
    good = sorted(set(past) - suspects)
    always = {*sorted(past)[-keep:], *good[-1:]}
    assert always <= stay
    scored = {step: metrics[step] for step in good if metrics[step] is not None}
    assert len(stay - always) <= keep_best and stay - always <= scored.keys()
    sign = 1 if mode == "min" else -1
    for gone in scored.keys() - stay:
        assert sum(sign * scored[step] <= sign * scored[gone] for step in stay & scored.keys()) >= keep_best


@given(st.lists(st.binary(max_size=50)))
def test_the_hash_of_what_is_written_is_that_of_the_file(pieces):
    file = io.BytesIO()
    hashing = HashingFile(file)
    for piece in pieces:
        assert hashing.write(memoryview(piece)) == len(piece)
    whole = b"".join(pieces)
    assert file.getvalue() == whole
    assert hashing.sum == FileSum(bytes=len(whole), sha256=hashlib.sha256(whole).hexdigest())


def test_names_of_steps():
    assert files.step_of("step-00000050.pt") == files.step_of("step-00000050") == 50
    assert files.step_of("step-123456789.json") == 123456789
    assert [files.step_of(name) for name in ("latest", "step-5.pt", ".step-00000050.json.7.tmp")] == [None] * 3


def test_a_latest_that_says_nothing_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "step-00000007.pt").write_bytes(b"")
    files.complete(tmp_path, seal(7))
    (tmp_path / "latest").write_text("")
    assert files.latest_step(tmp_path) is None
    assert files.steps(tmp_path) == [7]
    assert files.damage(tmp_path, seal(7)) == "the sha256 of step-00000007.pt differs"


def test_a_run_goes_back_to_the_newest_that_is_not_suspect(tmp_path: Path) -> None:
    assert files.go_back(tmp_path) is None and files.given_up(tmp_path) == []
    files.complete(tmp_path, seal(10, suspect=True))
    assert files.go_back(tmp_path) is None and files.latest_step(tmp_path) == 10, "no other to go back to"
    for step in (20, 30, 40, 50):
        files.complete(tmp_path, seal(step, suspect=step in (40, 50)))
    (tmp_path / "latest").write_text("step-00000040.pt")
    assert files.go_back(tmp_path) == files.go_back(tmp_path) == files.latest_step(tmp_path) == 30
    assert files.given_up(tmp_path) == [40, 50]


def test_a_first_write_that_was_cut_short_is_no_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000005.tmp").write_bytes(b"half")
    assert files.steps(tmp_path) == [] and newest(tmp_path).seal is None
    (tmp_path / "step-00000005.pt").write_bytes(b"whole, not sealed")
    assert files.steps(tmp_path) == [] and newest(tmp_path).seal is None
