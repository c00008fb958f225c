"""What a search leaves: a folder that other jobs name as their model. No torch in here.

    winner.json          the Found: structure, `model:` that builds it, score, costs, latency, how it was searched
    population.parquet   the populations of all islands and the Pareto fronts of all they saw, with all that is known
    model.safetensors    weights to start from, of searches that train some
    README.md            the same for people

It is complete or absent: written beside its place and renamed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from workloads.artifact import ArtifactError, of_job, read_card
from workloads.record import write_atomic
from workloads.spec import JobSpec, Named
from workloads.spec_any import AnySpec
from workloads.spec_search import SearchSpec

if TYPE_CHECKING:
    from torch import Tensor

FOUND, POPULATION = "winner.json", "population.parquet"


class Latency(BaseModel):
    """Of one image in a batch, measured at the end: by the conditions of the search's latency budget, if it had one."""

    ms: float
    device: str
    batch_size: int
    precision: str


class Found(BaseModel):
    """Facts of a search that ended, as `winner.json` holds them."""

    model_config = ConfigDict(extra="ignore")

    format: int = 1
    job_id: str
    spec: SearchSpec
    paper: str
    structure: str
    model: dict[str, Any]
    score: float
    costs: dict[str, float]
    latency: Latency | None = None
    blocks: list[dict[str, Any]]
    told: int
    scored: int
    spent: int

    def summary(self) -> dict[str, Any]:
        """What an answer about the job says of it; the rest is in the report and the files."""
        return self.model_dump(mode="json", include={"structure", "model", "score", "costs", "latency"})


def read_found(folder: Path) -> Found | None:
    """None where `folder` holds no winner (yet)."""
    try:
        return Found.model_validate_json((folder / FOUND).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None


def folder_of(reference: str, home: Path) -> Path | None:
    """Where the artifact of `job:<id>` lies, or the folder that is named; None: it is a name of something else.

    Raises:
        ArtifactError: `job:` with what is no id.
    """
    if reference.startswith("job:"):
        return of_job(reference, home)
    return Path(reference) if "/" in reference else None


def settled(spec: AnySpec, home: Path) -> AnySpec:
    """The spec with `model: {name: "job:<id>", ...}` replaced by what that job found, or trained.

    An artifact's folder may stand in place of the job, for what was found without a service. Further keys beside the
    name are kept over those of the winner.

    Raises:
        ArtifactError: the job has left no model.
    """
    if not isinstance(spec, JobSpec):
        return spec
    name = spec.model.name
    if (folder := folder_of(name, home)) is None:
        return spec
    if (found := read_found(folder)) is not None:
        model = found.model
    elif (folder / "manta.json").exists():
        model = read_card(folder).spec.model.model_dump()
    else:
        raise ArtifactError(
            f"got model {name!r}, which names no finished job (looked at {folder}), expected job:<id> or the artifact "
            "folder of a search or a training; wait until it is done, or correct the id"
        )
    return spec.model_copy(update={"model": Named.model_validate(model | spec.model.config)})


def write(
    folder: Path, found: Found, rows: Sequence[Mapping[str, Any]], weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the whole artifact in place of whatever `folder` held.

    Args:
        folder: the artifact's folder.
        found: what is in it.
        rows: candidates with what was measured, best first.
        weights: by the names of `found.model`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    columns = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    pq.write_table(table, scratch / POPULATION)
    if weights is not None:
        from safetensors.torch import save_file

        save_file(
            {name: value.detach().cpu().contiguous() for name, value in weights.items()}, scratch / "model.safetensors"
        )
    write_atomic(scratch / FOUND, found.model_dump_json(indent=1))
    write_atomic(scratch / "README.md", _words(found, len(rows)))
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)


def _words(found: Found, kept: int) -> str:
    lines = [f"# {found.spec.name}", "", f"Found by job `{found.job_id}`: {found.paper}.", ""]
    lines += ["```", found.structure, "```", "", f"- score: {found.score:.6g}"]
    lines += [f"- {name}: {value:,.10g}" for name, value in found.costs.items()]
    if found.latency is not None:
        x = found.latency
        lines.append(f"- latency: {x.ms:.4g} ms an image, batch {x.batch_size}, {x.precision}, on {x.device}")
    lines.append(f"- candidates: {found.told:,}, of which {found.spent:,} were over budget or known; {kept:,} are kept")
    here = "the path of this folder" if found.job_id.startswith("local-") else f"job:{found.job_id}"
    lines += ["", f"Use it in a job: `model: {{name: {here}}}`.", ""]
    return "\n".join(lines)
