"""Train the demo ALBEF on captioned scenes and write its weights: python -m attnx.demo.training.albef --out FILE.

The losses are ALBEF's: contrastive, image-text matching and masked language modelling, without the momentum teacher and
the queue. The image encoder is initialised from the demo network's first blocks, as the original is from DeiT's.

The matching loss has two kinds of texts (`attnx.demo.training.objective`):
- Captions. The negatives are the batch's hard negatives, sampled by contrastive similarity, and captions with one
  random change.
- Phrases of one or two words about one object, true or false. They train each word to attend to the object it names.
  Half of the scenes lack one object or both; these scenes have phrases only.

Half of the pictures are mirrored, and left and right are swapped in their captions.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from attnx.demo.albef import IMAGE_SIZE, demo_albef
from attnx.demo.captioned import draw_pair
from attnx.demo.pointing import point_at_phrases
from attnx.demo.training.objective import OPPOSITE, Objective, captions, converse, falsify
from attnx.demo.training.vit import HELD_OUT, Phase, learning_rate, normalize, optimizer_for, save
from attnx.demo.vit import demo_model
from attnx.models.albef import Albef

VISION_RATE = 0.3
"""Learning rate of the image encoder relative to the other weights. It is lower because the encoder is pretrained."""
BOTH = (True, True)
SHOWN = (*[BOTH] * 6, *[(True, False), (False, True), (False, False)] * 2)
"""(first, second): the objects that training scenes show, repeated in this order. If every scene showed both, a word
could attend to the other object. The bundled weights were trained with this order."""


def load_pairs(seeds: range, shown: Sequence[tuple[bool, bool]] = (BOTH,)) -> tuple[Tensor, Tensor, Tensor]:
    """Draw captioned scenes.

    Args:
        seeds: one seed for each scene.
        shown: (first, second), the objects that a scene shows. The scenes take these in turn.

    Returns:
        Images uint8 [S, 3, H, W], facts int64 [S, 5] and shown bool [S, 2].
    """
    images = torch.empty(len(seeds), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    facts = torch.empty(len(seeds), 5, dtype=torch.int64)
    seen = list(itertools.islice(itertools.cycle(shown), len(seeds)))
    for row, seed in enumerate(seeds):
        scene = draw_pair(seed, IMAGE_SIZE, seen[row])
        images[row] = torch.from_numpy(scene.image).permute(2, 0, 1)
        facts[row] = torch.tensor(scene.facts)
    return images, facts, torch.tensor(seen)


def mirror(images: Tensor, facts: Tensor, shown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Augment a batch of images, facts and shown.

    The first half is mirrored left to right, and left and right are swapped in its facts. Every second caption
    describes the relation from the other object.
    """
    half = len(images) // 2
    images, facts, shown = torch.cat([images[:half].flip(3), images[half:]]), facts.clone(), shown.clone()
    relation = facts[:half, 2]
    facts[:half, 2] = torch.where(relation < 2, OPPOSITE[relation], relation)
    facts[::2], shown[::2] = converse(facts[::2]), shown[::2].flip(1)
    return images, facts, shown


def train(
    objective: Objective, images: Tensor, facts: Tensor, shown: Tensor, phase: Phase, args: argparse.Namespace
) -> None:
    """Train the model in place, and save it whenever a log line is printed.

    Args:
        images: uint8 [S, 3, H, W].
        facts: int64 [S, 5].
        shown: bool [S, 2].
    """
    started = time.time()
    rng = np.random.default_rng(args.seed)
    optimizer = optimizer_for(objective, args.weight_decay, ("pos_embed", "cls_token", "embeddings.weight"))
    seeing = {id(parameter) for parameter in objective.model.visual_encoder.parameters()}
    for group in list(optimizer.param_groups):
        apart = [parameter for parameter in group["params"] if id(parameter) in seeing]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in seeing]
        group["share"] = 1.0
        optimizer.add_param_group({"params": apart, "weight_decay": group["weight_decay"], "share": VISION_RATE})
    objective.train()
    order = np.empty(0, dtype=np.int64)
    history: list[dict[str, float]] = []
    for step in range(phase.steps):
        if len(order) < args.batch_size:
            order = rng.permutation(len(images))
        rows, order = torch.from_numpy(order[: args.batch_size]), order[args.batch_size :]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, phase) * group["share"]
        pictures, said, seen = mirror(images[rows], facts[rows], shown[rows])
        losses, right = objective(normalize(pictures), said, seen)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()} | right)
        if (step + 1) % args.log_every == 0 or step + 1 == phase.steps:
            means = "  ".join(f"{name} {np.mean([t[name] for t in history]):.3f}" for name in history[0])
            print(f"{step + 1}/{phase.steps}  {means}  {time.time() - started:.0f} s", flush=True)
            history = []
            save(objective.model, args.out)
    objective.eval()


def begin(model: Albef) -> None:
    """Copy the demo network's first blocks into the image encoder."""
    own = model.visual_encoder.state_dict()
    model.visual_encoder.load_state_dict({k: v for k, v in demo_model().state_dict().items() if k in own})


@torch.no_grad()
def judge(model: Albef, seeds: range) -> dict[str, float]:
    """Share of true captions that the model accepts, and share of false captions that it refuses."""
    images, facts, _ = load_pairs(seeds)
    false = falsify(facts, 1, torch.Generator().manual_seed(0))[:, 0]
    assert model.tokenizer is not None
    read = captions(model.tokenizer)
    accepted: dict[str, list[Tensor]] = {"true": [], "false": []}
    for rows in torch.arange(len(seeds)).split(100):
        for name, said in (("true", facts), ("false", false)):
            accepted[name].append(model(normalize(images[rows]), *read(said[rows])).argmax(1) == 1)
    return {
        "true captions accepted": torch.cat(accepted["true"]).float().mean().item(),
        "false captions refused": 1.0 - torch.cat(accepted["false"]).float().mean().item(),
    }


def main() -> None:
    """Train, save, and print the scores of the saved weights on held-out scenes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="weights file to write (.safetensors)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--masked", type=float, default=0.3, help="share of the telling words that are masked")
    parser.add_argument("--scenes", type=int, default=32_000, help="training scenes to draw")
    parser.add_argument("--held-out", type=int, default=1000, help="held-out scenes to test on")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak rate")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--log-every", type=int, default=250, help="steps")
    args = parser.parse_args()
    if args.scenes > HELD_OUT:
        parser.error(f"--scenes must not reach the held-out seeds, from {HELD_OUT} on")

    torch.manual_seed(args.seed)
    model = demo_albef(pretrained=False).requires_grad_(True)
    begin(model)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    started = time.time()
    images, facts, shown = load_pairs(range(args.scenes), SHOWN)
    print(f"drew {args.scenes} scenes in {time.time() - started:.0f} s", flush=True)
    objective = Objective(model, args)
    train(objective, images, facts, shown, Phase("pair", args.steps, args.lr, 50, 0.0), args)
    print(f"trained in {(time.time() - started) / 60:.0f} min")
    # Weights are saved in float16, so they are tested with float16 precision.
    model.half().float()
    held_out = range(HELD_OUT, HELD_OUT + args.held_out)
    scores = judge(model, held_out) | point_at_phrases(len(held_out), HELD_OUT, model).shares
    print(f"{args.held_out} held-out scenes:", *(f"{name} {share:.3f}" for name, share in scores.items()), sep="\n  ")


if __name__ == "__main__":
    main()
