"""A trace in a safetensors file: the tensors of its records and statistics, and JSON that describes them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnx.files import open_regular, replacing
from attnx.trace.branch_layers import BranchLayer
from attnx.trace.gradient_record import GradientRecord
from attnx.trace.layout import TokenLayout
from attnx.trace.loaded_tokens import LayerFacts, LoadedTokens
from attnx.trace.qk_record import QKRecord, versions_of
from attnx.trace.records import LayerRecord, MapRecord, RowsRecord, without_rows
from attnx.trace.row_stats import RowStats
from attnx.trace.tokens import Tokens
from attnx.trace.trace import Trace
from attnx.trace.windows import Windows

_FORMAT = "attnx trace 1"
# Of a QKRecord. Its backend is left out: the machine that reads the file may not have it.
_OPTIONS = ("is_causal", "scale", "heads", "softcap")
_TENSORS = ("q", "k", "lse", "bias", "sinks", "rows")


class _Tensors:
    """The tensors of a file by name. A tensor that several layers share, such as a mask, is stored once."""

    def __init__(self) -> None:
        self.named: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._given: list[Tensor] = []  # kept alive, since addresses tell tensors apart
        self._storages: set[int] = set()

    def add(self, name: str, tensor: Tensor) -> str:
        """The name under which the tensor is stored."""
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self._names:
            stored = tensor.contiguous()
            if stored.untyped_storage().data_ptr() in self._storages:
                # safetensors refuses tensors that share memory.
                stored = stored.clone()
            self._given.append(tensor)
            self._storages.add(stored.untyped_storage().data_ptr())
            self.named[name] = stored
            self._names[key] = name
        return self._names[key]


def save(trace: Trace, path: Path) -> None:
    """Write a trace, see `Trace.save`."""
    from safetensors.torch import save_file

    if len(trace.calls) > 1:
        raise ValueError(f"save: expected a trace of one pass; got {len(trace.calls)}; save each of trace.calls")
    if not len(trace):
        raise ValueError("save: expected a trace with layers; got none")
    tensors = _Tensors()
    layers = [_layer(trace, name, f"{i}.", tensors) for i, name in enumerate(trace)]
    tokens, given = trace.tokens, trace.tokens.given
    about = {
        "heads": trace.heads, "rows": trace.rows, "in_a_row": trace.in_a_row, "layers": layers,
        "given": None if given is None else asdict(given), "attending": list(tokens.attending),
        "beside": tokens.beside, "ran": sorted(tokens.ran), "mixing": tokens.mixing,
    }  # fmt: skip
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a file in a folder that exists; {path.parent} does not")
    with replacing(path) as temporary:
        save_file(tensors.named, temporary, metadata={_FORMAT: json.dumps(about)})


def load(path: Path, device: str | torch.device) -> Trace:
    """Read a trace, see `Trace.load`."""
    from safetensors import SafetensorError, safe_open

    open_regular(path).close()
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a file of Trace.save; it is no safetensors file: {error}") from error
    if _FORMAT not in about:
        raise ValueError(
            f"{path}: expected a file of Trace.save ({_FORMAT}); got {', '.join(about) or 'other tensors'}"
        )
    try:
        return _trace_of(json.loads(about[_FORMAT]), tensors, torch.device(device))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: expected a file of Trace.save; it is damaged: {error!r}") from error


def _trace_of(facts: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> Trace:
    given = None if facts["given"] is None else TokenLayout(**_tuples(facts["given"]))
    trace = Trace(nn.Module(), facts["heads"], None if facts["rows"] is None else tuple(facts["rows"]), given)
    layers = {each["name"]: _facts_of(each, tensors) for each in facts["layers"]}
    tokens = LoadedTokens(given, layers, facts["attending"], facts["mixing"])
    tokens.beside, tokens.ran = [(a, b) for a, b in facts["beside"]], set(facts["ran"])
    trace.tokens, trace.in_a_row = tokens, facts["in_a_row"]
    for each in facts["layers"]:
        stats = each["stats"]
        named = None if stats is None else {stat: tensors[name] for stat, name in stats["names"].items()}
        row_stats = None if stats is None else RowStats(named or {}, stats["missing"])
        trace.add(each["name"], _record_of(each["record"], tensors, device), stats=row_stats)
    return trace


def _layer(trace: Trace, name: str, prefix: str, tensors: _Tensors) -> dict[str, Any]:
    """The description of a layer; its tensors are added under names that start with `prefix`."""
    queries, keys = trace.sides(name)
    windows, tokens, stats = trace.windows(name), trace.tokens, trace.stats.get(name)
    index = None if windows is None else tensors.add(f"{prefix}windows", windows.index)
    named = {stat: tensors.add(f"{prefix}stats.{stat}", values) for stat, values in (stats or {}).items()}
    branch = tokens.branch(name)
    return {
        "name": name, "record": _describe(trace.kept(name), prefix, tensors),
        "sides": [asdict(queries), asdict(keys)], "problem": _problem(trace, name),
        "windows": None if windows is None else {"index": index, "grid": windows.grid},
        "merges": tokens.merges_before(name), "place": tokens.place(name),
        "branch": None if branch is None else asdict(branch),
        "patch_size": [tokens.patch_size(name, side, trace) for side in (queries, keys)],
        "each": tokens.grids_of_items(name, keys, trace),
        "stats": None if stats is None else {"names": named, "missing": stats.missing},
    }  # fmt: skip


def _problem(trace: Trace, layer: str) -> str:
    """The reason that a layer has no layout; "" if it has one."""
    try:
        trace.layout_of(layer)
    except ValueError as error:
        return str(error)
    return ""


def _facts_of(layer: dict[str, Any], tensors: dict[str, Tensor]) -> LayerFacts:
    queries, keys = (Tokens(**_tuples(side)) for side in layer["sides"])
    of = layer["windows"]
    return LayerFacts(
        queries, keys, layer["problem"], layer["merges"], layer["place"],
        None if of is None else Windows(tensors[of["index"]].cpu(), (of["grid"][0], of["grid"][1])),
        None if layer["branch"] is None else BranchLayer(**layer["branch"]),
        tuple(None if size is None else (size[0], size[1]) for size in layer["patch_size"]),
        None if layer["each"] is None else tuple((h, w) for h, w in layer["each"]),
    )  # fmt: skip


def _describe(record: LayerRecord, prefix: str, tensors: _Tensors) -> dict[str, Any]:
    """The kind and the numbers of a record, and the names of its tensors, which are added."""
    try:
        if isinstance(record, QKRecord):
            record.check_unchanged()
            of = {name: getattr(record, name) for name in _TENSORS}
            of["bias"] = None if record.bias is None else _unexpanded(record.bias)
            named = {name: tensors.add(prefix + name, tensor) for name, tensor in of.items() if tensor is not None}
            return {"kind": "qk", "tensors": named} | {name: getattr(record, name) for name in _OPTIONS}
        if isinstance(record, GradientRecord) and record.has_no_map:
            return {"kind": "none", "shape": record.shape}
        if isinstance(record, RowsRecord):
            name = tensors.add(prefix + "map", record.amap)
            return {"kind": "rows", "map": name, "rows": record.rows, "queries": record.queries}
        name = tensors.add(prefix + "map", record.map())
    except RuntimeError as error:
        raise ValueError(f"save: {error}") from error
    kind = "gradient" if isinstance(record, GradientRecord) else "map"
    return {"kind": kind, "map": name, "rows_sum_to_one": record.rows_sum_to_one}


def _record_of(about: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> LayerRecord:
    kind = about["kind"]
    if kind == "qk":
        of = {name: tensors[stored] for name, stored in about["tensors"].items()}
        options = {name: about[name] for name in _OPTIONS}
        return QKRecord(**{"bias": None} | of | options, versions=versions_of(of["q"], of["k"], of.get("bias")))
    if kind == "none":
        return without_rows(about["shape"], device)
    amap = tensors[about["map"]]
    if kind == "rows":
        return RowsRecord(amap, tuple(about["rows"]), about["queries"])
    return GradientRecord.finished(amap) if kind == "gradient" else MapRecord(amap, about["rows_sum_to_one"])


def _unexpanded(tensor: Tensor) -> Tensor:
    """The tensor with size 1 in the dimensions that were expanded."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim]:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields from JSON, which has lists in place of tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
