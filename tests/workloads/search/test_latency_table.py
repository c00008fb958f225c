"""Latency tables: what they count, interpolate, refuse; and the budget and command over them."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

from workloads.models.structure import parse
from workloads.models.zennet import ZenNet, published
from workloads.search import commands, latency_grid
from workloads.search.latency_budget import LatencyBudget, NetworkLatency
from workloads.search.latency_grid import grid, measure_op, measure_table
from workloads.search.latency_ops import Op, TableError, conv, of_structure, operations
from workloads.search.latency_table import LatencyTable

TINY = "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,2,8,1)SuperResK1K3K1(16,24,2,8,1)SuperConvK1BNRELU(24,32,1,1)"
ON = {"on": "cpu", "device": "cpu, 1 threads", "torch": "2"}


def power_law(op: Op, *_: object) -> float:
    """ms: of such a device interpolation is exact."""
    return 1e-6 * len(op.family) * math.prod(size**0.7 for size in op.sizes)


def table(size: int = 32, **conditions: Any) -> LatencyTable:
    ms: dict[str, dict[str, float]] = {}
    for op in grid(size, 2, widths=[8, 32, 128, 512], kernels=[1, 3]):
        ms.setdefault(op.family, {})[",".join(map(str, op.sizes))] = power_law(op)
    return LatencyTable.model_validate(ON | {"size": size, "batch_size": 2, "precision": "fp32", "ms": ms} | conditions)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    table().write(tmp_path / "table.json")
    return tmp_path / "table.json"


def test_whole_networks_scale_the_sum() -> None:
    made = table(checks={"a": (1.0, 2.0), "b": (3.0, 1.5)})
    assert table().ratio == 1 and made.ratio == pytest.approx(1)
    made.checks["c"] = (1.0, 8.0)
    parts = list(of_structure(parse(TINY), 32))
    assert made.ratio == pytest.approx(2) and made.predict(parts) == pytest.approx(2 * made.added(parts))


def test_networks_that_the_table_covers_are_measured() -> None:
    """GENet-normal has 2560 channels, and the ZenNets kernels of 5 and more: those are left out."""
    wide: dict[str, dict[str, float]] = {}
    for op in grid(32, 2, widths=[8, 128, 2048], kernels=[1, 3]):
        wide.setdefault(op.family, {})[",".join(map(str, op.sizes))] = power_law(op)
    made, seen = table(ms=wide), []

    def measured(network: nn.Module, **how: object) -> float:
        seen.append(how)
        return 3.0

    latency_grid.check(made, measured)
    assert list(made.checks) == ["genet_light"] and made.checks["genet_light"][1] == 3
    assert seen == [{"size": 32, "batch_size": 2, "precision": "fp32", "device": "cpu"}]


@pytest.mark.parametrize("name", ["cifar-1M", "imagenet-400M", "imagenet-0.1ms"])
def test_a_structure_and_its_network_have_the_same_parts(name: str) -> None:
    structure, size = parse(published()[name]["structure"]), published()[name]["image_size"]
    with torch.device("meta"):
        network = ZenNet(structure, num_classes=1000)
    assert operations(network, size) == Counter(of_structure(structure, size, 1000))


def test_the_parts_of_a_network() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
            self.by_channel, self.fc = nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.row(x)
            return self.fc((self.by_channel(x) + x).mean(dim=(2, 3)))

    assert operations(Block(), 9) == {
        Op("conv 3x3 stride 2 at 9", (3, 8)): 1,
        Op("relu", (200,)): 1,
        Op("depthwise 5x5 stride 1 at 5", (8,)): 1,
        Op("add", (200,)): 1,
        Op("mean", (200,)): 1,
        Op("linear", (8, 4)): 1,
    }


def test_what_no_table_covers_is_named() -> None:
    with pytest.raises(TableError, match=r"'_softmax'.*table: null"):
        operations(nn.Softmax(dim=1), 8)
    with pytest.raises(TableError, match=r"2 groups.*table: null"):
        conv(3, 1, 8, 8, 4, groups=2)


def test_between_measured_widths_log_ms_is_linear_in_log_channels() -> None:
    assert table().of(conv(3, 1, 8, 32, 16)) == power_law(conv(3, 1, 8, 32, 16))
    for op in (conv(3, 1, 24, 200, 16), conv(1, 2, 3, 9, 32), conv(3, 2, 77, 77, 8, 77), Op("add", (3000,))):
        assert table().of(op) == pytest.approx(power_law(op), rel=1e-9)


def test_a_network_is_the_sum_of_its_parts() -> None:
    parts = list(of_structure(parse(TINY), 32))
    assert table().predict(parts) == pytest.approx(sum(power_law(op) for op in parts))
    assert table().predict(Counter(parts)) == pytest.approx(table().predict(parts))


@pytest.mark.parametrize(
    ("op", "sentence"),
    [
        (conv(3, 1, 8, 600, 16), r"of 8 -> 600.*has 8 to 512; measure it.*--width"),
        (conv(3, 1, 4, 8, 16), r"of 4 -> 8.*has 8 to 512"),
        (conv(5, 1, 8, 8, 16), r"'conv 5x5 stride 1 at 16', expected .*images of 32 px.*--kernel"),
        (conv(3, 1, 8, 8, 14), r"at 14', expected conv 3x3 stride 1 at 32, conv 3x3 stride 1 at 16.*--size"),
    ],
)
def test_outside_the_table_it_says_what_to_measure(op: Op, sentence: str) -> None:
    with pytest.raises(TableError, match=sentence):
        table().of(op)


def test_a_corner_that_was_too_large_is_not_made_up() -> None:
    small = table()
    del small.ms["conv 3x3 stride 1 at 16"]["512,512"]
    assert small.of(conv(3, 1, 512, 128, 16)) > 0
    with pytest.raises(
        TableError, match=r"no 512 -> 512, which was left out as too large.*--most-macs or --most-values"
    ):
        small.of(conv(3, 1, 300, 300, 16))


def test_the_grid_leaves_out_what_is_too_large() -> None:
    ops = set(grid(32, 64, widths=[8, 2048], kernels=[3], most_macs=5e8))
    assert conv(3, 1, 2048, 2048, 2) in ops and conv(3, 2, 2048, 2048, 4) in ops
    assert conv(3, 1, 2048, 2048, 4) not in ops  # 604 M
    assert conv(3, 1, 3, 8, 32) in ops and conv(3, 1, 3, 8, 16) not in ops
    assert not {op for op in grid(224, 64, widths=[8192]) if op.family == "depthwise 3x3 stride 1 at 224"}  # 200 GB


def test_measuring_goes_on_where_it_ended_and_refuses_other_conditions(tmp_path: Path) -> None:
    out, seen = tmp_path / "table.json", []
    ops = list(dict.fromkeys(grid(8, 2, widths=[8, 16], kernels=[3])))

    def one(op: Op, *conditions: object) -> float:
        seen.append(op)
        if len(seen) == 30:
            raise KeyboardInterrupt
        return power_law(op)

    latency_grid.OFTEN, often = 10, latency_grid.OFTEN
    try:
        with pytest.raises(KeyboardInterrupt):
            measure_table(out, ops, size=8, batch_size=2, measure_op=one)
    finally:
        latency_grid.OFTEN = often
    made = measure_table(out, ops, size=8, batch_size=2, measure_op=one)
    assert made == LatencyTable.read(out) and sum(map(len, made.ms.values())) == len(ops)
    assert 29 + 1 <= len(seen) - len(ops) + 30 < 29 + 12  # what was written by then is not measured again
    with pytest.raises(TableError, match=r"batches of 2.*expected .*batches of 4.*another file"):
        measure_table(out, ops, size=8, batch_size=4, measure_op=one)


@pytest.mark.parametrize(
    "op", [conv(3, 2, 3, 8, 9), conv(5, 1, 8, 8, 4, 8), *(Op(f, (64,)) for f in ("relu", "add", "mean"))], ids=str
)
def test_each_kind_of_part_is_measured(op: Op) -> None:
    assert 0 < measure_op(op, 2, "fp32", torch.device("cpu")) < 1000


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"no latency table at .*nothing.json \(No such file.*manta latency-table"):
        LatencyTable.read(tmp_path / "nothing.json")
    (tmp_path / "x.json").write_text(json.dumps({"device": "cpu"}))
    with pytest.raises(TableError, match=r"x.json, whose on is no latency table's"):
        LatencyTable.read(tmp_path / "x.json")


def test_a_gpu_budget_without_a_gpu_is_offered_a_table(tmp_path: Path) -> None:
    budget = LatencyBudget(ms=0.3, device="cuda")
    assert budget.resolved_precision == "fp16" and budget.problems("cuda", 192) == []
    assert (
        "gpus_per_worker" in budget.problems("cpu", 192)[0] and "manta latency-table" in budget.problems("cpu", 192)[0]
    )
    file = tmp_path / "h100.json"
    table(on="cuda", device="H100", batch_size=64, precision="fp16").write(file)
    assert LatencyBudget(ms=0.3, device="cuda", table=str(file)).problems("cpu", 32) == []
    wrong = LatencyBudget(ms=0.3, device="cuda", table=str(file)).problems("cpu", 192)
    assert "got table" in wrong[0] and "'fp16', 32), expected ('cuda', 64, 'fp16', 192)" in wrong[0]
    assert "no latency table" in LatencyBudget(ms=1, table="nowhere.json").problems("cpu", 32)[0]
    assert "fp16 on a CPU" in LatencyBudget(ms=1, precision="fp16").problems("cpu", 32)[0]


def test_a_budget_answers_by_its_table_or_by_measurement(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = parse(TINY)
    by_table = NetworkLatency(LatencyBudget(ms=1, batch_size=2, table=str(file)), 32)
    expected = table().predict(of_structure(structure, 32))
    assert by_table(ZenNet(structure)) == pytest.approx(expected) == by_table.of_structure(structure)
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("workloads.search.latency_budget.measure_all", lambda _, **how: seen.append(how) or [7.0])
    measured = NetworkLatency(LatencyBudget(ms=1, batch_size=2), 32)
    assert measured(ZenNet(structure)) == measured.of_structure(structure, 10) == 7
    assert seen[0] == {"size": 32, "batch_size": 2, "precision": "fp32", "device": "cpu"}


def manta(*args: object) -> Any:
    app = typer.Typer()
    app.command()(commands.latency_table)
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_command_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_table, "__kwdefaults__", measure_table.__kwdefaults__ | {"measure_op": power_law})
    out = tmp_path / "cpu.json"
    result = manta(
        "-o", out, "--size", 32, "--batch-size", 2, "--width", 8, "--width", 32, "--kernel", 1, "--kernel", 3
    )
    assert result.exit_code == 0 and "images of 32 px" in result.stdout
    assert "sums are multiplied by 1.000" in result.stdout  # no published network is so narrow
    made = LatencyTable.read(out)
    assert made.of(conv(3, 1, 16, 16, 16)) == pytest.approx(power_law(conv(3, 1, 16, 16, 16)))
    again = manta("-o", out, "--size", 64)
    assert again.exit_code == 1 and "write another file" in again.stderr


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--precision", "bf16"], "got precision 'bf16', expected fp16 or fp32"),
        (["--device", "tpu"], "got device 'tpu', expected cpu or cuda"),
        (["--precision", "fp16"], "fp16 on a CPU"),
        (["--device", "cuda"], "without a GPU"),
    ],
)
def test_the_command_refuses(args: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = manta("-o", tmp_path / "t.json", *args)
    assert result.exit_code == 1 and sentence in result.stderr
