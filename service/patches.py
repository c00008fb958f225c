"""Documents that differ: a JSON merge patch (RFC 7396) makes one from another, `differences` tells what is what."""

from __future__ import annotations

import copy
from typing import Any

import yaml


def merged(document: Any, patch: Any) -> Any:
    """The document with the patch applied (RFC 7396): objects by key, null removes, all else replaces as a whole."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    found = dict(document) if isinstance(document, dict) else {}
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merged(found.get(key), value)
    return found


def differences(a: Any, b: Any, path: str = "") -> list[dict[str, Any]]:
    """Where two documents differ: `path` in dots, `a` and `b`, of which one is left out where it has nothing there.

    Lists of one length are compared by their places, others as a whole.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in [*a, *(key for key in b if key not in a)]:
            at = f"{path}.{key}" if path else key
            if key in a and key in b:
                found += differences(a[key], b[key], at)
            else:
                found.append({"path": at, **({"a": a[key]} if key in a else {"b": b[key]})})
        return found
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [one for i, (left, right) in pairs for one in differences(left, right, f"{path}.{i}")]
    return [] if a == b and type(a) is type(b) else [{"path": path, "a": a, "b": b}]


def patch_of(settings: list[str]) -> dict[str, Any]:
    """`a.b=c` of a command line -> a merge patch; the value is YAML, `null` removes.

    Raises:
        ValueError: one has no `=`, no name, or a value that is no YAML.
    """
    patch: dict[str, Any] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        *parents, last = path.split(".")
        if not equals or not all([*parents, last]):
            raise ValueError(f"got {setting!r}, expected a.b=value, such as optimizer.lr=1e-3")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"got {setting!r}, whose value is no YAML; quote it") from error
        at = patch
        for name in parents:
            at = at.setdefault(name, {})
            if not isinstance(at, dict):
                raise ValueError(f"got {setting!r} behind one that sets {name}, expected one of them")
        at[last] = value
    return patch
