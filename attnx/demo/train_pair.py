"""Train the demo pair on captioned scenes and write its weights: python -m attnx.demo.train_pair --out FILE.

ALBEF's three losses: contrastive, image-text matching and masked words, without its momentum teacher and its queue. The
image encoder begins with the demo network's weights, as the original begins with DeiT's. Beside the batch's hard
negatives, which contrastive similarities choose, matching sees captions that say almost the truth: another colour,
shape or relation, or the objects' places, colours or shapes exchanged. To tell those, the words must look at what they
name. Half of the pictures are mirrored, left and right in their captions with them.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import PatchDropout
from torch import Tensor, nn

from attnx.demo.captioned import RELATIONS, describe, draw_pair
from attnx.demo.model import demo_model
from attnx.demo.pair import IMAGE_SIZE, demo_pair
from attnx.demo.pointing import point_at_phrases
from attnx.demo.scenes import COLORS, SHAPES
from attnx.demo.train import HELD_OUT, Phase, learning_rate, normalize, optimizer_for, save
from attnx.models.albef import Albef

SIZES = (len(COLORS), len(SHAPES), len(RELATIONS), len(COLORS), len(SHAPES))
"""How many values each of the five facts has."""
OPPOSITE = torch.arange(len(RELATIONS)) ^ 1


@dataclass(frozen=True)
class Captions:
    """Every possible caption as the model reads it: ids int64 and mask bool, both [*SIZES, T]."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, model: Albef) -> Captions:
        assert model.tokenizer is not None
        every = itertools.product(*map(range, SIZES))
        read = [model.tokenizer(describe((c, s, r, c2, s2))).ids for c, s, r, c2, s2 in every]
        length = max(map(len, read))
        pad = model.tokenizer.id_of("[PAD]")
        ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in read]).view(*SIZES, length)
        return cls(ids, ids != pad)

    def __call__(self, facts: Tensor) -> tuple[Tensor, Tensor]:
        """Facts [P, 5] -> ids and mask [P, T]."""
        return self.ids[facts.unbind(-1)], self.mask[facts.unbind(-1)]


def load_pairs(seeds: range) -> tuple[Tensor, Tensor]:
    """Draw captioned scenes: images uint8 [S, 3, H, W], facts int64 [S, 5]."""
    images = torch.empty(len(seeds), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    facts = torch.empty(len(seeds), 5, dtype=torch.int64)
    for row, seed in enumerate(seeds):
        scene = draw_pair(seed, IMAGE_SIZE)
        images[row] = torch.from_numpy(scene.image).permute(2, 0, 1)
        facts[row] = torch.tensor(scene.facts)
    return images, facts


def converse(facts: Tensor) -> Tensor:
    """[..., 5]: the same said from the other object, "a blue square right of a red circle"."""
    color, shape, relation, color2, shape2 = facts.unbind(-1)
    return torch.stack([color2, shape2, OPPOSITE[relation], color, shape], -1)


def meaning(facts: Tensor) -> Tensor:
    """[..., 5] -> [...] int64: equal where two captions say the same."""
    weights = torch.tensor([int(np.prod(SIZES[i + 1 :])) for i in range(5)])
    return torch.minimum((facts * weights).sum(-1), (converse(facts) * weights).sum(-1))


def mirror(images: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror the first half of a batch left to right, captions too, and say every second one from the other object."""
    half = len(images) // 2
    images, facts = torch.cat([images[:half].flip(3), images[half:]]), facts.clone()
    relation = facts[:half, 2]
    facts[:half, 2] = torch.where(relation < 2, OPPOSITE[relation], relation)
    facts[::2] = converse(facts[::2])
    return images, facts


def falsify(facts: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Captions [B, count, 5] that are nearly those of `facts` [B, 5], and not true: one change each, at random."""
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
    made = torch.stack([torch.stack(facts_of, -1) for facts_of in changed], 1)
    # An exchange of two equal colours changes nothing.
    false = meaning(made) != meaning(facts)[:, None]
    order = torch.rand(false.shape, generator=generator).masked_fill(~false, -1.0).argsort(1, descending=True)
    return made.gather(1, order[:, :count, None].expand(-1, -1, 5))


class Objective(nn.Module):
    """The model and its losses; the head that names masked words is used in training only."""

    def __init__(self, model: Albef, args: argparse.Namespace) -> None:
        super().__init__()
        self.model = model
        self.captions = Captions.of(model)
        assert model.tokenizer is not None
        self.mask_id, self.names = model.tokenizer.id_of("[MASK]"), model.tokenizer.id_of(next(iter(COLORS)))
        self.words_head = nn.Linear(model.config.width, model.config.vocab_size)
        self.false, self.masked = args.false, args.masked
        self.generator = torch.Generator().manual_seed(args.seed)

    def forward(self, images: Tensor, facts: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Losses by name, and the share of true and of false pairs [2] that matching gets right.

        images: float32 [B, 3, H, W]; facts: int64 [B, 5], true of them.
        """
        image = self.model.encode_image(images)
        false = falsify(facts, self.false, self.generator)
        ids, mask = self.captions(torch.cat([facts, false.flatten(0, 1)]))
        words = self.model.encode_text(ids, mask)
        same = meaning(facts)[:, None] == meaning(facts)[None]
        contrastive, similar = self._contrast(image, words[: len(facts)], same)
        matching, right = self._match(image, ids, mask, words, similar, same)
        return {"itc": contrastive, "itm": matching, "mlm": self._name_masked(image, facts)}, right

    def _contrast(self, image: Tensor, words: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """The contrastive loss, and similarities [B, B] of images (rows) and captions."""
        model = self.model
        assert model.vision_proj is not None
        assert model.text_proj is not None
        assert model.temp is not None
        seen = F.normalize(model.vision_proj(image[:, 0]), dim=-1)
        said = F.normalize(model.text_proj(words[:, 0]), dim=-1)
        similar = seen @ said.T / model.temp.clamp(0.02, 0.5)
        target = same.float() / same.sum(1)
        return 0.5 * (F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)), similar.detach()

    def _match(
        self, image: Tensor, ids: Tensor, mask: Tensor, words: Tensor, similar: Tensor, same: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The matching loss, true and false pairs weighing the same: true captions, hard ones, and falsified ones."""
        assert self.model.itm_head is not None
        B = len(image)
        own = torch.arange(B)
        caption = torch.multinomial(similar.masked_fill(same, -1e4).softmax(1), 1, generator=self.generator)[:, 0]
        picture = torch.multinomial(similar.T.masked_fill(same, -1e4).softmax(1), 1, generator=self.generator)[:, 0]
        rows = torch.cat([own, caption, own, torch.arange(B, len(words))])
        owner = torch.cat([own, own, picture, own.repeat_interleave(self.false)])
        layers = self.model.cross_layers
        fused = self.model.encode_text(ids[rows], mask[rows], image, owner, words=words[rows], layers=layers)
        logits = self.model.itm_head(fused[:, 0])
        true, false = logits[:B], logits[B:]
        yes, no = torch.ones(B, dtype=torch.int64), torch.zeros(len(false), dtype=torch.int64)
        loss = 0.5 * (F.cross_entropy(true, yes) + F.cross_entropy(false, no))
        right = torch.stack([(true.argmax(1) == 1).float().mean(), (false.argmax(1) == 0).float().mean()])
        return loss, right

    def _name_masked(self, image: Tensor, facts: Tensor) -> Tensor:
        """Cross-entropy of masked words, among those that say something: colours, shapes, relations."""
        ids, mask = self.captions(facts)
        hidden = (torch.rand(ids.shape, generator=self.generator) < self.masked) & (ids >= self.names)
        words = self.model.encode_text(ids.masked_fill(hidden, self.mask_id), mask, image)
        return F.cross_entropy(self.words_head(words[hidden]), ids[hidden])


def train(objective: Objective, images: Tensor, facts: Tensor, phase: Phase, args: argparse.Namespace) -> None:
    """Train the model in place, and save it whenever a line is printed.

    images: uint8 [S, 3, H, W]; facts: int64 [S, 5].
    """
    started = time.time()
    rng = np.random.default_rng(args.seed)
    optimizer = optimizer_for(objective, args.weight_decay, ("pos_embed", "cls_token", "embeddings.weight"))
    vision = objective.model.visual_encoder
    whole, vision.patch_drop = vision.patch_drop, PatchDropout(phase.patch_drop, num_prefix_tokens=1)
    objective.train()
    order = np.empty(0, dtype=np.int64)
    told: list[dict[str, float]] = []
    for step in range(phase.steps):
        if len(order) < args.batch_size:
            order = rng.permutation(len(images))
        rows, order = torch.from_numpy(order[: args.batch_size]), order[args.batch_size :]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, phase)
        pictures, said = mirror(images[rows], facts[rows])
        losses, right = objective(normalize(pictures), said)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        told.append({name: loss.item() for name, loss in losses.items()})
        told[-1] |= {"true": right[0].item(), "false": right[1].item()}
        if (step + 1) % args.log_every == 0 or step + 1 == phase.steps:
            means = "  ".join(f"{name} {np.mean([t[name] for t in told]):.3f}" for name in told[0])
            print(f"{phase.name} {step + 1}/{phase.steps}  {means}  {time.time() - started:.0f} s", flush=True)
            told = []
            save(objective.model, args.out)
    vision.patch_drop = whole
    objective.eval()


def begin(model: Albef) -> None:
    """Give the image encoder the demo network's weights."""
    own = model.visual_encoder.state_dict()
    model.visual_encoder.load_state_dict({k: v for k, v in demo_model().state_dict().items() if k in own})


@torch.no_grad()
def judge(model: Albef, seeds: range) -> dict[str, float]:
    """The share of true captions that the model takes for true, and of falsified ones that it doesn't."""
    images, facts = load_pairs(seeds)
    false = falsify(facts, 1, torch.Generator().manual_seed(0))[:, 0]
    captions = Captions.of(model)
    accepted: dict[str, list[Tensor]] = {"true": [], "false": []}
    for rows in torch.arange(len(seeds)).split(100):
        for name, said in (("true", facts), ("false", false)):
            accepted[name].append(model(normalize(images[rows]), *captions(said[rows])).argmax(1) == 1)
    return {
        "true captions accepted": torch.cat(accepted["true"]).float().mean().item(),
        "false captions refused": 1.0 - torch.cat(accepted["false"]).float().mean().item(),
    }


def main() -> None:
    """Train, save, and print how good the saved weights are on held-out scenes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="weights file to write (.safetensors)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000, help="steps with some patches left out")
    parser.add_argument("--whole-steps", type=int, default=600, help="steps on whole pictures after that")
    parser.add_argument("--patch-drop", type=float, default=0.4, help="share of patches left out at first")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--false", type=int, default=3, help="falsified captions for every true one, at most 4")
    parser.add_argument("--masked", type=float, default=0.3, help="share of the telling words that are masked")
    parser.add_argument("--scenes", type=int, default=24_000, help="training scenes to draw")
    parser.add_argument("--held-out", type=int, default=1000, help="held-out scenes to test on")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak rate; a third of it on whole pictures")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--log-every", type=int, default=100, help="steps")
    args = parser.parse_args()
    if args.scenes > HELD_OUT:
        parser.error(f"--scenes must not reach the held-out seeds, from {HELD_OUT} on")

    torch.manual_seed(args.seed)
    model = demo_pair(pretrained=False).requires_grad_(True)
    begin(model)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    started = time.time()
    images, facts = load_pairs(range(args.scenes))
    print(f"drew {args.scenes} scenes in {time.time() - started:.0f} s", flush=True)
    objective = Objective(model, args)
    # With patches missing, what a word names must be read from several places on the object, not from one corner.
    train(objective, images, facts, Phase("sparse", args.steps, args.lr, 100, args.patch_drop), args)
    train(objective, images, facts, Phase("whole", args.whole_steps, args.lr / 3, 50, 0.0), args)
    print(f"trained in {(time.time() - started) / 60:.0f} min")
    # The test reads what float16 keeps of the weights.
    model.half().float()
    held_out = range(HELD_OUT, HELD_OUT + args.held_out)
    scores = judge(model, held_out) | point_at_phrases(len(held_out), HELD_OUT, model).shares
    print(f"{args.held_out} held-out scenes:", *(f"{name} {share:.3f}" for name, share in scores.items()), sep="\n  ")


if __name__ == "__main__":
    main()
