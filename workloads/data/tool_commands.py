"""`manta inspect`, `validate`, `reshard` and `split`: the command line for shards that are there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from workloads.data.manifest import open_manifest
from workloads.data.order import WINDOW
from workloads.data.shards import DataError, expand
from workloads.data.terminal import one_line_errors, print_lines, print_packed, print_table, progress

Pattern = Annotated[list[str], typer.Argument(help="Shards: paths, globs or brace patterns, quoted.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="New folder for shards, classes.txt and manifests.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace the folder if it holds nothing but packed shards; drop what is unfinished."),
]
PrefixKeys = Annotated[
    bool, typer.Option("--prefix-keys", help="Put the shard's name before each key: for keys that repeat.")
]


def inspect(
    pattern: Pattern,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Scan again, whatever manifest is kept.")] = False,
    decode_all: Annotated[bool, typer.Option("--decode", help="Decode every image and list the bad ones.")] = False,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="How near an epoch is to a uniform shuffle.")] = False,
    window: Annotated[int, typer.Option(help="Samples mixed one by one: `shuffle_window` of a job.", min=1)] = WINDOW,
    batch_size: Annotated[int, typer.Option(help="Of the batches that --shuffle looks at.", min=1)] = 256,
    as_json: AsJson = False,
) -> None:
    """What shards hold: samples, bytes, classes, and what cannot be used."""
    with one_line_errors():
        with progress("scanning", len(expand(pattern))) as on_shard:
            manifest = open_manifest(pattern, rebuild=rebuild, on_shard=on_shard)
        counts = np.bincount(manifest.label[manifest.label >= 0], minlength=manifest.num_classes).tolist()
        report: dict[str, Any] = {
            "samples": len(manifest),
            "bytes": sum(manifest.shard_bytes),
            "classes": dict(zip(manifest.classes, counts, strict=True)),
            "shards": list(manifest.shards),
            "members": {name: int((places.offset >= 0).sum()) for name, places in manifest.members.items()},
            "quarantined": manifest.quarantined,
            "content_hash": manifest.content_hash,
        }
        if shuffle:
            from workloads.data.shuffle_report import mixing

            report["shuffle"] = asdict(mixing(manifest, batch_size=batch_size, window=window))
        if decode_all:
            from workloads.data.validate import undecodable

            with progress("decoding", len(manifest)) as on_sample:
                report["bad"] = undecodable(manifest, on_sample)
    if as_json:
        typer.echo(json.dumps(report))
        return
    lines = {name: value for name, value in report.items() if isinstance(value, int | str)}
    lines |= {"shards": len(manifest.shards), "classes": len(manifest.classes)}
    lines |= {name: len(report[name]) for name in ("quarantined", "bad") if name in report}
    print_table("", lines)
    print_table("member", report["members"])
    if manifest.classes:
        print_table("class", report["classes"])
    if shuffle:
        uniform = report["shuffle"].pop("uniform")
        measured = {name: value for name, value in report["shuffle"].items() if name in uniform and value is not None}
        rows: dict[str, Any] = {"window": window}
        rows |= {name: f"{value:.3f} (uniform {uniform[name]:.3f})" for name, value in measured.items()}
        print_table("shuffle", rows)
    for name in ("quarantined", "bad"):
        print_lines(name, report.get(name, []))


def validate(
    pattern: Pattern,
    decode_all: Annotated[
        bool, typer.Option("--decode", help="Also decode every image, mask, array, video and volume.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """All that is wrong with shards, as `file: member at offset N: why`; exit code 1 if anything is."""
    from workloads.data.validate import validate

    with one_line_errors(), progress("checking") as on_item:
        found = validate(pattern, decode=decode_all, on_shard=on_item, on_sample=on_item)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        print_table("", {"samples": found.samples, "shards": found.shards, "findings": len(found.findings)})
        print_lines("finding", found.findings)
    raise typer.Exit(1 if found.findings else 0)


def reshard(
    pattern: Pattern,
    out: Out,
    samples_per_shard: Annotated[int | None, typer.Option("--samples-per-shard", min=1)] = None,
    bytes_per_shard: Annotated[str, typer.Option("--bytes-per-shard", help="At most, e.g. 500MB or 1GiB.")] = "",
    shuffle: Annotated[int | None, typer.Option(help="Seed of a new order over all shards.", min=0)] = None,
    resize_short_side: Annotated[
        int | None, typer.Option(help="Pixels; images with a longer short side become JPEG files of this one.", min=1)
    ] = None,
    quality: Annotated[int, typer.Option(help="Of these.", min=1, max=100)] = 90,
    prefix_keys: PrefixKeys = False,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """The same samples in shards of another size or order, with smaller images if wanted."""
    from workloads.data.reshard import parse_bytes, reshard
    from workloads.data.shard_writer import ShardLimit

    with one_line_errors(), progress("writing") as on_sample:
        if (samples_per_shard is None) == (not bytes_per_shard):
            raise DataError("got both or none of --samples-per-shard and --bytes-per-shard, expected one; give one")
        packed = reshard(
            pattern,
            out,
            limit=ShardLimit(samples_per_shard, parse_bytes(bytes_per_shard) if bytes_per_shard else None),
            shuffle=shuffle,
            resize_short_side=resize_short_side,
            quality=quality,
            prefix_keys=prefix_keys,
            force=force,
            on_sample=on_sample,
        )
    print_packed(packed, as_json)


def split(
    pattern: Pattern,
    out: Out,
    fractions: Annotated[str, typer.Option(help="NAME=FRACTION,..., 1 together, e.g. train=0.8,val=0.1,test=0.1.")],
    by: Annotated[
        str,
        typer.Option(
            metavar="class|sample|key-prefix=REGEX",
            help="Split each class alike, or by chance, or keep samples together whose keys begin alike.",
        ),
    ] = "class",
    seed: Annotated[int, typer.Option(help="Draws which samples go where.", min=0)] = 0,
    samples_per_shard: Annotated[int, typer.Option("--samples-per-shard", min=1)] = 1000,
    prefix_keys: PrefixKeys = False,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Shards -> train, val, test or the like; every sample is in exactly one."""
    from workloads.data.split import parse_fractions, split

    rule, _, group = by.partition("=")
    with one_line_errors(), progress("writing") as on_sample:
        if rule not in ("class", "sample", "key-prefix") or (rule == "key-prefix") != bool(group):
            raise DataError(f"got --by {by!r}, expected class, sample or key-prefix=REGEX")
        packed = split(
            pattern,
            out,
            parse_fractions(fractions),
            seed=seed,
            group=group or None,
            by_class=rule == "class",
            samples_per_shard=samples_per_shard,
            prefix_keys=prefix_keys,
            force=force,
            on_sample=on_sample,
        )
    print_packed(packed, as_json)


TOOLS = (inspect, validate, reshard, split)
