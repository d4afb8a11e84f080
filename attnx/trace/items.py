"""The maps of one item of a batch."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from attnx.trace.gradient_record import GradientRecord
from attnx.trace.pass_tokens import PassTokens
from attnx.trace.qk_record import QKRecord, versions_of
from attnx.trace.records import LayerRecord, MapRecord, RowsRecord, without_rows
from attnx.trace.row_stats import RowStats

if TYPE_CHECKING:
    from attnx.trace.trace import Trace


def item(
    trace: "Trace", records: Mapping[str, LayerRecord], index: int
) -> tuple[dict[str, LayerRecord], dict[str, RowStats], PassTokens]:
    """The records, the statistics and the tokens of one item, see `Trace.item`.

    Args:
        trace: the trace of the batch.
        records: its records.
        index: of the item.

    Raises:
        IndexError: no such item, or the layers have different numbers of items.
        ValueError: a layer attends in windows of unknown places.
    """
    unknown = next((name for name in trace if trace.sides(name)[1].kind == "windows" and not trace.windows(name)), None)
    if unknown is not None:
        raise ValueError(f"item: expected windows of known places; got {trace.sides(unknown)[1]} in {unknown}")
    windows = {name: of.count for name in trace if (of := trace.windows(name)) is not None}
    items = {name: record.shape[0] // windows.get(name, 1) for name, record in records.items()}
    if len(set(items.values())) != 1 or not 0 <= index < min(items.values()):
        counts = " or ".join(map(str, sorted(set(items.values())))) or "no"
        raise IndexError(
            f"item: expected layers of equally many items, and one of these; got {counts} items and {index}"
        )
    found: dict[str, LayerRecord] = {}
    stats: dict[str, RowStats] = {}
    unpadded: dict[str, int] = {}  # {layer: number of queries without padding}
    for name, record in records.items():
        count, (queries, keys) = windows.get(name, 1), trace.sides(name)
        tokens = trace.tokens.unpadded(name, keys, index, records)
        if tokens is not None and queries == keys:
            unpadded[name] = tokens
        rows = unpadded.get(name) if trace.rows is None else None
        of_item = slice(index * count, (index + 1) * count)
        found[name] = _of_items(record, of_item, rows, tokens)
        if name in trace.stats:
            stats[name] = trace.stats[name].of_items(of_item, unpadded.get(name))
    return found, stats, trace.tokens.item(index, unpadded)


def _of_items(record: LayerRecord, items: slice, rows: int | None, columns: int | None) -> LayerRecord:
    """The record of some items of the batch.

    Args:
        record: of the whole batch.
        items: their indices.
        rows, columns: number of rows and columns of the map to keep; None: all.
    """
    if isinstance(record, QKRecord):
        record.check_unchanged()
        q, k, bias = record.q[items, :, :rows], record.k[items, :, :columns], record.bias
        bias = _of_bias(bias, items, rows, columns)
        return replace(record, q=q, k=k, lse=record.lse[items, :, :rows], bias=bias, versions=versions_of(q, k, bias))
    if isinstance(record, GradientRecord):
        if record.has_no_map:
            shape = items.stop - items.start, rows or record.shape[-2], record.shape[-1]
            return without_rows(shape, record.device)
        return GradientRecord.finished(record.map()[items][..., :rows, :columns])
    if isinstance(record, RowsRecord):
        return replace(record, amap=record.amap[items][..., :columns])
    rows_sum_to_one = record.rows_sum_to_one and rows is None and columns is None
    return MapRecord(record.map()[items][..., :rows, :columns], rows_sum_to_one)


def _of_bias(bias: Tensor | None, items: slice, rows: int | None, columns: int | None) -> Tensor | None:
    """The part of a bias that broadcasts to [B, H, M, N]; dimensions of size 1 stay as they are."""
    if bias is None:
        return None
    bias = bias if bias.dim() < 4 or bias.shape[0] == 1 else bias[items]
    bias = bias if bias.dim() < 2 or bias.shape[-2] == 1 else bias[..., :rows, :]
    return bias if bias.shape[-1] == 1 else bias[..., :columns]
