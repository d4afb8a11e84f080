"""Models by name: "timm:NAME", "hf:NAME or folder", "demo"; with their own weights, a checkpoint file, or random."""

import copy
import difflib
import hashlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from attnx.images import to_tensor
from attnx.layout import patch_convolutions
from attnx.limits import MODEL_LAYERS
from attnx.models.checkpoint import first_line, load_checkpoint, printable, weights_file

if TYPE_CHECKING:
    from PIL import Image

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# transformers downloads code for these from the hub.
_KERNEL_QUANTIZATION = ("eetq", "fbgemm_fp8", "fp8", "gguf", "metal", "mxfp4", "nvfp4")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, and how its images are prepared. size: (height, width) in pixels.

    crop_pct, crop_mode: of timm's own evaluation transform; `prepare` takes the whole image.
    """

    name: str
    model: nn.Module
    size: tuple[int, int]
    mean: Sequence[float] = IMAGENET[0]
    std: Sequence[float] = IMAGENET[1]
    interpolation: str = "bicubic"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def prepare(self, image: "Image.Image") -> Tensor:
        """RGB image -> [3, height, width] float32, the whole image resized and normalised."""
        return to_tensor(image, self.size, self.mean, self.std, self.interpolation)

    def fingerprint(self) -> str:
        """SHA-256 of the weights: of names, dtypes, shapes and bytes, in the order of names."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def load_model(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Loaded:
    """The model called `name`, on the CPU, in eval mode.

    Args:
        name: "timm:NAME", "hf:NAME" (of the hub, a local folder, or with pretrained=False a model type such as
            dinov2_with_registers in its default size), or "demo".
        pretrained: download the model's own weights; False: random ones.
        checkpoint: a file of weights (.safetensors, or a torch file, read with weights_only=True) to load instead.
        image_size: (height, width) in pixels, or one number for a square; the model's own unless given. Position
            embeddings are interpolated.

    Raises:
        ValueError: an unknown name, a checkpoint that doesn't fit (says which keys), an image size that is none.
        FileNotFoundError: no such checkpoint.
        ConnectionError: the weights could not be downloaded; says what to pass instead.
    """
    path = None if checkpoint is None else weights_file(checkpoint)
    size = height_and_width(image_size)
    kind, _, rest = name.partition(":")
    download = pretrained and path is None
    with _quiet_hub():
        if name == "demo":
            loaded = _demo(pretrained, size)
        elif kind == "timm" and rest:
            loaded = _timm(rest, download, size)
        elif kind == "hf" and rest:
            loaded = _huggingface(rest, download, size)
        else:
            raise ValueError(f"model: expected timm:NAME, hf:NAME or demo; got {name!r}")
    if size is not None:
        _check_size(name, loaded.model, size)
    if path is not None:
        load_checkpoint(loaded.model, path)
    loaded.model.eval().requires_grad_(False)
    return loaded


def height_and_width(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width) of an image size: of one number, a square; None of None.

    Raises:
        ValueError: it is neither a positive int nor a pair of them.
    """
    if size is None:
        return None
    pair: Sequence[object] = size if isinstance(size, (tuple, list)) else (size, size)
    whole = [int(n) for n in pair if isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0]
    if len(pair) != 2 or len(whole) != 2:
        raise ValueError(f"image size: expected a positive int, or (height, width) of two; got {size!r}")
    return whole[0], whole[1]


def _demo(pretrained: bool, image_size: tuple[int, int] | None) -> Loaded:
    from attnx.demo.model import demo_model

    model = demo_model(pretrained=pretrained)
    return _with_timm_config("demo", model, image_size)


def _timm(name: str, pretrained: bool, image_size: tuple[int, int] | None) -> Loaded:
    import timm

    base = name.partition(".")[0]
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), 3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; see timm.list_models()"
        raise ValueError(f"model: timm has no model {name!r}{hint}")
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if isinstance(error, TypeError) and image_size is not None:
            told = first_line(error)
            raise ValueError(f"image size: timm:{name} has a fixed one; got {image_size} ({told})") from error
        if not pretrained or name.startswith("local-dir:"):
            raise ValueError(f"model: timm can't load {printable(name, 150)}: {first_line(error)}") from error
        raise _no_download(f"timm:{name}", error) from error
    return _with_timm_config(f"timm:{name}", model, image_size)


def _with_timm_config(name: str, model: nn.Module, image_size: tuple[int, int] | None) -> Loaded:
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    size = image_size or tuple(config["input_size"][1:])
    return Loaded(
        name, model, size, config["mean"], config["std"], config["interpolation"],
        crop_pct=config["crop_pct"], crop_mode=config["crop_mode"],
    )  # fmt: skip


def _huggingface(name: str, pretrained: bool, image_size: tuple[int, int] | None) -> Loaded:
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    local = Path(name).is_dir()
    is_type = not local and name in CONFIG_MAPPING
    # None: "sdpa", or "eager" where transformers has no SDPA for a submodel; whatever a config.json asks for.
    options: dict[str, Any] = {"trust_remote_code": False, "attn_implementation": None}
    try:
        config = CONFIG_MAPPING[name]() if is_type else AutoConfig.from_pretrained(name, trust_remote_code=False)
        _check_config(config)
        if pretrained and not is_type:
            model = AutoModel.from_pretrained(name, config=config, weights_only=True, **options)
        else:
            model = AutoModel.from_config(config, **options)
    except Exception as error:
        if _asks_for_code(error):
            raise ValueError(
                f"model: {printable(name, 150)} has code of its own (auto_map in config.json), which attnx never runs; "
                "pass a model that transformers itself has a class for"
            ) from error
        if local or is_type or isinstance(error, _UnfitError):
            told = first_line(error)
            raise ValueError(
                f"model: {printable(name, 150)} holds no model that transformers can load: {told}"
            ) from error
        if pretrained:
            raise _no_download(f"hf:{name}", error) from error
        raise ConnectionError(
            f"the configuration of hf:{name} could not be downloaded ({first_line(error)}); pass a local folder, or a "
            "model type with --no-pretrained, such as hf:vit or hf:dinov2_with_registers"
        ) from error
    if pretrained and is_type:
        raise ValueError(f"model: hf:{name} is a model type without weights; pass --no-pretrained, or a model's name")
    model = getattr(model, "vision_model", model)
    config = getattr(model.config, "vision_config", model.config)
    try:
        own = height_and_width(getattr(config, "image_size", None)) or (224, 224)
    except ValueError as error:
        raise ValueError(f"model: hf:{printable(name, 150)}'s configuration: {error}") from error
    takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    kwargs = {"interpolate_pos_encoding": True} if takes and image_size not in (None, own) else {}
    how = (*IMAGENET, "bicubic") if is_type else _huggingface_preparation(name)
    return Loaded(f"hf:{name}", model, image_size or own, *how, kwargs)


class _UnfitError(ValueError):
    """A config.json that attnx refuses."""


def _check_config(config: Any) -> None:
    """Forgets the kernels that a configuration and those inside it ask for, and refuses one of another's code or size.

    Raises:
        _UnfitError: quantization by code from the hub; more layers, or bytes of parameters, than this machine can hold.
    """
    from transformers import AutoModel, PretrainedConfig

    todo = [config]
    while todo:
        part = todo.pop()
        part._attn_implementation_internal = part._experts_implementation_internal = None
        vars(part).pop("fusion_config", None)
        quantization = getattr(part, "quantization_config", None)
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method in _KERNEL_QUANTIZATION:
            raise _UnfitError(f"its quantization {method} runs code from the hub, which attnx never does")
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and not 0 <= layers <= MODEL_LAYERS:
            raise _UnfitError(f"expected 0 to {MODEL_LAYERS} layers; num_hidden_layers is {layers}")
        todo += [value for value in vars(part).values() if isinstance(value, PretrainedConfig)]
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(copy.deepcopy(config), trust_remote_code=False, attn_implementation=None)
    except Exception as error:
        # Some can't be built without memory. Those that claim too much for torch can't be built at all.
        if "overflow" in str(error).lower():
            raise _UnfitError(f"its parameters have no size that torch can count: {first_line(error)}") from error
        return
    size = sum(value.nbytes for value in model.parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise _UnfitError(f"its parameters are {size / 2**30:,.1f} GiB; this machine has {memory / 2**30:,.1f} GiB")


def _asks_for_code(error: Exception) -> bool:
    """True for the error that transformers raises where it would have to run a model's own code."""
    return isinstance(error, ValueError) and "trust_remote_code=True" in str(error)


def image_processor(name: str) -> Any:
    """A Hugging Face model's image processor, of transformers' own classes.

    Raises:
        ValueError: it has code of its own, or can't be loaded.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if _asks_for_code(error):
            raise ValueError(
                f"pixels: the image processor of {printable(name, 150)} has code of its own (auto_map in "
                "preprocessor_config.json), which attnx never runs; name one of transformers' in it"
            ) from error
        told = first_line(error)
        raise ValueError(f"pixels: the image processor of {printable(name, 150)} can't be loaded: {told}") from error


def _huggingface_preparation(name: str) -> tuple[Sequence[float], Sequence[float], str]:
    """The model's own mean, std and interpolation; ImageNet's, with a warning, where it ships no image processor."""
    from PIL.Image import Resampling
    from transformers.utils import cached_file

    try:
        shipped = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ConnectionError(
            f"pixels: the image processor of hf:{name} is not at hand: {first_line(error)}"
        ) from error
    try:
        processor = image_processor(name)
    except ValueError:
        if shipped is not None:
            raise
        warnings.warn(f"hf:{printable(name, 150)} has no image processor; images get ImageNet's", stacklevel=2)
        return *IMAGENET, "bicubic"
    try:
        resample = Resampling(getattr(processor, "resample", None) or Resampling.BICUBIC).name.lower()
    except ValueError as error:
        raise ValueError(f"pixels: hf:{printable(name, 150)}'s image processor: {first_line(error)}") from error
    return processor.image_mean or IMAGENET[0], processor.image_std or IMAGENET[1], resample


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub's client retries for half a minute and tells of each try; one line at the end is enough."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _no_download(name: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"the weights of {name} could not be downloaded ({first_line(error)}); pass --checkpoint FILE with weights "
        "you have, --no-pretrained for random ones, or --model demo"
    )


def _check_size(name: str, model: nn.Module, size: tuple[int, int]) -> None:
    """Raises ValueError for a size that patches don't cover: part of the image would have no map."""
    for patch in patch_convolutions(model)[:1]:
        if any(pixels % p for pixels, p in zip(size, patch.stride, strict=True)):
            fits = "x".join(str(max(p, round(s / p) * p)) for s, p in zip(size, patch.stride, strict=True))
            raise ValueError(
                f"image size: expected multiples of {name}'s patch of {patch.stride[0]} pixels, such as {fits}; "
                f"got {size[0]}x{size[1]}"
            )
