"""MAE pretraining of ViT-B/16 and ViT-L/16 at 224 px on a GPU: images/s, MFU, memory, and what the input takes.

    python -m tests.benchmarks.gpu                      both models, compiled and not, the largest batch that fits
    python -m tests.benchmarks.gpu --model vit_large --batch 512 --steps 60 --profile
    python -m tests.benchmarks.gpu --toy                a tiny model on whatever is there, in seconds

Prints a JSON line for each configuration and a row for RESULTS.md beside this file. The engine is that of a job (bf16
under autocast, blocks compiled one by one, AdamW); images are random bytes that wait in pinned memory. There is no Ray
in it and there are no shards: torch, numpy, pydantic, PyYAML, Pillow, simplejpeg, braceexpand and tqdm suffice. Without
a GPU it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.benchmarks.table import Row, markdown
from workloads.batches import to_device
from workloads.flops import count, mfu, peak
from workloads.methods.base import Batch, DataInfo, Inputs, Progress
from workloads.methods.mae import MAE, MAEConfig
from workloads.models.encoders import build_encoder
from workloads.parallel import Spread
from workloads.parts import optimizers
from workloads.ranks import Ranks
from workloads.spec import JobSpec
from workloads.step import Stepper

START = Progress(step=0, epoch=0, total_steps=1)
MODELS = {"vit_base": "ViT-B/16", "vit_large": "ViT-L/16"}
WANTED_MFU = 0.45  # of the large one, compiled
WANTED = f"MFU >= {100 * WANTED_MFU:.0f} %"
SMALLEST, LARGEST = 64, 4096  # batch: of a search; MAE trains with 4096
ROUNDS = 3
POOL = 4  # batches on the host
TOY = {
    "model": {"name": "vit", "image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2},
    "method": {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
}


def spec_of(model: str, batch: int, *, compiled: bool) -> JobSpec:
    """A job of the paper's decoder and mask ratio (He et al. 2022, table 1); `toy` is no model of theirs."""
    sized = TOY if model == "toy" else {"model": {"name": model}, "method": {"name": "mae"}}
    document = sized | {
        "name": "bench-gpu",
        "data": {"train": {"shards": "synthetic"}},
        "steps": 1,
        "batch_size": batch,
        "precision": "bf16",
        "engine": {"compile": compiled},
    }
    return JobSpec.model_validate(document)


class Training:
    """A model on its device that makes steps from batches on the host.

    Attributes:
        flops: of a step.
    """

    def __init__(self, spec: JobSpec, device: torch.device) -> None:
        torch.manual_seed(spec.seed)
        encoder: Any = build_encoder(spec.model)
        size = encoder.config.image_size
        config = MAEConfig.model_validate(spec.method.config)
        info = DataInfo(num_instances=1, num_classes=0, shape=(3, size, size))
        method = MAE(config, Inputs(encoder, info, load=_nothing, build=_nothing))
        self.views, self.device = MAE.views(config, size), device
        self._pool = [_bytes(spec.batch_size, size, pin=device.type == "cuda") for _ in range(POOL)]
        of_one = count(method, to_device(_bytes(1, size), self.views, torch.device("cpu")), START)
        assert of_one is not None
        self.flops = of_one * spec.batch_size
        ranks = Ranks(device=device)
        model = Spread(method.to(device), spec.engine, ranks)
        self._stepper = Stepper(spec, model, optimizers.build(method.parameter_groups(), spec.optimizer), ranks)

    def pool(self, n: int) -> Iterator[Batch]:
        return (self._pool[i % POOL] for i in range(n))

    def steps(self, n: int) -> None:
        for batch in self.pool(n):
            self._stepper({"train": to_device(batch, self.views, self.device)}, START)

    def copies(self, n: int) -> None:
        """What `steps` does to move batches, alone; on a GPU it is in the same stream as the work."""
        for batch in self.pool(n):
            to_device(batch, {}, self.device)

    def inputs(self, n: int) -> None:
        """The copies and what is done to the images on the device."""
        for batch in self.pool(n):
            to_device(batch, self.views, self.device)


def _nothing(_: Any) -> Any:
    raise AssertionError("MAE loads and builds nothing")


def _bytes(n: int, size: int, *, pin: bool = False) -> Batch:
    number = torch.arange(n)
    image = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
    batch = {"image": image, "key": number, "index": number}
    return {name: value.pin_memory() for name, value in batch.items()} if pin else batch


def seconds(call: Callable[[int], None], n: int, device: torch.device) -> float:
    """Of one of n turns, on a device that has nothing else to do before and after."""
    _wait(device)
    began = time.perf_counter()
    call(n)
    _wait(device)
    return (time.perf_counter() - began) / n


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    model: str, batch: int, steps: int, device: torch.device, *, compiled: bool, profiled: bool = False
) -> dict[str, Any]:
    """One configuration.

    Args:
        model: a name of MODELS, or `toy`.
        batch: images of a step.
        steps: of each of ROUNDS rounds.
        device: where.
        compiled: whether blocks are.
        profiled: whether to add the longest kernels and their shares of the device's time.

    Returns:
        medians over the rounds; `first_step_s` with the compilation; `transfer_share` and `input_share`: time of
        copying a batch, and of copying and normalising it, over that of a step.
    """
    if compiled:
        torch.compiler.reset()  # else a second batch size is compiled for any size
    spec = spec_of(model, batch, compiled=compiled)
    training = Training(spec, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first_step_s = seconds(training.steps, 1, device)
    training.steps(3)
    step_s = statistics.median(seconds(training.steps, steps, device) for _ in range(ROUNDS))
    top = peak(device, spec.precision)
    result = {
        "model": model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "precision": spec.precision,
        "compiled": compiled,
        "batch": batch,
        "images_per_s": batch / step_s,
        "step_s": step_s,
        "first_step_s": first_step_s,
        "tflops_per_step": training.flops / 1e12,
        "mfu": None if top is None else mfu(training.flops, step_s, top, 1),
        "memory_gib": _memory_gib(device),
        "transfer_share": statistics.median(seconds(training.copies, steps, device) for _ in range(ROUNDS)) / step_s,
        "input_share": statistics.median(seconds(training.inputs, steps, device) for _ in range(ROUNDS)) / step_s,
    }
    return result | ({"kernels": kernels(training)} if profiled else {})


def _memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def kernels(training: Training, most: int = 12) -> dict[str, float]:
    """The longest kernels of three steps: name -> share of all kernels' time. Tells what bounds the step."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = training.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        seconds(training.steps, 3, training.device)
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type.name == ("CUDA" if on_gpu else "CPU"):
            took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            times[event.key[:120]] = times.get(event.key[:120], 0) + took
    total = sum(times.values())
    longest = sorted(times, key=lambda name: times[name], reverse=True)[:most]
    return {name: round(times[name] / total, 4) for name in longest}


def largest_batch(model: str, device: torch.device) -> int:
    """Doubled until a step does not fit, not compiled, which needs no less memory.

    Raises:
        SystemExit: the smallest does not fit.
    """
    batch = SMALLEST
    while batch <= LARGEST and _fits(model, batch, device):
        batch *= 2
    if batch == SMALLEST:
        raise SystemExit(f"{model} does not fit with a batch of {batch}; name a smaller one by --batch")
    return batch // 2


def _fits(model: str, batch: int, device: torch.device) -> bool:
    try:
        seconds(Training(spec_of(model, batch, compiled=False), device).steps, 2, device)  # the second has the moments
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()  # frees also what the traceback holds
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def row(result: dict[str, Any]) -> Row:
    judged = result["model"] == "vit_large" and result["compiled"] and result["mfu"] is not None
    used = "no MFU" if result["mfu"] is None else f"MFU {100 * result['mfu']:.1f} %"
    return (
        f"GPU: MAE of {MODELS.get(result['model'], 'a toy')}, {result['precision']}, "
        f"{'' if result['compiled'] else 'not '}compiled, batch {result['batch']}, {result['device']}",
        f"{result['images_per_s']:,.0f} images/s, {used}, {result['memory_gib']:.1f} GiB, "
        f"transfers {100 * result['transfer_share']:.1f} % of the time",
        WANTED if judged else "-",
        result["mfu"] >= WANTED_MFU if judged else None,
    )


def rows() -> list[Row]:
    """For `make bench`: measured where there is a GPU, else an open row."""
    if torch.cuda.is_available():
        return [row(result) for result in configurations(list(MODELS), None, 20, torch.device("cuda"))]
    open_row = "not measured here, `python -m tests.benchmarks.gpu`"
    wanted = {"vit_large": WANTED}
    return [
        (f"GPU: MAE of {MODELS[name]} at 224 px, bf16, compiled", open_row, wanted.get(name, "-"), None)
        for name in MODELS
    ]


def configurations(
    models: list[str], batch: int | None, steps: int, device: torch.device, *, profiled: bool = False
) -> Iterator[dict[str, Any]]:
    """Each model, not compiled and compiled, with one batch size; the toy is not compiled, which takes minutes."""
    for model in models:
        size = batch or largest_batch(model, device)
        for compiled in (False,) if model == "toy" else (False, True):
            yield measure(model, size, steps, device, compiled=compiled, profiled=profiled)
            gc.collect()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, help="one of them; default: both")
    parser.add_argument("--batch", type=int, help="images of a step; default: the largest power of two that fits")
    parser.add_argument("--steps", type=int, default=20, help=f"of each of {ROUNDS} rounds")
    parser.add_argument("--toy", action="store_true", help="a tiny model, on a CPU too")
    parser.add_argument("--profile", action="store_true", help="add the longest kernels to the JSON lines")
    parser.add_argument("--json", action="store_true", help="no row for RESULTS.md")
    wish = parser.parse_args(argv)
    if not wish.toy and not torch.cuda.is_available():
        print("got no GPU that torch can use, expected one; --toy tries the harness on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = ["toy"] if wish.toy else [wish.model] if wish.model else list(MODELS)
    batch = wish.batch or (8 if wish.toy else None)
    for result in configurations(models, batch, wish.steps, device, profiled=wish.profile):
        print(json.dumps(result), flush=True)
        if not wish.json:
            print(markdown(row(result)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
