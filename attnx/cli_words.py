"""attnx words: what each word of a caption looks at, for one image or for a file of pairs."""

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnx.cli_options import (
    Alpha,
    BatchSize,
    Checkpoint,
    Colormap,
    Device,
    Dtype,
    ImageSize,
    Interpolation,
    Out,
    Seed,
    autocast_of,
    device_of,
    pixels_of,
    told,
)

if TYPE_CHECKING:
    from torch import Tensor

    from attnx.models.albef import Albef
    from attnx.models.loading import Loaded
    from attnx.pairs import WordMaps

METHODS = ("attention", "gradcam")
VL_DINO_SIZE = (480, 480)


@told
def words(
    image: Annotated[Path | None, typer.Argument(help="An image file.")] = None,
    caption: Annotated[str | None, typer.Argument(help="What it shows.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help='JSON lines {"image": "photo.jpg", "caption": "a dog"}, for a batch job.')
    ] = None,
    model: Annotated[
        str, typer.Option(help="[bold]albef[/bold] in the published sizes, or [bold]demo[/bold] (bundled).")
    ] = "albef",
    checkpoint: Checkpoint = None,
    pretrained: Annotated[bool, typer.Option(help="--no-pretrained takes random weights.")] = True,
    vocab: Annotated[Path | None, typer.Option(help="bert-base-uncased's vocab.txt; downloaded unless given.")] = None,
    out: Out = Path("attnx-words"),
    layer: Annotated[
        int | None, typer.Option(help="Text layer with cross-attention; 8 of ALBEF, 2 of the demo.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="[bold]attention[/bold] itself, or [bold]gradcam[/bold]: weighted by its gradient of a match."
        ),
    ] = "attention",
    heads: Annotated[str, typer.Option(help="How heads are fused: mean, max or min (gradcam: mean).")] = "mean",
    preset: Annotated[
        str | None, typer.Option(help="vl-dino: that script's input (480 pixels, ImageNet's colours) and pass.")
    ] = None,
    image_size: ImageSize = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the pairs' images; their file's unless given.")] = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "float32",
    pictures: Annotated[bool, typer.Option("--pictures", help="With --pairs: words.png of every pair, too.")] = False,
    device: Device = None,
    colormap: Colormap = "turbo",
    alpha: Alpha = 0.5,
    interpolation: Interpolation = "bilinear",
    seed: Seed = 0,
) -> None:
    """Draws what each word of a caption looks at: cross-attention, or its Grad-CAM.

    Writes a picture a word (00-a.png), words.png with all of them over the caption, and words.npz. With --pairs,
    Parquet shards: a row a pair, maps [T, h, w], extract's columns and text, tokens (the T word pieces), word_of (the
    word that each is of) and score (gradcam: the logit of a match). Pairs that can't be read become
    rows with an error.
    """
    import torch

    from attnx import __version__
    from attnx.images import read_image
    from attnx.jobs.reading import progress_bar
    from attnx.jobs.words import extract_words, read_pairs
    from attnx.show import Style
    from attnx.show_words import draw_words, save_sheet

    asked = {"IMAGE": image, "CAPTION": caption, "--pairs": pairs}
    given = [name for name, value in asked.items() if value is not None]
    if given not in (["IMAGE", "CAPTION"], ["--pairs"]):
        raise ValueError(f'expected IMAGE "CAPTION", or --pairs FILE; got {" and ".join(given) or "neither"}')
    _check(method, heads, preset)
    picture = None if image is None else read_image(image)
    lines = [] if pairs is None else read_pairs(pairs)
    autocast, on, style = autocast_of(dtype), device_of(device), Style(colormap, alpha, interpolation)
    torch.manual_seed(seed)
    loaded, albef, own_layer = _load(model, pretrained, checkpoint, vocab, image_size, preset)
    albef.to(on)
    chosen = own_layer if layer is None else layer
    albef.cross_attention(chosen)  # raises where the layer has none

    def find(images: "Tensor", texts: list[list[str]]) -> "WordMaps":
        from attnx.pairs import gradcam, word_maps

        with torch.autocast(on.type, autocast or torch.bfloat16, enabled=autocast is not None):
            if method == "gradcam":
                return gradcam(albef, images, texts, chosen)
            return word_maps(albef, images, texts, chosen, heads, preset=preset)

    if picture is not None and caption is not None:
        with warnings.catch_warnings(record=True) as warned:
            found = find(loaded.prepare(picture)[None].to(on), [[caption]])[0]
        for warning in warned:
            typer.echo(f"attnx: {warning.message}", err=True)
        for path, what in draw_words(picture, found, out, style).items():
            typer.echo(f"{path}  {what}")
        return
    assert pairs is not None
    assert albef.tokenizer is not None
    settings = {
        "attnx": __version__, "model": loaded.name, "pretrained": pretrained and checkpoint is None,
        "checkpoint": str(checkpoint) if checkpoint else None, "seed": seed, "image_size": list(loaded.size),
        "mean": list(loaded.mean), "std": list(loaded.std), "interpolation": loaded.interpolation, "method": method,
        "layer": chosen, "heads": heads, "preset": preset, "dtype": dtype, "torch": torch.__version__,
    }  # fmt: skip
    with progress_bar(len(lines), "pairs") as progress:
        summary = extract_words(
            lines, pairs.parent if root is None else root, loaded.prepare, find, albef.tokenizer, out, settings,
            batch_size=batch_size, device=on, progress=progress,
            seen=partial(save_sheet, out / "pictures", style) if pictures else None,
        )  # fmt: skip
    told_of = f"{summary.done} captions' maps in {out} ({summary.per_second:.1f} pairs/s)"
    if summary.cut:
        told_of += f", {summary.cut} captions were cut: they are longer than {albef.config.max_tokens} tokens"
    if summary.failed:
        told_of += f", {summary.failed} pairs could not be read: see their error column"
    typer.echo(told_of)
    if summary.failed:
        raise typer.Exit(1)


def _check(method: str, heads: str, preset: str | None) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected attention or gradcam; got {method!r}")
    if heads not in ("mean", "max", "min"):
        raise ValueError(f"heads: expected mean, max or min; got {heads!r}")
    if preset not in (None, "vl-dino"):
        raise ValueError(f"preset: expected vl-dino; got {preset!r}")
    if method == "gradcam" and (heads != "mean" or preset):
        raise ValueError(f"method gradcam: expected heads mean and no preset; got {heads!r}, {preset!r}")


def _load(
    model: str,
    pretrained: bool,
    checkpoint: Path | None,
    vocab: Path | None,
    image_size: str | None,
    preset: str | None,
) -> "tuple[Loaded, Albef, int]":
    """The model, and the text layer that is looked at unless another is asked for."""
    from attnx.demo import pair
    from attnx.models.albef import Albef
    from attnx.models.albef_checkpoint import load_albef
    from attnx.models.loading import IMAGENET

    size = pixels_of(image_size)
    if model == "demo":
        loaded, layer = pair.load_demo_pair(checkpoint, size, pretrained), pair.LAYER
    elif model == "albef":
        if checkpoint is None and pretrained:
            raise ValueError(
                "checkpoint: expected ALBEF's weights (https://github.com/salesforce/ALBEF has them to download), "
                "--no-pretrained for random ones, or --model demo; got none"
            )
        size = VL_DINO_SIZE if preset and size is None else size
        loaded, layer = load_albef(checkpoint, vocab, size), 8
    else:
        raise ValueError(f"model: expected albef or demo; got {model!r}")
    if preset:
        loaded = replace(loaded, mean=IMAGENET[0], std=IMAGENET[1])
    assert isinstance(loaded.model, Albef)
    return loaded, loaded.model, layer
