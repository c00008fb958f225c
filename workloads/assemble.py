"""A JobSpec -> its manifests, its method, and a method back from an artifact."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from workloads import artifact, catalog, weights
from workloads.data.indexing import Mapper, here
from workloads.data.manifest import Manifest, open_manifest
from workloads.data.modalities import Views
from workloads.data.reader import Reader
from workloads.data.scores import best
from workloads.data.shards import DataError, some
from workloads.data.streaming import StreamReader, stream_manifest
from workloads.data.views import Size, View, height_width
from workloads.methods.base import DataInfo, Inputs, Method, MethodConfig
from workloads.models.encoders import build_encoder, model_config
from workloads.parts.frozen import Frozen
from workloads.spec import JobSpec, Stream
from workloads.teachers import load_teacher

logger = logging.getLogger(__name__)


def open_stream(stream: Stream, mapper: Mapper = here) -> Manifest:
    """The manifest of a stream, cut down to `per_class` or to the best by `scores` where the spec says so.

    Args:
        stream: what to open.
        mapper: where shards are scanned that have no manifest yet.

    Raises:
        DataError: the shards or the scores cannot be used, or more than `max_bad_share` of what the shards hold is
            damaged.
    """
    if stream.piped:
        return stream_manifest(stream.shards, stream.epoch_samples or 0, stream.num_classes)
    return chosen(stream, open_manifest(stream.shards, mapper=mapper))


def chosen(stream: Stream, manifest: Manifest) -> Manifest:
    """What a stream takes of the manifest of its shards; raises as `open_stream` does."""
    bad, good = len(manifest.quarantined), len(manifest)
    if bad > stream.max_bad_share * (bad + good):
        raise DataError(
            f"got {bad} damaged members beside {good} samples, expected at most a share of {stream.max_bad_share}; "
            f"repair the shards or raise max_bad_share: {some(manifest.quarantined, 20)}"
        )
    if stream.scores is not None and stream.keep is not None:
        return manifest.take(best(stream.scores, manifest, stream.keep))
    return manifest if stream.per_class is None else manifest.select(stream.per_class, stream.subset_seed)


def image_size(spec: JobSpec) -> Size:
    size: Size = model_config(spec.model).image_size  # type: ignore[attr-defined]
    return size


def method_of(spec: JobSpec) -> tuple[type[Method], MethodConfig]:
    """Class and validated config of `method:`."""
    cls: type[Method] = catalog.load("method", spec.method.name)
    return cls, cls.Config.model_validate(spec.method.config)


def views_of(spec: JobSpec) -> Views:
    cls, config = method_of(spec)
    return cls.views(config, image_size(spec))


def served_view(spec: JobSpec) -> View:
    """What the export of a job sees images through: its first view of images, else a plain one of values in [0, 1]."""
    size = image_size(spec)
    plain = View(size=size, mean=(0, 0, 0), std=(1, 1, 1))  # as the slices of volumes that are scaled to their bounds
    return next((view for view in views_of(spec).values() if isinstance(view, View)), plain)


def readers_of(spec: JobSpec, manifests: dict[str, Manifest]) -> dict[str, Reader | StreamReader]:
    """A reader for each stream of the method; the sampler of the method is for the first.

    Raises:
        DataError: batch size, sampler or views do not fit the samples.
    """
    cls, config = method_of(spec)
    views, sampler = views_of(spec), cls.sampler(config)
    readers: dict[str, Reader | StreamReader] = {}
    for name, manifest in manifests.items():
        stream = spec.data[name]
        shared: dict[str, Any] = {
            "batch_size": spec.batch_size_of(name),
            "seed": spec.seed,
            "window": stream.shuffle_window,
            "max_bad_share": stream.max_bad_share,
        }
        of_first = sampler if name == cls.streams[0] else None
        if manifest.indexed:
            workers = spec.resources.loader_workers
            readers[name] = Reader(manifest, views, **shared, sampler=of_first, workers=workers)
        elif of_first is None:
            readers[name] = StreamReader(manifest, views, **shared)
        else:
            raise DataError(
                f"got `pipe:` for {spec.method.name}, which chooses samples by label, expected files; write some"
            )
    return readers


def data_info(spec: JobSpec, manifest: Manifest) -> DataInfo:
    size = height_width(image_size(spec))
    return DataInfo(len(manifest), manifest.num_classes, shape=(3, *size), indexed=manifest.indexed)


def build_method(spec: JobSpec, info: DataInfo, home: Path) -> Method:
    """The method at its start: weights from the seed, then from `init`.

    Raises:
        ValueError: names, sizes or weights that do not fit each other.
    """
    torch.manual_seed(spec.seed)
    encoder = build_encoder(spec.model)
    if spec.init is not None:
        view = served_view(spec)
        for note in weights.load_initial(encoder, spec.init, home, mean=view.mean, std=view.std):
            logger.info("init: %s", note)

    # A teacher is built at random and then loaded: that must not change what the student starts from.
    def load(reference: str) -> Frozen:
        with torch.random.fork_rng(devices=[]):
            return load_teacher(reference, home)

    def restore(reference: str) -> Frozen:
        folder = artifact.resolve(reference, home)
        card = artifact.read_card(folder)
        with torch.random.fork_rng(devices=[]):
            return Frozen(restore_method(folder, home), View(size=card.image_size, mean=card.mean, std=card.std))

    def build(inner: dict[str, Any]) -> Method:
        config = dict(inner)
        inner_cls: type[Method] = catalog.load("method", config.pop("name"))
        return inner_cls(inner_cls.Config.model_validate(config), inputs)

    inputs = Inputs(encoder=encoder, data=info, load=load, build=build, restore=restore)
    cls, config = method_of(spec)
    return cls(config, inputs)


def restore_method(folder: Path, home: Path) -> Method:
    """The trained method of an artifact that reconstructs, in eval mode.

    Raises:
        artifact.ArtifactError: the artifact holds no method state.
    """
    from safetensors.torch import load_model

    card = artifact.read_card(folder)
    if not card.reconstructs:
        raise artifact.ArtifactError(
            f"got {folder}, whose method {card.spec.method.name!r} draws no reconstructions; use one that does"
        )
    size = height_width(card.image_size)
    info = DataInfo(num_instances=card.num_instances, num_classes=len(card.classes), shape=(3, *size))
    method = build_method(card.spec.model_copy(update={"init": None}), info, home)
    if torch.get_default_device().type != "meta":  # there only sizes are compared
        load_model(method, str(folder / "method.safetensors"))
    return method.eval()
