"""Records of layers on another device."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnx.trace.gradient_record import GradientRecord
from attnx.trace.qk_record import QKRecord
from attnx.trace.records import LayerRecord, MapRecord, RowsRecord, without_rows


def on_device(record: LayerRecord, device: torch.device) -> LayerRecord:
    """The record with its tensors on a device. That of a gradient capture holds its map only."""
    if isinstance(record, QKRecord):
        moved: dict[str, Any] = {
            name: _moved(getattr(record, name), device) for name in ("q", "k", "lse", "bias", "sinks", "rows")
        }
        record.check_unchanged()
        if moved["q"] is not record.q:
            # The copies have no history. Another device may not have the backend.
            moved |= dict(versions=(), backend="auto" if device.type != record.device.type else record.backend)
        return replace(record, **moved)
    if isinstance(record, GradientRecord):
        if record.has_no_map:
            return without_rows(record.shape, device)
        return GradientRecord.finished(record.map().to(device))
    if isinstance(record, RowsRecord):
        return replace(record, amap=record.amap.to(device))
    return MapRecord(record.map().to(device), record.rows_sum_to_one)


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
