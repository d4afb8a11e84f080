"""Train the demo network on drawn scenes and write its weights: python -m attnx.demo.train --out FILE."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import PatchDropout
from torch import nn

from attnx.demo.model import IMAGE_SIZE, MEAN, STD, demo_model
from attnx.demo.scenes import CLASSES, draw_scene

HELD_OUT = 10_000_000
"""Scenes with seeds from here on are never trained on."""


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
    """Mirror the first half of a batch [B, 3, H, W] left to right: every class keeps its look."""
    half = len(images) // 2
    return torch.cat([images[:half].flip(3), images[half:]])


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warmup to ``peak``, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimizer_for(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only, not biases, norms or embeddings."""
    skip = model.no_weight_decay()
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim < 2 or name in skip else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def train(model: nn.Module, args: argparse.Namespace) -> None:
    """Train ``model`` in place with plain cross-entropy on the class of the scene."""
    started = time.time()
    images, labels, _ = load_scenes(range(args.scenes))
    print(f"drew {args.scenes} scenes in {time.time() - started:.0f} s", flush=True)
    rng = np.random.default_rng(args.seed)
    optimizer = optimizer_for(model, args.weight_decay)
    # With some patches missing the class must be read from several places on the target, not from one corner.
    model.patch_drop = PatchDropout(args.patch_drop, num_prefix_tokens=model.num_prefix_tokens)
    model.train()
    order = np.empty(0, dtype=np.int64)
    losses, hits = [], []
    for step in range(args.steps):
        if len(order) < args.batch_size:
            order = rng.permutation(args.scenes)
        rows, order = torch.from_numpy(order[: args.batch_size]), order[args.batch_size :]
        batch = normalize(mirror_half(images[rows]).to(args.device))
        target = labels[rows].to(args.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        logits = model(batch)
        loss = F.cross_entropy(logits, target, label_smoothing=args.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        hits.append((logits.argmax(1) == target).float().mean().item())
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            print(
                f"step {step + 1}/{args.steps}  loss {np.mean(losses):.3f}  "
                f"accuracy {np.mean(hits):.3f}  {time.time() - started:.0f} s",
                flush=True,
            )
            losses, hits = [], []
    model.eval()


@torch.no_grad()
def attention(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run ``model`` on a batch: logits [B, C] and each layer's attention [B, heads, N, N]."""
    maps: list[torch.Tensor] = []
    handles = []
    fused = [block.attn.fused_attn for block in model.blocks]
    for block in model.blocks:
        # The fused kernel never forms the attention matrix.
        block.attn.fused_attn = False
        hook = block.attn.attn_drop.register_forward_hook(lambda _m, _i, output: maps.append(output))
        handles.append(hook)
    try:
        return model(batch), maps
    finally:
        for handle, block, was in zip(handles, model.blocks, fused, strict=True):
            handle.remove()
            block.attn.fused_attn = was


def rollout(maps: list[torch.Tensor]) -> torch.Tensor:
    """Attention rollout with half identity, heads averaged: [B, N, N]."""
    eye = torch.eye(maps[0].shape[-1], device=maps[0].device)
    result = eye
    for layer in maps:
        mixed = 0.5 * layer.mean(1) + 0.5 * eye
        result = mixed / mixed.sum(-1, keepdim=True) @ result
    return result


def peaks_inside(patch_map: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Whether the peak of each upsampled map [B, P] lies in its box [B, 4]: bool [B]."""
    grid = math.isqrt(patch_map.shape[1])
    small = patch_map.reshape(-1, 1, grid, grid)
    large = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    peak = large.flatten(1).argmax(1).cpu()
    x, y = peak % IMAGE_SIZE, peak // IMAGE_SIZE
    return (boxes[:, 0] <= x) & (x < boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 3])


def pointing_game(model: nn.Module, seeds: range, device: str = "cpu") -> dict[str, float]:
    """Accuracy on the scenes of ``seeds`` and the share of maps that peak inside the target's box."""
    images, labels, boxes = load_scenes(seeds)
    generator = torch.Generator().manual_seed(0)
    first = model.num_prefix_tokens
    found: dict[str, list[torch.Tensor]] = {"accuracy": [], "rollout": [], "cls": [], "random": []}
    for rows in torch.arange(len(seeds)).split(100):
        logits, maps = attention(model, normalize(images[rows].to(device)))
        rolled = rollout(maps)[:, 0, first:]
        last = maps[-1].mean(1)[:, 0, first:]
        noise = torch.rand(last.shape, generator=generator)
        found["accuracy"].append(logits.argmax(1).cpu() == labels[rows])
        for name, patch_map in (("rollout", rolled), ("cls", last), ("random", noise)):
            found[name].append(peaks_inside(patch_map, boxes[rows]))
    return {name: torch.cat(hits).float().mean().item() for name, hits in found.items()}


def save(model: nn.Module, path: Path) -> None:
    """Write the weights as float16 safetensors."""
    tensors = {name: value.detach().half().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, path)


def main() -> None:
    """Train, save, and print how good the saved weights are on held-out scenes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="weights file to write (.safetensors)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--scenes", type=int, default=24_000, help="training scenes to draw")
    parser.add_argument("--held-out", type=int, default=1000, help="held-out scenes to test on")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--warmup", type=int, default=300, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--patch-drop", type=float, default=0.25, help="share of patches left out in training")
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--log-every", type=int, default=250, help="steps")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.scenes > HELD_OUT:
        parser.error(f"--scenes must not reach the held-out seeds, from {HELD_OUT} on")

    torch.manual_seed(args.seed)
    model = demo_model(pretrained=False).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(CLASSES)} classes")
    train(model, args)
    save(model, args.out)
    # The test reads what float16 keeps of the weights.
    model.half().float()
    scores = pointing_game(model, range(HELD_OUT, HELD_OUT + args.held_out), args.device)
    print(f"{args.held_out} held-out scenes: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))


if __name__ == "__main__":
    main()
