"""A reference -> a frozen network: the teachers of `Inputs.load` and `Inputs.restore`.

    name@version, job:<id>, an artifact folder    what such a job exported: an encoder or a classifier
    timm:vit_base_patch16_clip_224.openai         downloaded once by timm, kept in the Hugging Face cache

On the meta device networks are built without their weights, and nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from workloads import artifact
from workloads.data.views import View
from workloads.parts.frozen import Frozen
from workloads.weights import locate


def load_teacher(reference: str, home: Path) -> Frozen:
    """The network that `reference` names, with the size and normalisation of the images that it knows.

    Args:
        reference: see the module.
        home: where registry and runs are.

    Raises:
        ArtifactError: there is no such network, or only its weights without a word on what they belong to.
    """
    where = locate(reference, home)
    if isinstance(where, str):
        return _from_timm(where)
    if where.name != "model.safetensors" or not (where.parent / "manta.json").is_file():
        raise artifact.ArtifactError(
            f"got the file {reference}, which does not say its network, expected name@version, job:<id>, an artifact "
            "folder or timm:<name>; give one of these"
        )
    card = artifact.read_card(where.parent)
    model = artifact.fresh_model(where.parent) if _on_meta() else artifact.load_model(where.parent)
    return Frozen(model, View(size=card.image_size, mean=card.mean, std=card.std))


def _from_timm(name: str) -> Frozen:
    import httpx

    from workloads.models.timm_import import timm

    options = {"pretrained": not _on_meta(), "num_classes": 0}
    try:
        try:
            model: nn.Module = timm.create_model(name, **options, dynamic_img_size=True)  # a ViT: any grid of patches
        except TypeError:
            model = timm.create_model(name, **options)
    except (OSError, httpx.HTTPError) as error:  # no network, and not in the cache
        raise artifact.ArtifactError(
            f"got timm:{name}, whose weights could not be fetched ({error}); fetch them once where there is a network "
            "and give HF_HOME, or name an artifact"
        ) from error
    known = timm.data.resolve_data_config({}, model=model)
    return Frozen(model, View(size=known["input_size"][-1], mean=known["mean"], std=known["std"]))


def _on_meta() -> bool:
    return torch.get_default_device().type == "meta"
