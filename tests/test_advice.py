"""Errors on the command line name its options; errors in Python name arguments."""

from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import attnx
from attnx.cli.advice import in_options, options_of
from attnx.cli.main import app


def command(
    source: Annotated[str, typer.Argument()],
    layers: Annotated[list[str] | None, typer.Option("--layers")] = None,
    layer: Annotated[list[str] | None, typer.Option("--layer", hidden=True)] = None,
    pretrained: bool = True,
    checkpoint: str | None = None,
    image_size: str | None = None,
    compile: Annotated[bool, typer.Option("--compile")] = False,
    plain: Annotated[bool, typer.Option("--plain/--coloured")] = False,
) -> None: ...


@pytest.mark.parametrize(
    ("message", "spelt"),
    [
        ("choose layers= of one kind", "choose --layers of one kind"),
        ("such as layers='vision_model.*'", "such as --layers 'vision_model.*'"),
        ("the others by layers=['a.0', 'a.1']", "the others by --layers a.0 --layers a.1"),
        ("pass checkpoint=FILE with weights, pretrained=False", "pass --checkpoint FILE with weights, --no-pretrained"),
        ("image_size=(224, 448)", "--image-size 224x448"),
        ("set compile=True", "set --compile"),
        ("set compile=False", "set compile=False"),
        ("set plain=True", "set --plain"),
        ("set plain=False", "set --coloured"),
        ("layers=(0, 1)", "--layers 0 --layers 1"),
        ("layers=[0, 1]", "--layers 0 --layers 1"),
        ("got layers=[] and layers=()", "got layers=[] and layers=()"),
        ("image_size=224", "--image-size 224"),
        ("got rows=None and layer=3", "got rows=None and layer=3"),
        ("source='x'", "source='x'"),
        ("x == 3, a_layers=3, f(layers=3)", "x == 3, a_layers=3, f(layers=3)"),
        ("/data/checkpoint=VIT/a.jpg: can't be read: '/data/layers=3/a.jpg'", None),
        ("layers=2.jpg: no photo", None),
        ("'layers=[1].jpg' and layers=1/a.jpg", None),
        ("pass layout=attnx.TokenLayout(prefix=1)", "in Python, pass layout=attnx.TokenLayout(prefix=1)"),
    ],
)
def test_arguments_become_options(message: str, spelt: str | None) -> None:
    assert in_options(message) == message.replace("pass layout=", "in Python, pass layout=")
    with options_of(command):
        assert in_options(message) == (message if spelt is None else spelt)
    assert in_options("layers=3") == "layers=3"


def test_one_fault_in_both_spellings(tmp_path: Path) -> None:
    photo = tmp_path / "a.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(photo)
    model = attnx.load("timm:convit_tiny", pretrained=False).model
    with pytest.raises(ValueError, match=r"choose some of one kind, such as layers=\['blocks\.10\.attn', 'blocks"):
        attnx.Extractor(model)(torch.zeros(1, 3, 224, 224))
    arguments = [
        "extract",
        str(photo),
        "--model",
        "timm:convit_tiny",
        "--no-pretrained",
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "such as --layers blocks.10.attn --layers blocks.11.attn" in result.stderr


def test_former_options_still_work(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    arguments = ["--model", "demo", "--method", "cls", "--layer", "0", "--workers", "0", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["extract", str(tmp_path / "a.png"), *arguments])
    assert result.exit_code == 0, result.output
    assert "attnx: --layer of show, extract and probe is now --layers" in result.stderr
    assert attnx.open(tmp_path / "out").settings["layers"] == [0]
