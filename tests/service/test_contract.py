"""The OpenAPI document: complete, and kept to by every answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service.access import RULES
from service.contract import TAGS
from service.routes.jobs import EXAMPLES
from tests.service.contract import Contracted, failures
from workloads.spec_any import parse_spec

SEED = 7


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contracted]:
    service = Contracted(tmp_path_factory.mktemp("contract"))
    yield service
    service.close()


@pytest.fixture(scope="module")
def document(service: Contracted) -> dict[str, Any]:
    return service.app.openapi()


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


@pytest.mark.slow
def test_every_operation_keeps_to_the_document(service: Contracted) -> None:
    found, asked = failures(service, examples=1, seed=SEED)
    assert not found, "\n".join(found)
    assert {label.split(" ", 1)[1] for label in asked} == RULES.keys() - {"GET /docs", "GET /openapi.json"}
    assert {label.split(" ", 1)[0] for label in asked} == {"examples", "coverage", "fuzzing", "stateful_testing"}


def test_every_operation_says_what_it_does_takes_and_answers(document: dict[str, Any]) -> None:
    tags = {tag["name"] for tag in TAGS}
    found = operations(document)
    assert found.keys() == RULES.keys() - {"GET /docs", "GET /openapi.json"}
    for key, operation in found.items():
        assert operation["operationId"].isidentifier() and set(operation["tags"]) <= tags and operation["tags"], key
        assert operation.get("description") or key.startswith("GET /v1/"), key  # else the summary says it all
        for status, answer in operation["responses"].items():
            if status >= "400" and "$ref" in answer:
                assert answer["$ref"].startswith("#/components/responses/"), key
            elif status != "204":
                schemas = [content["schema"] for content in answer["content"].values()]
                assert all(schema not in ({}, {"type": "object"}) for schema in schemas), (key, status)
        assert ("security" in operation) == (RULES[key].least is not None), key


def test_a_job_in_the_document_is_a_training_or_a_search(document: dict[str, Any]) -> None:
    body = operations(document)["POST /v1/jobs"]["requestBody"]["content"]["application/json"]
    kinds = [option["$ref"].rpartition("/")[2] for option in body["schema"]["anyOf"]]
    assert kinds == ["JobSpec", "SearchSpec"]
    batch = operations(document)["POST /v1/jobs:batch"]["requestBody"]["content"]["application/json"]["schema"]
    entries = [option["$ref"].rpartition("/")[2] for option in batch["items"]["anyOf"]]
    assert entries == [*kinds, "DeploySpec"] and "Deploy" in document["components"]["schemas"]["DeploySpec"]["title"]
    spec = document["components"]["schemas"]["JobSpec"]
    assert {"method", "model", "data", "register"} <= spec["properties"].keys() and not spec["additionalProperties"]
    for example in EXAMPLES.values():
        assert parse_spec(example["value"])


def test_refusals_are_written_once_and_name_their_codes(document: dict[str, Any]) -> None:
    components = document["components"]
    codes = components["schemas"]["Problem"]["properties"]["code"]["enum"]
    assert {"NotFound", "InvalidSpec", "NotDeployed"} <= set(codes)
    for answer in components["responses"].values():
        assert answer["content"] == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    assert components["responses"]["Unavailable"]["headers"]["Retry-After"]["required"]
    submit = operations(document)["POST /v1/jobs"]["responses"]
    assert {"201", "200", "401", "403", "404", "409", "413", "422", "429", "503"} <= submit.keys()
    assert list(submit) == sorted(submit)
