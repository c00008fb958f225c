import pickle
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.data.columns import Keys, Manifest, Places
from workloads.data.keys import sample_keys
from workloads.data.manifest import DataError
from workloads.data.order import BLOCK, WINDOW
from workloads.data.reader import Reader
from workloads.data.transforms.image import Geometry
from workloads.data.views import View

VIEWS = {"image": View(size=4)}
TWO_VIEWS = {"a": View(size=4, crop_scale=(0.3, 1), flip=0.5), "b": View(size=6, crop_scale=(0.3, 1), flip=0.5)}


def columns(n: int, image_bytes: int = 1000) -> Manifest:
    """A manifest of n samples in 10 sorted classes with no file behind it: for order and counts."""
    return Manifest(
        shards=("/nowhere/x.tar",),
        shard_bytes=(0,),
        keys=Keys.of([str(i) for i in range(n)]),
        shard=np.zeros(n, np.int32),
        members={"image": Places(np.arange(n, dtype=np.int64) * image_bytes, np.full(n, image_bytes, np.int64))},
        primary="image",
        label=np.arange(n, dtype=np.int64) * 10 // max(n, 1),
        classes=[str(i) for i in range(10)],
        content_hash="",
        total_bytes=n * image_bytes,
        quarantined=[],
    )


def reader_of(n: int, batch_size: int, **options) -> Reader:
    return Reader(columns(n), VIEWS, batch_size=batch_size, **options)


def whole(reader: Reader, epoch: int) -> np.ndarray:
    """All rows in the order of an epoch."""
    return reader.sampler.rows(epoch, 0, len(reader.manifest))


many = settings(max_examples=60, deadline=None)
sizes = {"n": st.integers(1, 3000), "batch_size": st.integers(1, 300), "window": st.integers(1, 5000)}


@many
@given(**sizes, epoch=st.integers(0, 3), world_size=st.sampled_from([1, 2, 3, 7]), shuffle=st.booleans())
def test_each_sample_exactly_once_over_ranks(n, batch_size, window, epoch, world_size, shuffle):
    reader = reader_of(n, batch_size, window=window, shuffle=shuffle, drop_last=False, seed=5)
    steps = range(epoch * reader.steps_per_epoch, (epoch + 1) * reader.steps_per_epoch)
    rows = np.concatenate([reader.rows(step, rank, world_size) for step in steps for rank in range(world_size)])
    assert len(rows) == n and set(rows.tolist()) == set(range(n))
    assert (rows == whole(reader, epoch)).all(), "contiguous shares: put together they are the order of the epoch"


@many
@given(**sizes, world_size=st.sampled_from([2, 3, 7]))
def test_drop_last_leaves_out_less_than_a_batch(n, batch_size, window, world_size):
    batch_size = min(batch_size, n)
    reader = reader_of(n, batch_size, window=window)
    shares = [
        [reader.rows(step, rank, world_size) for rank in range(world_size)] for step in range(reader.steps_per_epoch)
    ]
    rows = np.concatenate([share for step in shares for share in step])
    assert n - batch_size < len(rows) <= n and len(set(rows.tolist())) == len(rows)
    for step in shares:
        lengths = [len(share) for share in step]
        assert sum(lengths) == batch_size and max(lengths) - min(lengths) <= 1


@many
@given(
    n=st.integers(1, 500), batch_size=st.integers(1, 50), stop=st.integers(0, 40), before=st.sampled_from([1, 2, 3, 7]),
    after=st.sampled_from([1, 2, 3, 7]), drop_last=st.booleans(),
)  # fmt: skip
def test_resumed_anywhere_with_another_world_size_it_goes_on(n, batch_size, stop, before, after, drop_last):
    batch_size = min(batch_size, n)

    def sequence(start: int, end: int, world_size: int) -> list[int]:
        reader = reader_of(n, batch_size, drop_last=drop_last)  # a new process: nothing is carried over
        shares = [reader.rows(step, rank, world_size) for step in range(start, end) for rank in range(world_size)]
        return [int(row) for share in shares for row in share]

    end = stop + 2 * reader_of(n, batch_size, drop_last=drop_last).steps_per_epoch
    assert sequence(0, stop, before) + sequence(stop, end, after) == sequence(0, end, 1)


def test_orders_differ_by_epoch_and_seed_and_are_pinned():
    reader = reader_of(1000, 10)
    orders = [whole(reader, epoch) for epoch in range(4)] + [whole(reader_of(1000, 10, seed=1), 0)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.05
    assert whole(reader_of(8, 1), 0).tolist() == [7, 4, 2, 6, 5, 0, 1, 3], "runs that are resumed rely on it"
    assert whole(reader_of(8, 1, shuffle=False), 3).tolist() == list(range(8))


@pytest.mark.parametrize("n", [2_000, 10_000, 50_000])
def test_a_set_sorted_by_class_comes_out_mixed(n):
    reader = reader_of(n, 64)
    labels = reader.manifest.label[whole(reader, 0)]
    # A uniform shuffle has 10 classes in each batch of 64 and runs of 1.11 samples.
    counts = [len(set(labels[i : i + 64].tolist())) for i in range(0, n - 63, 64)]
    runs = n / (1 + np.count_nonzero(np.diff(labels)))
    assert min(counts) >= 6 and np.mean(counts) > 9.5 and runs < 1.15
    assert abs(np.corrcoef(np.arange(n), whole(reader, 0))[0, 1]) < 0.1


def test_a_step_costs_its_window_not_the_set(monkeypatch):
    from workloads.data import order as module

    drawn = []
    words = module.words
    monkeypatch.setattr(module, "words", lambda *args: drawn.append(args[3]) or words(*args))
    reader = reader_of(300_000, 100, seed=987)
    reader.rows(1_234_567)
    assert sum(drawn) < 300_000 / BLOCK + 2 * WINDOW


def test_batch_has_what_it_promises(make_manifest):
    manifest = make_manifest([5, 0, 3])
    reader = Reader(manifest, VIEWS, batch_size=4, seed=9)
    batch = reader.batch(3)  # epoch 1
    rows = reader.rows(3)
    assert batch.keys() == {"image", "image_geometry", "index", "key", "label"}
    assert batch["index"].tolist() == rows.tolist() and batch["label"].tolist() == manifest.label[rows].tolist()
    assert torch.equal(batch["key"], sample_keys(9, 1, batch["index"]))
    assert batch["image"].shape == (4, 3, 4, 4) and batch["image"].dtype == torch.uint8
    assert batch["image"][:, 0, 0, 0].tolist() == rows.tolist(), "grey value = number of the sample"
    assert Geometry.unpacked(batch["image_geometry"]).box.tolist() == [[0, 0, 1, 1]] * 4


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_content_does_not_depend_on_the_world_size(make_manifest, world_size):
    manifest = make_manifest([7, 1, 8], corrupt=[3, 9])
    options = {"batch_size": 5, "max_bad_share": 1, "drop_last": False}
    whole = Reader(manifest, TWO_VIEWS, **options)
    parts = [Reader(manifest, TWO_VIEWS, **options) for _ in range(world_size)]
    for step in range(8):
        shares = [part.batch(step, rank, world_size) for rank, part in enumerate(parts)]
        for name, value in whole.batch(step).items():
            assert torch.equal(torch.cat([share[name] for share in shares]), value), name


def test_views_of_a_sample_are_independent_and_change_by_epoch(make_manifest):
    reader = Reader(make_manifest([40]), {**TWO_VIEWS, "c": TWO_VIEWS["a"]}, batch_size=40, shuffle=False)
    first, second = reader.batch(0), reader.batch(1)
    assert not torch.equal(first["a_geometry"], first["c_geometry"])
    assert not torch.equal(first["a_geometry"], second["a_geometry"])
    assert not torch.equal(first["key"], second["key"])


def test_bad_sample_is_counted_and_replaced(make_manifest):
    reader = Reader(make_manifest([6, 6], corrupt=[7]), VIEWS, batch_size=12, shuffle=False, max_bad_share=0.1)
    batch = reader.batch(0)
    index = batch["index"].tolist()
    assert index[:7] == list(range(7)) and index[8:] == list(range(8, 12)) and index[7] != 7
    assert batch["image"][:, 0, 0, 0].tolist() == index and batch["label"].tolist() == [i % 3 for i in index]
    (line,) = reader.skipped.values()
    assert list(reader.skipped) == [7]
    assert line.startswith(
        f"set-000001.tar: 000007 at offset {reader.manifest.members['image'].offset[7]}: got 38 bytes"
    )
    again = reader.batch(0)  # now it is known to be bad, and not read: the same sample takes its place
    assert again["index"].tolist() == index


def test_too_many_bad_samples_fail_with_the_list(make_manifest):
    reader = Reader(make_manifest([20], corrupt=[3, 5]), VIEWS, batch_size=20, max_bad_share=0.05)
    with pytest.raises(DataError, match=r"got 2 of 20 samples.*share of 0.05.*00000[35] at .*00000[35] at "):
        reader.batch(0)


def test_nothing_but_bad_samples_ends(make_manifest):
    reader = Reader(make_manifest([3], corrupt=range(3)), VIEWS, batch_size=3, max_bad_share=1)
    with pytest.raises(DataError, match="no sample that can be decoded"):
        reader.batch(0)


def test_batch_larger_than_the_set():
    with pytest.raises(DataError, match="got batch_size=11 for 10 samples, expected at most as many; use"):
        reader_of(10, 11)
    assert reader_of(10, 11, drop_last=False).steps_per_epoch == 1


def test_a_rank_without_a_share_gets_an_empty_batch(make_manifest):
    reader = Reader(make_manifest([5]), TWO_VIEWS, batch_size=4, drop_last=False)
    batch = reader.batch(1, 0, 3)
    assert batch["a"].shape == (0, 3, 4, 4) and batch["index"].shape == (0,) and batch["b_geometry"].shape == (0, 8)


def test_a_shard_that_vanished_during_the_run_is_named(make_manifest, tmp_path):
    reader = Reader(make_manifest([4, 4]), VIEWS, batch_size=8)
    reader.batch(0)
    (tmp_path / "set-000001.tar").unlink()
    with pytest.raises(DataError, match=r"set-000001.tar"):
        reader.batch(1)


def test_a_reader_pickles(make_manifest):
    reader = Reader(make_manifest([5]), VIEWS, batch_size=2)
    assert torch.equal(pickle.loads(pickle.dumps(reader)).batch(3)["image"], reader.batch(3)["image"])


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_batches_are_those_of_the_steps_and_the_thread_ends(make_manifest):
    reader = Reader(make_manifest([9]), VIEWS, batch_size=2)
    for start, stop in ((0, 9), (3, 4), (2, 2)):
        made = list(reader.batches(start, stop, 1, 2))
        assert [b["index"].tolist() for b in made] == [reader.rows(s, 1, 2).tolist() for s in range(start, stop)]
    assert not reader_threads()


def test_closing_early_ends_the_thread(make_manifest):
    batches = Reader(make_manifest([9]), VIEWS, batch_size=2).batches(0, 1_000_000)
    next(batches)
    assert reader_threads()
    batches.close()
    assert not reader_threads()
    Reader(make_manifest([9]), VIEWS, batch_size=2).batches(0, 9).close()  # never started


def test_errors_of_the_thread_reach_the_consumer_at_their_step(make_manifest, monkeypatch):
    reader = Reader(make_manifest([9]), VIEWS, batch_size=3)
    batch = reader.batch

    def failing(step, rank, world_size):
        if step == 2:
            raise DataError("got nothing")
        return batch(step, rank, world_size)

    monkeypatch.setattr(reader, "batch", failing)
    batches = reader.batches(0, 10)
    assert len(next(batches)["index"]) == len(next(batches)["index"]) == 3
    with pytest.raises(DataError, match="got nothing"):
        next(batches)
    assert not reader_threads()


@pytest.mark.parametrize(("name", "size"), [("cifar10", 32), ("photos", 64)])
def test_real_shards(real_data, name, size):
    from workloads.data.manifest import build_manifest

    manifest = build_manifest(str(real_data(name) / "test-*.tar"))
    reader = Reader(manifest, {"image": View(size=size, crop_scale=(0.2, 1), flip=0.5)}, batch_size=50)
    batches = list(reader.batches(0, reader.steps_per_epoch))
    index = torch.cat([batch["index"] for batch in batches])
    assert Counter(index.tolist()) == dict.fromkeys(range(len(manifest)), 1) and not reader.skipped
    assert torch.cat([batch["label"] for batch in batches]).bincount().unique().numel() == 1
    assert batches[0]["image"].float().std() > 30


def test_a_batch_for_a_gpu_is_pinned_by_the_thread_that_made_it(make_manifest, monkeypatch):
    threads = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda self: threads.append(threading.current_thread().name) or self
    )
    reader = Reader(make_manifest([6]), VIEWS, batch_size=3)
    assert len(list(reader.batches(0, 2))) == 2 and not threads
    batches = list(reader.batches(0, 2, pin_memory=True))
    tensors = sum(isinstance(value, torch.Tensor) for batch in batches for value in batch.values())
    assert len(threads) == tensors and all(name.startswith("reader") for name in threads)
