"""Training objective of the demo ALBEF: ALBEF's three losses, on captions and on phrases."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnx.demo.captioned import RELATIONS, describe
from attnx.demo.scenes import COLORS, SHAPES
from attnx.models.albef import Albef, CrossAttention
from attnx.models.tokenizer import Tokenizer

SIZES = (len(COLORS), len(SHAPES), len(RELATIONS), len(COLORS), len(SHAPES))
"""Number of values of each of the five facts."""
OPPOSITE = torch.arange(len(RELATIONS)) ^ 1
FALSE = 2
"""Number of false captions for each true caption."""
PHRASE, CAPTION, MASKED = 1.0, 0.5, 0.3
"""Weights of the phrase matching, caption matching and masked word losses. The contrastive loss has weight 1."""


@dataclass(frozen=True)
class Table:
    """Token ids int64 and mask bool, both [*sizes, T], of every possible text of a kind."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, tokenizer: Tokenizer, sizes: tuple[int, ...], text: Callable[..., str]) -> Table:
        """Tokenize every text.

        Args:
            tokenizer: the tokenizer of the model.
            sizes: number of values of each index.
            text: function from one index for each of the sizes to a text.
        """
        read = [tokenizer(text(*indices)).ids for indices in itertools.product(*map(range, sizes))]
        length, pad = max(map(len, read)), tokenizer.id_of("[PAD]")
        ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in read]).view(*sizes, length)
        return cls(ids, ids != pad)

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask [P, T] of indices [P, len(sizes)]."""
        return self.ids[indices.unbind(-1)], self.mask[indices.unbind(-1)]


def captions(tokenizer: Tokenizer) -> Table:
    """Table of all captions, indexed by their facts."""
    return Table.of(tokenizer, SIZES, lambda *facts: describe(facts))


def phrase(color: int, shape: int) -> str:
    """A text such as "a red circle", or "a red" or "a circle" if the other index is one past the end."""
    named = ((*COLORS, "")[color], (*SHAPES, "")[shape])
    return " ".join(("a", *filter(None, named)))


def converse(facts: Tensor) -> Tensor:
    """Facts [..., 5] of the same scene described from the other object: "a blue square right of a red circle"."""
    color, shape, relation, color2, shape2 = facts.unbind(-1)
    return torch.stack([color2, shape2, OPPOSITE[relation], color, shape], -1)


def meaning(facts: Tensor) -> Tensor:
    """Numbers int64 [...] of facts [..., 5], equal for captions with the same meaning."""
    weights = torch.tensor([int(np.prod(SIZES[i + 1 :])) for i in range(5)])
    return torch.minimum((facts * weights).sum(-1), (converse(facts) * weights).sum(-1))


def falsify(facts: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """False captions [B, count, 5], each with one random change of the true captions `facts` [B, 5]."""
    color, shape, relation, color2, shape2 = facts.unbind(-1)

    def other(values: Tensor, kinds: int) -> Tensor:
        return (values + torch.randint(1, kinds, values.shape, generator=generator)) % kinds

    changed = [
        (color2, shape2, relation, color, shape),
        (color, shape, OPPOSITE[relation], color2, shape2),
        (color2, shape, relation, color, shape2),
        (color, shape2, relation, color2, shape),
        (other(color, len(COLORS)), shape, relation, color2, shape2),
        (color, other(shape, len(SHAPES)), relation, color2, shape2),
        (color, shape, relation, other(color2, len(COLORS)), shape2),
        (color, shape, relation, color2, other(shape2, len(SHAPES))),
    ]
    candidates = torch.stack([torch.stack(facts_of, -1) for facts_of in changed], 1)
    # Exchanging two equal colours changes nothing.
    false = meaning(candidates) != meaning(facts)[:, None]
    order = torch.rand(false.shape, generator=generator).masked_fill(~false, -1.0).argsort(1, descending=True)
    return candidates.gather(1, order[:, :count, None].expand(-1, -1, 5))


def parts(facts: Tensor, generator: torch.Generator) -> Tensor:
    """Phrases about one object of each scene: indices [B, 5, 2] for `phrase`.

    The five phrases have, in order: the object's colour and shape; only one of the two; the other object's shape; the
    other object's colour; a colour or shape that neither object has, which is sometimes the only word.
    """
    own = torch.arange(len(facts))

    def choose() -> Tensor:
        return torch.rand(len(facts), generator=generator) < 0.5

    def absent(present: Tensor, kinds: int) -> Tensor:
        return torch.rand(len(present), kinds, generator=generator).scatter(1, present, -1.0).argmax(1)

    colors, shapes, chosen = facts[:, [0, 3]], facts[:, [1, 4]], choose().long()
    color, shape = colors[own, chosen], shapes[own, chosen]
    color2, shape2 = colors[own, 1 - chosen], shapes[own, 1 - chosen]
    no_color, no_shape = torch.full_like(color, len(COLORS)), torch.full_like(shape, len(SHAPES))
    alone, of_color, short = choose(), choose(), choose()
    wrong_color = torch.where(of_color, absent(colors, len(COLORS)), torch.where(short, no_color, color))
    wrong_shape = torch.where(of_color, torch.where(short, no_shape, shape), absent(shapes, len(SHAPES)))
    said = (
        (color, shape),
        (torch.where(alone, color, no_color), torch.where(alone, no_shape, shape)),
        (color, shape2),
        (color2, shape),
        (wrong_color, wrong_shape),
    )
    return torch.stack([torch.stack(pair, -1) for pair in said], 1)


def holds(said: Tensor, facts: Tensor, shown: Tensor) -> Tensor:
    """Bool [B, K], True if the phrase describes an object that is shown.

    Args:
        said: phrases, int64 [B, K, 2].
        facts: int64 [B, 5].
        shown: bool [B, 2].
    """
    color, shape = said[..., :1], said[..., 1:]
    colored = (color == facts[:, None, [0, 3]]) | (color == len(COLORS))
    shaped = (shape == facts[:, None, [1, 4]]) | (shape == len(SHAPES))
    return (colored & shaped & shown[:, None]).any(-1)


class Evidence:
    """Randomly scale the outputs of cross-attention in training.

    For most pairs the outputs are multiplied by a random share, and the target of a true pair is that share. So the
    logit grows with the image evidence of each word, and Grad-CAM's gradients get a consistent sign. For some pairs one
    word gets a smaller share, so that each word is used. The outputs of tokens without a content word, such as [CLS],
    and those of layers above the first one are mostly set to 0, so that the evidence passes through the words.

    Args:
        whole: share of pairs whose outputs are not scaled.
        blind: share of pairs in which the outputs of tokens without a content word are 0. For the same share of pairs,
            chosen independently, the outputs of layers above the first one are 0.
        apart: share of pairs in which one word gets a smaller share than the others.
    """

    def __init__(
        self, model: Albef, generator: torch.Generator, whole: float = 0.3, blind: float = 0.7, apart: float = 0.5
    ) -> None:
        self.generator, self.whole, self.blind, self.apart = generator, whole, blind, apart
        self.scales: list[Tensor | None] = []
        crossing = [module for module in model.text_encoder.modules() if isinstance(module, CrossAttention)]
        for i, module in enumerate(crossing):
            self.scales.append(None)
            module.register_forward_hook(partial(self._scale, i))

    def withhold(self, naming: Tensor) -> Tensor:
        """Draw the scales of the next forward passes, and return each pair's share [pairs].

        Args:
            naming: bool [pairs, T], True at content words.
        """
        pairs = len(naming)
        left = torch.where(self._random(pairs) < self.whole, 1.0, self._random(pairs))
        seeing = naming | (self._random(pairs) >= self.blind)[:, None]
        of_one = torch.where(self._random(pairs) < self.apart, self._random(pairs), 1.0)
        one = torch.rand(naming.shape, generator=self.generator).masked_fill(~naming, -1.0).argmax(1)
        first = left[:, None] * seeing
        first[torch.arange(pairs), one] *= of_one
        left = left * of_one
        above = left * (self._random(pairs) >= self.blind)
        self.scales = [first[..., None], *[above[:, None, None]] * (len(self.scales) - 1)]
        return left

    def restore(self) -> None:
        """Stop scaling, from the next forward pass on."""
        self.scales = [None] * len(self.scales)

    def _random(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator)

    def _scale(self, layer: int, module: nn.Module, inputs: tuple[Tensor, ...], seen: Tensor) -> Tensor:
        scale = self.scales[layer]
        return seen if scale is None else seen * scale


class Objective(nn.Module):
    """The model and its losses. The head that predicts masked words is used in training only."""

    def __init__(self, model: Albef, args: argparse.Namespace) -> None:
        super().__init__()
        self.model = model
        assert model.tokenizer is not None
        self.captions = captions(model.tokenizer)
        self.phrases = Table.of(model.tokenizer, (len(COLORS) + 1, len(SHAPES) + 1), phrase)
        self.mask_id, self.names = model.tokenizer.id_of("[MASK]"), model.tokenizer.id_of(next(iter(COLORS)))
        self.words_head = nn.Linear(model.config.width, model.config.vocab_size)
        self.masked = args.masked
        self.generator = torch.Generator().manual_seed(args.seed)
        self.evidence = Evidence(model, self.generator)

    def forward(self, images: Tensor, facts: Tensor, shown: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The losses by name, and the matching accuracies of image-caption and image-phrase pairs.

        Args:
            images: float32 [B, 3, H, W].
            facts: int64 [B, 5], the facts of each image's two objects.
            shown: bool [B, 2], True for objects that are shown. An image that lacks one has phrases, but no captions.
        """
        seen, both = self.model.encode_image(images), shown.all(1)
        said = parts(facts, self.generator)
        ids, mask = self.phrases(said.flatten(0, 1))
        true = holds(said, facts, shown).flatten()
        phrases, phrases_right = self._match(seen, ids, mask, self.model.encode_text(ids, mask), true)
        image, facts = seen[both], facts[both]
        own = torch.arange(len(facts))
        false = falsify(facts, FALSE, self.generator)
        ids, mask = self.captions(torch.cat([facts, false.flatten(0, 1)]))
        words = self.model.encode_text(ids, mask)
        same = meaning(facts)[:, None] == meaning(facts)[None]
        contrastive, similar = self._contrast(image, words[: len(facts)], same)
        hard = torch.multinomial(similar.masked_fill(same, -1e4).softmax(1), 1, generator=self.generator)[:, 0]
        rows = torch.cat([own[:, None], hard[:, None], torch.arange(len(facts), len(ids)).view(-1, FALSE)], 1).flatten()
        true = (torch.arange(2 + FALSE) == 0).repeat(len(facts))
        matching, right = self._match(image, ids[rows], mask[rows], words[rows], true)
        losses = {"itc": contrastive, "captions": CAPTION * matching, "phrases": PHRASE * phrases}
        losses["mlm"] = MASKED * self._name_masked(image, facts)
        return losses, {"captions right": right, "phrases right": phrases_right}

    def _contrast(self, image: Tensor, words: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """The contrastive loss, and the similarities [B, B] of images (rows) and captions (columns)."""
        model = self.model
        assert model.vision_proj is not None
        assert model.text_proj is not None
        assert model.temp is not None
        seen = F.normalize(model.vision_proj(image[:, 0]), dim=-1)
        said = F.normalize(model.text_proj(words[:, 0]), dim=-1)
        similar = seen @ said.T / model.temp.clamp(0.02, 0.5)
        target = same.float() / same.sum(1)
        return 0.5 * (F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)), similar.detach()

    def _match(self, image: Tensor, ids: Tensor, mask: Tensor, words: Tensor, true: Tensor) -> tuple[Tensor, float]:
        """The matching loss, and the accuracy on pairs whose outputs are not scaled.

        Every image has the same number of texts, and they are in the order of the images. `true`, bool [texts], is True
        for true texts. True and false texts have equal weight in total.
        """
        assert self.model.itm_head is not None
        left = self.evidence.withhold(ids >= self.names)
        fused = self.model.encode_text(ids, mask, image, words=words, layers=self.model.cross_layers)
        self.evidence.restore()
        logits = self.model.itm_head(fused[:, 0])
        belief = true * left
        loss = F.cross_entropy(logits, torch.stack([1.0 - belief, belief], 1), reduction="none")
        right = (logits.argmax(1) == true.long())[left == 1.0].float().mean().item()
        return 0.5 * (loss[true].mean() + loss[~true].mean()), right

    def _name_masked(self, image: Tensor, facts: Tensor) -> Tensor:
        """Cross-entropy of masked words. Only content words are masked: colours, shapes and relations."""
        ids, mask = self.captions(facts)
        hidden = (torch.rand(ids.shape, generator=self.generator) < self.masked) & (ids >= self.names)
        words = self.model.encode_text(ids.masked_fill(hidden, self.mask_id), mask, image)
        return F.cross_entropy(self.words_head(words[hidden]), ids[hidden])
