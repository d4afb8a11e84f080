"""Reading, checking and loading of files of weights, without running code from them."""

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnx.limits import CHECKPOINT_DEPTH
from attnx.messages import printable

_CONTAINERS = ("state_dict", "model", "teacher", "student", "model_state", "module")
_WRAPPERS = ("module.", "backbone.", "_orig_mod.")
_HEADS = ("head.", "head_dist.", "fc.", "classifier.", "pooler.")


def weights_file(path: str | Path) -> Path:
    """The path of a checkpoint.

    Raises:
        FileNotFoundError: no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: expected a file; {printable(path, None)} is none")
    return Path(path)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of weights, taken out of known containers and without wrapper prefixes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of weights only.
    """
    path = weights_file(path)
    return _unwrap(read_checkpoint(path), path)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a file of weights, in any known container or with a known prefix. The classifier may be missing.

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
    message = misfit(*bodies)
    if message:
        raise ValueError(f"checkpoint {printable(path, None)} doesn't fit {type(model).__name__}: {message}")
    fitting = {k: v for k, v in filtered.items() if k in own and own[k].shape == v.shape}
    check_values(fitting, own, path)
    model.load_state_dict(fitting, strict=False)


def misfit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Error message that lists missing keys, unexpected keys and wrong shapes; "" if the weights fit."""
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
    """Check the dtypes and values of weights whose keys and shapes fit the model.

    Raises:
        ValueError: the kind of dtype differs from the model's, or values are not finite where the model's are.
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


def first_line(error: Exception, most: int = 150) -> str:
    """The first line of an error message, at most `most` characters."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], most)


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating-point"
    return "complex" if dtype.is_complex else "boolean" if dtype == torch.bool else "integer"


def read_checkpoint(path: Path) -> Any:
    """The content of a file of weights: of a safetensors file, or of a torch file, read with weights_only=True.

    Raises:
        ValueError: neither of the two, or a torch file with more than weights.
    """
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file is the length of its header, then the header, which is JSON.
    if path.suffix.lower() == ".safetensors" or (head[8:] == b"{" and head[5:8] == bytes(3)):
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:
            message = f"expected a safetensors file: {first_line(error)}"
            raise ValueError(f"checkpoint {printable(path, None)}: {message}") from error
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                claimed = sum(member.file_size for member in archive.infolist())
            if claimed > path.stat().st_size:
                raise ValueError(f"it claims {claimed:,} bytes and has {path.stat().st_size:,}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the same facts are in the error, or `_unwrap` raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        message = f"expected a torch file of weights only: {first_line(error, 100)}"
        raise ValueError(f"checkpoint {printable(path, None)}: {message}") from error


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the key prefixes of wrappers."""
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
        problem = _unusual(value)
        if problem:
            raise ValueError(f"{where}: {printable(key)}: expected an ordinary tensor with data; got {problem}")
    for wrapper in _WRAPPERS:
        weights = {k.removeprefix(wrapper): v for k, v in weights.items()}
    return weights


def _unusual(value: Tensor) -> str:
    """Description of a property that makes the tensor unusable; "" for an ordinary tensor."""
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
    """The weights after timm's conversion of other ViT formats and its interpolation of position embeddings."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    if not isinstance(model, VisionTransformer):
        return weights
    # DINO's projection head belongs to its training, not to the backbone.
    return checkpoint_filter_fn({k: v for k, v in weights.items() if not k.startswith("head.mlp")}, model)


def _some(keys: Sequence[str], most: int = 6) -> str:
    return ", ".join(map(printable, keys[:most])) + (f" and {len(keys) - most} more" if len(keys) > most else "")
