"""Jobs of any kind, from a request, a file, or a run folder: one that has `search` searches, others train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.spec_search import SearchSpec

AnySpec = JobSpec | SearchSpec


def kind_of(document: Any) -> type[JobSpec] | type[SearchSpec]:
    """The model that a document is to be validated by."""
    return SearchSpec if isinstance(document, dict) and "search" in document else JobSpec


def parse_spec(document: Any) -> AnySpec:
    """Raises pydantic's ValidationError, a ValueError."""
    return kind_of(document).model_validate(document)


def read_spec(path: Path) -> AnySpec:
    """Reads a YAML (or JSON) file into a spec, as it stands there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML mapping, or no job (pydantic's ValidationError is one).
    """
    return parse_spec(read_document(path))


def read_document(path: Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file; raises as `read_spec` does."""
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(
            f"{path} holds {type(document).__name__}, expected a mapping with method, model, data, or with search"
        )
    return document


def spec_of(run: RunFolder) -> AnySpec:
    """Of a run folder that holds one; raises ValueError where it is damaged."""
    return parse_spec(json.loads(run.spec.read_text()))
