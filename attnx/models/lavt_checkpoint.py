"""Loading of LAVT's published checkpoints. The sizes of the model are read from the weights."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from attnx.messages import printable
from attnx.models.checkpoint import check_values, misfit, read_checkpoint, weights_file
from attnx.models.lavt import INTERPOLATION, Four, Lavt, LavtConfig
from attnx.models.loaded import IMAGENET, Loaded, height_and_width
from attnx.models.tokenizer import Tokenizer

MAX_TOKENS = 20
_TEXT = "text_encoder."
_INDEX = "relative_position_index"
_TABLE = "backbone.layers.{}.blocks.0.attn.relative_position_bias_table"


def load_lavt(
    checkpoint: str | Path | None,
    vocab: str | Path | Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    fusion_heads: Four | None = None,
    config: LavtConfig | None = None,
) -> Loaded:
    """A LAVT in eval mode, on the CPU, with its tokenizer and the preparation of its images.

    Images are resized to 480 x 480 pixels and normalised with ImageNet's mean and std. Expressions are read by BERT's
    plain tokenizer and cut to 20 word pieces.

    Args:
        checkpoint: a file that the original's train.py saves, with --model lavt (the text encoder stands in its entry
            `bert_model`) or lavt_one. It is read with weights_only=True; of other types, only `argparse.Namespace` is
            allowed. None: random weights.
        vocab: bert-base-uncased's vocab.txt, or its pieces; None: from the Hugging Face hub.
        image_size: (height, width) in pixels, or one number for a square; None: 480 x 480.
        fusion_heads: the heads of each stage's attention to words, the original's option --mha, which the weights do
            not show. None: those of the options in the checkpoint.
        config: sizes for random weights; None: those of the published checkpoints.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of weights, weights that don't fit LAVT (the message lists the keys), heads that are
            unknown or don't divide the channels, an invalid image size, or a vocabulary of more pieces than embeddings.
        ConnectionError: the vocabulary could not be downloaded.
    """
    size = height_and_width(image_size)
    weights: dict[str, Tensor] | None = None
    if checkpoint is not None:
        path = weights_file(checkpoint)
        content = read_lavt(path)
        weights = _weights(content, path)
        config = _config(weights, fusion_heads or _heads_of(content.get("args"), path), path)
    config = config or LavtConfig()
    config = replace(config, image_size=size or config.image_size)
    tokenizer = Tokenizer(vocab, MAX_TOKENS, plain=True)
    if tokenizer.size > config.vocab_size:
        raise ValueError(
            f"vocab: expected at most {config.vocab_size} word pieces, as LAVT's embeddings; got {tokenizer.size}"
        )
    model = Lavt(config, tokenizer)
    if weights is not None:
        _load(model, weights, path)
    model.eval().requires_grad_(False)
    name = "lavt" if checkpoint is None else f"lavt:{checkpoint}"
    return Loaded(name, model, config.image_size, *IMAGENET, interpolation=INTERPOLATION)


def read_lavt(path: Path) -> Mapping[str, Any]:
    """The entries of a checkpoint of LAVT's train.py.

    Raises:
        ValueError: no file of weights only, or no entry `model`.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = read_checkpoint(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ValueError(
            f"checkpoint {printable(path, None)}: expected one of LAVT's train.py, a dict with `model` and, for "
            f"--model lavt, `bert_model`; got {_kind(content)}"
        )
    return content


def _kind(content: object) -> str:
    """The type of a checkpoint's content, with the names of a few entries."""
    if not isinstance(content, Mapping):
        return type(content).__name__
    return f"a dict of {', '.join(printable(str(key)) for key in list(content)[:4])}"


def _weights(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights, named as in `Lavt`."""
    weights = dict(content["model"])
    bert = content.get("bert_model")
    if bert is not None and not isinstance(bert, Mapping):
        raise ValueError(f"checkpoint {printable(path, None)}: bert_model: expected weights; got {type(bert).__name__}")
    if bert is None and not any(str(key).startswith(_TEXT) for key in weights):
        raise ValueError(
            f"checkpoint {printable(path, None)}: expected a text encoder, as `bert_model` or in `model`; got neither"
        )
    weights.update({f"{_TEXT}{key}": value for key, value in (bert or {}).items()})
    odd = [key for key, value in weights.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"checkpoint {printable(path, None)}: {printable(str(odd[0]))}: expected a tensor")
    return weights


def _heads_of(options: Any, path: Path) -> Four:
    """The heads of the attention to words, from the option --mha ("1-1-1-1"; empty: one head in each stage)."""
    where = f"checkpoint {printable(path, None)}"
    if not isinstance(options, argparse.Namespace) or not hasattr(options, "mha"):
        raise ValueError(
            f"{where} has no options of its training (args.mha), so the heads of its attention to words are unknown; "
            "pass fusion_heads, (1, 1, 1, 1) in the original's default"
        )
    given = options.mha or "1-1-1-1"
    parts = str(given).split("-")
    if len(parts) != 4 or not all(part.isdecimal() and 0 < int(part) <= 4096 for part in parts):
        raise ValueError(f"{where}: args.mha: expected four numbers such as 1-1-1-1; got {printable(str(given))}")
    return cast(Four, tuple(map(int, parts)))


def _config(weights: Mapping[str, Tensor], fusion_heads: Four, path: Path) -> LavtConfig:
    """The sizes of the model that has these weights."""

    def shape(key: str, dims: int) -> torch.Size:
        if key not in weights or weights[key].dim() != dims or min(weights[key].shape) < 1:
            got = list(weights[key].shape) if key in weights else "none"
            raise ValueError(
                f"checkpoint {printable(path, None)} doesn't fit LAVT: expected {key} with {dims} dimensions; got {got}"
            )
        return weights[key].shape

    dim = shape("backbone.patch_embed.proj.weight", 4)[0]
    tables = [shape(_TABLE.format(i), 2) for i in range(4)]
    heads = cast(Four, tuple(table[1] for table in tables))
    for i in range(4):
        for what, number in (("heads of the windows", heads[i]), ("heads of the attention to words", fusion_heads[i])):
            if (dim << i) % number:
                raise ValueError(
                    f"checkpoint {printable(path, None)}: {what} of stage {i}: expected a divisor of {dim << i} "
                    f"channels; got {number}"
                )
    vocab, width = shape(f"{_TEXT}embeddings.word_embeddings.weight", 2)
    if width % 64:
        raise ValueError(f"checkpoint {printable(path, None)}: expected BERT with heads of 64 channels; got {width}")
    return LavtConfig(
        embed_dim=dim,
        depths=cast(Four, tuple(_count(weights, f"backbone.layers.{i}.blocks.") for i in range(4))),
        heads=heads,
        window=round((tables[0][0] ** 0.5 + 1) / 2),
        fusion_heads=fusion_heads,
        text_width=width,
        text_depth=_count(weights, f"{_TEXT}encoder.layer."),
        text_heads=width // 64,
        vocab_size=vocab,
        max_positions=shape(f"{_TEXT}embeddings.position_embeddings.weight", 2)[0],
    )


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """The number of modules with weights in a list of modules."""
    return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})


def _load(model: Lavt, weights: dict[str, Tensor], path: Path) -> None:
    """Load the weights. All keys must be there, and no others."""
    own = model.state_dict()
    message = misfit(weights, own)
    if message:
        raise ValueError(f"checkpoint {printable(path, None)} doesn't fit LAVT: {message}")
    check_values(weights, own, path)
    for key, value in own.items():
        if key.endswith(_INDEX) and not torch.equal(weights[key], value):
            raise ValueError(f"checkpoint {printable(path, None)}: {key}: expected the index of Swin's windows")
    model.load_state_dict(weights)
