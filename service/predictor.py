"""The Ray Serve deployment that serves one artifact: its own process, its own application.

A request is decoded on its own, so a bad image fails that request alone and says its
position; only decoded images meet those of other requests, in one forward.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from service.batching import Batcher
from service.errors import BadImage, BadRequest, ServiceError, Unavailable

if TYPE_CHECKING:
    from torch import Tensor

MAX_BATCH_SIZE = 32  # images in one forward
MAX_ONGOING_REQUESTS = 64  # in the replica: being decoded, waiting for a forward, in it
MAX_QUEUED_REQUESTS = 128  # for a place there; one more is refused at once, which beats a queue without end
TIMEOUT_S = 120.0  # of an answer


class Predictor:
    """Answers for one model version; whatever a request holds, the replica lives on."""

    def __init__(self, folder: Path, home: Path, reference: str, threads: int, max_pixels: int) -> None:
        """Loads the artifact and runs it once, so that RUNNING means that it answers.

        Args:
            folder: the artifact.
            home: the installation's folder.
            reference: `name@version`, told in every answer: while a version is replaced, it says which one answered.
            threads: CPU threads of a forward.
            max_pixels: of an image.
        """
        import torch

        from workloads.inference import Model  # here, so that the service names this class without importing torch

        torch.set_num_threads(threads)
        self._reference = reference
        self._model = Model(folder, home, max_pixels=max_pixels)
        self._model.warm_up()
        self._classify = Batcher(self._watched(self._model.classify), MAX_BATCH_SIZE)
        self._features = Batcher(self._watched(self._model.features), MAX_BATCH_SIZE)
        self._decoding = asyncio.Semaphore(threads)
        self._drawing = asyncio.Lock()
        self._suspect = False

    async def predict(self, images: list[bytes]) -> dict[str, Any]:
        """`{"model": reference, "outputs": [...]}`, as each of the three; raises BadImage, BadRequest."""
        with _refusals():
            self._model.expect_classifier()
            pixels = await self._decode(images)
        return self._answer(await self._classify(pixels))

    async def embed(self, images: list[bytes]) -> dict[str, Any]:
        with _refusals():
            pixels = await self._decode(images)
        return self._answer(await self._features(pixels))

    async def reconstruct(self, images: list[bytes]) -> dict[str, Any]:
        """One request at a time, unbatched: pictures are for people."""
        with _refusals():
            async with self._drawing:
                return self._answer(await asyncio.to_thread(self._model.reconstruct, images))

    async def check_health(self) -> None:
        """After a forward that broke (memory, a lost device), one more must succeed, or Serve replaces the replica."""
        if self._suspect:
            await asyncio.to_thread(self._model.warm_up)
            self._suspect = False

    async def _decode(self, images: list[bytes]) -> list[Tensor]:
        async with self._decoding:  # a large image is large only here
            return await asyncio.to_thread(self._model.decode, images)

    def _watched(self, forward: Callable[[list[Tensor]], list[Any]]) -> Callable[[list[Tensor]], list[Any]]:
        def run(pixels: list[Tensor]) -> list[Any]:
            try:
                return forward(pixels)
            except Exception:
                self._suspect = True
                raise

        return run

    def _answer(self, outputs: list[Any]) -> dict[str, Any]:
        return {"model": self._reference, "outputs": outputs}


@contextmanager
def _refusals() -> Iterator[None]:
    """What the model refuses, as errors of the service, which cross to the front end."""
    from workloads.inference import ImageError

    try:
        yield
    except ValueError as error:
        detail, _, hint = str(error).partition("; ")
        if isinstance(error, ImageError):
            raise BadImage(detail, hint or "send the bytes of a whole image file") from error
        raise BadRequest(detail, hint) from error


async def ask(handle: DeploymentHandle[Any], verb: str, images: list[bytes]) -> Any:
    """Asks a predictor: a dictionary of `service.model_views`.

    Args:
        handle: of the application.
        verb: "predict", "embed" or "reconstruct".
        images: encoded.

    Raises:
        ServiceError: what the predictor refused.
        Unavailable: its queue is full, or it does not answer.
    """
    again = "try again in a few seconds"
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await handle.options(method_name=verb).remote(images)
    except RayTaskError as error:
        if isinstance(error.cause, ServiceError):
            raise error.cause from None  # without the text of the traceback, which tells processes and addresses
        raise
    except BackPressureError as error:
        raise Unavailable(f"got more requests than wait in line ({MAX_QUEUED_REQUESTS})", again) from error
    except TimeoutError as error:
        raise Unavailable(f"got no answer within {TIMEOUT_S:.0f} s", "send fewer images at a time") from error
    except (RayError, RayServeException) as error:
        raise Unavailable("the replica of the model is not there", again) from error


def application(folder: Path, home: Path, reference: str, *, max_pixels: int, cpus: float = 0) -> Application:
    """The Serve application of one model version.

    Args:
        folder: the artifact.
        home: the installation's folder.
        reference: `name@version`.
        max_pixels: of an image.
        cpus: what the replica reserves; its threads are as many, one at least. 0 on a laptop: a reserved core
            would be taken from training, and an idle replica needs none.
    """
    deployment = serve.deployment(
        name="predictor",
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=MAX_QUEUED_REQUESTS,
        max_constructor_retry_count=1,  # an artifact that cannot be loaded cannot be loaded later either
        max_surge_percent=100,  # a version is replaced once the next one answers
        graceful_shutdown_timeout_s=10,
        logging_config={"enable_access_log": False},  # the front end has its own
    )(Predictor)
    return deployment.bind(folder, home, reference, max(1, int(cpus)), max_pixels)
