"""Names of a JobSpec -> the classes that they name, imported on demand.

A new method, model, evaluation or search is one line here. Nothing is imported until its
name is used, so listing the catalog costs no torch.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from pydantic import BaseModel, ValidationError

METHODS = {
    "binas": "workloads.methods.binas:Binas",
    "coins": "workloads.methods.coins:CoIns",
    "cp2": "workloads.methods.cp2:CP2",
    "densecl": "workloads.methods.densecl:DenseCL",
    "dino": "workloads.methods.dino:DINO",
    "coke": "workloads.methods.coke:CoKe",
    "dmae": "workloads.methods.dmae:DMAE",
    "fine_tune": "workloads.methods.fine_tune:FineTune",
    "i_mae": "workloads.methods.i_mae:IMAE",
    "linear_probe": "workloads.methods.linear_probe:LinearProbe",
    "look": "workloads.methods.look:LOOK",
    "mae": "workloads.methods.mae:MAE",
    "maskdistill": "workloads.methods.maskdistill:MaskDistill",
    "maskfeat": "workloads.methods.maskfeat:MaskFeat",
    "million_way": "workloads.methods.million_way:MillionWay",
    "medical_cl": "workloads.methods.medical_cl:MedicalCL",
    "mimco": "workloads.methods.mimco:MimCo",
    "moco_v2": "workloads.methods.moco_v2:MoCoV2",
    "moco_v3": "workloads.methods.moco_v3:MoCoV3",
    "rtk": "workloads.methods.rtk:RTK",
    "simclr": "workloads.methods.simclr:SimCLR",
    "solider": "workloads.methods.solider:SOLIDER",
    "transreid_ssl": "workloads.methods.transreid_ssl:TransReIDSSL",
}
MODELS = {
    "binas": "workloads.models.binas:BinasConfig",
    "binas_supernet": "workloads.models.binas_supernet:BinasSupernetConfig",
    "genet": "workloads.models.genet:GENetConfig",
    "genet_light": "workloads.models.genet:GENetLight",
    "genet_normal": "workloads.models.genet:GENetNormal",
    "genet_large": "workloads.models.genet:GENetLarge",
    "deeplab": "workloads.models.deeplab:DeepLabConfig",
    "maedet": "workloads.models.maedet:MAEDetConfig",
    "resnet_cifar": "workloads.models.resnet_cifar:ResNetCifarConfig",
    "unet": "workloads.models.unet:UNetConfig",
    "swin_semantic": "workloads.models.swin_semantic:SwinSemanticConfig",
    "vit": "workloads.models.vit:ViTConfig",
    "vit_tiny": "workloads.models.vit:ViTTiny",
    "vit_small": "workloads.models.vit:ViTSmall",
    "vit_base": "workloads.models.vit:ViTBase",
    "vit_large": "workloads.models.vit:ViTLarge",
    "vit_huge": "workloads.models.vit:ViTHuge",
    "zennet": "workloads.models.zennet:ZenNetConfig",
    "vit_ics": "workloads.models.vit_ics:ViTICSConfig",
    "vit_small_ics": "workloads.models.vit_ics:ViTSmallICS",
    "vit_base_ics": "workloads.models.vit_ics:ViTBaseICS",
    "wide_resnet": "workloads.models.wide_resnet:WideResNetConfig",
}
EVALUATIONS = {
    "accuracy": "workloads.evaluation.accuracy:Accuracy",
    "fine_tune": "workloads.evaluation.fine_tune:FineTuneEvaluation",
    "forgetting": "workloads.evaluation.forgetting:Forgetting",
    "knn": "workloads.evaluation.knn:KNN",
    "linear_probe": "workloads.evaluation.linear_probe:LinearProbe",
    "linear_probe_augmented": "workloads.evaluation.linear_probe_augmented:LinearProbeAugmented",
    "retrieval": "workloads.evaluation.retrieval:Retrieval",
    "segmentation": "workloads.evaluation.segmentation:Segmentation",
    "separability": "workloads.evaluation.separability:Separability",
    "sweep": "workloads.evaluation.sweep:Sweep",
    "volume_segmentation": "workloads.evaluation.volume_segmentation:VolumeSegmentation",
}
SEARCHES = {
    "binas": "workloads.search.binas:Binas",
    "genet": "workloads.search.genet_llr:GENetLLR",
    "mae_det": "workloads.search.mae_det:MAEDET",
    "zen_nas": "workloads.search.zen_nas:ZenNAS",
}
KINDS = {"method": METHODS, "model": MODELS, "evaluation": EVALUATIONS, "search": SEARCHES}
PLURAL = {"method": "methods", "model": "models", "evaluation": "evaluations", "search": "searches"}


class UnknownName(ValueError):
    """A name that the catalog does not hold; says the nearest ones."""

    def __init__(self, kind: str, got: str, valid: list[str]) -> None:
        self.kind, self.got, self.valid = kind, got, valid
        super().__init__(kind, got, valid)

    def __str__(self) -> str:
        return f"got {self.kind} {self.got!r}, expected one of the catalog; {nearest(self.got, self.valid)}"


def nearest(got: str, valid: list[str]) -> str:
    """'did you mean ...?' for a typo, else the whole (short) list."""
    close = difflib.get_close_matches(got, valid, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    return f"valid are {', '.join(sorted(valid))}"


def load(kind: str, name: str) -> Any:
    """Imports what `name` names.

    Args:
        kind: "method", "model", "evaluation" or "search".
        name: a key of that table.

    Raises:
        UnknownName: the table has no such key.
    """
    table = KINDS[kind]
    if name not in table:
        raise UnknownName(kind, name, list(table))
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def problems_of(error: ValidationError, config: type[BaseModel]) -> list[tuple[tuple[str | int, ...], str]]:
    """(location, sentence) of each error of a pydantic model; an unknown key is answered by the nearest valid ones."""
    found: list[tuple[tuple[str | int, ...], str]] = []
    items = error.errors(include_url=False, include_context=False)
    inside = {item["loc"][:n] for item in items for n in range(len(item["loc"]))}
    for item in items:
        location = item["loc"]
        if item["type"] == "too_short" and location in inside:
            continue  # of a tuple pydantic counts only what is valid
        if item["type"] == "extra_forbidden":
            owner: Any = config
            for part in location[:-1]:
                fields = getattr(owner, "model_fields", {})
                owner = fields[part].annotation if part in fields else owner
            keys = [f.alias or n for n, f in getattr(owner, "model_fields", {}).items()]
            message = f"got unknown key {location[-1]!r}; {nearest(str(location[-1]), keys)}"
        elif item["type"] == "missing":
            message = f"got nothing for {location[-1]!r}, expected a value; add it"
        elif item["type"] == "value_error":
            message = item["msg"].removeprefix("Value error, ")  # ours says itself what was got
        else:
            message = f"got {item['input']!r:.100}: {item['msg']}"
        found.append((location, message))
    return found
