"""`init:` of a JobSpec: the weights that an encoder starts from, ours or public ones.

    name@version, job:<id>, an artifact folder    `workloads.artifact`, or what a search found with weights
    weights/mae_base.safetensors                  a file; pickles are refused
    timm:vit_base_patch16_224.mae                 downloaded once by timm, kept in the Hugging Face cache
    vit_base_patch16_224.mae                      the same, where no artifact has that name

What must fit does fit, or the job is refused with the list of what does not, which beyond ten is in the log. What may
differ (heads, a decoder, the grid of positions, the normalisation of pixels) is adapted and told.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workloads.artifact import ArtifactError, resolve
from workloads.data.shards import some
from workloads.data.views import IMAGENET_MEAN, IMAGENET_STD
from workloads.models.vit import ViT, resize_positions
from workloads.winner import folder_of, read_found

logger = logging.getLogger(__name__)

MOST_NAMED = 10  # of what does not fit, in the error
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
WRAPPERS = ("module.", "encoder.", "backbone.", "model.")  # DDP, methods, detectors, Lightning
HEADS = ("head.", "head_dist.", "fc.", "fc_norm.", "classifier.", "last_linear.")
PRETEXT = ("decoder", "mask_token")  # of MAE and its kin: what the encoder trained with
COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")  # older files of Swin store these
FRESH = (*HEADS, "norm.", "mask_token", "decoder.")
"""What weights may lack: an encoder of averaged tokens has `fc_norm`, others `norm`; a U-Net may grow a decoder."""
ADDED = r"\.controller\.|num_batches_tracked$"  # what a Swin is given to be told lambda; older files lack the counts


@dataclass(frozen=True)
class Found:
    """Weights before they meet a model; `mean` and `std` of their pixels and `size` of their images where known."""

    label: str
    tensors: dict[str, Tensor]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] = (1, 1)  # height and width; most are square


def load_initial(
    encoder: nn.Module,
    reference: str,
    home: Path,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> list[str]:
    """Starts `encoder` from the weights that `reference` names.

    On the meta device only names and shapes are compared: nothing is downloaded and no weight is read.

    Args:
        encoder: a ViT of ours or a model of timm, without a head; or a network with such a `backbone`, which may be
            started alone. Changed in place.
        reference: what the module says.
        home: where registry and runs are.
        mean: of the job's pixels in [0, 1], by channel.
        std: likewise.

    Returns:
        What was adapted, left out or stays fresh, a sentence each, for the log.

    Raises:
        ArtifactError: no such weights, no network, a pickle, or weights of another architecture.
    """
    where = locate(reference, home)
    shapes_only = next(encoder.parameters()).is_meta
    found = _from_timm(where, shapes_only) if isinstance(where, str) else _from_file(where, shapes_only)
    part = _part(encoder, found)
    notes = _fit(part, found)
    if part is not encoder:
        notes.append(f"what is behind the backbone is fresh: {found.label} has the backbone alone")
    for name, theirs, ours in (("mean", found.mean, mean), ("std", found.std, std)):
        if theirs is not None and not _close(theirs, ours):
            notes.append(f"pixels are normalised by {name} {ours}, those of {found.label} were by {tuple(theirs)}")
    return notes


def _close(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, abs_tol=5e-3) for x, y in zip(a, b, strict=True))


def locate(reference: str, home: Path) -> Path | str:
    """The safetensors file that `reference` names, else the name under which timm has the weights.

    Opens no network connection and reads no more than the header of a file; imports timm for its names only.

    Raises:
        ArtifactError: there are no such weights.
    """
    if reference.startswith("timm:"):
        return _timm_name(reference.removeprefix("timm:"))
    try:
        return resolve(reference, home) / "model.safetensors"
    except ArtifactError as error:
        unknown = error
    if (folder := folder_of(reference, home)) is not None and read_found(folder) is not None:
        if not (folder / "model.safetensors").exists():
            raise ArtifactError(
                f"got init: {reference}, a search that trained nothing, expected weights; its structure comes "
                "by model: leave init out"
            )
        return folder / "model.safetensors"
    path = Path(reference)
    if path.suffix in PICKLES:
        raise ArtifactError(_pickle_refused(path))
    if path.suffix == ".safetensors":
        _shapes(path)
        return path
    more = f"{unknown}, a .safetensors file, or timm:<name>"
    if re.fullmatch(r"[\w.-]+", reference) is None:
        raise ArtifactError(more)
    try:
        return _timm_name(reference)
    except ArtifactError as error:
        raise ArtifactError(f"{more}; and {error}") from None


def is_public(name: str) -> bool:
    """Whether timm has weights of that name."""
    from workloads.models.timm_import import timm

    return bool(timm.models.is_model_pretrained(name))


def _timm_name(name: str) -> str:
    from workloads.models.timm_import import timm

    if is_public(name):
        return name
    tagged: list[str] = timm.models.list_pretrained()
    near = difflib.get_close_matches(name, tagged if "." in name else {one.partition(".")[0] for one in tagged}, n=3)
    raise ArtifactError(
        f"got timm:{name}, expected a model that timm has weights of; "
        + (f"the nearest are {', '.join(near)}" if near else "https://huggingface.co/timm lists them")
    )


def _pickle_refused(path: Path) -> str:
    return (
        f"got {path}, a pickle, which can run any program when it is read, expected safetensors; convert it where you "
        'trust it: python -c "import torch, safetensors.torch as s; '
        f"c = torch.load('{path}', map_location='cpu', weights_only=True); "
        "w = c.get('model', c.get('state_dict', c)); "
        f"s.save_file({{k: v.clone().contiguous() for k, v in w.items()}}, '{path.with_suffix('.safetensors')}')\""
    )


def _shapes(path: Path) -> dict[str, list[int]]:
    """Names and shapes from the header of a safetensors file, which is checked against the file's length."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ArtifactError(f"got {path}, which is no file here, expected a local .safetensors file; correct the path")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"got {path}, expected a whole safetensors file: {error}; copy it again") from error


def _from_file(path: Path, shapes_only: bool) -> Found:
    from safetensors.torch import load_file

    tensors = {name: torch.empty(shape, device="meta") for name, shape in _shapes(path).items()}
    if not shapes_only:
        tensors = load_file(path)
    config = path.with_name("config.json")  # beside it in artifacts and in folders of the Hugging Face hub
    if path.name != "model.safetensors" or not config.is_file():
        return Found(str(path), tensors)
    pretrained = json.loads(config.read_text()).get("pretrained_cfg", {})
    return Found(str(path), tensors, pretrained.get("mean"), pretrained.get("std"), _image_size(pretrained))


def _image_size(pretrained: dict[str, Any]) -> tuple[int, int]:
    """Height and width by a `pretrained_cfg` of timm."""
    _, height, width = pretrained.get("input_size", (3, 1, 1))
    return height, width


def _from_timm(name: str, shapes_only: bool) -> Found:
    import httpx

    from workloads.models.timm_import import timm

    # Without the fork the method's own fresh weights would depend on what timm draws.
    with torch.random.fork_rng(devices=[]), torch.device("meta" if shapes_only else "cpu"):
        try:
            model = timm.create_model(name, pretrained=not shapes_only, num_classes=0)
        except (OSError, httpx.HTTPError) as error:
            raise ArtifactError(_not_downloaded(name, error)) from error
    config = model.pretrained_cfg
    return Found(f"timm:{name}", model.state_dict(), config["mean"], config["std"], _image_size(config))


def _not_downloaded(name: str, error: Exception) -> str:
    from workloads.models.timm_import import timm

    config = timm.models.get_pretrained_cfg(name)
    hub = f"model.safetensors of https://huggingface.co/{config.hf_hub_id}"
    return (
        f"got timm:{name}, whose weights could not be downloaded ({type(error).__name__}: {error}), expected a network "
        f"connection; fetch {hub if config.hf_hub_id else config.url} on a machine that has one, copy it here as a "
        ".safetensors file and set init: to its path"
    )


def _part(encoder: nn.Module, found: Found) -> nn.Module:
    """The backbone of a network that has one, where the weights are of a backbone; else the whole network."""
    backbone = getattr(encoder, "backbone", None)
    if not isinstance(backbone, nn.Module):
        return encoder
    names, both = found.tensors, (encoder.state_dict(), backbone.state_dict())
    of_all, of_part = (_fitting(names, own, _prefix(names, own)) for own in both)
    return backbone if of_part >= of_all else encoder


def _fit(encoder: nn.Module, found: Found) -> list[str]:
    """Loads what belongs to the encoder; see `load_initial`."""
    own = encoder.state_dict()
    notes: list[str] = []
    prefix = _prefix(found.tensors, own)
    weights = {name.removeprefix(prefix): value for name, value in found.tensors.items() if name.startswith(prefix)}
    left_out = [name for name in found.tensors if not name.startswith(prefix)]
    if prefix:
        notes.append(f"names of {found.label} were taken without {prefix!r}")
    if note := _resize(encoder, weights, found.size):
        notes.append(note)

    wrong = []
    for name, value in list(weights.items()):
        if name in own and own[name].shape == value.shape:
            continue
        if name.startswith(HEADS) or (name not in own and (name.startswith(PRETEXT) or name.endswith(COMPUTED))):
            left_out.append(prefix + name)
            del weights[name]
        else:
            expected = tuple(own[name].shape) if name in own else "no such weight"
            wrong.append(f"{name}: got {tuple(value.shape)}, expected {expected}")
    fresh = [name for name in own if name not in weights]
    lacking = [name for name in fresh if not name.startswith(FRESH) and not re.search(ADDED, name)]
    wrong += [f"{name}: got nothing, expected {tuple(own[name].shape)}" for name in lacking]
    if wrong:
        if len(wrong) > MOST_NAMED:
            logger.error("all that does not fit of %s:\n%s", found.label, "\n".join(wrong))
        raise ArtifactError(
            f"got weights of {found.label} that do not fit the model, expected its names and shapes; set model: to the "
            f"one that they are of{_patch_size(weights, own)}. {some(wrong, MOST_NAMED)}"
            f"{', all of them in the log' if len(wrong) > MOST_NAMED else ''}"
        )
    encoder.load_state_dict(weights, strict=False)
    if left_out:
        notes.append(f"{_names(left_out)} left out: no part of the encoder")
    if fresh:
        notes.append(f"{_names(fresh)} fresh: not in {found.label}")
    return notes


def _names(names: list[str]) -> str:
    return some(names, 5).replace(";", ",") + (" are" if len(names) > 1 else " is")


def _prefix(names: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """What to strip so that most names become the encoder's; '' where that is best."""
    prefixes = {""}
    for name in names:
        at = 0
        while wrapper := next((one for one in WRAPPERS if name.startswith(one, at)), None):
            at += len(wrapper)
            prefixes.add(name[:at])

    shortest_first = sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
    return max(shortest_first, key=lambda prefix: _fitting(names, own, prefix))


def _fitting(names: dict[str, Tensor], own: dict[str, Tensor], prefix: str) -> int:
    """How many names are the encoder's behind the prefix."""
    return sum(name.startswith(prefix) and name[len(prefix) :] in own for name in names)


def _resize(encoder: nn.Module, weights: dict[str, Tensor], size: tuple[int, int]) -> str | None:
    """Brings a table of absolute positions [1, prefix tokens + h w, D] to the encoder's grid, in place."""
    table, target = weights.get("pos_embed"), getattr(encoder, "pos_embed", None)
    if table is None or target is None or table.ndim != 3 or target.ndim != 3:
        return None
    height, width = size
    columns = math.isqrt(table.shape[1] * width // height)  # the few prefix tokens make no further column
    old = columns * height // width, columns
    prefix_tokens = table.shape[1] - math.prod(old)
    new: tuple[int, int] = encoder.config.grid_shape if isinstance(encoder, ViT) else encoder.patch_embed.grid_size  # type: ignore[union-attr, assignment]
    if old == new or table.shape[2] != target.shape[2] or prefix_tokens != target.shape[1] - math.prod(new):
        return None  # they fit, or the shapes are listed as a mismatch
    if isinstance(encoder, ViT):
        weights["pos_embed"] = resize_positions(table, old, new)
    else:
        from timm.layers.pos_embed import resample_abs_pos_embed

        weights["pos_embed"] = resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=prefix_tokens)
    return f"pos_embed resized {old[0]}x{old[1]} -> {new[0]}x{new[1]}"


def _patch_size(weights: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """The commonest mismatch in words."""
    name = "patch_embed.proj.weight"
    if name not in weights or name not in own or weights[name].shape[2:] == own[name].shape[2:]:
        return ""
    got, expected = ("x".join(map(str, one.shape[2:])) for one in (weights[name], own[name]))
    return f" (their patches are {got} pixels, the model's {expected}: set patch_size)"
