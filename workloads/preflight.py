"""Everything about a JobSpec that can be found wrong without training.

The service asks before it accepts a job, `manta run --local` and `workloads.run` ask
before they start. Modules are built on the meta device, so a network of any size costs
milliseconds and no memory. torch is imported at the first check; `warm` does it ahead.
"""

from __future__ import annotations

import difflib
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from workloads import catalog
from workloads.artifact import ArtifactError, resolve
from workloads.data.shards import DataError, Unreachable
from workloads.data.sources import hurried
from workloads.spec import BaseSpec, JobSpec, Named
from workloads.spec_any import AnySpec
from workloads.spec_search import SearchSpec
from workloads.winner import settled


class Problem(BaseModel):
    """One thing that is wrong: where in the spec, what (got, expected), and what to do."""

    loc: list[str | int]
    message: str
    hint: str = ""

    @property
    def sentence(self) -> str:
        """Where and what, without the hint."""
        return f"{'.'.join(map(str, self.loc))}: {self.message}"

    def __str__(self) -> str:
        return self.sentence + (f" ({self.hint})" if self.hint else "")


MOST_SIZE = 2**24  # of an integer in the config of a network, a method or a search: none of any paper comes near
MOST_MODULES = 50_000  # of a network; a ViT of 100 blocks has 2,000

PATIENCE_S = 5.0  # of `check` with a store that does not answer


class NoAnswer(Exception):
    """Data of the spec is in a store that does not answer, so nothing can be said about it now."""


Check = Callable[[AnySpec, Path], list[Problem]]


def warm() -> None:
    """Imports what `check` needs, seconds of it, so that the first request need not wait."""
    importlib.import_module("workloads.assemble")
    importlib.import_module("workloads.models.timm_import")
    for kind, table in catalog.KINDS.items():
        for name in table:
            catalog.load(kind, name)


def is_public(name: str) -> bool:
    """Whether `init: name` means weights that timm has, where no artifact has the name."""
    from workloads.weights import is_public

    return is_public(name)


def check(spec: AnySpec, home: Path) -> list[Problem]:
    """What is wrong with `spec`; `[]` means that it can start.

    Args:
        spec: a job whose own fields are valid.
        home: where `init` and other references to weights are looked up.

    Raises:
        NoAnswer: an object store does not answer; after seconds, since somebody waits.
    """
    with hurried(PATIENCE_S):
        found = look(spec, home)
    if not found and isinstance(spec := settled(spec, home), JobSpec):
        found = _fit(spec, home)
    return found


def look(spec: AnySpec, home: Path) -> list[Problem]:
    """`check` without building the network, for a run that builds it next anyway."""
    try:
        spec = settled(spec, home)
    except ArtifactError as error:
        return [Problem(loc=["model", "name"], message=str(error))]
    return form(spec) or _data(spec) + _init(spec, home) + _references(spec, home)


def form(spec: AnySpec) -> list[Problem]:
    """`check` of what the spec itself says: all that can be said while other jobs make its weights or its data."""
    if isinstance(spec, SearchSpec):
        return _search(spec)
    problems = _config("method", "method", spec.method)
    for i, evaluation in enumerate(spec.evaluate):
        problems += _config("evaluation", "evaluate", evaluation, i)
    if not spec.model.name.startswith("job:"):
        problems += _model(spec)
    return problems or _streams(spec)


def _config(kind: str, field: str, named: Named, *index: int) -> list[Problem]:
    """Name and keys of `{name: ..., **config}`."""
    try:
        cls = catalog.load(kind, named.name)
    except catalog.UnknownName as error:
        return [
            Problem(loc=[field, *index, "name"], message=str(error), hint=f"GET /v1/{catalog.PLURAL[kind]} lists them")
        ]
    try:
        cls.Config.model_validate(named.config)
    except ValidationError as error:
        found = catalog.problems_of(error, cls.Config)
        hint = f"GET /v1/{catalog.PLURAL[kind]}/{named.name} has the schema"
        return [Problem(loc=[field, *index, *loc], message=message, hint=hint) for loc, message in found]
    return []


def _model(spec: JobSpec) -> list[Problem]:
    from workloads.models.encoders import TimmConfig, model_config

    try:
        model_config(spec.model)
    except catalog.UnknownName as error:
        return [Problem(loc=["model", "name"], message=str(error), hint="a name of ours or of timm")]
    except ValidationError as error:
        known = spec.model.name in catalog.MODELS
        config: Any = catalog.load("model", spec.model.name) if known else TimmConfig
        return [Problem(loc=["model", *loc], message=message) for loc, message in catalog.problems_of(error, config)]
    return []


def _search(spec: SearchSpec) -> list[Problem]:
    """What the search itself finds wrong."""
    if problems := _config("search", "search", spec.search):
        return problems
    cls = catalog.load("search", spec.search.name)
    if spec.islands > 1 and not cls.islands:
        message = f"got {spec.islands} islands, expected 1: {spec.search.name} measures a list that is the same for all"
        return [Problem(loc=["islands"], message=message, hint="leave it out; more workers share the list")]
    each, most = spec.resources.max_workers // spec.islands, cls.ahead // 2
    if each > most:
        message = f"got {each} workers for an island, expected at most {most}: more would wait for each other's scores"
        hint = f"islands: {-(-spec.resources.max_workers // most)}" if cls.islands else "ask for fewer"
        return [Problem(loc=["resources", "workers"], message=message, hint=hint)]
    for key, value in spec.search.config.items():
        if key != "budget" and _largest(value) > MOST_SIZE:
            return [_too_large("search", key)]
    config = cls.Config.model_validate(spec.search.config)
    device = "cuda" if spec.resources.gpus else "cpu"
    found = [Problem(loc=["search", *loc], message=message) for loc, message in config.problems(device)]
    if cls.starts_from_weights != (spec.init is not None):
        expected = (
            "the weights that it measures; name those of a job" if cls.starts_from_weights else "none; leave it out"
        )
        found.append(Problem(loc=["init"], message=f"got {spec.init} for {spec.search.name}, expected {expected}"))
    return found or _streams(spec)


def _streams(spec: AnySpec) -> list[Problem]:
    kind, name = spec.about
    wanted = catalog.load(kind, name).streams
    if set(spec.data) == set(wanted):
        return []
    got, expected = sorted(spec.data), ", ".join(wanted)
    close = [f"{name!r} is like {m[0]!r}" for name in got if (m := difflib.get_close_matches(name, wanted, n=1))]
    message = f"got streams {', '.join(got) or 'none'}, expected {expected or 'none'} for {kind} {name}"
    return [Problem(loc=["data"], message=message, hint="; ".join(close) or f"give exactly: {expected or 'no data'}")]


def _data(spec: AnySpec) -> list[Problem]:
    """Shards that cannot be read or hold no image, without a scan of all of them, and files that hold no scores."""
    from workloads.data.manifest import peek
    from workloads.data.scores import expect_scores

    streams: list[tuple[list[str | int], Any]] = [(["data", name], s) for name, s in spec.data.items() if not s.piped]
    for i, evaluation in enumerate(spec.evaluate if isinstance(spec, JobSpec) else ()):
        config = catalog.load("evaluation", evaluation.name).Config.model_validate(evaluation.config)
        streams += [(["evaluate", i, "data", name], getattr(config.data, name)) for name in ("train", "test")]
    problems = []
    for loc, stream in streams:
        for field, look_at in (("shards", peek), ("scores", expect_scores)):
            try:
                if (given := getattr(stream, field)) is not None:
                    look_at(given)
            except Unreachable as error:
                raise NoAnswer(str(error)) from error
            except DataError as error:
                problems.append(Problem(loc=[*loc, field], message=str(error)))
    return problems


def _largest(config: Any) -> int:
    """The largest integer in a config, as far as it goes from 0."""
    if isinstance(config, dict | list):
        return max(map(_largest, config.values() if isinstance(config, dict) else config), default=0)
    return abs(config) if isinstance(config, int) else 0


def _too_large(*loc: str) -> Problem:
    return Problem(loc=[*loc], message=f"got an integer above {MOST_SIZE:,}, expected sizes of networks that there are")


@contextmanager
def _bounded() -> Iterator[None]:
    """Ends the construction of a network of a billion blocks by ValueError: on the meta device that takes days."""
    from torch.nn.modules.module import register_module_module_registration_hook

    thread, made = threading.get_ident(), 0

    def count(*_: object) -> None:
        nonlocal made
        made += threading.get_ident() == thread  # requests are checked at the same time
        if made > MOST_MODULES:
            raise ValueError(f"got a network of more than {MOST_MODULES:,} modules, expected fewer; take less depth")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _init(spec: BaseSpec, home: Path) -> list[Problem]:
    """Weights that are not there; a public name is looked up, not downloaded."""
    if spec.init is None:
        return []
    from workloads.weights import locate

    try:
        locate(spec.init, home)
    except ArtifactError as error:
        return [Problem(loc=["init"], message=str(error))]
    return []


def _references(spec: AnySpec, home: Path) -> list[Problem]:
    """Networks that an evaluation compares with and that are not there; it asks for them at the end of the job."""
    problems = []
    for i, evaluation in enumerate(spec.evaluate if isinstance(spec, JobSpec) else ()):
        if (reference := evaluation.config.get("reference")) is not None:
            try:
                resolve(reference, home)
            except ArtifactError as error:
                problems.append(Problem(loc=["evaluate", i, "reference"], message=str(error)))
    return problems


def _fit(spec: JobSpec, home: Path) -> list[Problem]:
    """Builds the method on the meta device: sizes that do not divide, a model or weights that it cannot use."""
    import torch

    from workloads import assemble, weights
    from workloads.data.views import height_width
    from workloads.methods.base import DataInfo
    from workloads.models.encoders import build_encoder

    if huge := [field for field in ("method", "model") if _largest(getattr(spec, field).config) > MOST_SIZE]:
        return [_too_large(huge[0])]
    size = height_width(assemble.image_size(spec))
    cls, _ = assemble.method_of(spec)
    indexed = not spec.data[cls.streams[0]].piped
    info = DataInfo(spec.batch_size, num_classes=2, shape=(3, *size), indexed=indexed)  # the data is not read yet
    try:
        with torch.device("meta"), _bounded():
            assemble.build_method(spec.model_copy(update={"init": None}), info, home)
    except ValueError as error:
        return [Problem(loc=["method"], message=str(error))]
    except RuntimeError as error:  # torch, of sizes whose product has no number or no memory
        return [Problem(loc=["method"], message=f"got sizes that cannot be built: {str(error).splitlines()[0]}")]
    try:
        if spec.init is not None:
            with torch.device("meta"):
                weights.load_initial(build_encoder(spec.model), spec.init, home)
    except ArtifactError as error:
        return [Problem(loc=["init"], message=str(error))]
    return []
