import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workloads.data.manifest import Manifest, build_manifest

Members = Iterable[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests of read-only folders are kept in the user's cache: never in the real one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("cifar10")`: the folder of a real data set; skips where it is absent."""

    def find(name: str) -> Path:
        default = Path(__file__).parents[4] / "shared" / "data"
        folder = Path(os.environ.get("MANTA_TEST_DATA", default)) / name
        if not folder.is_dir():
            pytest.skip(f"no real data at {folder}: set MANTA_TEST_DATA to the folder that holds {name}")
        return folder

    return find


def encode(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """`encoded(pixels, "JPEG")` -> bytes of an image file."""
    return encode


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """`write_tar(path, [(name, bytes), ...])`: a tar file by the standard library."""

    def write(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> Path:
        with tarfile.open(path, "w", format=format) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def make_manifest(tmp_path: Path, write_tar: Callable[..., Path]) -> Callable[..., Manifest]:
    """`make_manifest([3, 0, 2])`: shards with so many 4x4 images; sample i is of grey i % 256 and label i % classes."""

    def make(sizes: list[int], classes: int = 3, corrupt: Iterable[int] = ()) -> Manifest:
        corrupt, number = set(corrupt), 0
        for shard, size in enumerate(sizes):
            members = []
            for i in range(number, number + size):
                data = encode(np.full((4, 4, 3), i % 256, np.uint8))
                members += [(f"{i:06d}.png", data[: len(data) // 2] if i in corrupt else data)]
                members += [(f"{i:06d}.cls", str(i % classes).encode())]
            write_tar(tmp_path / f"set-{shard:06d}.tar", members)
            number += size
        return build_manifest(str(tmp_path / "set-*.tar"))

    return make
