"""Load models by name, with their own weights, those of a checkpoint file, or random weights.

`load_model`: "timm:NAME", "hf:NAME or folder", "torchvision:NAME", "open_clip:NAME/PRETRAINED",
"torchhub:FOLDER:ENTRY", or a name of `registry.IMAGE_MODELS`. `load_word_model`: "albef", "lavt", either with ":FILE",
or a name of `registry.WORD_MODELS`.
"""

import importlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from attnx.models.checkpoint import first_line, load_checkpoint, weights_file
from attnx.models.loaded import IMAGENET, Loaded, height_and_width
from attnx.models.registry import IMAGE_MODELS, WORD_MODELS
from attnx.trace.grids import patch_convolutions

_NAMES = "timm:NAME, hf:NAME, torchvision:NAME, open_clip:NAME/PRETRAINED, torchhub:FOLDER:ENTRY"
_VL_DINO_SIZE = (480, 480)
_ALBEF_LAYER = 8  # the layer that ALBEF's authors use


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub client, which logs each retry for half a minute; one error at the end is enough."""
    # Its first import sets the level of its logger.
    from huggingface_hub.utils import logging as hub

    before = hub.get_verbosity()
    hub.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hub.set_verbosity(before)


def load(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    vocab: str | Path | None = None,
) -> Loaded:
    """A model with its weights, and the preprocessing of its images, by name.

    Args:
        name: of a model of images, see `load_model`: "timm:vit_base_patch16_224", "hf:google/vit-base-patch16-224",
            "torchvision:vit_b_16", "open_clip:ViT-B-32/laion2b_s34b_b79k", "torchhub:FOLDER:ENTRY", or "demo". Or of a
            model of words and images: "albef:FILE", "lavt:FILE", or "albef:demo".
        pretrained: download the model's own weights; False: random weights.
        checkpoint: a file of weights to load instead.
        image_size: (height, width) in pixels, or one number for a square; None: the model's own size.
        vocab: for ALBEF and LAVT: bert-base-uncased's vocab.txt; None: from the Hugging Face hub.

    Returns:
        `Loaded`: `.model` on the CPU in eval mode, `.prepare(image)`, `.size`, and `.model_kwargs`.

    Raises:
        ValueError: an unknown name, an invalid image size, a vocab for a model without words, no weights, or a
            checkpoint that doesn't fit.
        FileNotFoundError: no such checkpoint or vocab.
        ConnectionError: the weights could not be downloaded; the message lists alternatives.
        ImportError: torchvision or open_clip can't be imported.
        NotImplementedError: a model of torchvision that doesn't classify images; images that need padding.

    Example:
        >>> from PIL import Image
        >>> loaded = attnx.load("timm:vit_tiny_patch16_224", pretrained=False, image_size=(96, 128))
        >>> attnx.Extractor(loaded.model)(loaded.prepare([Image.new("RGB", (640, 480))])).shape
        torch.Size([1, 6, 8])
    """
    if not isinstance(name, str):
        raise ValueError(f"name: expected {_NAMES}, albef:FILE, lavt:FILE or demo; got {name!r:.80}")
    if name.partition(":")[0] in _WEIGHTS:
        return load_word_model(name, pretrained=pretrained, checkpoint=checkpoint, vocab=vocab, image_size=image_size)
    if vocab is not None:
        raise ValueError(f"vocab: expected none for {name}, which reads no words; got {str(vocab)!r}")
    return load_model(name, pretrained=pretrained, checkpoint=checkpoint, image_size=image_size)


def load_model(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Loaded:
    """The model called `name`, on the CPU, in eval mode.

    Args:
        name: "timm:NAME", "hf:NAME", "torchvision:NAME", "open_clip:NAME/PRETRAINED" (the image tower; PRETRAINED
            may be omitted for other weights), "torchhub:FOLDER:ENTRY", which runs the code in that folder, or "demo".
            For "hf:", NAME is a model of the hub, a local folder, or, with pretrained=False, a model type such as
            dinov2_with_registers in its default size.
        pretrained: download the model's own weights; False: random weights.
        checkpoint: a file of weights (.safetensors, or a torch file, read with weights_only=True) to load instead.
        image_size: (height, width) in pixels, or one number for a square; None: the model's own size. Position
            embeddings are interpolated.

    Raises:
        ValueError: an unknown name, an invalid image size, or a checkpoint that doesn't fit (the message lists keys).
        FileNotFoundError: no such checkpoint.
        ConnectionError: the weights could not be downloaded; the message lists alternatives.
        ImportError: torchvision or open_clip can't be imported.
        NotImplementedError: a model of torchvision that doesn't classify images; images that need padding.
    """
    path = None if checkpoint is None else weights_file(checkpoint)
    size = height_and_width(image_size)
    kind, _, rest = name.partition(":")
    download = pretrained and path is None
    with _quiet_hub():
        loaded = (
            IMAGE_MODELS[name](pretrained, size) if name in IMAGE_MODELS else _load(name, kind, rest, download, size)
        )
    if size is not None:
        _check_size(name, loaded.model, size)
    if path is not None and kind == "open_clip":
        from attnx.models.open_clip import load_visual

        load_visual(loaded.model, path)
    elif path is not None:
        load_checkpoint(loaded.model, path)
    loaded.model.eval().requires_grad_(False)
    return loaded


def _load(name: str, kind: str, rest: str, pretrained: bool, size: tuple[int, int] | None) -> Loaded:
    """The model `rest` of the library `kind`; `name` is both, for messages."""
    load: Callable[[str, bool, tuple[int, int] | None], Loaded]
    if kind == "timm" and rest:
        from attnx.models.timm import load_timm as load
    elif kind == "hf" and rest:
        from attnx.models.huggingface import load_huggingface as load
    elif kind == "torchvision" and rest:
        _check_import("torchvision", "pip install torchvision, in the version for this torch")
        from attnx.models.torchvision import load_torchvision as load
    elif kind == "open_clip" and rest:
        _check_import("open_clip", "pip install 'attnx[open_clip]'")
        from attnx.models.open_clip import load_open_clip as load
    elif kind == "torchhub" and rest:
        from attnx.models.torchhub import load_torchhub as load
    else:
        raise ValueError(f"model: expected {_NAMES} or {' or '.join(IMAGE_MODELS)}; got {name!r}{_hint(name)}")
    return load(rest, pretrained, size)


def _hint(name: str) -> str:
    """A guess at the library of a name without one, for a message; "" if there is none."""
    import timm

    known = ("timm", "hf", "torchvision", "open_clip")
    first, rest = re.split("[:/]", f"{name}:", maxsplit=1)
    rest = rest.removesuffix(":")
    if rest and first.lower() in known:
        guess = f"{first.lower()}:{rest}"
    elif timm.is_model(name.partition(".")[0]):
        guess = f"timm:{name}"
    else:
        guess = f"hf:{name}" if name.count("/") == 1 and ":" not in name else ""
    return f"; did you mean {guess}?" if guess and guess != name else ""


def _check_import(library: str, install: str) -> None:
    """Raise ImportError unless the library can be imported; a library built for another torch raises other errors."""
    try:
        importlib.import_module(library)
    except Exception as error:
        raise ImportError(f"model: {library} can't be imported ({first_line(error)}); {install}") from error


# Word models whose weights can't be downloaded: what is expected in place of them.
_WEIGHTS = {
    "albef": "ALBEF's weights as albef:FILE (https://github.com/salesforce/ALBEF has them to download), "
    "pretrained=False for random ones, or the model demo",
    "lavt": "LAVT's weights as lavt:FILE (https://github.com/yz93/LAVT-RIS has them to download), or "
    "pretrained=False for random ones",
}


@_quiet_hub()
def load_word_model(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    vocab: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    preset: str | None = None,
) -> Loaded:
    """The `Albef` or `Lavt` called `name`, on the CPU, in eval mode.

    Args:
        name: "albef" or "lavt" in the published sizes, "albef:FILE" or "lavt:FILE" with the weights of a file, or
            "demo" (also "albef:demo").
        pretrained: use the model's own weights; False: random weights.
        checkpoint: a file of weights, if `name` has none. ALBEF's and LAVT's own can't be downloaded by attnx.
        vocab: bert-base-uncased's vocab.txt; None: from the Hugging Face hub.
        image_size: (height, width) in pixels, or one number for a square; None: the model's own size, or 480 with
            preset "vl-dino".
        preset: "vl-dino": images are normalised with ImageNet's mean and std.

    Raises:
        ValueError: an unknown name, no weights, two files, or a checkpoint that doesn't fit.
        FileNotFoundError: no such file.
    """
    name, checkpoint = word_model(name, checkpoint)
    if preset and image_size is None:
        image_size = _VL_DINO_SIZE if name not in WORD_MODELS else None
    if name in WORD_MODELS:
        loaded = WORD_MODELS[name].load(pretrained, checkpoint, vocab, height_and_width(image_size))
    elif name in _WEIGHTS:
        if checkpoint is None and pretrained:
            raise ValueError(f"checkpoint: expected {_WEIGHTS[name]}; got none")
        if name == "albef":
            from attnx.models.albef_checkpoint import load_albef

            loaded = load_albef(checkpoint, vocab, image_size)
        else:
            from attnx.models.lavt_checkpoint import load_lavt

            loaded = load_lavt(checkpoint, vocab, image_size)
    else:
        raise ValueError(f"model: expected albef, lavt or {' or '.join(WORD_MODELS)}; got {name!r}")
    return replace(loaded, mean=IMAGENET[0], std=IMAGENET[1]) if preset else loaded


def word_model(name: str, checkpoint: str | Path | None = None) -> tuple[str, str | Path | None]:
    """The bare name and the checkpoint of a word model: "albef:FILE" is "albef" and FILE, "albef:demo" is "demo".

    Raises:
        ValueError: `name` has a file, and `checkpoint` is another.
    """
    kind, _, file = name.partition(":")
    if kind not in _WEIGHTS:
        return name, checkpoint
    if kind == "albef" and file in WORD_MODELS:
        return file, checkpoint
    if file and checkpoint is not None:
        raise ValueError(f"checkpoint: expected one; got {name} and checkpoint={str(checkpoint)!r}")
    return kind, file or checkpoint


def default_layer(name: str) -> int:
    """The default text layer of maps."""
    name, _ = word_model(name)
    return WORD_MODELS[name].layer if name in WORD_MODELS else _ALBEF_LAYER


def _check_size(name: str, model: nn.Module, size: tuple[int, int]) -> None:
    """Raise ValueError if the size is not a multiple of the patch size, because part of the image would have no map."""
    for patch in patch_convolutions(model)[:1]:
        if any(pixels % p for pixels, p in zip(size, patch.stride, strict=True)):
            fits = "x".join(str(max(p, round(s / p) * p)) for s, p in zip(size, patch.stride, strict=True))
            raise ValueError(
                f"image size: expected multiples of {name}'s patch of {patch.stride[0]} pixels, such as {fits}; "
                f"got {size[0]}x{size[1]}"
            )
