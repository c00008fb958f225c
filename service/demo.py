"""`manta demo`: the main job, end to end, as a user of the REST API would run it.

Shards, a cluster and a service of its own, POST /v1/jobs, training, evaluation,
registry, deployment, predictions over HTTP, a table and a report. Whatever it started is
stopped however it ends.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from cluster.embedded import ClusterError
from service.client import ApiError, Client
from service.local_cluster import temporary
from service.progress import follow
from service.report import page
from service.terminal import FAILED, OK, out
from workloads.sheet import contact_sheet

PICTURES = 8
BATCH = 60  # images of one predict request
MARK = ".manta-demo"  # in the folder of an earlier demo, which may be replaced


class DemoError(Exception):
    """The demo cannot go on."""


def run_demo(folder: Path) -> int:
    """Runs the demo in `folder`; returns the exit code. A second run starts anew.

    Args:
        folder: for data, report and the demo's own home; empty, absent, or of an earlier demo.
    """
    folder = folder.absolute()
    began = time.monotonic()
    try:
        _clean(folder)
        summary = _main_job(folder, began)
    except (DemoError, ClusterError, ApiError) as error:
        out.print(f"demo: failed {error}", markup=False)
        return FAILED
    except KeyboardInterrupt:
        out.print("demo: interrupted; everything that it started is stopped")
        return 130
    sys.stdout.write(f"demo: ok {json.dumps(summary)}\n")
    return OK


def _clean(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise DemoError(f"{folder} holds files that are not of a demo; choose another folder by --out")
    for part in ("home", "data"):
        shutil.rmtree(folder / part, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def _main_job(folder: Path, began: float) -> dict[str, Any]:
    _say("packing 1,797 handwritten digits into WebDataset shards")
    digits = _pack(folder / "data" / "digits")
    _say("starting a Ray head and the service, on loopback, with a token")
    with temporary(folder / "home") as head, Client(head.url) as client:
        _say(f"the service is ready: {head.url}/docs")
        job = client.submit(demo_spec(digits))
        _say(f"POST /v1/jobs -> {job['id']}")
        job = _finished(client, job["id"])
        encoder, classifier = job["models"]
        _say(f"registered {encoder} and {classifier}; deploying both")
        names = [reference.partition("@")[0] for reference in (encoder, classifier)]
        for name in names:
            client.deploy(name)
        for name in names:
            client.deploy(name, wait_s=120)
        images, labels = _test_digits(digits)
        outputs = [o for i in range(0, len(images), BATCH) for o in client.predict(names[1], images[i : i + BATCH])]
        right = sum(output["label"] == label for output, label in zip(outputs, labels, strict=True))
        _say(f"asked {names[1]} about {len(images)} held-out digits over HTTP: {right} right")
        drawn = client.reconstruct(names[0], images[:PICTURES])
        curve = client.metrics(job["id"])
        model = client.model(names[0])
    sheet = contact_sheet([{kind: base64.b64decode(data) for kind, data in row.items()} for row in drawn])
    summary = summarise(job, right / len(images), time.monotonic() - began)
    card, html, png = model["card"], folder / "report.html", folder / "report.png"
    facts = {"paper": card["paper"], "parameters": card["parameters"], "sheet": sheet, "summary": summary}
    html.write_text(page(job=job, points=curve, online=[], **facts))
    png.write_bytes(sheet)
    out.print(result_table(job, summary))
    _say(f"report: {html}")
    _say(f"pictures: {png}")
    return summary


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False)


def _pack(folder: Path) -> Path:
    """As a user would: `manta pack digits`."""
    import subprocess

    command = [sys.executable, "-m", "service.cli", "pack", "digits", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DemoError(f"manta pack digits: {done.stderr or done.stdout}")
    return folder


def demo_spec(digits: Path) -> dict[str, Any]:
    """The recipe with its shards at `digits`."""
    text = (resources.files("workloads") / "recipes" / "digits_mae.yaml").read_text()
    spec: dict[str, Any] = yaml.safe_load(text.replace("data/digits/", f"{digits}/"))
    return spec


def _finished(client: Client, job_id: str) -> dict[str, Any]:
    """Follows the job to its end, which must be a good one."""
    job = follow(client, job_id)
    if job["state"] != "SUCCEEDED":
        tail = "\n".join(client.logs(job_id).splitlines()[-20:])
        raise DemoError(f"{job['state']}: {job['reason']} ({job['hint']})\n{tail}")
    return job


def _test_digits(digits: Path) -> tuple[list[bytes], list[str]]:
    """The held-out images as they lie in the shard, and the names of their classes."""
    import tarfile

    classes = (digits / "classes.txt").read_text().split()
    images, labels = [], []
    with tarfile.open(digits / "test-000000.tar") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            if member.name.endswith(".png"):
                images.append(file.read())
            elif member.name.endswith(".cls"):
                labels.append(classes[int(file.read())])
    return images, labels


def _result(job: dict[str, Any], label: str) -> dict[str, Any]:
    results: dict[str, Any] = next(e["results"] for e in job["evaluations"] if e["label"] == label)
    return results


def summarise(job: dict[str, Any], predict_accuracy: float, wall_s: float) -> dict[str, Any]:
    """The keys of the last line; `random` is the untrained encoder."""
    means = {
        f"{key}_{column}": round(_result(job, label)[who]["mean"], 4)
        for key, label in (("knn10", "knn10"), ("probe", "probe"), ("few_label", "few_label10"))
        for column, who in (("random", "untrained"), ("pretrained", "pretrained"))
    }
    start = {"job_id": job["id"], "epochs": job["spec"]["epochs"]}
    return start | means | {"predict_accuracy": round(predict_accuracy, 4), "wall_s": round(wall_s, 1)}


ROWS = (
    ("kNN, 10 labels/class", "knn10"),
    ("linear probe, all labels", "probe"),
    ("fine-tune, 10 labels/class", "few_label10"),
)
COLUMNS = ("untrained", "pretrained", "raw_pixels")


def result_table(job: dict[str, Any], summary: dict[str, Any]) -> Table:
    """Accuracy on the test digits: mean and standard deviation over seeds."""
    table = Table(title="accuracy on 360 held-out digits, mean \u00b1 deviation over seeds")
    for column in ("", "untrained", "pretrained", "raw pixels"):
        table.add_column(column, no_wrap=True)
    for title, label in ROWS:
        result = _result(job, label)
        cells = [f"{r['mean']:.3f} \u00b1{r['std']:.3f}" if (r := result.get(who)) else "-" for who in COLUMNS]
        table.add_row(title, *cells)
    table.add_row("served model, over HTTP", "-", f"{summary['predict_accuracy']:.3f}", "-")
    return table
