"""/v1/models/{name}/deploy and /v1/models/{name}:predict, :embed, :reconstruct."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import UploadFile

from service.errors import BadRequest, TooLarge
from service.parts import DeploymentsDep, PartsDep
from service.predictor import ask

router = APIRouter(prefix="/v1/models", tags=["models"])

WAIT_S = 120.0  # of `deploy?wait=true`
SHAPE = 'send {"images": ["<base64 of an encoded image>", ...]}, or one file as multipart/form-data'


class Deploy(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int | None = Field(default=None, ge=1, description="None: the newest.")


class Images(BaseModel):
    model_config = ConfigDict(extra="forbid")

    images: list[str] = Field(description="Encoded images (JPEG, PNG, ...), each in base64.")


class Answer(BaseModel):
    model: str = Field(description="name@version of what answered.")
    outputs: list[Any] = Field(description="One for each image, in the same order.")


async def _served(name: str, deployments: DeploymentsDep) -> DeploymentHandle[Any]:
    return await deployments.handle(name)


async def _images(request: Request, parts: PartsDep) -> list[bytes]:
    """The images of a request in either form; declared by hand, since FastAPI declares one form only."""
    if "content-length" not in request.headers:  # the limit of the body is told by it
        raise BadRequest("got a body of unknown length", "send a Content-Length header")
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form(max_files=1) as form:
            return [await file.read() for file in form.values() if isinstance(file, UploadFile)]
    body = await request.body()
    limit = parts.settings.max_images
    return await run_in_threadpool(parse, body, limit)


def parse(body: bytes, limit: int) -> list[bytes]:
    """The JSON form.

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
        except binascii.Error as error:
            raise BadRequest(f"image {position}: got no base64 ({error})", "encode the file's bytes in base64") from error
    return images
