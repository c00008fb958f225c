import asyncio
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.embedded import Head
from service.deployments import PREFIX, Deployments
from service.errors import BadImage, BadRequest, NotDeployed
from service.predictor import Predictor, ask
from service.registry import Registry
from service.settings import Settings
from service.store import Store
from tests.toy_artifact import image, write_artifact
from workloads.inference import Model


def huge_png() -> bytes:
    """A PNG whose header says 50,000 x 50,000 pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)), (b"IDAT", b""))
    framed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    return {kind: write_artifact(folder / kind, kind) for kind in ("classifier", "encoder")}


@pytest.fixture
def make(folders: dict[str, Path]) -> Iterator[Callable[[str], Predictor]]:
    """Predictors without Ray."""
    threads = torch.get_num_threads()
    yield lambda kind: Predictor(folders[kind], Path(), f"{kind}@1", threads=1, max_pixels=10**6)
    torch.set_num_threads(threads)


def test_answers_are_those_of_the_model_and_name_it(make: Callable[[str], Predictor], folders: dict[str, Path]) -> None:
    images = [image(seed) for seed in range(3)]
    classifier, encoder = Model(folders["classifier"]), Model(folders["encoder"])

    async def main() -> None:
        answer = await make("classifier").predict(images)
        assert answer["model"] == "classifier@1"
        assert [output["label"] for output in answer["outputs"]] == [a["label"] for a in classifier.predict(images)]
        served = make("encoder")
        assert (await served.embed(images))["outputs"] == encoder.embed(images)
        assert (await served.reconstruct(images))["outputs"] == encoder.reconstruct(images)

    asyncio.run(main())


def test_bad_images_fail_their_request_alone(make: Callable[[str], Predictor]) -> None:
    async def main() -> list[Any]:
        served = make("classifier")
        requests = [[image(0)], [image(1), b"no image"], [huge_png()], [b""], [image(2), image(3)]]
        return await asyncio.gather(*map(served.predict, requests), return_exceptions=True)

    good, no_image, huge, empty, two = asyncio.run(main())
    assert len(good["outputs"]) == 1 and len(two["outputs"]) == 2
    assert isinstance(no_image, BadImage) and no_image.detail.startswith("image 1: got 8 bytes")
    assert isinstance(huge, BadImage) and "far more pixels" in huge.detail and huge.hint == "make the image smaller"
    assert isinstance(empty, BadImage)


def test_what_a_model_cannot_do_is_refused(make: Callable[[str], Predictor]) -> None:
    with pytest.raises(BadRequest, match="got an encoder, expected a classifier") as refusal:
        asyncio.run(make("encoder").predict([image(0)]))
    assert refusal.value.hint == "use :embed or fine-tune it" and not isinstance(refusal.value, BadImage)
    with pytest.raises(BadRequest, match="draws reconstructions"):
        asyncio.run(make("classifier").reconstruct([image(0)]))


def test_a_replica_is_unhealthy_only_while_forwards_break(
    make: Callable[[str], Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("out of memory")

    async def main() -> None:
        served = make("classifier")
        with pytest.raises(BadImage):
            await served.embed([b"no image"])
        with monkeypatch.context() as broken:
            broken.setattr(Model, "_pooled", out_of_memory)
            await served.check_health()  # no forward was seen to break
            with pytest.raises(RuntimeError):
                await served.embed([image(0)])
            with pytest.raises(RuntimeError):
                await served.check_health()
        await served.check_health()
        assert len((await served.embed([image(0)]))["outputs"]) == 1

    asyncio.run(main())


def replica_pids() -> list[int]:
    from ray.serve.context import _get_global_client

    app = _get_global_client().get_serve_details()["applications"][f"{PREFIX}toy"]
    return [replica["pid"] for replica in app["deployments"]["predictor"]["replicas"]]


@pytest.mark.ray
def test_a_served_model_survives_whatever_it_is_sent(cluster: Head, folders: dict[str, Path], tmp_path: Path) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions

    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=cluster.http_port), proxy_location="HeadOnly")
    settings = Settings(home=tmp_path)
    store = Store(settings.database)
    registry = Registry(settings, store)
    for kind, folder in folders.items():
        registry.register("toy", folder, job_id=kind, source="artifact")
    service = Deployments(settings, store, registry)
    assert service.deploy("toy", 1).state == "DEPLOYING"
    row = service.wait("toy", 60)
    assert row.state == "RUNNING", row.reason

    pids = replica_pids()
    assert len(pids) == 1

    async def clients() -> list[Any]:
        handle = await service.handle("toy")
        requests = [[image(seed)] if seed != 7 else [image(7), b"no image"] for seed in range(32)]
        answers = await asyncio.gather(*(ask(handle, "predict", r) for r in requests), return_exceptions=True)
        bad = [[huge_png()], [b""], [b"\xff\xd8\xff"]]
        return answers + await asyncio.gather(*(ask(handle, "embed", r) for r in bad), return_exceptions=True)

    answers = asyncio.run(clients())
    refused = [answers.pop(7), *answers[-3:]]
    expected = [Model(folders["classifier"]).predict([image(seed)])[0]["label"] for seed in range(32) if seed != 7]
    assert [answer["outputs"][0]["label"] for answer in answers[:-3]] == expected
    assert all(type(refusal) is BadImage for refusal in refused), refused
    assert refused[0].detail.startswith("image 1: got 8 bytes")
    assert replica_pids() == pids

    assert service.deploy("toy", 2).state == "DEPLOYING"
    assert service.wait("toy", 60).state == "RUNNING"
    answer = asyncio.run(_embed(service))
    assert answer["model"] == "toy@2"
    service.undeploy("toy")
    with pytest.raises(NotDeployed):
        asyncio.run(_embed(service))
    for _ in range(200):
        if f"{PREFIX}toy" not in serve.status().applications:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the application is still there after 20 s")
    store.close()


async def _embed(service: Deployments) -> dict[str, Any]:
    return await ask(await service.handle("toy"), "embed", [image(0)])
