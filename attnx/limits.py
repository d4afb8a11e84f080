"""The largest sizes, depths and counts that are accepted from files and options. They are checked before they are used."""

from __future__ import annotations

__all__ = [
    "CAPTION_BYTES",
    "CHECKPOINT_DEPTH",
    "HEADER_BYTES",
    "JSON_DEPTH",
    "LINE_BYTES",
    "PICTURE_BYTES",
    "PROCESSES",
    "RUN_BYTES",
]

PICTURE_BYTES = 2**30  # an encoded picture that is read into memory: a tar's member, a cell of a table
CAPTION_BYTES = 2**20  # a member or cell with a caption
HEADER_BYTES = 2**20  # an extended header of a tar: a long name, pax records
LINE_BYTES = 2**22  # a line of a table in text, and a field of CSV
JSON_DEPTH = 64  # nested lists and objects
RUN_BYTES = 2**24  # run.json
CHECKPOINT_DEPTH = 8  # nested containers around a state dict
PROCESSES = 1024  # decoders, actors, ranks' processes
