"""Every trained parameter in exactly one group, whatever the rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from workloads.models.encoders import layer_ids
from workloads.models.vit import ViTConfig
from workloads.parts.parameter_groups import TOKENS, groups, layer_decay


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = ViTConfig(image_size=8, patch_size=4, dim=8, depth=2, heads=2).build()
        self.encoder.requires_grad_(True)
        self.mask_token = nn.Parameter(nn.init.ones_(nn.Linear(8, 1).weight.data))
        self.head = nn.Linear(8, 3)
        self.header = nn.Linear(8, 3)
        self.tied = self.head


NET = Net()
NAMED = dict(NET.named_parameters())


def by_name(found):
    named = {id(parameter): name for name, parameter in NAMED.items()}
    return {named[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in found for p in g["params"]}


@given(
    frozen=st.sets(st.sampled_from(sorted(NAMED))),
    no_decay=st.sets(st.sampled_from(TOKENS)),
    ids=st.dictionaries(st.sampled_from(sorted(NAMED)), st.integers(0, 3)),
    decay=st.sampled_from([1.0, 0.65]),
    heads=st.dictionaries(st.sampled_from(["head", "encoder", "encoder.blocks.1"]), st.sampled_from([1.0, 10.0])),
)
def test_every_trained_parameter_is_in_one_group(frozen, no_decay, ids, decay, heads):
    for name, parameter in NAMED.items():
        parameter.requires_grad_(name not in frozen)
    found = groups(NET.named_parameters(), no_decay=no_decay, lr_scale=layer_decay(ids, 3, decay), heads=heads)
    grouped = [id(p) for group in found for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in NET.parameters() if p.requires_grad)
    rules = [(group["lr_scale"], group["weight_decay"]) for group in found]
    assert len(rules) == len(set(rules)) and all(group["params"] for group in found)
    for parameter in NAMED.values():
        parameter.requires_grad_(True)


def test_vectors_do_not_decay_and_tokens_where_asked():
    plain, tokens = by_name(groups(NAMED.items())), by_name(groups(NAMED.items(), no_decay=TOKENS))
    for name, parameter in NAMED.items():
        token = name in ("mask_token", "encoder.cls_token", "encoder.pos_embed")
        assert plain[name] == (1.0, 0.0 if parameter.ndim <= 1 else None), name
        assert tokens[name] == (1.0, 0.0 if parameter.ndim <= 1 or token else None), name


def test_layers_of_a_vit():
    """BEiT's rule: embeddings at decay^(depth + 1), block i at decay^(depth - i), the rest at 1."""
    ids, last = layer_ids(NET.encoder)
    ids = {f"encoder.{name}": depth for name, depth in ids.items()}
    scales = by_name(groups(NAMED.items(), lr_scale=layer_decay(ids, last, 0.5)))
    assert scales["encoder.patch_embed.proj.weight"][0] == scales["encoder.pos_embed"][0] == 0.125
    assert scales["encoder.blocks.0.attn.qkv.weight"][0] == 0.25
    assert scales["encoder.blocks.1.mlp.fc1.bias"][0] == 0.5
    assert scales["encoder.norm.weight"][0] == scales["head.weight"][0] == 1.0


def test_heads_multiply_what_is_under_their_name():
    scales = by_name(groups(NAMED.items(), lr_scale=lambda name: 0.5 if "head" in name else 1.0, heads={"head": 10.0}))
    assert scales["head.weight"][0] == scales["head.bias"][0] == 5.0
    assert scales["header.weight"][0] == 0.5
    assert scales["mask_token"][0] == 1.0


def test_a_head_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"got heads \['fc'\], expected .* it has \['encoder', 'head', 'header'"):
        groups(NAMED.items(), heads={"fc": 10.0})
