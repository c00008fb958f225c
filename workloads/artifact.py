"""What a job leaves: a folder that timm and the Hugging Face tools read, without pickle.

    model.safetensors    weights of the encoder or classifier, timm's names
    config.json          `timm.create_model("local-dir:FOLDER", pretrained=True)` reads this
    manta.json           the Card: method, model, data, classes, metrics, lineage
    method.safetensors   all state of the method, where it can draw reconstructions
    pictures.png         what the method draws of some images, where it does
    README.md            the card for people

Reading a card costs no torch. An artifact is complete or absent: it is written beside
its place and renamed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from workloads.data.views import Size, height_width
from workloads.record import write_atomic
from workloads.spec import JobSpec

if TYPE_CHECKING:
    from torch import nn


PICTURES = "pictures.png"
_NAME = re.compile(r"[\w-][\w.-]*")  # never `..`, which would climb out of registry or runs
_REFERENCE = re.compile(rf"{_NAME.pattern}(@\d+)?")


class Card(BaseModel):
    """Facts of an artifact, as `manta.json` holds them."""

    model_config = ConfigDict(extra="ignore")

    format: int = 1
    kind: Literal["encoder", "classifier"]
    job_id: str
    spec: JobSpec
    paper: str
    classes: list[str]
    image_size: Size
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_features: int
    parameters: int
    num_instances: int
    datasets: dict[str, dict[str, Any]]  # stream -> {samples, content_hash}
    sha256: str
    reconstructs: bool = False
    evaluations: list[dict[str, Any]] = []


class ArtifactError(ValueError):
    """A reference that names no artifact, or a folder that is none."""


def read_card(folder: Path) -> Card:
    """Raises ArtifactError where `folder` holds no artifact."""
    try:
        return Card.model_validate_json((folder / "manta.json").read_text())
    except FileNotFoundError:
        raise ArtifactError(
            f"got {folder}, expected an artifact folder with manta.json and model.safetensors; "
            "`manta models` lists the registered ones"
        ) from None


def of_job(reference: str, home: Path) -> Path:
    """`job:<id>` -> the folder of the artifact that the job leaves.

    Raises:
        ArtifactError: no id, but a path.
    """
    job_id = reference.removeprefix("job:")
    if not _NAME.fullmatch(job_id):
        raise ArtifactError(f"got {reference!r}, which names no finished job, expected job:<id>; correct the id")
    return home / "runs" / job_id / "artifact"


def resolve(reference: str, home: Path) -> Path:
    """`name@version`, `name` (its newest version), `job:<id>` or a folder -> the artifact's folder.

    Raises:
        ArtifactError: there is no such artifact.
    """
    if reference.startswith("job:"):
        folder = of_job(reference, home)
    elif _REFERENCE.fullmatch(reference) and (home / "registry" / reference.partition("@")[0]).is_dir():
        name, _, version = reference.partition("@")
        versions = (home / "registry" / name).iterdir()
        newest = max((int(path.name) for path in versions if path.name.isdigit()), default=0)
        folder = home / "registry" / name / (version or str(newest))
    else:
        folder = Path(reference)
    if not (folder / "manta.json").is_file():
        raise ArtifactError(
            f"got {reference!r}, which names no artifact (looked at {folder}); "
            "expected name@version, job:<id> of a finished job, or an artifact folder"
        )
    return folder


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(
    folder: Path, model: nn.Module, card: dict[str, Any], method: nn.Module | None, pictures: bytes | None = None
) -> Card:
    """Writes a whole artifact in place of whatever `folder` held.

    Args:
        folder: the artifact's folder.
        model: what `Method.export` returned.
        card: fields of Card but `sha256`, `parameters`, `num_features`, `reconstructs`.
        method: the trained method where it draws pictures, so that the served model can as well.
        pictures: some of these, as PNG.
    """
    from safetensors.torch import save_model

    from workloads.models.encoders import timm_folder_config

    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_model(model, str(scratch / "model.safetensors"))
    if method is not None:
        save_model(method, str(scratch / "method.safetensors"))
    if pictures is not None:
        (scratch / PICTURES).write_bytes(pictures)
    num_features = int(model.num_features)  # type: ignore[arg-type]
    whole = Card(
        **card,
        sha256=sha256(scratch / "model.safetensors"),
        parameters=sum(p.numel() for p in model.parameters()),
        num_features=num_features,
        reconstructs=method is not None,
    )
    num_classes = len(whole.classes) if whole.kind == "classifier" else 0
    config = timm_folder_config(model)
    config |= {"num_classes": num_classes, "num_features": num_features}
    config["pretrained_cfg"] = {
        "input_size": [3, *height_width(whole.image_size)],
        "mean": whole.mean,
        "std": whole.std,
        "num_classes": num_classes,
        "label_names": whole.classes if num_classes else None,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    (scratch / "config.json").write_text(json.dumps(config, indent=1))
    _write_words(scratch, whole)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)
    return whole


def write_evaluations(folder: Path, evaluations: list[dict[str, Any]]) -> None:
    """Adds results to the card of an artifact that is not registered yet."""
    _write_words(folder, read_card(folder).model_copy(update={"evaluations": evaluations}))


def _write_words(folder: Path, card: Card) -> None:
    write_atomic(folder / "manta.json", card.model_dump_json(indent=1))
    lines = [f"# {card.spec.name}", "", f"{card.kind} of job `{card.job_id}`: {card.paper}.", ""]
    size = " x ".join(map(str, height_width(card.image_size)))  # height first
    lines += [f"{card.parameters:,} parameters, {card.num_features} features, {size} px.", ""]
    for stream, facts in card.datasets.items():
        lines.append(f"- data `{stream}`: {facts['samples']:,} samples, content {facts['content_hash'][:12]}")
    for result in card.evaluations:
        values = ", ".join(f"{who} {value['mean']:.3f}" for who, value in result["results"].items())
        lines.append(f"- {result['label']} ({result['metric']}): {values}")
    if (folder / PICTURES).exists():
        lines += ["", f"![what the method draws of some images]({PICTURES})"]
    lines += ["", 'Load: `timm.create_model("local-dir:FOLDER", pretrained=True)`.', ""]
    write_atomic(folder / "README.md", "\n".join(lines))


def fresh_model(folder: Path) -> nn.Module:
    """The exported network, its weights not read."""
    from workloads.models.encoders import exported

    card = read_card(folder)
    num_classes = len(card.classes) if card.kind == "classifier" else 0
    return exported(card.spec.model, num_classes, json.loads((folder / "config.json").read_text())["model_args"])


def load_model(folder: Path) -> nn.Module:
    """The exported network with its weights, in eval mode.

    Raises:
        ArtifactError: no artifact, or weights that are not those of its card.
    """
    from safetensors.torch import load_model as load_safetensors

    card = read_card(folder)
    if sha256(folder / "model.safetensors") != card.sha256:
        raise ArtifactError(f"{folder / 'model.safetensors'} is not the file that its card describes; copy it again")
    model = fresh_model(folder)
    load_safetensors(model, str(folder / "model.safetensors"))
    return model.eval()
