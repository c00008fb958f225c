"""Validates custom resources against KubeRay's CRDs: structural schemas, made JSON Schema."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest


def folder() -> Path:
    """MANTA_KUBERAY_SCHEMAS, or `shared/crds` beside the checkout: `rayservices.v1.json` and its kin.

    Raises:
        pytest.skip: there are none.
    """
    named = os.environ.get("MANTA_KUBERAY_SCHEMAS")
    found = Path(named) if named else Path(__file__).parents[3] / "shared" / "crds"
    if not found.is_dir():
        pytest.skip(f"no KubeRay schemas at {found}: set MANTA_KUBERAY_SCHEMAS to a folder of them")
    return found


def strict(schema: Any) -> Any:
    """A structural schema as JSON Schema in which an unknown field is an error."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: strict(value) for key, value in schema.items() if key not in ("description", "format")}
    if kept.get("x-kubernetes-int-or-string") is True:
        kept["type"] = ["integer", "string"]
        kept.pop("anyOf", None)
    open_ended = "additionalProperties" in kept or kept.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(kept.get("properties"), dict) and kept.get("type") == "object" and not open_ended:
        kept["additionalProperties"] = False
    if kept.get("nullable") is True:
        kept = {"anyOf": [kept, {"type": "null"}]}
    return kept


@cache
def _validator(kind: str) -> jsonschema.Draft7Validator:
    file = folder() / f"{kind.lower()}s.v1.json"
    if not file.exists():
        pytest.skip(f"no schema of {kind}, which is not KubeRay's, at {file}: put its CRD's there")
    schema = strict(json.loads(file.read_text())["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(schema)


def problems(doc: dict[str, Any]) -> list[str]:
    """Every field that the CRD of the document's kind does not allow."""
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in _validator(doc["kind"]).iter_errors(doc)
    ]
