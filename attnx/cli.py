"""The command line: attnx demo | show | extract | words | kernels."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnx.cli_options import (
    Alpha,
    BatchSize,
    Checkpoint,
    Colormap,
    Device,
    Discard,
    Dtype,
    Heads,
    ImageSize,
    Interpolation,
    Layer,
    Method,
    Model,
    Out,
    Preset,
    Pretrained,
    Residual,
    Seed,
    Start,
    autocast_of,
    device_of,
    pixels_of,
    told,
)
from attnx.cli_words import words

if TYPE_CHECKING:
    import torch

    from attnx.models.loading import Loaded

app = typer.Typer(
    name="attnx",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""The attention maps of any vision transformer, at the price of its attention.

    [bold]attnx demo[/bold] shows what it does, without a download. [bold]attnx show photo.jpg --model demo[/bold] draws
    the maps of one image, [bold]attnx extract photos/ --model timm:vit_base_patch16_224 --out maps/[/bold] writes
    those of a folder. [bold]attnx words photo.jpg "a dog" --checkpoint ALBEF.pth[/bold] draws what each word looks at.
    [bold]attnx kernels[/bold] compiles the GPU kernels, without a GPU.

    Exit codes: 0 all is well, 1 some images or captions could not be read or a kernel spills, 2 a mistake in what was
    asked.""",
)


@app.command()
@told
def demo(
    out: Out = Path("attnx-demo"),
    scenes: Annotated[int, typer.Option(help="How many scenes to draw.")] = 48,
) -> None:
    """Draws scenes, runs the bundled models on them, and shows where they looked: for the target, and for words.

    Writes the scenes, their maps (Parquet), results.json, contact_sheet.png, words.png, and captioned/pairs.jsonl for
    `attnx words --model demo --pairs`. No download, no GPU.
    """
    from attnx.demo.run import run_demo
    from attnx.jobs.reading import progress_bar

    verdict = run_demo(out, scenes, progress=progress_bar)
    typer.echo(str(verdict))
    typer.echo(f"look at {out / 'contact_sheet.png'} and {out / 'words.png'}")


@app.command()
@told
def show(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    model: Model = "demo",
    out: Out = Path("attnx-out"),
    method: Method = "rollout",
    layer: Layer = None,
    heads: Heads = "mean",
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    image_size: ImageSize = None,
    device: Device = None,
    residual: Residual = 0.5,
    discard: Discard = 0.0,
    start: Start = 0,
    preset: Preset = None,
    colormap: Colormap = "turbo",
    alpha: Alpha = 0.5,
    interpolation: Interpolation = "bilinear",
    keep: Annotated[float, typer.Option(help="Share of a head's mass inside its mask.")] = 0.6,
    seed: Seed = 0,
) -> None:
    """Draws the maps of one image, at the image's own size.

    Writes overlay.png (the method's map), heads.png (the class token's map, head by head), masks.png (the patches
    that hold 60 % of each head's mass) and layers.png (every layer, then max, min, mean, and rollout).
    """
    from attnx.images import read_image
    from attnx.show import Style, draw

    picture = read_image(image)
    on, loaded = _prepare(model, pretrained, checkpoint, image_size, device, seed)
    rolling = _rollout_options(residual, discard, start, preset)
    style = Style(colormap, alpha, interpolation, keep)
    written = draw(picture, loaded, out, method, _layers(layer), heads, rolling, style, on)
    for path, what in written.items():
        typer.echo(f"{path}  {what}")


@app.command()
@told
def extract(
    source: Annotated[Path, typer.Argument(help="A folder of images (read recursively), or one image.")],
    model: Model = "demo",
    out: Out = Path("attnx-out"),
    method: Method = "rollout",
    layer: Layer = None,
    heads: Heads = "mean",
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    image_size: ImageSize = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "float32",
    keep: Annotated[
        str, typer.Option(help="Of every layer, for rollout: map, qk (memory linear in the tokens), or auto.")
    ] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Record CUDA graphs: for small batches.")] = False,
    device: Device = None,
    residual: Residual = 0.5,
    discard: Discard = 0.0,
    start: Start = 0,
    preset: Preset = None,
    seed: Seed = 0,
) -> None:
    """Writes the maps of a folder of images as Parquet shards.

    A row: key (path in the folder), map (float16 list), shape, width, height of the image, error (null if all went
    well). An image that can't be read becomes a row with an error, and the job goes on. Read them with
    pandas.read_parquet(OUT), or attnx.jobs.shards.read_shards(OUT), which gives arrays.
    """
    import torch

    from attnx import __version__
    from attnx.extractor import Extractor
    from attnx.images import find_images
    from attnx.jobs.extract import extract_images
    from attnx.jobs.reading import progress_bar

    paths = find_images(source)
    autocast = autocast_of(dtype)
    on, loaded = _prepare(model, pretrained, checkpoint, image_size, device, seed)
    rolling = _rollout_options(residual, discard, start, preset)
    extractor = Extractor(
        loaded.model,
        method,
        layers=_layers(layer),
        heads=heads,
        dtype=autocast,
        keep=keep,
        compile=compile,
        model_kwargs=loaded.model_kwargs,
        **(rolling if method == "rollout" else {}),
    )
    settings = {
        "attnx": __version__,
        "model": loaded.name,
        "pretrained": pretrained and checkpoint is None,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "seed": seed,
        "image_size": list(loaded.size),
        "mean": list(loaded.mean),
        "std": list(loaded.std),
        "interpolation": loaded.interpolation,
        "method": method,
        "layers": layer,
        "heads": heads,
        "dtype": dtype,
        "keep": keep,
        "torch": torch.__version__,
        **(rolling if method == "rollout" else {}),
    }
    with progress_bar(len(paths)) as progress:
        summary = extract_images(
            paths, source, loaded.prepare, extractor, out, settings,
            batch_size=batch_size, device=on, progress=progress,
        )  # fmt: skip
    typer.echo(
        f"{summary.done} maps in {out} ({summary.per_second:.1f} images/s)"
        + (f", {summary.failed} images could not be read: see their error column" if summary.failed else "")
    )
    if summary.failed:
        raise typer.Exit(1)


app.command()(words)


@app.command()
@told
def kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_86, sm_89, sm_90, sm_100 or gfx942; repeat for several.")
    ] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="1 to 256; repeat; 32, 64, 80, 128 unless given.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bfloat16 (unless given), float16 or float32; repeat.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes that compile; one a core unless given.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list for tools, and nothing else on stdout.")] = False,
) -> None:
    """Compiles every kernel for GPUs that need not be here: registers, spills, shared memory, matrix instructions.

    All default configurations, for A100, RTX 30, RTX 40, H100, B200 and MI300 unless some are named; minutes the first
    time. Exit code 1 if one spills, asks for more shared memory than there is, or does not compile.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET is 1: the interpreter compiles nothing; unset it")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("triton is not installed, so nothing can be compiled: pip install triton")
    import json

    import torch

    from attnx.kernels.offline import TARGETS, compile_defaults, failures, table, target_name

    targets = {target_name(target): target for target in TARGETS}
    names = [f"sm_{name}" if name.isdecimal() else name for name in arch or targets]
    for name in names:
        if name not in targets:
            raise ValueError(f"arch: expected one of {', '.join(targets)}; got {name!r}")
    for name in dtype or ():
        if name not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype: expected bfloat16, float16 or float32; got {name!r}")
    head_dims = head_dim or [32, 64, 80, 128]
    if not all(1 <= dim <= 256 for dim in head_dims):
        raise ValueError(f"head-dim: expected 1 to 256; got {', '.join(map(str, head_dims))}")
    dtypes = [getattr(torch, name) for name in dtype or ["bfloat16"]]
    rows = compile_defaults([targets[name] for name in names], head_dims, dtypes, jobs or os.cpu_count() or 1)
    typer.echo(json.dumps([row._asdict() for row in rows]) if as_json else "\n".join(table(rows)))
    failed = list(failures(rows))
    for line in failed:
        typer.echo(f"attnx: {line}", err=True)
    if failed:
        raise typer.Exit(1)


def _prepare(
    model: str, pretrained: bool, checkpoint: Path | None, image_size: str | None, device: str | None, seed: int
) -> "tuple[torch.device, Loaded]":
    """The device, and the model on it."""
    import torch

    from attnx.models.loading import load_model

    size, on = pixels_of(image_size), device_of(device)
    torch.manual_seed(seed)
    loaded = load_model(model, pretrained=pretrained, checkpoint=checkpoint, image_size=size)
    loaded.model.to(on)
    return on, loaded


def _layers(layers: list[str] | None) -> list[str | int] | None:
    """Depth indices as numbers, names and globs as they are."""
    if not layers:
        return None
    return [int(x) if x.removeprefix("-").isdecimal() else x for x in layers]


def _rollout_options(residual: float, discard: float, start: int, preset: str | None) -> dict[str, Any]:
    return {"residual": residual, "discard": discard, "start": start, "preset": preset}


def main() -> None:
    """The entry point: 130 after an interrupt, as shells do."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
