"""`attnx words`: the map of each word of a caption, for one image or for many pairs."""

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnx.cli.job_options import (
    JobOptions,
    Kind,
    MapDtype,
    Root,
    Split,
    absolute,
    runs_jobs,
)
from attnx.cli.options import (
    PATH,
    SOURCE,
    Alpha,
    Checkpoint,
    Cmap,
    Dtype,
    ImageSize,
    Interpolation,
    Out,
    Seed,
    autocast_of,
    device_of,
    one_of,
    pixels_of,
    report_errors,
)
from attnx.cli.run_job import run_recipe
from attnx.messages import printable

_SHOWN = 5  # unknown words

if TYPE_CHECKING:
    from PIL.Image import Image

    from attnx.extract.captions import CaptionMaps
    from attnx.figures.style import Style
    from attnx.jobs.run import Report
    from attnx.jobs.runtime import Runtime


@report_errors
@runs_jobs
def words(
    image: Annotated[Path | None, typer.Argument(help="An image file.", **PATH)] = None,
    caption: Annotated[str | None, typer.Argument(help="A caption of the image.")] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help='For a batch job: JSON lines {"image": "photo.jpg", "caption": "a dog"}, or another source of images '
            "with captions, as for attnx extract.",
            **SOURCE,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="[bold]albef:CHECKPOINT[/bold] in the published sizes, [bold]demo[/bold] (bundled; also albef:demo), "
            "or [bold]lavt:CHECKPOINT[/bold]: a file of LAVT's train.py. albef and lavt take the file of --checkpoint."
        ),
    ] = "albef",
    checkpoint: Checkpoint = None,
    pretrained: Annotated[bool, typer.Option(help="--no-pretrained: random weights.")] = True,
    vocab: Annotated[
        Path | None, typer.Option(help="vocab.txt of bert-base-uncased; downloaded by default.", **PATH)
    ] = None,
    out: Out = Path("attnx-words"),
    layer: Annotated[
        int | None, typer.Option(help="Text layer with cross-attention; default: 8 for ALBEF, 2 for the demo.")
    ] = None,
    stage: Annotated[
        int | None, typer.Option(help="LAVT: 0 to 3; default: the mean of all stages, on the grid of stage 0.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="[bold]attention[/bold]; ALBEF: [bold]gradcam[/bold], attention weighted by the match's gradient; "
            "LAVT: [bold]rollout[/bold], attention carried on through the image encoder to the grid of stage 0."
        ),
    ] = "attention",
    heads: Annotated[str, typer.Option(help="How heads are fused: mean, max or min (gradcam: mean).")] = "mean",
    preset: Annotated[
        str | None,
        typer.Option(help="vl-dino: the input (480 pixels, ImageNet's mean and std) and forward pass of that script."),
    ] = None,
    image_size: ImageSize = None,
    dtype: Dtype = "float32",
    pictures: Annotated[
        bool,
        typer.Option(
            "--pictures",
            help="With --pairs: also draw words.png for every pair, named by its number and words: 000007-a-dog.png.",
        ),
    ] = False,
    page: Annotated[
        bool,
        typer.Option(
            "--page",
            help="Also write words.html, an interactive page of every layer with cross-attention and its Grad-CAM "
            "(ALBEF), or of every stage (LAVT).",
        ),
    ] = False,
    map_dtype: MapDtype = "float16",
    kind: Kind = None,
    root: Root = None,
    split: Split = None,
    cmap: Cmap = "turbo",
    alpha: Alpha = 0.5,
    interpolation: Interpolation = "bilinear",
    seed: Seed = 0,
    *,
    options: JobOptions,
) -> None:
    """Draws a map for each word of a caption: cross-attention, its Grad-CAM (ALBEF), or its rollout (LAVT).

    Writes one picture per word (00-a.png), words.png with all of them, and words.npz. gradcam also prints the score of
    a match, a logit; attention has none, because the model stops before it. With --page, also writes words.html, an
    interactive page. With --pairs, writes Parquet shards like attnx extract: one row per pair, maps [T, h, w], and the
    columns tokens (the T word pieces), word_of (the word of each token), words, score (gradcam) and cut (words beyond
    the model's length). Pairs that can't be read become rows with an error. The same command continues a job that was
    stopped.
    """
    import torch

    from attnx.extract.caption_layers import caption_layers, layer_name
    from attnx.figures.style import Style
    from attnx.images import read_image
    from attnx.jobs.packing import DTYPES
    from attnx.jobs.recipe import WordsRecipe
    from attnx.jobs.sources import open_source
    from attnx.models.loading import default_layer, word_model
    from attnx.page.words import words_page

    arguments = {"IMAGE": image, "CAPTION": caption, "--pairs": pairs}
    given = [name for name, value in arguments.items() if value is not None]
    if given not in (["IMAGE", "CAPTION"], ["--pairs"]):
        raise ValueError(f'expected IMAGE "CAPTION", or --pairs FILE; got {" and ".join(given) or "neither"}')
    if page and pairs is not None:
        raise ValueError("page: expected IMAGE and CAPTION; got --pairs; attnx browse makes a page of their job")
    cast = autocast_of(dtype)
    one_of("map-dtype", map_dtype, DTYPES)
    style = Style(cmap, alpha, interpolation)
    model, named = word_model(model, checkpoint)
    file = None if named is None else Path(named)
    if model == "lavt":
        _check_options(method, layer, heads, preset)
    else:
        if stage is not None:
            raise ValueError(f"stage: expected --model lavt:CHECKPOINT, since only LAVT has stages; got {model!r}")
        if method == "rollout":
            raise ValueError(f"method: expected attention or gradcam, since only LAVT has rollout; got {method!r}")
        layer = default_layer(model) if layer is None else layer
    images = None if pairs is None else open_source(pairs, kind, root, split)
    if images is not None and images.kind == "folder":
        raise ValueError(f"pairs: expected a source with captions; {pairs} is a folder of images")
    recipe = WordsRecipe(
        source=absolute(image or pairs or Path()), kind="folder" if images is None else images.kind,
        root=absolute(root), split=split, model=model, pretrained=pretrained, checkpoint=absolute(file),
        image_size=pixels_of(image_size), seed=seed, method=method, heads=heads, dtype=dtype, map_dtype=map_dtype,
        max_pixels=options.pixels, vocab=absolute(vocab), layer=layer, preset=preset, stage=stage,
    )  # fmt: skip
    if images is not None:
        run_recipe(recipe, images, out, options, "pairs", partial(_finish, out, style if pictures else None))
    elif image is not None and caption is not None:
        on, picture = device_of(options.device), read_image(image)
        loaded, find = recipe.load_words(on)
        batch = loaded.prepare(picture)[None].to(on)
        _draw(picture, find(batch, [[caption]])[0], out, style)
        if page:
            place = stage if model == "lavt" else layer
            with torch.autocast(on.type, cast or torch.bfloat16, enabled=cast is not None):
                found = caption_layers(loaded.model, batch, caption, heads, preset)
            first = layer_name(method, place, "stage" if model == "lavt" else "layer")
            words_page(found, picture, start=first).save(out / "words.html")
            typer.echo(f"{out / 'words.html'}  an interactive page of the words in every layer")


def _check_options(method: str, layer: int | None, heads: str, preset: str | None) -> None:
    """Raise ValueError if an option, or a method, that LAVT does not have is given."""
    from attnx.extract.lavt_maps import check_method

    check_method(method)
    for name, value, only in (("layer", layer, None), ("heads", heads, "mean"), ("preset", preset, None)):
        if value != only:
            raise ValueError(f"{name}: expected {'none' if only is None else only} with LAVT; got {value!r}")


def _draw(picture: "Image", maps: "CaptionMaps", out: Path, style: "Style") -> None:
    """Draw the pictures of one image and the words of its caption."""
    from attnx.figures.words import draw_words

    for path, what in draw_words(picture, maps, out, style).items():
        typer.echo(f"{path}  {what}")
    if maps.score is not None:
        typer.echo(f'match {maps.score:+.2f}: "{printable(maps.caption.text)}"')


def _finish(out: Path, style: "Style | None", runtime: "Runtime", report: "Report") -> str:
    """Draw the pairs if `style` is given; return a text with scores, and the numbers of cut and unknown captions."""
    import numpy as np
    import pyarrow.compute as pc

    from attnx.figures.words import draw_pairs
    from attnx.jobs.shards import Part, parts

    if style is not None:
        draw_pairs(out, runtime, style)
    cut, unknown, words, scores = 0, 0, dict[str, None](), [np.zeros(0)]
    for part in parts(out):
        rows = Part(part).table(["cut", "tokens", "text", "score"])
        scores.append(rows["score"].drop_null().to_numpy())
        cut += pc.sum(pc.greater(rows["cut"], 0)).as_py() or 0
        tokens = rows["tokens"].combine_chunks()
        of_row = pc.list_parent_indices(tokens).filter(pc.equal(pc.list_flatten(tokens), "[UNK]")).unique()
        unknown += len(of_row)
        for text in rows["text"].take(of_row[:_SHOWN]).to_pylist() if len(words) < _SHOWN else ():
            words |= dict.fromkeys(_unknown(runtime, text))
    found, message = np.concatenate(scores), ""
    if found.size:
        message = f", match: mean {found.mean():+.2f}, min {found.min():+.2f}, max {found.max():+.2f}"
    message += f", {cut} captions were cut: they are longer than the model's limit" if cut else ""
    if unknown:
        such = ", ".join(printable(word, 40) for word in [*words][:_SHOWN])
        message += f", {unknown} captions have words that are not in the vocabulary, such as {such}"
    return message


def _unknown(runtime: "Runtime", text: str) -> tuple[str, ...]:
    """The words of a caption that are not in the vocabulary."""
    from attnx.jobs.tasks import WordTask

    assert isinstance(runtime.task, WordTask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return runtime.task.tokenizer(text).unknown
