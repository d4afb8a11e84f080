"""`attnx summary`: statistics of a job's maps."""

from pathlib import Path
from typing import Annotated

import typer

from attnx.cli.options import PATH, Alpha, Cmap, FormerMass, Interpolation, Mass, mass_of, report_errors
from attnx.cli.probe import write_report


@report_errors
def summary(
    folder: Annotated[
        Path, typer.Argument(help="OUT of attnx extract, words or probe; it may still be running.", **PATH)
    ],
    masks: Annotated[
        Path | None,
        typer.Option(
            help="Folder of labelled masks. The mask of a/b.jpg is a/b.png: 0 is the background, 255 is void, other "
            "values are objects. Adds DINO's Jaccard index and the pointing game.",
            **PATH,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; default: FOLDER/summary.", **PATH)] = None,
    examples: Annotated[
        int, typer.Option(help="Number of examples per entropy level, and of most and least focused.", min=1)
    ] = 6,
    mass: Mass = 0.6,
    keep: FormerMass = None,
    cmap: Cmap = "turbo",
    alpha: Alpha = 0.5,
    interpolation: Interpolation = "bilinear",
) -> None:
    """Summarises a job: counts, errors, images/s, entropy levels with examples, and the mean map.

    Writes summary.json, levels.png, focus.png (the most and least focused images) and mean.png. An image's entropy is
    the entropy of its map over the patches, averaged over layers and heads. The levels are quarters of the images. Of a
    job of attnx probe, writes its tables and figures, of the shards that exist.
    """
    mass = mass_of(mass, keep)
    from attnx.figures.style import Style
    from attnx.figures.summary import draw_summary, numbers, table, write_numbers
    from attnx.jobs.masks import score
    from attnx.jobs.reader import Maps
    from attnx.jobs.summary import summarise

    maps = Maps(folder)
    if "stats" in maps.settings:
        for path, what in write_report(folder, folder / "probe" if out is None else out).items():
            typer.echo(f"{path}  {what}")
        return
    found = summarise(maps)
    if masks is not None and not masks.is_dir():
        raise ValueError(f"masks: expected a folder of masks; {masks} is not a folder")
    scored = None if masks is None else score(maps, masks, mass)
    target = folder / "summary" if out is None else out
    written = draw_summary(maps, found, target, Style(cmap, alpha, interpolation), examples)
    values = numbers(maps, found, scored)
    target.mkdir(parents=True, exist_ok=True)
    write_numbers(values, target / "summary.json")
    typer.echo(table(values))
    for path, what in written.items():
        typer.echo(f"{path}  {what}")
