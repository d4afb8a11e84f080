"""Models by name: "timm:NAME", "hf:NAME or folder", "demo"; with their own weights, a checkpoint file, or random."""

import copy
import difflib
import hashlib
import inspect
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from attnx.images import to_tensor
from attnx.layout import patch_convolutions
from attnx.limits import CHECKPOINT_DEPTH, MODEL_LAYERS

if TYPE_CHECKING:
    from PIL import Image

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CONTAINERS = ("state_dict", "model", "teacher", "student", "model_state", "module")
_WRAPPERS = ("module.", "backbone.", "_orig_mod.")
_HEADS = ("head.", "head_dist.", "fc.", "classifier.", "pooler.")
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


def weights_file(path: str | Path) -> Path:
    """The path of a checkpoint.

    Raises:
        FileNotFoundError: no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: expected a file; {printable(path, None)} is none")
    return Path(path)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Loads a file of weights, whatever usual container or prefix they are wrapped in. A classifier may be missing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of weights, or keys, shapes or values that don't fit; says which.
    """
    weights = read_weights(path)
    own = model.state_dict()
    try:
        filtered = _timm_filter(model, weights)
    except Exception as error:
        raise ValueError(f"checkpoint {printable(path, None)}: timm can't convert it: {first_line(error)}") from error
    bodies = ({k: v for k, v in keys.items() if not k.startswith(_HEADS)} for keys in (filtered, own))
    told = misfit(*bodies)
    if told:
        raise ValueError(f"checkpoint {printable(path, None)} doesn't fit {type(model).__name__}: {told}")
    fitting = {k: v for k, v in filtered.items() if k in own and own[k].shape == v.shape}
    check_values(fitting, own, path)
    model.load_state_dict(fitting, strict=False)


def misfit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What of some weights doesn't fit a model's own: keys missing, unexpected, of another shape."""
    wrong = {
        "missing": [k for k in own if k not in weights],
        "unexpected": [k for k in weights if k not in own],
        "of another shape": [
            f"{k} {list(weights[k].shape)} for {list(own[k].shape)}"
            for k in own
            if k in weights and own[k].shape != weights[k].shape
        ],
    }
    return "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in wrong.items() if keys)


def check_values(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path) -> None:
    """Checks the values of weights that fit a model's own by key and shape.

    Raises:
        ValueError: weights of another kind of dtype than the model's, or not finite where the model's are.
    """
    for key, value in weights.items():
        mine, where = own[key], f"checkpoint {printable(path, None)}: {printable(key)}"
        if _kind(value.dtype) != _kind(mine.dtype):
            raise ValueError(f"{where}: expected {_kind(mine.dtype)} weights, such as {mine.dtype}; got {value.dtype}")
        if not mine.is_floating_point():
            continue
        try:
            finite = value.to(mine.dtype).isfinite()
        except RuntimeError as error:
            raise ValueError(f"{where}: torch can't read {value.dtype}: {first_line(error)}") from error
        if not finite.all() and mine.isfinite().all():
            raise ValueError(f"{where} has {int((~finite).sum())} values that are not finite as {mine.dtype}")


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating-point"
    return "complex" if dtype.is_complex else "boolean" if dtype == torch.bool else "integer"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of weights, out of whatever usual container and without wrappers' prefixes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of weights only.
    """
    path = weights_file(path)
    return _unwrap(_read(path), path)


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
    own = height_and_width(getattr(config, "image_size", None)) or (224, 224)
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
        if isinstance(layers, int) and layers > MODEL_LAYERS:
            raise _UnfitError(f"expected at most {MODEL_LAYERS} layers; num_hidden_layers is {layers}")
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


def first_line(error: Exception, most: int = 150) -> str:
    """The first line of an error, cut."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], most)


def printable(name: object, most: int | None = 100) -> str:
    """A name on one line: what is not printable is escaped, and what is longer than most is cut."""
    text = str(name)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if most is None or len(text) <= most else text[: most - 3] + "..."


def _check_size(name: str, model: nn.Module, size: tuple[int, int]) -> None:
    """Raises ValueError for a size that patches don't cover: part of the image would have no map."""
    for patch in patch_convolutions(model)[:1]:
        if any(pixels % p for pixels, p in zip(size, patch.stride, strict=True)):
            fits = "x".join(str(max(p, round(s / p) * p)) for s, p in zip(size, patch.stride, strict=True))
            raise ValueError(
                f"image size: expected multiples of {name}'s patch of {patch.stride[0]} pixels, such as {fits}; "
                f"got {size[0]}x{size[1]}"
            )


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file is the length of its header, then the header, which is JSON.
    if path.suffix.lower() == ".safetensors" or (head[8:] == b"{" and head[5:8] == bytes(3)):
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:
            told = f"expected a safetensors file: {first_line(error)}"
            raise ValueError(f"checkpoint {printable(path, None)}: {told}") from error
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                claimed = sum(member.file_size for member in archive.infolist())
            if claimed > path.stat().st_size:
                raise ValueError(f"it claims {claimed:,} bytes and has {path.stat().st_size:,}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what the error tells, or `_unwrap` refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        told = f"expected a torch file of weights only: {first_line(error, 100)}"
        raise ValueError(f"checkpoint {printable(path, None)}: {told}") from error


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, its keys without wrappers' prefixes."""
    where = f"checkpoint {printable(path, None)}"
    for _ in range(CHECKPOINT_DEPTH + 1):
        inner = (
            [content[c] for c in _CONTAINERS if isinstance(content.get(c), Mapping)]
            if isinstance(content, Mapping)
            else []
        )
        if not inner:
            break
        content = inner[0]
    else:
        raise ValueError(f"{where}: expected a state dict of tensors at most {CHECKPOINT_DEPTH} containers deep")
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{where}: expected a state dict of tensors; got {type(content).__name__}")
    weights = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    for key, value in weights.items():
        told = _unusual(value)
        if told:
            raise ValueError(f"{where}: {printable(key)}: expected an ordinary tensor with data; got {told}")
    for wrapper in _WRAPPERS:
        weights = {k.removeprefix(wrapper): v for k, v in weights.items()}
    return weights


def _unusual(value: Tensor) -> str:
    """What is unusual about a tensor; empty if nothing is."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"layout {value.layout}"
    if value.is_meta:
        return "one without data (meta)"
    if value.is_quantized:
        return f"a quantized one, {value.dtype}"
    if value.nbytes > value.untyped_storage().nbytes():
        return f"shape {list(value.shape)} of {value.untyped_storage().nbytes()} bytes"
    return ""


def _timm_filter(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's own conversions of foreign ViT checkpoints, and its interpolation of position embeddings."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    if not isinstance(model, VisionTransformer):
        return weights
    # DINO's projection head belongs to its training, not to the backbone.
    return checkpoint_filter_fn({k: v for k, v in weights.items() if not k.startswith("head.mlp")}, model)


def _some(keys: Sequence[str], most: int = 6) -> str:
    return ", ".join(map(printable, keys[:most])) + (f" and {len(keys) - most} more" if len(keys) > most else "")
