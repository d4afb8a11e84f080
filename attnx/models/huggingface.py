"""Models of Hugging Face transformers: "hf:NAME", "hf:FOLDER" or "hf:TYPE". Code from repositories never runs."""

import copy
import inspect
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attnx.limits import MODEL_LAYERS
from attnx.messages import printable
from attnx.models.checkpoint import first_line
from attnx.models.loaded import IMAGENET, Loaded, height_and_width, no_download

# transformers downloads code for these from the hub.
_KERNEL_QUANTIZATION = ("eetq", "fbgemm_fp8", "fp8", "gguf", "metal", "mxfp4", "nvfp4")


def load_huggingface(name: str, pretrained: bool, image_size: tuple[int, int] | None) -> Loaded:
    """The model, or the vision part of a vision-language model; errors as in `load_model`."""
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    local = Path(name).is_dir()
    is_type = not local and name in CONFIG_MAPPING
    # None: "sdpa", or "eager" if a submodel has no SDPA. It overrides the setting of config.json.
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
            message = first_line(error)
            raise ValueError(
                f"model: {printable(name, 150)} holds no model that transformers can load: {message}"
            ) from error
        if pretrained:
            raise no_download(f"hf:{name}", error) from error
        raise ConnectionError(
            f"the configuration of hf:{name} could not be downloaded ({first_line(error)}); pass a local folder, or a "
            "model type with pretrained=False, such as hf:vit or hf:dinov2_with_registers"
        ) from error
    if pretrained and is_type:
        raise ValueError(f"model: hf:{name} is a model type without weights; pass pretrained=False, or a model's name")
    model = getattr(model, "vision_model", model)
    config = getattr(model.config, "vision_config", model.config)
    try:
        own = height_and_width(getattr(config, "image_size", None)) or (224, 224)
    except ValueError as error:
        raise ValueError(f"model: hf:{printable(name, 150)}'s configuration: {error}") from error
    interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    kwargs = {"interpolate_pos_encoding": True} if interpolates and image_size not in (None, own) else {}
    preparation = (*IMAGENET, "bicubic") if is_type else _preparation(name)
    return Loaded(f"hf:{name}", model, image_size or own, *preparation, kwargs)


class _UnfitError(ValueError):
    """config.json is refused."""


def _check_config(config: Any) -> None:
    """Remove kernel settings from a configuration and those inside it; refuse code from the hub and excessive sizes.

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
        # Some models can't be built on the meta device. An overflow means that the sizes are too large for torch.
        if "overflow" in str(error).lower():
            raise _UnfitError(f"its parameters have no size that torch can count: {first_line(error)}") from error
        return
    size = sum(value.nbytes for value in model.parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise _UnfitError(f"its parameters are {size / 2**30:,.1f} GiB; this machine has {memory / 2**30:,.1f} GiB")


def _asks_for_code(error: Exception) -> bool:
    """True for the error of transformers about a model that needs trust_remote_code."""
    return isinstance(error, ValueError) and "trust_remote_code=True" in str(error)


def image_processor(name: str) -> Any:
    """The image processor of a Hugging Face model. Its class must be part of transformers.

    Raises:
        ValueError: the processor has its own code, or can't be loaded.
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
        message = first_line(error)
        raise ValueError(f"pixels: the image processor of {printable(name, 150)} can't be loaded: {message}") from error


def _preparation(name: str) -> tuple[Sequence[float], Sequence[float], str]:
    """Mean, std and interpolation of the model's image processor; ImageNet's, with a warning, if it has none."""
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
