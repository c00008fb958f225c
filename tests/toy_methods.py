"""A toy job of each method, and the teachers that some of them need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.learning import pretrained
from tests.toy import make_job
from workloads.spec import JobSpec

DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
TOY_CONFIGS: dict[str, dict[str, Any]] = {
    "binas": {"largest": 0.5},
    "coins": {"dim": 8, "queue": 20, "coarse": [0, 1, 1, 0]},
    "cp2": {"dim": 8, "queue": 20},
    "densecl": {"dim": 8, "queue": 20, "warmup_steps": 5},
    "dino": {"out_dim": 16, "hidden_dim": 16, "bottleneck_dim": 8, "local_crops": 2, "local_size": 8},
    "coke": {"dim": 8, "clusters": [4, 6]},
    "dmae": DECODER | {"teacher": "job:toy-mae", "student_blocks": [0], "teacher_blocks": [1]},
    "fine_tune": {
        "drop_path": 0.2,
        "mixup": 0.8,
        "cutmix": 1.0,
        "view": {"randaugment": {"magnitude": 9, "magnitude_std": 0.5, "increasing": True}, "erasing": {}},
    },
    "i_mae": DECODER | {"teacher": "job:toy-mae"},
    "linear_probe": {},
    "look": {"dim": 8, "queue": 100, "k": 4},
    "mae": DECODER,
    "maskdistill": {"teacher": "job:toy-mae", "min_block": 1},
    "maskfeat": {"cell": 4},
    "million_way": {"dim": 8, "hardest": 5, "init": "random"},  # raw: its first epoch trains nothing, see its tests
    "medical_cl": {"depth": 14, "dim": 8, "hidden_dim": 16},
    "mimco": {"teacher": "job:toy-mae", "head_dim": 16},
    "moco_v2": {"dim": 8, "queue": 20},
    "moco_v3": {"dim": 8, "mlp_dim": 16},
    "rtk": {"teacher": "job:toy-classifier", "d": 8},
    "simclr": {"dim": 8, "probe": True},
    "solider": {
        "out_dim": 16,
        "hidden_dim": 16,
        "bottleneck_dim": 8,
        "local_crops": 2,
        "local_size": [8, 4],
        "momentum": 0.9,
        "freeze_last_layer": 0,
    },
    "transreid_ssl": {"out_dim": 16, "hidden_dim": 16, "bottleneck_dim": 8, "local_crops": 2, "local_size": [8, 4]},
}
"""A toy size of each method; one is required, so a method without tests cannot be added. `toy_home` has teachers."""
TOY_JOBS: dict[str, dict[str, Any]] = {
    "binas": {
        "micro_batch_size": None,  # BatchNorm
        "model": {
            "name": "binas_supernet",
            "image_size": 16,
            "stem": 8,
            "first": 8,
            "widths": [8, 16],
            "strides": [1, 2],
            "relu_stages": 1,
            "min_depth": 1,
            "max_depth": 2,
            "expansions": [2, 3],
            "last": 16,
            "features": 16,
        },
        # AdamW would enlarge rounding: BatchNorm takes away what biases before a 1 x 1 convolution add
        "optimizer": {"name": "sgd", "lr": 0.01},
    },
    "coke": {"micro_batch_size": None},
    "cp2": {
        "micro_batch_size": None,
        "model": {
            "name": "deeplab",
            "image_size": 16,
            "backbone": "resnet_cifar",
            "options": {"depth": 8},
            "output_stride": 4,
            "channels": 8,
            "rates": [1, 2],
        },
    },
    "linear_probe": {"micro_batch_size": None},
    "look": {"micro_batch_size": None},  # the mean is over images that have a neighbour of their class
    "medical_cl": {
        "micro_batch_size": None,
        "model": {"name": "unet", "image_size": 16, "channels": [4, 8, 8]},
        "optimizer": {"lr": 1e-4},  # as of rtk
    },
    "mimco": {"micro_batch_size": None},
    "moco_v3": {"micro_batch_size": None},
    "simclr": {"micro_batch_size": None},
    "solider": {  # the mean is over the views that are accepted
        "micro_batch_size": None,
        "model": {
            "name": "swin_semantic",
            "image_size": [16, 8],
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 2],
            "num_heads": [2, 2],
            "window_size": 3,
            "drop_path_rate": 0,
        },
    },
    "rtk": {
        "micro_batch_size": None,
        "model": {"name": "resnet_cifar", "image_size": 16, "depth": 8},
        "optimizer": {"lr": 1e-4},  # where rounding opens a ReLU on one side only, a small step keeps the trouble small
    },
    "transreid_ssl": {
        "micro_batch_size": None,  # BatchNorm
        "model": {"name": "vit_ics", "image_size": [16, 8], "patch_size": 4, "dim": 16, "depth": 2, "heads": 2},
        "optimizer": {"lr": 1e-4},  # as above
    },
}
"""Fields of the job of a method where they differ: methods that compare samples of a batch have no micro-batches."""
_REGIONS = {"model": {"name": "unet", "image_size": 16, "channels": [4, 8, 8], "decoder_blocks": 1}}
_ONE_VIEW = {"large": [{"crop_scale": [0.2, 1.0]}], "temperature": 0.1, "beta": 1}
TOY_FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "coins of whole images": ("coins", {"instance": "same_class", "proxy_weight": 0.5}, {}),
    "coke of one view, stage 2": ("coke", _ONE_VIEW | {"stage2_epoch": 1}, {}),
    "coke of many views": (
        "coke",
        {"small": 2, "small_size": 8},
        {"model": TOY_JOBS["rtk"]["model"], "optimizer": {"name": "lars", "lr": 0.01}},
    ),
    "medical_cl of random pairs": ("medical_cl", {"loss": "gr"}, {}),
    "medical_cl of like slices": ("medical_cl", {"loss": "gd_minus"}, {}),
    "medical_cl of regions": ("medical_cl", {"loss": "lr"}, _REGIONS),
    "medical_cl of like regions": ("medical_cl", {"loss": "ld"}, _REGIONS),
}
"""Other forms of a method, which keep other state: the method, more of its config, more fields of its job."""
TOY_DATA = {"medical_cl": "volumes"}
"""Which of the toy shards a method trains on, where it is not `train`."""


@pytest.fixture(scope="session")
def toy_home(tmp_path_factory: pytest.TempPathFactory, toy_shards: dict[str, str]) -> Path:
    """An installation with teachers: `job:toy-mae`, and `job:toy-classifier`, a network of convolutions."""
    folder = tmp_path_factory.mktemp("home")
    pretrained(make_job(toy_shards, epochs=None, steps=2), folder, "toy-mae")
    scratch = {"name": "fine_tune", "layer_decay": 1.0, "drop_path": 0}
    wide = {"name": "wide_resnet", "image_size": 16, "depth": 16, "widen_factor": 1}
    pretrained(make_job(toy_shards, method=scratch, model=wide, epochs=None, steps=2), folder, "toy-classifier")
    return folder


def toy_method_job(toy_shards: dict[str, str], name: str, **fields: Any) -> JobSpec:
    """A job of a method over the toy shards; `fields` replace those of the spec."""
    assert name in TOY_CONFIGS, f"add a toy config of {name} to TOY_CONFIGS"
    own = {"micro_batch_size": 4, "method": {"name": name} | TOY_CONFIGS[name]} | TOY_JOBS.get(name, {})
    own["data"] = {"train": {"shards": toy_shards[TOY_DATA.get(name, "train")]}}
    return make_job(toy_shards, **(own | fields))


def toy_form_job(toy_shards: dict[str, str], form: str) -> JobSpec:
    """A job of one of `TOY_FORMS`, or of a method as it is."""
    name, more, fields = TOY_FORMS.get(form, (form, {}, {}))
    return toy_method_job(toy_shards, name, **{"method": {"name": name} | TOY_CONFIGS[name] | more} | fields)
