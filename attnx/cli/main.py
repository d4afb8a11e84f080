"""The command line: `attnx --help` lists the commands."""

import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from attnx.cli.advice import in_options
from attnx.cli.browse import browse
from attnx.cli.explore import explore
from attnx.cli.extract import extract
from attnx.cli.masks import masks
from attnx.cli.models import models
from attnx.cli.options import Out, UsageError, report_errors
from attnx.cli.probe import compare, probe
from attnx.cli.show import show
from attnx.cli.summary import summary
from attnx.cli.words import words
from attnx.messages import say, warnings_in_lines
from attnx.supervisor import ENDING, can_supervise, supervise


class OneLine(TyperGroup):
    """Commands that report wrong options in one line, with exit code 2."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run the command line, see `typer.core.TyperGroup.main`."""
        run = partial(super().main, args, *rest, **kwargs)
        if not standalone_mode:
            return run(standalone_mode=False)
        try:
            with warnings_in_lines(in_options):
                code = run(standalone_mode=False)
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
                sys.exit(2)
            context = getattr(error, "ctx", None)
            command = "" if context is None or context.parent is None else f"{context.info_name}: "
            say(command + error.format_message())
            sys.exit(2)
        except typer.Abort:
            code = 130
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    name="attnx",
    cls=OneLine,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Extracts attention maps of vision transformers.

    [bold]attnx demo[/bold] shows examples without a download. [bold]attnx show photo.jpg --model demo[/bold] draws
    the maps of one image. [bold]attnx extract photos/ --model timm:vit_base_patch16_224 --out maps/[/bold] writes
    the maps of a folder, [bold]attnx summary maps/[/bold] computes statistics of them, and [bold]attnx masks maps/
    --out masks/[/bold] writes them as grey pictures. [bold]attnx explore photo.jpg --model demo[/bold] and
    [bold]attnx browse maps/[/bold] write interactive pages of an image and of a job. [bold]attnx words photo.jpg
    "a dog" --model albef:ALBEF.pth[/bold] draws the map of each word. [bold]attnx probe photos/ --model
    timm:vit_base_patch16_224[/bold] computes how far and how widely each head attends, and [bold]attnx
    compare[/bold] overlays several models. [bold]attnx models[/bold] shows what works for each family of models.
    [bold]attnx kernels[/bold] compiles the GPU kernels without a GPU.

    Exit codes: 0 success, 1 some images or captions could not be read or a kernel spills, 2 wrong usage or another
    error.""",
)


@app.command()
@report_errors
def demo(
    out: Out = Path("attnx-demo"),
    scenes: Annotated[int, typer.Option(help="How many scenes to draw.")] = 48,
) -> None:
    """Draws scenes, runs the bundled models on them, and draws the maps of the target and of words.

    Writes the scenes, their maps (Parquet), results.json, contact_sheet.png, words.png, the interactive pages
    explore.html and browse/index.html, and captioned/pairs.jsonl for `attnx words --model demo --pairs`. No download,
    no GPU.
    """
    from attnx.demo.run import run_demo
    from attnx.jobs.progress import progress_bar

    verdict = run_demo(out, scenes, progress=progress_bar if sys.stderr.isatty() else None)
    typer.echo(str(verdict))
    typer.echo(f"see {out / 'contact_sheet.png'} and {out / 'words.png'}")
    typer.echo(f"open {out / 'explore.html'} and {out / 'browse' / 'index.html'} in a browser")


app.command()(show)
app.command()(explore)
app.command()(extract)
app.command()(words)
app.command()(probe)
app.command()(compare)
app.command()(summary)
app.command()(browse)
app.command()(masks)
app.command()(models)


@app.command()
@report_errors
def kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_86, sm_89, sm_90, sm_100 or gfx942; repeat for several.")
    ] = None,
    head_dim: Annotated[
        list[int] | None, typer.Option(help="1 to 1024; repeat for several; default: 32, 64, 80, 128.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bfloat16 (default), float16 or float32; repeat for several.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Compiler processes; default: one per core.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, and nothing else, on stdout.")] = False,
) -> None:
    """Compiles every kernel without a GPU; prints registers, spills, shared memory and matrix instructions.

    Compiles all default configurations, by default for A100, RTX 30, RTX 40, H100, B200 and MI300. The first run takes
    minutes. For Hopper's own kernels it also prints the main loop: products, waits, and exponentials beside products.
    Exit code 1 if a kernel spills, needs too much shared memory, does not compile, or waits for every product.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET is 1: the interpreter does not compile kernels; unset it")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("triton is not installed, so nothing can be compiled: pip install triton")
    import json

    import torch

    from attnx.kernels.configs import WIDEST_HEAD
    from attnx.kernels.inspect.offline import TARGETS, compile_defaults, target_name
    from attnx.kernels.inspect.table import failures, table

    targets = {target_name(target): target for target in TARGETS}
    names = [f"sm_{name}" if name.isdecimal() else name for name in arch or targets]
    for name in names:
        if name not in targets:
            raise ValueError(f"arch: expected one of {', '.join(targets)}; got {name!r}")
    for name in dtype or ():
        if name not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype: expected bfloat16, float16 or float32; got {name!r}")
    head_dims = head_dim or [32, 64, 80, 128]
    if not all(1 <= dim <= WIDEST_HEAD for dim in head_dims):
        raise ValueError(f"head-dim: expected 1 to {WIDEST_HEAD}; got {', '.join(map(str, head_dims))}")
    dtypes = [getattr(torch, name) for name in dtype or ["bfloat16"]]
    rows = compile_defaults([targets[name] for name in names], head_dims, dtypes, jobs or os.cpu_count() or 1)
    if as_json:
        described = [{**row._asdict(), "loop": row.loop._asdict() if row.loop else None} for row in rows]
        typer.echo(json.dumps(described))
    else:
        typer.echo("\n".join(table(rows)))
    failed = list(failures(rows))
    for line in failed:
        say(line)
    if failed:
        raise typer.Exit(1)


class Stopped(KeyboardInterrupt):
    """A signal that ends this process. number: the signal number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _stop(number: int, frame: object) -> None:
    # Further signals are ignored, so that cleanup is not interrupted.
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def main() -> None:
    """The entry point. After a signal, the exit code is 128 plus its number, as in shells: 130 for an interrupt."""
    if sys.argv[1:2] in (["extract"], ["words"], ["probe"]) and can_supervise():
        try:
            supervise()
        except OSError as error:
            say(f"no process or temporary folder for the job: {error}")
            sys.exit(2)
    for number in ENDING:
        # nohup ignores SIGHUP; keep it ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        app()
    except KeyboardInterrupt as error:
        sys.exit(128 + getattr(error, "number", signal.SIGINT))
