import numpy as np
import pytest

from workloads.data.columns import Keys, Manifest, Places
from workloads.data.shuffle_report import mixing


def sorted_set(n: int, classes: int = 20) -> Manifest:
    """Sorted by class, no file behind it."""
    zeros = np.zeros(n, np.int64)
    return Manifest(
        shards=("x",), shard_bytes=(0,), keys=Keys(zeros, np.empty(0, np.uint8)), shard=np.zeros(n, np.int32),
        label=np.arange(n) * classes // n, members={"image": Places(zeros, zeros)}, primary="image",
        classes=[str(i) for i in range(classes)], content_hash="", total_bytes=0, quarantined=[],
    )  # fmt: skip


@pytest.mark.parametrize("n", [5_000, 100_000])
def test_the_default_window_mixes_a_sorted_set_nearly_as_a_uniform_shuffle_does(n):
    found = mixing(sorted_set(n), batch_size=64)
    assert abs(found.position_correlation) < 0.3 and abs(found.uniform["position_correlation"]) < 0.05
    assert found.run_length < 1.2 and found.uniform["run_length"] == pytest.approx(20 / 19, rel=0.02)
    assert found.classes_in_batch > 0.9 * found.uniform["classes_in_batch"]


def test_a_larger_window_is_nearer_to_uniform_and_a_tiny_one_far():
    manifest = sorted_set(50_000)
    tiny, usual, large = (mixing(manifest, batch_size=64, window=window) for window in (1, 4096, 50_000))
    assert tiny.classes_in_batch < 2 < usual.classes_in_batch < large.classes_in_batch
    assert large.classes_in_batch == pytest.approx(large.uniform["classes_in_batch"], rel=0.02)
    assert tiny.neighbours_share > 0.9 > usual.neighbours_share > large.neighbours_share


def test_without_labels_there_are_no_classes_to_count():
    manifest = sorted_set(3000)
    bare = Manifest(**{**vars(manifest), "label": np.full(3000, -1)})
    found = mixing(bare)
    assert found.classes_in_batch is None and found.run_length is None and found.neighbours_share > 0
