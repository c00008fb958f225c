"""Runs the evaluations that a job lists; each result is kept as soon as it is there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from workloads import artifact, catalog
from workloads.evaluation.base import Evaluation, Subject
from workloads.place import Place
from workloads.record import RunFolder, write_atomic
from workloads.spec import JobSpec

logger = logging.getLogger(__name__)


def evaluate(
    spec: JobSpec, run: RunFolder, home: Path, job_id: str, should_stop: Callable[[], bool], place: Place
) -> bool:
    """Runs what `evaluate` lists and has no result yet; False when it was stopped in between."""
    results = run.read_evaluations()
    for i, named in enumerate(spec.evaluate):
        if i < len(results):
            continue
        if should_stop():
            return False
        evaluation: Evaluation = catalog.load("evaluation", named.name)()
        config = evaluation.Config.model_validate(named.config)
        folder = run.path / "evaluations" / f"{i}-{named.name}"
        result = evaluation.run(config, Subject(spec, run.artifact, home, folder, job_id, should_stop, place))
        if result is None:
            return False
        if "artifact" in result:
            result["artifact"] = str(Path(result["artifact"]).relative_to(run.path))
        results.append({"name": named.name, "config": named.config, **result})
        write_atomic(run.evaluations, json.dumps(results, indent=1))
        means = {who: round(value["mean"], 4) for who, value in result["results"].items()}
        logger.info("evaluation %s: %s %s", result["label"], result["metric"], means)
    artifact.write_evaluations(run.artifact, results)
    return True
