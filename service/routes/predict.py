"""/v1/models/{name}/deploy and /v1/models/{name}:predict, :embed, :reconstruct."""

from __future__ import annotations

import base64
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import UploadFile

from service.declarations import MOST_INT, refuses
from service.deployments import view_of
from service.errors import BadRequest, NotDeployed, TooLarge
from service.model_views import DeploymentView, EmbedAnswer, PredictAnswer, ReconstructAnswer
from service.parts import DeploymentsDep, PartsDep
from service.predictor import ask

router = APIRouter(prefix="/v1/models", tags=["models"])

WAIT_S = 120.0  # of `deploy?wait=true`
SMALL_BODY = 64 * 1024  # bytes that are parsed sooner than a thread would begin with them
SHAPE = 'send {"images": ["<base64 of an encoded image>", ...]}, or files as multipart/form-data'


class Deploy(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: int | None = Field(default=None, ge=1, le=MOST_INT, description="null: the newest.")


class Images(BaseModel):
    model_config = ConfigDict(extra="forbid")

    images: list[str] = Field(description="Encoded images (JPEG, PNG, ...), each in base64.")


async def _served(name: str, deployments: DeploymentsDep) -> DeploymentHandle[Any]:
    return await deployments.handle(name)


async def _images(request: Request, parts: PartsDep) -> list[bytes]:
    """The images of a request in either form, at least one."""
    limit = parts.settings.max_images
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form(max_files=limit) as form:
            images = [await file.read() for _, file in form.multi_items() if isinstance(file, UploadFile)]
    else:
        body = await request.body()
        images = parse(body, limit) if len(body) < SMALL_BODY else await run_in_threadpool(parse, body, limit)
    if not images:
        raise BadRequest("got no image, expected one at least", SHAPE)
    return images


def parse(body: bytes, limit: int) -> list[bytes]:
    """Images of the JSON form.

    Raises:
        BadRequest: another shape, or no base64; says the position.
        TooLarge: more than `limit` images.
    """
    try:
        texts = Images.model_validate_json(body).images
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "body"
        raise BadRequest(f"{where}: {problem['msg']}", SHAPE) from error
    if len(texts) > limit:
        raise TooLarge(f"got {len(texts)} images, expected at most {limit}", "send them in several requests")
    images = []
    for position, text in enumerate(texts):
        try:
            images.append(base64.b64decode(text, validate=True))
        except ValueError as error:  # binascii.Error is one; so is a character beyond ASCII
            raise BadRequest(
                f"image {position}: got no base64 ({error})", "encode the file's bytes in base64"
            ) from error
    return images


ServedDep = Annotated[DeploymentHandle[Any], Depends(_served)]
ImagesDep = Annotated[list[bytes], Depends(_images)]
REFUSES = refuses(NotDeployed)
FORMS: dict[str, Any] = {  # FastAPI itself declares one form of a body only
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": Images.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
                    },
                    "required": ["file"],
                }
            },
        },
    }
}


@router.post("/{name}/deploy", status_code=202)
def deploy_model(
    name: str, deployments: DeploymentsDep, body: Deploy | None = None, wait: bool = False
) -> DeploymentView:
    """Serves the model in this version or its newest, in place of another one; `wait=true` answers once it runs."""
    row = deployments.deploy(name, body.version if body else None)
    return view_of(deployments.wait(name, WAIT_S) if wait else row)


@router.delete("/{name}/deploy", status_code=204, responses=refuses(NotDeployed))
def undeploy_model(name: str, deployments: DeploymentsDep) -> Response:
    """Ends the serving of the model; it stays registered."""
    deployments.undeploy(name)
    return Response(status_code=204)


@router.post("/{name}:predict", openapi_extra=FORMS, responses=REFUSES)
async def predict(served: ServedDep, images: ImagesDep) -> PredictAnswer:
    """`outputs`: `{"label", "index", "probabilities": {label: p}}` of each image, the 5 most probable classes."""
    return await ask(served, "predict", images)


@router.post("/{name}:embed", openapi_extra=FORMS, responses=REFUSES)
async def embed(served: ServedDep, images: ImagesDep) -> EmbedAnswer:
    """`outputs`: the features of each image, a list of numbers."""
    return await ask(served, "embed", images)


@router.post("/{name}:reconstruct", openapi_extra=FORMS, responses=REFUSES)
async def reconstruct(served: ServedDep, images: ImagesDep) -> ReconstructAnswer:
    """`outputs`: what the method draws of each image, PNG in base64; of MAE `original`, `masked`, `reconstruction`."""
    return await ask(served, "reconstruct", images)
