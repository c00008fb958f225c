"""Each harness of the training engine runs at toy size, so that it cannot rot; what it measures there means nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.embedded import Head
from tests.benchmarks import apart, contrast, engine, gpu, growth, loop, masked, search, synthetic, table, workers
from tests.toy import TOY_MAE, TOY_MODEL
from workloads import ray_train
from workloads.methods.mae import MAE
from workloads.record import RunFolder
from workloads.spec import JobSpec

TOY: dict[str, Any] = {"name": "toy", "method": TOY_MAE, "model": TOY_MODEL, "batch_size": 8, "steps": 1}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def toy_document(shards: str, steps: int) -> dict[str, Any]:
    return TOY | {"data": {"train": {"shards": shards}}, "steps": steps}


def test_the_loop_and_the_bare_loop(toy_shards: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "ROUNDS", 2)
    monkeypatch.setattr(loop, "spec_of", toy_document)
    rates = loop.measure(toy_shards["train"])
    assert len(rates["ours"]) == len(rates["bare"]) == 2
    assert 0.05 < apart.ratio(rates["ours"], rates["bare"]) < 5


@pytest.mark.ray
def test_two_workers_and_torchrun(cluster: Head, toy_shards: dict[str, str], tmp_path: Path) -> None:
    document = toy_document(toy_shards["train"], 40) | {"resources": {"workers": 2}}
    rates = workers.rates(document, str(tmp_path / "turns"), rounds=1, head=cluster.pid)
    assert 0 < growth.idle_share(cluster.pid, 1.0) < 4
    assert len(rates["ours"]) == len(rates["bare"]) == 1
    assert 0.01 < apart.ratio(rates["ours"], rates["bare"]) < 10


def test_all_tokens_are_encoded_by_the_plain_implementation() -> None:
    found = engine.masking(TOY, steps=1, rounds=2)
    assert len(found["mae"]) == len(found["all"]) == 2 and min(found["mae"] + found["all"]) > 0
    assert 1 < found["predicted"] < 17 / 5  # 16 patches and CLS rather than 4 and CLS, but for the decoder
    methods, batch = engine.masked_and_plain(TOY), synthetic.images(8, 16)
    mae, plain = methods["mae"], methods["all"]
    assert type(mae) is MAE and isinstance(plain, engine.AllTokens)
    latent = plain.encode(batch["image"], plain.mask(batch["key"]))
    assert latent.shape == (8, 17, 16)
    loss = plain(batch, synthetic.START).loss
    assert loss is not None
    loss.backward()
    assert {n for n, p in plain.named_parameters() if p.requires_grad and p.grad is None} == {"decoder.mask_token"}


def test_masked_methods_beside_mae_and_the_plainest_implementation() -> None:
    small = masked.JOB | {"model": masked.JOB["model"] | {"dim": 48}, "batch_size": 2}
    found = masked.step_times(small, masked.METHODS, steps=1, rounds=2)
    assert found["seconds"].keys() == {*masked.METHODS, "plain"} and found["flops"].keys() == masked.METHODS.keys()
    assert all(len(values) == 2 and min(values) > 0 for values in found["seconds"].values())
    flops = found["flops"]
    assert flops["mae"] < flops["dmae"] and flops["maskfeat"] < flops["maskdistill"]  # a teacher comes on top


def test_masked_rows_judge_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"mae": [1.0], "plain": [0.98], "dmae": [1.2], "maskfeat": [4.0], "maskdistill": [3.0]}
    flops = {"mae": 1.0, "dmae": 1.2, "maskfeat": 3.2, "maskdistill": 4.0}
    monkeypatch.setattr(apart, "run", lambda *_, **__: {"seconds": seconds, "flops": flops})
    assert [row[3] for row in masked.rows()] == [False, True, False, True]


@pytest.mark.parametrize("name", contrast.METHODS)
def test_contrast_and_the_same_with_lightly(name: str) -> None:
    pytest.importorskip("lightly", reason="`make bench` installs lightly, which is only compared with")
    small = contrast.JOB | {"model": {"name": "resnet_cifar", "image_size": 16, "depth": 8}, "batch_size": 4}
    found = contrast.step_times(small, name, rounds=2)
    assert found.keys() == {"ours", "lightly"} and all(len(seconds) == 2 for seconds in found.values())


def test_the_dense_half_of_densecl() -> None:
    small = contrast.JOB | {"model": {"name": "resnet_cifar", "image_size": 16, "depth": 8}, "batch_size": 4}
    found = contrast.dense_times(small, rounds=2)
    assert found.pop("predicted") > 1
    assert found.keys() == {"densecl", "moco_v2", "loss"} and all(len(seconds) == 2 for seconds in found.values())


def test_a_step_of_contrast_that_is_slower_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"simclr": 1.0, "moco_v2": 1.1, "densecl": 0.9}

    def run(function: object, *, name: str = "", **_: object) -> dict[str, Any]:
        dense = {"densecl": [1.06], "moco_v2": [1.0], "loss": [0.06], "predicted": 1.1}
        if function is contrast.softmax_memory:
            return 6e8
        return dense if function is contrast.dense_times else {"ours": [times[name]], "lightly": [1.0]}

    monkeypatch.setattr(apart, "run", run)
    assert [row[3] for row in contrast.rows()] == [True, False, True, False, False, None]


def test_memory_of_a_softmax_over_rows() -> None:
    assert apart.run(contrast.softmax_memory, instances=40_000) > 40_000 * 128 * 4 * 3  # rows, gradient, momentum


def test_what_a_checkpoint_costs_the_loop(toy_shards: dict[str, str]) -> None:
    held = engine.stall(toy_document(toy_shards["train"], 1), interval=2, checkpoints=2)
    assert 0 < held["step_s"] < 5 and 0 < held["save_s"] < 5 and abs(held["cost_s"]) < 10


def test_checkpoint_times(tmp_path: Path) -> None:
    found = growth.checkpoint_times(16, 1, str(tmp_path), saves=2)
    assert 0 < found["held_s"] <= found["disk_s"] and 0 < found["millions"] < 0.1


def test_step_times() -> None:
    arguments: dict[str, Any] = {"document": TOY, "images": 4, "steps": 2, "rounds": 2}
    alone, two = growth.step_times(**arguments), apart.run(growth.step_times, ranks=2, **arguments)
    assert min(alone.values()) > 0 and min(two.values()) > 0 and two.keys() == {"step", "compute"}


def test_start_times(toy_shards: dict[str, str], tmp_path: Path) -> None:
    found = growth.start_times(toy_shards["train"], str(tmp_path), times=1)
    assert found["import_torch_s"] > 0.1 and found["first_step_s"] > 0.5


def test_group_start_times_are_read_off_the_run(
    toy_shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_on_ray(spec: JobSpec, run: RunFolder, home: Path, **_: Any) -> bool:
        assert (spec.resources.workers, spec.steps, home) == (2, 1, tmp_path)
        clock[0] += 3
        run.event("workers_joined", "2 workers")
        run.checkpoints.mkdir()
        written = run.checkpoints / "step-00000001.pt"
        written.touch()
        os.utime(written, (clock[0] + 1, clock[0] + 1))
        return True

    clock = [1000.0]
    monkeypatch.setattr(ray_train, "train_on_ray", train_on_ray)
    monkeypatch.setattr("time.time", lambda: clock[0])
    assert growth.group_start_times(toy_shards["train"], str(tmp_path), times=3) == {"joined_s": 3, "first_step_s": 4}


def test_rows_judge_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {
        "measure": {"ours": [0.99, 2.0, 1.0], "bare": [1.0, 2.0, 1.0]},
        "rates_on_own_cluster": {"ours": [0.96], "bare": [1.0]},
        "masking": {"mae": [1.0, 1.0], "all": [3.0, 3.0], "predicted": 3.4},
        "stall": {"step_s": 0.1, "cost_s": 3.0, "save_s": 0.1},
        "step_times": {"step": 0.3, "compute": 0.2},
        "checkpoint_times": {"millions": 5.0, "held_s": 0.01, "disk_s": 0.5},
        "costs_of_own_cluster": {"joined_s": 9.0, "first_step_s": 10.0, "idle": 0.05},
    }
    monkeypatch.setattr(apart, "run", lambda function, **_: measured[function.__name__])
    monkeypatch.setattr(growth, "start_times", lambda *_, **__: {"first_step_s": 3.0, "import_torch_s": 1.5})
    rows = engine.rows(tmp_path, "digits.tar")
    assert [row[3] for row in rows] == [True, False, True, False, None, None, None, None, None]
    assert rows[6][1] == "9.0 s; 10.0 s" and rows[7][1] == "5.0% of a core"
    assert rows[3][1] == "6.00 % (3000 ms, of which in `save` 100 ms, for 500 steps of 0.10 s)"
    assert rows[4][1] == "0.300 (0.200 + 0.100) / 0.300 (0.200 + 0.100) / 0.300 (0.200 + 0.100) s"
    assert table.markdown(rows[1]).endswith("| 0.960 (0.96 / 1.00) | >= 0.97 | **no** |")


def test_a_failure_in_a_process_of_its_own_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ratio ended with exit code 1.*argument 2 is shorter"):
        apart.run(apart.ratio, above=[1.0], below=[])


def test_gpu_harness_needs_neither_ray_nor_shards() -> None:
    code = (
        "import sys; from tests.benchmarks import gpu\n"
        "assert gpu.main(['--toy', '--steps', '2', '--batch', '4', '--profile']) == 0\n"
        "print(*{name.partition('.')[0] for name in sys.modules} & {'ray', 'pyarrow', 'timm', 'torchvision'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line, row, imported = done.stdout.splitlines()
    result = json.loads(line)
    assert result["batch"] == 4 and result["images_per_s"] > 0 and result["memory_gib"] > 0
    assert result["transfer_share"] > 0 and result["input_share"] > 0 and sum(result["kernels"].values()) <= 1.001
    assert row.startswith("| GPU: MAE of a toy") and imported == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "got no GPU" in capsys.readouterr().err
    rows = gpu.rows()
    assert [row[0].split()[3] for row in rows] == ["ViT-B/16", "ViT-L/16"]
    assert all("not measured here" in table.markdown(row) and row[3] is None for row in rows)


def test_flops_of_the_gpu_harness_are_those_of_its_whole_batch() -> None:
    spec = gpu.spec_of("toy", 4, compiled=False)
    assert isinstance(spec, JobSpec) and spec.precision == "bf16"
    training = gpu.Training(spec, torch.device("cpu"))
    assert training.flops == 2 * gpu.Training(gpu.spec_of("toy", 2, compiled=False), torch.device("cpu")).flops


@pytest.mark.parametrize(("room", "found"), [(300, 256), (10**9, gpu.LARGEST)])
def test_the_batch_is_doubled_until_it_does_not_fit(room: int, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fits(_: str, batch: int, __: torch.device) -> bool:
        return batch <= room

    monkeypatch.setattr(gpu, "_fits", fits)
    assert gpu.largest_batch("vit_base", torch.device("cpu")) == found


def test_a_model_without_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "Training", too_much)
    with pytest.raises(SystemExit, match="smaller one"):
        gpu.largest_batch("vit_base", torch.device("cpu"))


def test_the_large_model_is_judged_by_its_mfu() -> None:
    result = {
        **{"model": "vit_large", "precision": "bf16", "compiled": True, "batch": 512, "device": "NVIDIA H200"},
        **{"images_per_s": 3000.0, "mfu": 0.451, "memory_gib": 80.0, "transfer_share": 0.01},
    }
    assert gpu.row(result)[2:] == ("MFU >= 45 %", True)
    assert gpu.row(result | {"mfu": 0.449})[3] is False
    assert gpu.row(result | {"compiled": False})[2:] == ("-", None)


def test_scores_of_ours_and_of_the_plainest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "NETWORKS", {"S0": search.NETWORKS["S0"]})
    monkeypatch.setattr(search, "SCORE_S", 0.0)
    assert all(search.scores_per_s(of)["S0"] > 0 for of in ("ours", "plainest"))
    start = search.parse(search.NETWORKS["S0"])
    assert search.plainest(start) == pytest.approx(search.ours(start), abs=0.3)  # the same but for the noise
    assert search.bare(5) > 0


@pytest.mark.ray
def test_searches_under_tune(cluster: Head, tmp_path: Path) -> None:
    (found,) = search.searched(tmp_path, 40, [2])
    # a chunk counts where it is told, so its scoring may be of a turn before, in which nothing was
    assert 0 < found["loop_s"] < found["fit_s"] and 0 < found["scoring_s"] < 2 * found["fit_s"]
