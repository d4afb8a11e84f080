"""`attnx browse`: pages to look through the maps of a job."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from attnx.cli.options import PATH, report_errors

_SHOWN = 5  # errors of rows


@report_errors
def browse(
    folder: Annotated[
        Path, typer.Argument(help="OUT of attnx extract or attnx words; it may still be running.", **PATH)
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the pages; default: FOLDER/browse.", **PATH)] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the photos, if the source of the job has moved: the photo of a row is at its key.", **PATH
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many rows; default: all.", min=1)] = None,
    thumb: Annotated[int, typer.Option(help="Pixels of the longer side of a thumbnail.", min=16, max=1024)] = 192,
    plain: Annotated[bool, typer.Option("--plain", help="Maps alone, without thumbnails of the photos.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: one per core; 0: none but this one.", min=0)
    ] = None,
) -> None:
    """Writes pages in which the maps of a job can be searched, sorted and enlarged, over thumbnails of the photos.

    index.html opens in any browser, without a server and without a connection; the files in chunks/ belong to it, and
    load while one scrolls. The same command continues where it was stopped, and adds the rows that were added since.
    If the photos can't be found, the pages have the maps alone. Exit code 1 if a photo could not be read.
    """
    from attnx.jobs.memory import usable_cores
    from attnx.jobs.photos import Photos
    from attnx.jobs.progress import progress_bar
    from attnx.jobs.reader import Maps
    from attnx.limits import WORKERS
    from attnx.messages import say
    from attnx.page.browse import Browse, check_job, write_pages

    if workers is not None and workers > WORKERS:
        raise ValueError(f"workers: expected at most {WORKERS}; got {workers}")
    maps = Maps(folder)
    check_job(maps)
    photos = None if plain else Photos(maps, images)
    if photos is not None:
        try:
            photos.check()
        except ValueError as error:
            if images is not None:
                raise
            say(f"maps alone, without photos: {error}; --images FOLDER says where they are")
            photos = None
    pages = Browse(maps, folder / "browse" if out is None else out, photos, thumb, limit)
    with progress_bar(pages.rows) if sys.stderr.isatty() else nullcontext(None) as progress:
        report = write_pages(pages, usable_cores() if workers is None else workers, progress)
    for key, reason in sorted(report.errors)[:_SHOWN]:
        say(f"{key[:200]}: {reason[:200]}")
    more = f", {len(report.errors):,} photos could not be read" if report.errors else ""
    done = f"{pages.rows:,} rows; {report.made:,} chunks made, {report.kept:,} there before"
    typer.echo(f"{pages.out / 'index.html'}  {done}{more}")
    if report.errors:
        raise typer.Exit(1)
