"""attnx summary: what the maps of a job have in common."""

from pathlib import Path
from typing import Annotated

import typer

from attnx.cli.options import PATH, Alpha, Colormap, Interpolation, report_errors


@report_errors
def summary(
    folder: Annotated[
        Path, typer.Argument(help="OUT of attnx extract or attnx words; it may still be running.", **PATH)
    ],
    masks: Annotated[
        Path | None,
        typer.Option(
            help="Folder of labelled masks: of a/b.jpg, a/b.png with numbers for objects, 0 for the background and 255 "
            "for void. Adds DINO's Jaccard and the pointing game.",
            **PATH,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; FOLDER/summary unless given.", **PATH)
    ] = None,
    examples: Annotated[int, typer.Option(help="Of each level of entropy, and of each end.", min=1)] = 6,
    keep: Annotated[float, typer.Option(help="Share of a head's mass inside its mask, for the Jaccard.")] = 0.6,
    colormap: Colormap = "turbo",
    alpha: Alpha = 0.5,
    interpolation: Interpolation = "bilinear",
) -> None:
    """Counts, errors, images a second; four levels of entropy with examples; the mean map; the most and least focused.

    Writes summary.json, levels.png, focus.png and mean.png. An image's entropy is that of its map over the patches,
    layers and heads averaged; the levels are quarters of the images.
    """
    from attnx.figures.one_image import Style
    from attnx.figures.summary import draw_summary, numbers, table, write_numbers
    from attnx.jobs.masks import score
    from attnx.jobs.reader import Maps
    from attnx.jobs.summary import summarise

    maps = Maps(folder)
    found = summarise(maps)
    if masks is not None and not masks.is_dir():
        raise ValueError(f"masks: expected a folder of masks; {masks} is none")
    scored = None if masks is None else score(maps, masks, keep)
    target = folder / "summary" if out is None else out
    written = draw_summary(maps, found, target, Style(colormap, alpha, interpolation), examples)
    said = numbers(maps, found, scored)
    target.mkdir(parents=True, exist_ok=True)
    write_numbers(said, target / "summary.json")
    typer.echo(table(said))
    for path, what in written.items():
        typer.echo(f"{path}  {what}")
