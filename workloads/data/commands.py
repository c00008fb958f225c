"""`manta pack`: folders, tables and files -> shards. The other data commands are in `tool_commands`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workloads.data.terminal import one_line_errors, print_packed, progress
from workloads.data.tool_commands import TOOLS, AsJson, Force, Out, inspect

__all__ = ["TOOLS", "inspect", "pack_app"]

pack_app = typer.Typer(
    help="Write WebDataset shards and their manifest. A run that was killed goes on when it is repeated.",
    no_args_is_help=True,
)

PerShard = Annotated[int, typer.Option("--samples-per-shard", min=1)]
Root = Annotated[Path, typer.Argument(metavar="DIR", show_default=False)]


@pack_app.command("digits")
def pack_digits_command(out: Out, as_json: AsJson = False, force: Force = False) -> None:
    """The handwritten digits of scikit-learn, 32x32: train 1437, test 360."""
    from workloads.data.pack import pack_digits

    with one_line_errors():
        print_packed(pack_digits(out, force=force), as_json)


@pack_app.command("folder")
def pack_folder_command(
    folder: Path, out: Out, samples_per_shard: PerShard = 1000, as_json: AsJson = False, force: Force = False
) -> None:
    """Images in FOLDER; sub-folders are classes, or splits (train, val, test) that hold class folders."""
    from workloads.data.pack import pack_folder

    with one_line_errors(), progress("packing") as on_sample:
        packed = pack_folder(folder, out, samples_per_shard=samples_per_shard, force=force, on_sample=on_sample)
    print_packed(packed, as_json)


@pack_app.command("csv")
def pack_csv_command(
    file: Path,
    out: Out,
    image_column: Annotated[str, typer.Option(help="Column with paths of images.")] = "image",
    label_column: Annotated[str, typer.Option(help="Column with class names; '' for no labels.")] = "label",
    root: Annotated[Path | None, typer.Option(help="Where relative paths start [the folder of FILE].")] = None,
    samples_per_shard: PerShard = 1000,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Images named in a CSV FILE with a header."""
    from workloads.data.pack import pack_csv

    with one_line_errors(), progress("packing") as on_sample:
        packed = pack_csv(
            file,
            out,
            image_column=image_column,
            label_column=label_column or None,
            root=root,
            samples_per_shard=samples_per_shard,
            force=force,
            on_sample=on_sample,
        )
    print_packed(packed, as_json)


@pack_app.command("parquet")
def pack_parquet_command(
    files: list[Path],
    out: Out,
    image: Annotated[str, typer.Option(help="Column with images: bytes, {bytes, path}, or paths.")] = "image",
    label: Annotated[str, typer.Option(help="Column with classes; '' for no labels.")] = "",
    key: Annotated[str, typer.Option(help="Column with keys of samples; '' numbers them.")] = "",
    caption: Annotated[str, typer.Option(help="Column with captions; '' for none.")] = "",
    samples_per_shard: PerShard = 1000,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Images in Parquet FILES, in their order; files called train..., test... and the like are splits."""
    from workloads.data.pack_parquet import Columns, pack_parquet

    columns = Columns(image, label or None, key or None, caption or None)
    with one_line_errors(), progress("packing") as on_sample:
        packed = pack_parquet(
            files, out, columns, samples_per_shard=samples_per_shard, force=force, on_sample=on_sample
        )
    print_packed(packed, as_json)


@pack_app.command("hf")
def pack_hf_command(
    folder: Root, out: Out, samples_per_shard: PerShard = 1000, as_json: AsJson = False, force: Force = False
) -> None:
    """Images in DIR as Hugging Face's ImageFolder: split folders, class folders or metadata.csv / .jsonl."""
    from workloads.data.pack_hf import pack_hf

    with one_line_errors(), progress("packing") as on_sample:
        packed = pack_hf(folder, out, samples_per_shard=samples_per_shard, force=force, on_sample=on_sample)
    print_packed(packed, as_json)


@pack_app.command("videos")
def pack_videos_command(
    folder: Root, out: Out, samples_per_shard: PerShard = 100, as_json: AsJson = False, force: Force = False
) -> None:
    """Videos in DIR (mp4, avi, mov, mkv, webm); sub-folders are classes or splits."""
    from workloads.data.pack_media import pack_videos

    with one_line_errors(), progress("packing") as on_sample:
        packed = pack_videos(folder, out, samples_per_shard=samples_per_shard, force=force, on_sample=on_sample)
    print_packed(packed, as_json)


@pack_app.command("volumes")
def pack_volumes_command(
    folder: Root, out: Out, samples_per_shard: PerShard = 100, as_json: AsJson = False, force: Force = False
) -> None:
    """Volumes in DIR (nii.gz, npy) with their masks: KEY.seg.nii.gz beside, or in a folder labels."""
    from workloads.data.pack_media import pack_volumes

    with one_line_errors(), progress("packing") as on_sample:
        packed = pack_volumes(folder, out, samples_per_shard=samples_per_shard, force=force, on_sample=on_sample)
    print_packed(packed, as_json)
