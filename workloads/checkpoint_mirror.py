"""A copy of checkpoints and log elsewhere, for when the disk is lost: same files, same names, in a folder or a bucket.

Each run has a folder of its own there, by the name of its run folder (in the service the id of the job): the same job
finds its copy from any node, and jobs that name the same mirror have nothing to do with each other.

The disk of the run is the truth: a store that is away costs no checkpoint and ends no run. What it missed is sent
with the next one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from workloads.checkpoint_folder import MIRRORED, Seal, complete, kept, latest_step, remove, seals, stem, step_of
from workloads.data.sources import impatient
from workloads.log_file import segment, segments
from workloads.record import RunFolder, write_atomic
from workloads.spec_training import CheckpointPolicy

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK_BYTES = 8 << 20  # pyarrow's own 1 MiB is slow over a network


class Mirror:
    def __init__(
        self, url: str, name: str, policy: CheckpointPolicy, *, wait: Callable[[float], bool], delays_s: Sequence[float]
    ) -> None:
        """Opens nothing yet.

        Args:
            url: a folder, or a prefix that pyarrow knows: `s3://`, `gs://`, `hdfs://`.
            name: of the run, whose folder there this is.
            policy: which checkpoints stay here too.
            wait: waits so many seconds before the next try, and says whether to leave it at that.
            delays_s: pauses between tries.
        """
        self._url, self._name, self._policy = url, name, policy
        self._wait, self._delays_s = wait, delays_s
        self._opened: Any = None

    def __str__(self) -> str:
        return f"{self._url.rstrip('/')}/{self._name}"

    def update(self, folder: Path) -> bool:
        """Sends what is missing here of the checkpoints in `folder`, then the pointer; removes what does not stay.

        Returns:
            Whether all is here; where it is not, the log says why.
        """
        newest = latest_step(folder)
        if newest is None:  # nothing could be written yet
            return True
        try:
            self._tried(lambda: self._update(folder, newest))
            write_atomic(folder / MIRRORED, str(newest))
        except (OSError, ValueError) as error:  # pyarrow: a URL that it does not know
            logger.warning(
                "checkpoint of step %d is on the disk of the run but not yet in %s; it is sent with the next one (%s)",
                newest,
                self,
                _one_line(error),
            )
            return False
        return True

    def send_log(self, log: Path) -> bool:
        """Sends the files of the log that have grown, removes those that are gone, and says whether all is here."""
        try:
            if segments(log):
                self._tried(lambda: self._send_log(log))
        except (OSError, ValueError) as error:
            logger.warning("the log is not yet in %s; it is sent again at the end (%s)", self, _one_line(error))
            return False
        return True

    def fetch_story(self, run: RunFolder) -> None:
        """Brings job and log of earlier attempts to a disk that has none, to go on; a warning where that fails."""
        try:
            if not run.log.exists():
                self._tried(lambda: self._fetch_log(run.log))
            if not run.spec.exists():
                self._tried(lambda: self._fetch_job(run.spec))
        except (OSError, ValueError) as error:
            logger.warning("job and log of earlier attempts are not fetched from %s (%s)", self, _one_line(error))

    def clear(self) -> None:
        """Removes all that is here of the run.

        Raises:
            OSError: some may be left, but nothing that would be continued from.
            ValueError: a URL of an unknown kind.
        """
        self._tried(self._clear)

    def steps(self) -> list[int]:
        """Steps up to its latest, newest first.

        Raises:
            OSError: it cannot be asked.
        """
        return self._tried(self._steps)

    def fetch(self, step: int, folder: Path) -> Seal:
        """Brings a checkpoint into `folder`.

        Raises:
            OSError: it is not there, or cannot be read.
            ValueError: its seal is damaged.
        """
        from pyarrow import fs

        folder.mkdir(parents=True, exist_ok=True)
        seal = self._tried(lambda: self._seal(step))
        remove(folder / seal.name)
        for name in seal.files:
            (folder / name).parent.mkdir(exist_ok=True)
        self._tried(
            lambda: fs.copy_files(
                seal.name, str(folder / seal.name), self._store, fs.LocalFileSystem(), chunk_size=CHUNK_BYTES
            )
        )
        complete(folder, seal)
        return seal

    def _tried(self, call: Callable[[], T]) -> T:
        for delay_s in (*self._delays_s, None):
            try:
                return call()
            except FileNotFoundError:
                raise
            except OSError as error:
                if delay_s is None:
                    raise
                logger.info("mirror %s does not answer (%s); again in %s s", self, _one_line(error), delay_s)
                if self._wait(delay_s):
                    raise
        raise AssertionError

    @property
    def _store(self) -> Any:
        if self._opened is None:
            from pyarrow import fs

            if "://" in self._url:
                patient, path = fs.FileSystem.from_uri(self._url)
                store = impatient(patient)
            else:
                store, path = fs.LocalFileSystem(), str(Path(self._url).absolute())
            path = f"{path.rstrip('/')}/{self._name}"  # not in the URL, where a name would have to be quoted
            if store.type_name == "local":
                store.create_dir(path)
            self._opened = fs.SubTreeFileSystem(path, store)
        return self._opened

    def _update(self, folder: Path, newest: int) -> None:
        from pyarrow import fs

        if (job := RunFolder(folder.parent).spec).exists():
            self._write(job.name, job.read_text())  # says whose all this is
        here = {seal.step: seal for step in self._listed() if (seal := self._sealed(step))}
        there = {seal.step: seal for seal in seals(folder)}
        stay = kept((here | there).values(), self._policy, newest)
        for step, seal in sorted(there.items()):
            if step in stay and here.get(step) != seal:
                self._delete(f"{stem(step)}.json")
                if (folder / seal.name).is_dir():
                    self._store.create_dir(seal.name, recursive=True)
                fs.copy_files(
                    str(folder / seal.name), seal.name, fs.LocalFileSystem(), self._store, chunk_size=CHUNK_BYTES
                )
                self._write(f"{stem(step)}.json", seal.model_dump_json())
        self._write("latest", there[newest].name)
        for step, names in self._listed().items():
            if step not in stay:
                for name in sorted(names, key=lambda name: not name.endswith(".json")):  # the seal first
                    self._delete(name)

    def _send_log(self, log: Path) -> None:
        from pyarrow import fs

        here = self._log_files(log)
        there = [path for number in segments(log) if (path := segment(log, number)).exists()]
        for path in there:
            if here.pop(path.name, None) != path.stat().st_size:
                fs.copy_files(str(path), path.name, fs.LocalFileSystem(), self._store, chunk_size=CHUNK_BYTES)
        for name in here:
            self._delete(name)

    def _fetch_log(self, log: Path) -> None:
        from pyarrow import fs

        log.parent.mkdir(parents=True, exist_ok=True)
        for name in sorted(self._log_files(log)):
            path = str(log.with_name(name))
            fs.copy_files(name, path, self._store, fs.LocalFileSystem(), chunk_size=CHUNK_BYTES)

    def _fetch_job(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            write_atomic(path, self._read(path.name).decode())

    def _clear(self) -> None:
        from pyarrow import fs

        infos = self._store.get_file_info(fs.FileSelector("", allow_not_found=True))
        for name in sorted((info.base_name for info in infos), key=lambda name: name != "latest"):
            self._delete(name)

    def _log_files(self, log: Path) -> dict[str, int]:
        """Name -> bytes of the log's files that are here."""
        from pyarrow import fs

        infos = self._store.get_file_info(fs.FileSelector("", allow_not_found=True))
        of_log = f"{log.stem}.*"  # `log.txt`, `log.00001.txt`
        return {info.base_name: info.size for info in infos if fnmatchcase(info.base_name, of_log)}

    def _steps(self) -> list[int]:
        try:
            latest = step_of(self._read("latest").decode().strip())
        except FileNotFoundError:
            return []
        return sorted((step for step in self._listed() if latest is None or step <= latest), reverse=True)

    def _seal(self, step: int) -> Seal:
        return Seal.model_validate_json(self._read(f"{stem(step)}.json"))

    def _sealed(self, step: int) -> Seal | None:
        try:
            return self._seal(step)
        except (FileNotFoundError, ValueError):
            return None

    def _listed(self) -> dict[int, list[str]]:
        from pyarrow import fs

        entries: dict[int, list[str]] = {}
        for info in self._store.get_file_info(fs.FileSelector("", allow_not_found=True)):
            if (step := step_of(info.base_name)) is not None:
                entries.setdefault(step, []).append(info.base_name)
        return entries

    def _read(self, name: str) -> bytes:
        with self._store.open_input_file(name) as file:
            data: bytes = file.readall()
        return data

    def _write(self, name: str, text: str) -> None:
        with self._store.open_output_stream(name) as stream:
            stream.write(text.encode())

    def _delete(self, name: str) -> None:
        from pyarrow import fs

        kind = self._store.get_file_info(name).type
        if kind == fs.FileType.Directory:
            self._store.delete_dir(name)
        elif kind == fs.FileType.File:
            self._store.delete_file(name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
