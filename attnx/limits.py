"""Limits of sizes, depths and counts in files and options. Each is checked before the value is used."""

from __future__ import annotations

__all__ = [
    "ACTORS",
    "CAPTION_BYTES",
    "CHECKPOINT_DEPTH",
    "HEADER_BYTES",
    "IMAGE_SIDE",
    "JSON_BYTES",
    "LINE_BYTES",
    "MODEL_LAYERS",
    "PICTURE_BYTES",
    "PICTURE_PIXELS",
    "RUN_BYTES",
    "VOCAB_BYTES",
    "WORKERS",
]

PICTURE_BYTES = 2**30  # an encoded picture that is read into memory from a tar or a table
PICTURE_PIXELS = 178_956_970  # a labelled mask, and the default limit of pictures; Pillow's own limit
CAPTION_BYTES = 2**20  # a caption
JSON_BYTES = 2**24  # a JSON member of a tar
HEADER_BYTES = 2**20  # all headers of one tar member: long names, pax records, sparse maps
LINE_BYTES = 2**22  # characters of a line in a text table; the csv module limits a field to 131,072
IMAGE_SIDE = 16384  # pixels of a side of a model's input
RUN_BYTES = 2**24  # run.json
CHECKPOINT_DEPTH = 8  # nested containers around a state dict
MODEL_LAYERS = 4096  # layers in a config.json
VOCAB_BYTES = 2**26  # a vocabulary of word pieces
WORKERS = 256  # decoder processes on a machine
ACTORS = 4096  # actors of a cluster
