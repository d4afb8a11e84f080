"""`attnx models`: what works for the families of models, or for one model."""

import json
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnx.cli.options import Device, ImageSize, Seed, prepared, report_errors

if TYPE_CHECKING:
    from attnx.extract.support import Support
    from attnx.models.loaded import Loaded

# {key of a row: its name in tables}; the value of each is an outcome.
METHODS = {
    "rollout": "rollout",
    "cls": "CLS",
    "gradients": "gradients",
    "relevance": "relevance",
    "words": "words",
    "extractor": "Extractor",
    "attn_implementation": "attn_impl",
}
PACKAGES = {"HF": "transformers"}  # of families whose name does not start with the name of their package
DISTRIBUTIONS = {"open_clip": "open_clip_torch"}  # where the name on PyPI is another than the package's
WIDTH = 120  # characters of the table
WORDS = {True: "yes", False: "no", None: "-"}


@report_errors
def models(
    model: Annotated[
        str | None,
        typer.Argument(help="A model as in attnx show --model; without it: the table of families."),
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Download the model's weights; default: random weights.")] = False,
    image_size: ImageSize = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Shows which methods work for each family of models, or tries them all on one MODEL.

    Without MODEL, prints the stored results of small models of each family. With MODEL, builds it with random weights,
    without a download where its configuration needs none, and tries every method on one random image.
    """
    if model is None:
        if pretrained or image_size is not None or device is not None:
            raise ValueError("model: expected a MODEL with --pretrained, --image-size or --device; got none")
        table = stored()
        typer.echo(json.dumps(table, indent=1)) if as_json else _print_table(table)
        return
    loaded, found = _tried(model, pretrained, image_size, device, seed)
    if as_json:
        height, width = loaded.size
        values = {"model": loaded.name, "size": [height, width], **found.row(), "difference": found.difference}
        typer.echo(json.dumps(values))
    else:
        _print_support(loaded, found)


def stored() -> dict[str, Any]:
    """The stored table: {"versions": {package: version}, "families": {name: row}}, see `Support.row`."""
    table: dict[str, Any] = json.loads((files("attnx.models") / "table.json").read_text(encoding="utf-8"))
    return table


def by_package(families: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of each package: {package: {name of the family within the package: row}}."""
    groups: dict[str, dict[str, Any]] = {}
    for family, row in families.items():
        first, _, name = family.partition(" ")
        groups.setdefault(PACKAGES.get(first, first), {})[name] = row
    return groups


def reasons(row: dict[str, Any]) -> dict[str, list[str]]:
    """{reason: names of what it refuses} of a row."""
    found = {row["missing"]: ["maps"]} if row["missing"] else {}
    for key, name in METHODS.items():
        if row[key]["works"] is False:
            found.setdefault(row[key]["reason"], []).append(name)
    return found


def _tried(
    model: str, pretrained: bool, image_size: str | None, device: str | None, seed: int
) -> "tuple[Loaded, Support]":
    """The model, and the results of trying every method on one random image."""
    import torch

    from attnx.extract.inputs import image_call
    from attnx.extract.support import support

    on, loaded = prepared(model, pretrained, None, image_size, device, seed)
    image = torch.randn(1, 3, *loaded.size, generator=torch.Generator().manual_seed(seed)).to(on)
    call = image_call(loaded.model, loaded.model_kwargs)
    return loaded, support(loaded.model, lambda: call(image), image, loaded.model_kwargs)


def _print_table(table: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A narrower table would cut the names of families, also in a pipe.
    console = Console(highlight=False, markup=False, width=max(Console().width, WIDTH))
    for package, rows in by_package(table["families"]).items():
        shown = Table(box=None, title=_title(package, table["versions"]), title_justify="left", pad_edge=False)
        shown.add_column("family", no_wrap=True)
        for name in ("layers", *METHODS.values(), "own maps"):
            shown.add_column(name, no_wrap=True)
        for family, row in rows.items():
            words = [WORDS[row[key]["works"]] for key in METHODS]
            cells = (family, f"{row['captured']}/{row['layers']}", *words, str(row["own_maps"] or "-"))
            shown.add_row(*map(Text, cells))
        console.print(shown)
        console.print()
    console.print(
        "layers: captured/running. own maps: layers whose softmax the model computes itself. -: does not apply."
    )
    console.print("attnx models MODEL tries one model and gives the reasons; --json prints them for all families.")


def _title(package: str, versions: dict[str, str]) -> str:
    """The package with the version that the table was made with, and the installed one if it is another."""
    if package not in versions:
        return package
    try:
        installed = version(DISTRIBUTIONS.get(package, package)).partition("+")[0]
    except PackageNotFoundError:
        installed = "none"
    other = "" if installed == versions[package] else f" (installed: {installed})"
    return f"{package} {versions[package]}{other}"


def _print_support(loaded: "Loaded", found: "Support") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    height, width = loaded.size
    console = Console(highlight=False, markup=False)
    shown = Table(box=None, show_header=False, pad_edge=False, title_justify="left")
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")

    def line(name: str, text: str) -> None:
        shown.add_row(Text(name), Text(text))

    line("model", f"{loaded.name}, images of {height}x{width}")
    line("layers", f"{found.captured} of {found.layers} captured" + f": {found.missing}" * bool(found.missing))
    for layout in found.layouts:
        line("tokens", layout)
    line("output", f"{'unchanged' if found.unchanged else 'CHANGED'}: differs by {found.difference:.0e} of its largest")
    line("model after", "restored" if found.restored else "NOT restored")
    if not found.layers:
        console.print(shown)
        typer.echo(f"{type(loaded.model).__name__} has no attention layers")
        return
    row = found.row()
    said: dict[str, str] = {}
    for key, name in METHODS.items():
        works, reason = row[key]["works"], row[key]["reason"]
        first = said.setdefault(reason, name)
        why = f": {reason}" if first == name else f": as {first}"
        line(name, WORDS[works] + why * bool(reason))
    console.print(shown)
    if found.own_maps:
        typer.echo(
            f"{found.own_maps} layers compute their own softmax: the model holds all heads' weights; attnx adds its map"
        )
