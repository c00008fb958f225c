"""Parameter groups by rule: what decays, and at which share of the job's learning rate it is trained.

`groups(model.named_parameters())` leaves vectors without decay, `no_decay=TOKENS` positions and tokens too;
`lr_scale=layer_decay(*layer_ids(model), 0.65)` trains earlier layers slower, `heads={"head": 10.0}` the head faster.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn

TOKENS = ("cls_token", "dist_token", "mask_token", "pos_embed", "reg_token")
"""What vision transformers learn beside their layers: not 1-D, yet of the same kind as a bias."""


def groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    no_decay: Collection[str] = (),
    lr_scale: Callable[[str], float] | None = None,
    heads: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Every parameter that requires a gradient, each in one group; as few groups as the rules allow.

    Args:
        named_parameters: of a module.
        no_decay: last parts of names; these parameters do not decay, and neither do those of at most one dimension.
        lr_scale: name -> share of the job's learning rate; None: 1.
        heads: and that share times so much for parameters under a name: `{"head": 10.0}` is for `head.weight`.

    Returns:
        Groups of `params`, `lr_scale` and `weight_decay`: 0, or None for the job's.

    Raises:
        ValueError: no parameter is under a name of `heads`.
    """
    heads = heads or {}
    unused = set(heads)
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    names = []
    for name, parameter in named_parameters:
        names.append(name)
        scale = 1.0 if lr_scale is None else lr_scale(name)
        for head, factor in heads.items():
            if name == head or name.startswith(f"{head}."):
                unused.discard(head)
                scale *= factor
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name.rpartition(".")[2] not in no_decay
            found.setdefault((scale, decays), []).append(parameter)
    if unused:
        tops = sorted({name.partition(".")[0] for name in names})
        raise ValueError(f"got heads {sorted(unused)}, expected names of parts of the network; it has {tops}")
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": None if decays else 0.0}
        for (scale, decays), parameters in found.items()
    ]


def layer_decay(ids: Mapping[str, int], last: int, decay: float) -> Callable[[str], float]:
    """Rate decay^(last - id) by layer (ELECTRA, Clark et al. 2020; BEiT, Bao et al. 2022; MAE, appendix A.1).

    Args:
        ids: depth of each parameter, from `models.encoders.layer_ids`; what is not in it counts as the head.
        last: depth of the head.
        decay: 0.65 for ViT-B, 0.75 for ViT-L and ViT-H in MAE.
    """
    return lambda name: decay ** (last - ids.get(name, last))
