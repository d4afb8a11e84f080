"""The largest sizes, depths and counts that are accepted from files and options: each is checked before its use."""

from __future__ import annotations

__all__ = [
    "ACTORS",
    "CAPTION_BYTES",
    "CHECKPOINT_DEPTH",
    "HEADER_BYTES",
    "IMAGE_SIDE",
    "JSON_BYTES",
    "LINE_BYTES",
    "MASK_PIXELS",
    "MODEL_LAYERS",
    "PICTURE_BYTES",
    "RUN_BYTES",
    "VOCAB_BYTES",
    "WORKERS",
]

PICTURE_BYTES = 2**30  # an encoded picture that is read into memory: a tar's member, a cell of a table
CAPTION_BYTES = 2**20  # a caption
JSON_BYTES = 2**24  # a tar's member of JSON, which may have a caption
HEADER_BYTES = 2**20  # all headers of one member of a tar: long names, pax records, sparse maps
LINE_BYTES = 2**22  # a line of a table in text, in characters; the csv module limits a field to 131,072
IMAGE_SIDE = 16384  # pixels of what a model gets
MASK_PIXELS = 178_956_970  # a labelled mask; Pillow refuses larger images, too
RUN_BYTES = 2**24  # run.json
CHECKPOINT_DEPTH = 8  # nested containers around a state dict
MODEL_LAYERS = 4096  # layers that a config.json asks for
VOCAB_BYTES = 2**26  # a vocabulary of word pieces
WORKERS = 256  # processes that decode, on a machine
ACTORS = 4096  # of a cluster
