"""`attnx masks`: the masks of a job's photos as PNG files."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from attnx.cli.options import PATH, one_of, report_errors

_SHOWN = 5  # errors of rows


@report_errors
def masks(
    folder: Annotated[Path, typer.Argument(help="OUT of attnx extract; it may still be running.", **PATH)],
    out: Annotated[
        Path, typer.Option(help="Folder for the masks; created if missing. The mask of a/b.jpg is a/b.png.", **PATH)
    ] = Path("attnx-masks"),
    kind: Annotated[
        str,
        typer.Option(
            help="[bold]heat[/bold]: the map, resized bilinearly, its largest pixel 255; [bold]mass[/bold]: 255 in the "
            "largest patches that together hold the share --mass of the map, else 0."
        ),
    ] = "heat",
    mass: Annotated[
        float | None,
        typer.Option(
            "--mass",
            "--keep",
            help="With --kind mass: share of the map's mass inside the mask; default: 0.6.",
            show_default=False,
        ),
    ] = None,
    full_names: Annotated[
        bool, typer.Option("--full-names", help="The mask of a/b.jpg is a/b.jpg.png, for photos a/b.jpg and a/b.png.")
    ] = False,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of the photos: each photo must have the size that the job has read.", **PATH),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes; default: one per core; 0: none but this one.", min=0),
    ] = None,
) -> None:
    """Writes a grey PNG of each photo's size from its map.

    The mask is 0 outside the part of the photo that the map covers. Of several heads or layers, the mean map is taken.
    The same command continues where it was stopped, and writes the masks of rows that were added since: files that
    exist are kept. Settings are in masks.json. Exit code 1 if the mask of a map could not be written.
    """
    from attnx.jobs.mask_files import KINDS, Masks, write_masks
    from attnx.jobs.memory import usable_cores
    from attnx.jobs.progress import progress_bar
    from attnx.jobs.reader import Maps
    from attnx.limits import WORKERS
    from attnx.messages import say

    one_of("kind", kind, KINDS)
    if mass is not None and kind != "mass":
        raise ValueError(f"mass: only with --kind mass; got --kind {kind}")
    share = 0.6 if mass is None else mass
    if not 0 <= share <= 1:
        raise ValueError(f"mass: expected a share in [0, 1]; got {share:g}")
    if root is not None and not root.is_dir():
        raise ValueError(f"root: expected a folder of photos; {root} is not a folder")
    if workers is not None and workers > WORKERS:
        raise ValueError(f"workers: expected at most {WORKERS}; got {workers}")
    maps = Maps(folder)
    with progress_bar(len(maps)) if sys.stderr.isatty() else nullcontext(None) as progress:
        report = write_masks(
            Masks(maps, out, kind, share, root, full_names), usable_cores() if workers is None else workers, progress
        )
    for key, reason in sorted(report.errors)[:_SHOWN]:
        say(f"{key[:200]}: {reason[:200]}")
    more = f", {len(report.errors):,} errors" if report.errors else ""
    typer.echo(
        f"{report.made:,} masks in {out}, {report.kept:,} there before, {report.without:,} rows without a map{more}"
    )
    if report.errors:
        raise typer.Exit(1)
