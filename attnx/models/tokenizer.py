"""Tokenizer of captions: BERT word pieces, and the word of each piece."""

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnx.files import open_regular
from attnx.limits import VOCAB_BYTES

if TYPE_CHECKING:
    from tokenizers import Encoding

HUB = "google-bert/bert-base-uncased"


@dataclass(frozen=True)
class Caption:
    """A tokenised caption.

    Attributes:
        text: the caption after `pre_caption`, or as given (a plain tokenizer).
        ids, tokens: ids and texts of the T word pieces, [CLS] first and [SEP] last (not if a plain tokenizer cut it).
        words: the W words of `text`, in order.
        word_of: index of the word of each token; None for [CLS] and [SEP].
        cut: number of words that were cut at the end.
    """

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    words: tuple[str, ...]
    word_of: tuple[int | None, ...]
    cut: int = 0

    @property
    def unknown(self) -> tuple[str, ...]:
        """The words with a piece that is not in the vocabulary ([UNK]), in order, each once."""
        return tuple(dict.fromkeys(self.words[w] for w in _unknown_places(self)))


def pre_caption(caption: str, max_words: int | None = None) -> str:
    """ALBEF's caption rules: lower case, no punctuation, hyphens and slashes as spaces, at most `max_words` words.

    Reference:
        https://github.com/salesforce/ALBEF/blob/main/dataset/utils.py
    """
    text = re.sub(r"[,.'!?\"()*#:;~]", "", caption.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    words = re.sub(r"\s+", " ", text).strip().split(" ")
    return " ".join(words if max_words is None else words[:max_words])


class Tokenizer:
    """BERT's word pieces, lower case.

    Args:
        vocab: a file with one piece per line (vocab.txt), or the pieces; None: those of bert-base-uncased from the
            Hugging Face hub.
        max_tokens: number of positions of the model, including [CLS] and [SEP].
        plain: read captions as BERT's own tokenizer does: punctuation is kept, and a longer caption is cut to its first
            `max_tokens` pieces, without [SEP]. False: ALBEF's `pre_caption`, and a cut after a whole word.

    Raises:
        FileNotFoundError: no such file.
        ValueError: [CLS], [SEP], [PAD], [UNK] or [MASK] is missing from the vocabulary.
        ConnectionError: the vocabulary could not be downloaded; the message lists alternatives.
    """

    def __init__(
        self, vocab: str | Path | Sequence[str] | None = None, max_tokens: int = 512, *, plain: bool = False
    ) -> None:
        self.max_tokens, self.plain = max_tokens, plain
        if vocab is None:
            self._tokenizer = _from_hub()
            return
        from tokenizers import BertWordPieceTokenizer

        if isinstance(vocab, (str, Path)):
            vocab = _read(Path(vocab))
        pieces = {piece.rstrip("\r"): i for i, piece in enumerate(vocab) if piece.rstrip("\r")}
        missing = [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name not in pieces]
        if missing:
            raise ValueError(f"vocab: expected BERT's word pieces, one a line; {', '.join(missing)} not among them")
        self._tokenizer = BertWordPieceTokenizer(vocab=pieces, lowercase=True)

    @cached_property
    def size(self) -> int:
        """Number of word pieces."""
        return int(self._tokenizer.get_vocab_size())

    def id_of(self, piece: str) -> int:
        """The id of a piece, such as [MASK]."""
        return int(self._tokenizer.token_to_id(piece))

    def fingerprint(self) -> str:
        """SHA-256 of the pieces, their ids, `max_tokens` and `plain`."""
        pieces = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(repr((pieces, self.max_tokens, *["plain"] * self.plain)).encode()).hexdigest()

    def __call__(self, caption: str) -> Caption:
        """The tokenised caption. What exceeds `max_tokens` is cut at the end, with a warning.

        Raises:
            ValueError: not a str, invalid Unicode, without words, or the first word is too long.

        Warns:
            UserWarning: the caption was cut, or words are not in the vocabulary (the warning lists them).
        """
        if not isinstance(caption, str):
            raise ValueError(f"caption: expected text; got {type(caption).__name__}")
        if any("\ud800" <= c <= "\udfff" for c in caption):
            raise ValueError(f"caption: expected valid Unicode; got {caption[:80]!r}")
        text = caption.strip() if self.plain else pre_caption(caption)
        if not text:
            raise ValueError(f"caption: expected words; got {caption[:80]!r}")
        encoded = self._tokenizer.encode(text)
        word_of = _words(encoded)
        words = max((w for w in word_of if w is not None), default=-1) + 1
        if not words:
            raise ValueError(f"caption: expected words; got {caption[:80]!r}")
        chosen = self._chosen(word_of, text)
        kept = max(w for w in (word_of[i] for i in chosen) if w is not None) + 1
        if len(chosen) < len(word_of):
            lost = next(word for i, word in enumerate(word_of) if i not in chosen)
            side = "in" if lost is not None and lost < kept else "before"
            place = f"{side} {'[SEP]' if lost is None else f'word {lost + 1} of {words}'}"
            warnings.warn(
                f"caption: {len(word_of)} tokens, and the model takes {self.max_tokens}: cut {place}: {text[:40]!r}...",
                stacklevel=2,
            )
        spans: list[tuple[int, int]] = [(len(text), 0)] * kept
        for i in chosen:
            w = word_of[i]
            if w is not None:
                start, end = encoded.offsets[i]
                spans[w] = min(spans[w][0], start), max(spans[w][1], end)
        result = Caption(
            text=text[: spans[-1][1]] if len(chosen) < len(word_of) else text,
            ids=tuple(encoded.ids[i] for i in chosen),
            tokens=tuple(encoded.tokens[i] for i in chosen),
            words=tuple(text[start:end] for start, end in spans),
            word_of=tuple(word_of[i] for i in chosen),
            cut=words - kept,
        )
        message = _unknown(result)
        if message:
            warnings.warn(message, stacklevel=2)
        return result

    def _chosen(self, word_of: Sequence[int | None], text: str) -> list[int]:
        """The indices of the tokens that are kept."""
        if len(word_of) <= self.max_tokens:
            return list(range(len(word_of)))
        if self.plain:
            return list(range(self.max_tokens))
        kept = next(w for w in word_of[self.max_tokens - 1 :] if w is not None)
        if kept == 0:
            raise ValueError(
                f"caption: expected a first word of at most {self.max_tokens - 2} pieces; got {text[:40]!r}..."
            )
        return [i for i, w in enumerate(word_of) if w is None or w < kept]


def _read(path: Path) -> list[str]:
    """The pieces in a file, one a line."""
    if not path.is_file():
        raise FileNotFoundError(f"vocab: expected a file of word pieces; {path} is none")
    with open_regular(path) as file:
        content = file.read(VOCAB_BYTES + 1)
    if len(content) > VOCAB_BYTES:
        raise ValueError(f"vocab: expected at most {VOCAB_BYTES:,} bytes of word pieces; {path} has more")
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"vocab: expected word pieces in UTF-8; {path} is not: {error.reason}") from error


def _words(encoded: "Encoding") -> list[int | None]:
    """Index of the word of each token; None for [CLS] and [SEP]. Words are separated by whitespace."""
    last, word, end = len(encoded.ids) - 1, -1, -1
    indices: list[int | None] = []
    for i, (start, stop) in enumerate(encoded.offsets):
        if i in (0, last):
            indices.append(None)
            continue
        word += start != end
        end = stop
        indices.append(word)
    return indices


def _unknown_places(caption: Caption) -> list[int]:
    """The index of the word of each [UNK], in order."""
    return [w for token, w in zip(caption.tokens, caption.word_of, strict=True) if token == "[UNK]" and w is not None]


def _unknown(caption: Caption, most: int = 10) -> str:
    """Warning text that counts and lists the words that are not in the vocabulary; "" if there are none."""
    unknown = _unknown_places(caption)
    if not unknown:
        return ""
    # Control characters are escaped for the terminal.
    names = [word if word.isprintable() else repr(word) for word in caption.unknown]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    count = len(set(unknown))
    message = (
        f"caption: {count} of {len(caption.words)} words {'is' if count == 1 else 'are'} not in the vocabulary: "
        f"{', '.join(names[:most])}{more}"
    )
    alone = len(unknown) == sum(w is not None for w in caption.word_of)
    return f"{message}; the vocabulary has none of the words, so the maps are meaningless" if alone else message


def _from_hub() -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(HUB, trust_remote_code=False).backend_tokenizer
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConnectionError(
            f"the vocabulary of {HUB} could not be downloaded ({first}); pass a local one, vocab='vocab.txt'"
        ) from error
