"""`model:` of a JobSpec -> an encoder: ours by a catalog name, else any model of timm.

What an encoder offers: `encoder(images [B, 3, H, W]) -> [B, num_features]`, `num_features`.
timm is imported only for its own names: that import costs seconds.
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from torch import nn

from workloads import catalog
from workloads.data.views import Size, height_width
from workloads.models.vit import ViT, ViTConfig
from workloads.spec import Named

SETTLED = {
    *("num_classes", "in_chans", "img_size", "features_only", "pruned"),  # what an encoder is
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),  # weights: `init:`
    *("model_name", "scriptable", "exportable", "no_jit"),
}
"""Arguments of `timm.create_model` that are not the architecture's, or not the job's to change."""
SIZES = {"patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "drop_path_rate"}
"""Arguments of timm's plain ViT that ours has too."""


class TimmConfig(BaseModel):
    """Arguments of `timm.create_model` that a job may set beside the name.

    Attributes:
        architecture: a name of timm.
        image_size: of the images, the side of a square or [height, width]; networks of a fixed size are built for it.
        patch_size: of transformers.
        drop_path_rate: of the last block; earlier ones drop less (stochastic depth).
        options: further arguments of the architecture by timm's names, such as `init_values` of a BEiT.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    image_size: Size = 224
    patch_size: int | None = None
    drop_path_rate: float | None = None
    options: dict[str, bool | int | float | str] = {}

    @model_validator(mode="after")
    def _of_the_architecture(self) -> TimmConfig:
        refused = self.options.keys() & {*SETTLED, *self._fields()}
        if refused:
            raise ValueError(
                f"got options {', '.join(sorted(refused))}, expected arguments of the architecture that nothing else "
                "sets; leave these out (image_size is the size, init: names weights)"
            )
        return self

    def _fields(self) -> dict[str, Any]:
        fields = {"patch_size": self.patch_size, "drop_path_rate": self.drop_path_rate}
        return {name: value for name, value in fields.items() if value is not None}

    def build(self) -> nn.Module:
        """A fresh network; a plain ViT of timm becomes ours of the same size, so masked methods can use it.

        Raises:
            ValueError: an argument that the architecture does not take, or not with this value.
        """
        from workloads.models.timm_import import timm

        given = self._fields() | self.options
        options: dict[str, Any] = {"num_classes": 0} | given
        fixed = timm.models.get_pretrained_cfg(self.architecture)
        if fixed is not None and fixed.fixed_input_size:  # others take images of any size
            options["img_size"] = height_width(self.image_size)
        try:
            model = timm.create_model(self.architecture, **options)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ValueError(
                f"got {options} for timm model {self.architecture}, expected arguments that it takes: {error}; "
                "remove what it refuses"
            ) from error
        del options["num_classes"]
        model.manta_args = options  # what an artifact must say so that timm builds it again
        plain = _plain_vit(model, self.image_size, given.get("drop_path_rate", 0.0)) if given.keys() <= SIZES else None
        return plain or model


def _plain_vit(model: nn.Module, image_size: Size, drop_path: float) -> ViT | None:
    """Our ViT in the size of timm's, if that is the plain one (no registers, layer scale, other norms, positions)."""
    from timm.models.vision_transformer import VisionTransformer

    if type(model) is not VisionTransformer:
        return None
    block: Any = model.blocks[0]
    config = ViTConfig(
        image_size=image_size,
        patch_size=model.patch_embed.patch_size[0],
        dim=model.embed_dim,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
    )
    ours = ViT(config, drop_path=drop_path)
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    plain: bool = theirs == {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    plain = plain and isinstance(block.mlp.act, nn.GELU) and block.norm1.eps == block.norm2.eps == 1e-6
    return ours if plain else None


def model_config(model: Named) -> BaseModel:
    """The validated config of `model:`; it has `build()` and `image_size`.

    Raises:
        catalog.UnknownName: neither ours nor timm's; says the nearest names of both.
        pydantic.ValidationError: a key that the model does not know, or a value out of range.
    """
    if model.name in catalog.MODELS:
        config: BaseModel = catalog.load("model", model.name).model_validate(model.config)
        return config
    from workloads.models.timm_import import timm

    base, _, _ = model.name.partition(".")
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.6)
        raise catalog.UnknownName("model", model.name, [*catalog.MODELS, *close])
    return TimmConfig.model_validate({"architecture": model.name, **model.config})


def build_encoder(model: Named) -> nn.Module:
    encoder: nn.Module = model_config(model).build()  # type: ignore[attr-defined]
    return encoder


def classifier_of(encoder: nn.Module, num_classes: int, drop_path: float = 0.0, *, fc_norm: bool = True) -> nn.Module:
    """The encoder's weights under a fresh classification head.

    Args:
        encoder: ours stays as it is; one of timm gets the head.
        num_classes: of the head.
        drop_path: of our ViT.
        fc_norm: of our ViT: whether what is pooled is normalised, rather than the tokens.
    """
    if isinstance(encoder, ViT):
        return encoder.as_classifier(num_classes, drop_path, fc_norm=fc_norm)
    encoder.reset_classifier(num_classes)  # type: ignore[operator]
    return encoder


def layer_ids(model: nn.Module) -> tuple[dict[str, int], int]:
    """Depth of each parameter for layer-wise decay: name -> id, and the id of the head.

    ViT: cls, pos and patch embedding 0, block i -> i + 1, the rest depth + 1.
    """
    names = [name for name, _ in model.named_parameters()]
    if isinstance(model, ViT):
        last = model.config.depth + 1
        stem = ("cls_token", "pos_embed", "patch_embed.")
        ids = {
            n: 0 if n.startswith(stem) else int(n.split(".")[1]) + 1 if n.startswith("blocks.") else last for n in names
        }
        return ids, last
    from timm.models import group_parameters

    ids = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    return ids, max(ids.values())


def timm_folder_config(model: nn.Module) -> dict[str, Any]:
    """`architecture` and `model_args` with which `timm.create_model("local-dir:...")` builds the same network."""
    if isinstance(model, ViT):
        return {"architecture": model.architecture, "model_args": model.timm_args()}
    args = dict(getattr(model, "manta_args", {}))
    return {"architecture": model.default_cfg["architecture"], "model_args": args}  # type: ignore[index]


def exported(model: Named, num_classes: int, model_args: dict[str, Any]) -> nn.Module:
    """The network that an artifact describes, with fresh weights.

    Args:
        model: `model:` of its job.
        num_classes: of its head; 0: an encoder.
        model_args: of `timm_folder_config`.
    """
    encoder = build_encoder(model)
    if isinstance(encoder, ViT):
        encoder.pool = model_args["global_pool"]
        return encoder.as_classifier(num_classes, fc_norm=model_args["fc_norm"]) if num_classes else encoder
    return classifier_of(encoder, num_classes) if num_classes else encoder
