"""Train the demo network on drawn scenes and write its weights: python -m attnx.demo.training.vit --out FILE."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from attnx.demo.scenes import CLASSES, draw_scene
from attnx.demo.vit import IMAGE_SIZE, MEAN, STD, demo_model
from attnx.methods import cls_map, pointing_game, rollout
from attnx.trace.capture import capture

HELD_OUT = 10_000_000
"""Scenes with seeds from here on are never trained on."""


@dataclass(frozen=True)
class Phase:
    """A phase of training with its own learning rate schedule.

    patch_drop: share of patches that are randomly dropped from each picture.
    """

    name: str
    steps: int
    peak: float
    warmup: int
    patch_drop: float


def load_scenes(seeds: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw scenes: images uint8 [S, 3, H, W], labels int64 [S], boxes int64 [S, 4] in pixels."""
    images = torch.empty(len(seeds), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    labels = torch.empty(len(seeds), dtype=torch.int64)
    boxes = torch.empty(len(seeds), 4, dtype=torch.int64)
    for row, seed in enumerate(seeds):
        scene = draw_scene(seed, IMAGE_SIZE)
        images[row] = torch.from_numpy(scene.image).permute(2, 0, 1)
        labels[row] = scene.label
        boxes[row] = torch.tensor(scene.box)
    return images, labels, boxes


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 [B, 3, H, W] into the float32 input of the network."""
    mean = torch.tensor(MEAN, device=images.device)[:, None, None]
    std = torch.tensor(STD, device=images.device)[:, None, None]
    return (images.float() / 255.0 - mean) / std


def mirror_half(images: torch.Tensor) -> torch.Tensor:
    """Mirror the first half of a batch [B, 3, H, W] left to right. Mirroring does not change the class."""
    half = len(images) // 2
    return torch.cat([images[:half].flip(3), images[half:]])


def learning_rate(step: int, phase: Phase) -> float:
    """Learning rate of a step: linear warmup to the phase's peak, then cosine decay to zero."""
    if step < phase.warmup:
        return phase.peak * (step + 1) / phase.warmup
    done = (step - phase.warmup) / max(1, phase.steps - phase.warmup)
    return 0.5 * phase.peak * (1.0 + math.cos(math.pi * done))


def optimizer_for(model: nn.Module, weight_decay: float, skip: tuple[str, ...]) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    Biases, norms and parameters whose names end with one of ``skip`` are not decayed.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim < 2 or name.endswith(skip) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def train(
    model: VisionTransformer, images: torch.Tensor, labels: torch.Tensor, phase: Phase, args: argparse.Namespace
) -> None:
    """Train ``model`` in place with cross-entropy on the scene's class.

    Args:
        images: uint8 [S, 3, H, W].
        labels: int64 [S].
    """
    started = time.time()
    rng = np.random.default_rng(args.seed)
    optimizer = optimizer_for(model, args.weight_decay, tuple(model.no_weight_decay()))
    whole = model.patch_drop
    model.patch_drop = PatchDropout(phase.patch_drop, num_prefix_tokens=model.num_prefix_tokens)
    model.train()
    order = np.empty(0, dtype=np.int64)
    losses: list[float] = []
    hits: list[float] = []
    for step in range(phase.steps):
        if len(order) < args.batch_size:
            order = rng.permutation(len(images))
        rows, order = torch.from_numpy(order[: args.batch_size]), order[args.batch_size :]
        target = labels[rows].to(args.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, phase)
        logits = model(normalize(mirror_half(images[rows]).to(args.device)))
        loss = F.cross_entropy(logits, target, label_smoothing=args.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        hits.append((logits.argmax(1) == target).float().mean().item())
        if (step + 1) % args.log_every == 0 or step + 1 == phase.steps:
            print(
                f"{phase.name} {step + 1}/{phase.steps}  loss {np.mean(losses):.3f}  "
                f"accuracy {np.mean(hits):.3f}  {time.time() - started:.0f} s",
                flush=True,
            )
            losses, hits = [], []
    model.patch_drop = whole
    model.eval()


@torch.no_grad()
def evaluate(model: VisionTransformer, seeds: range, device: str = "cpu") -> dict[str, float]:
    """Accuracy on the scenes of ``seeds``, and the share of each method's maps that peak inside the target's box."""
    images, labels, boxes = load_scenes(seeds)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[torch.Tensor]] = {"accuracy": [], "rollout": [], "cls": [], "random": []}
    for rows in torch.arange(len(seeds)).split(100):
        with capture(model) as trace:
            logits = model(normalize(images[rows].to(device)))
        found["accuracy"].append(logits.argmax(1).cpu() == labels[rows])
        maps = {"rollout": rollout(trace).cpu(), "cls": cls_map(trace).cpu()}
        maps["random"] = torch.rand(maps["cls"].shape, generator=generator)
        for name, amap in maps.items():
            found[name].append(pointing_game(amap, boxes[rows], (IMAGE_SIZE, IMAGE_SIZE)))
    return {name: torch.cat(hits).float().mean().item() for name, hits in found.items()}


def save(model: nn.Module, path: Path) -> None:
    """Write the weights as float16 safetensors."""
    tensors = {name: value.detach().half().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, path)


def main() -> None:
    """Train, save, and print the scores of the saved weights on held-out scenes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="weights file to write (.safetensors)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="steps with some patches left out")
    parser.add_argument("--whole-steps", type=int, default=1000, help="steps on whole pictures after that")
    parser.add_argument("--patch-drop", type=float, default=0.25, help="share of patches left out at first")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--scenes", type=int, default=24_000, help="training scenes to draw")
    parser.add_argument("--held-out", type=int, default=1000, help="held-out scenes to test on")
    parser.add_argument("--lr", type=float, default=1.2e-3, help="peak rate; half of it on whole pictures")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--log-every", type=int, default=250, help="steps")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.scenes > HELD_OUT:
        parser.error(f"--scenes must not reach the held-out seeds, from {HELD_OUT} on")

    torch.manual_seed(args.seed)
    model = demo_model(pretrained=False).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(CLASSES)} classes")
    started = time.time()
    images, labels, _ = load_scenes(range(args.scenes))
    print(f"drew {args.scenes} scenes in {time.time() - started:.0f} s", flush=True)
    # With patches dropped, the model must use several parts of the target, not one corner.
    train(model, images, labels, Phase("sparse", args.steps, args.lr, 300, args.patch_drop), args)
    train(model, images, labels, Phase("whole", args.whole_steps, args.lr / 2, 100, 0.0), args)
    print(f"trained in {(time.time() - started) / 60:.0f} min")
    save(model, args.out)
    # Weights are saved in float16, so they are tested with float16 precision.
    model.half().float()
    scores = evaluate(model, range(HELD_OUT, HELD_OUT + args.held_out), args.device)
    print(f"{args.held_out} held-out scenes: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))


if __name__ == "__main__":
    main()
