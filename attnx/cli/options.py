"""Options and error reporting that all commands share."""

import os
import re
import signal
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnx.cli.advice import in_options, options_of
from attnx.limits import IMAGE_SIDE
from attnx.messages import say
from attnx.remote import is_url, location

if TYPE_CHECKING:
    import torch

    from attnx.models.loaded import Loaded


# Depending on its version, typer uses click or its own copy of it.
UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def path_of(text: str) -> Path:
    """The path in an option. Raises BadParameter if it is empty, because it would mean the current folder."""
    if not text:
        raise typer.BadParameter("expected a file or folder; got an empty text")
    return Path(text)


def source_of(text: str) -> Path:
    """The path or URL of a source. Raises BadParameter as `path_of`, or if fsspec can't open the URL."""
    try:
        return location(text) if is_url(text) else path_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("source: ")) from error


MODEL = typer.Option(
    help="[bold]demo[/bold] (bundled), [bold]timm:NAME[/bold], [bold]hf:NAME[/bold] (on the hub, or a folder "
    "written by save_pretrained), [bold]torchvision:NAME[/bold], [bold]open_clip:NAME/PRETRAINED[/bold] (its image "
    "part), or [bold]torchhub:FOLDER:ENTRY[/bold] (runs the code in that folder)."
)
PICTURE_PIXELS = typer.Option(
    help="[bold]timm[/bold]: timm's evaluation transform with its crop (default for timm:, torchvision: and open_clip: "
    "models, with their own settings); [bold]whole[/bold]: the whole picture (default for others); "
    "[bold]processor[/bold]: the image processor of an hf: model."
)
PATH: dict[str, Any] = {"parser": path_of, "metavar": "PATH"}  # arguments of typer.Option and typer.Argument
SOURCE: dict[str, Any] = {"parser": source_of, "metavar": "PATH"}
Out = Annotated[Path, typer.Option(help="Folder for the results; created if missing.", **PATH)]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights to load (.safetensors or a torch file).", **PATH)]
Mass = Annotated[float, typer.Option(help="Share of a head's mass inside its mask.")]
FormerMass = Annotated[float | None, typer.Option("--keep", help="Former name of --mass.", hidden=True)]
Pretrained = Annotated[bool, typer.Option(help="Download the model's weights; --no-pretrained: random weights.")]
Seed = Annotated[int, typer.Option(help="Seed of random weights.")]
ImageSize = Annotated[str | None, typer.Option(help="Pixels: 480, or HEIGHTxWIDTH such as 480x640.")]
Method = Annotated[
    str | None,
    typer.Option(
        help="[bold]rollout[/bold] through all layers (default), [bold]cls[/bold]: the class token's map in the last "
        "layer, or in each of [bold]--layers[/bold], [bold]layers[/bold]: the class token's map in every layer, "
        "[bold]token[/bold]: that of [bold]--token[/bold] (default with it)."
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        help="The map of this token instead of the class token's: X,Y in pixels of the picture, X%,Y% in shares of "
        "what the model sees, or the index of a token (0: the class token).",
        show_default=False,
    ),
]
LayersOption = Annotated[
    list[str] | None,
    typer.Option("--layers", help="Layers: a name, glob or depth index (-1 is the last); repeat for several."),
]
FormerLayers = Annotated[list[str] | None, typer.Option("--layer", help="Former name of --layers.", hidden=True)]
HeadsOption = Annotated[str, typer.Option(help="How heads are fused: mean, max or min (each: with cls and token).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")]
Residual = Annotated[float, typer.Option(help="Rollout: weight of the identity.")]
Discard = Annotated[float, typer.Option(help="Rollout: share of the smallest entries to drop in each layer.")]
Start = Annotated[int, typer.Option(help="Rollout: first layer of the product.")]
Preset = Annotated[str | None, typer.Option(help="Rollout: vit-explain reproduces the arithmetic of that code.")]
BatchSize = Annotated[int, typer.Option(help="Images or pairs per batch.", min=1)]
Dtype = Annotated[str, typer.Option(help="float32, or bfloat16 / float16 with autocast.")]
Cmap = Annotated[str, typer.Option("--cmap", "--colormap", help="Name of a matplotlib colour map.")]
Alpha = Annotated[float, typer.Option(help="Opacity of the map: 0 shows only the image, 1 only the map.")]
Interpolation = Annotated[str, typer.Option(help="bilinear or nearest. Pictures of heads show the patches.")]


def mass_of(mass: float, keep: float | None) -> float:
    """The share of mass, also under its former name --keep, with a message."""
    if keep is not None:
        say("--keep of show and summary is now --mass")
        mass = keep
    if not 0 <= mass <= 1:
        raise ValueError(f"mass: expected a share in [0, 1]; got {mass:g}")
    return mass


def report_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Report any error of a command as one line on stderr with exit code 2. ATTNX_TRACEBACK=1 shows the traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with options_of(command):
            try:
                command(*args, **kwargs)
            except (typer.Exit, UsageError):
                raise
            except KeyboardInterrupt as error:
                # typer would discard the signal number.
                raise typer.Exit(128 + getattr(error, "number", signal.SIGINT)) from None
            except Exception as error:
                if os.environ.get("ATTNX_TRACEBACK"):
                    traceback.print_exc()
                say(in_options(_message_of(command.__name__, error)))
                raise typer.Exit(2) from None

    return run


def _message_of(command: str, error: Exception) -> str:
    """The message of an error; with its type and the command if the error is unexpected."""
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if (
        not isinstance(error, (ValueError, RuntimeError, OSError, NotImplementedError, KeyError, ImportError))
        or not message
    ):
        message = f"{command}: {type(error).__name__}: {message} (ATTNX_TRACEBACK=1 shows where)"
    return message


def device_of(name: str | None) -> "torch.device":
    """The device with this name; by default a GPU if there is one.

    Raises:
        ValueError: torch can't use the device.
    """
    import torch

    try:
        on = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
        torch.empty(0, device=on)
    except (RuntimeError, AssertionError, ImportError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that torch can use here; got {name!r} ({cause})") from error
    return on


def devices_of(names: str | None) -> list[str]:
    """The names of devices in a comma-separated list; "all": every GPU.

    Raises:
        ValueError: torch can't use one of the devices.
    """
    import torch

    if names == "all":
        if not torch.cuda.is_available():
            raise ValueError("device: expected GPUs for all; torch finds none here")
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = [None] if names is None else names.split(",")
    if len(devices) == 1:
        return [str(device_of(devices[0]))]
    for name in devices:
        # Checked without a tensor on it, because this process will not use it.
        count = torch.cuda.device_count()
        if not (
            name == "cpu" or (re.fullmatch(r"cuda:\d+", name or "") and int((name or "").partition(":")[2]) < count)
        ):
            raise ValueError(f"device: expected cpu or cuda:N of {count} GPUs, with commas between them; got {name!r}")
    return [str(name) for name in devices]


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless the option's value is in `known`."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")


DTYPES = ("float32", "bfloat16", "float16")


def autocast_of(dtype: str) -> "torch.dtype | None":
    """The dtype to autocast to; None for float32.

    Raises:
        ValueError: the dtype is unknown.
    """
    import torch

    one_of("dtype", dtype, DTYPES)
    return None if dtype == "float32" else getattr(torch, dtype)


def pixels_of(text: str | None) -> tuple[int, int] | None:
    """(height, width) for "480" or "480x640"; None for None.

    Raises:
        ValueError: the text has another form, or a side is out of range.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,5})(?:[xX]([0-9]{1,5}))?", text)
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (0 < height <= IMAGE_SIDE and 0 < width <= IMAGE_SIDE):
        expected = f"pixels such as 480, or HEIGHTxWIDTH such as 480x640, at most {IMAGE_SIDE} on a side"
        raise ValueError(f"image-size: expected {expected}; got {text!r:.80}")
    return height, width


def prepared(
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


def named_model(model: str | None) -> tuple[str, str]:
    """A notice, and the model's name: the demo model if there is none."""
    if model is not None:
        return "", model
    return "no --model: using the demo model, which was trained on drawn scenes and not on photos", "demo"


def absolute_model(model: str) -> str:
    """The model's name, with an absolute path if it is a folder."""
    from attnx.models.torchhub import absolute_name

    kind, _, name = model.partition(":")
    if kind == "torchhub":
        return absolute_name(model)
    return f"{kind}:{Path(name).absolute()}" if kind == "hf" and Path(name).is_dir() else model


def method_of(method: str | None, token: str | None) -> str:
    """The method: by default "token" with a token, else "rollout".

    Raises:
        ValueError: a token with another method, or the method "token" without one.
    """
    if token is not None and method not in (None, "token"):
        raise ValueError(f"token: expected --method token with it; got --method {method}")
    if token is None and method == "token":
        raise ValueError("token: expected a token for --method token, such as --token 50%,50%; got none")
    return method or ("rollout" if token is None else "token")


def layers_of(layers: list[str] | None, former: list[str] | None) -> list[str | int] | None:
    """The layers, also under their former name --layer, with a message. Depth indices become integers."""
    if former:
        say("--layer of show, extract and probe is now --layers")
    given = [*(layers or ()), *(former or ())]
    return [int(x) if x.removeprefix("-").isdecimal() else x for x in given] or None


def rollout_options(residual: float, discard: float, start: int, preset: str | None) -> dict[str, Any]:
    """The keyword arguments of `attnx.rollout`."""
    return {"residual": residual, "discard": discard, "start": start, "preset": preset}
