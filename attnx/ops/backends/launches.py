"""Launches of Triton and Gluon kernels: on a tensor's device, for its target, and with heads that are split."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from attnx.kernels.configs import Launch, Target, head_splits
from attnx.kernels.map import fuse_launch
from attnx.ops.backends.plans import note
from attnx.ops.reducers import Reduction


def fused_map(
    q: Tensor, rows: int, keys: int, reduction: Reduction, tiles: int, launch: Callable[[Tensor, int], Launch]
) -> Tensor:
    """The map of a launch that splits the heads over programs where the tiles are too few for the device.

    Args:
        q: [B, H, M, D].
        rows, keys: sizes of the map.
        reduction: of the heads.
        tiles: programs of a map whose heads are not split.
        launch: makes the launch from partial maps [B * splits, rows, keys] and the number of splits.

    Returns:
        [B, rows, keys] float32, or [B, H, rows, keys] for EACH.
    """
    B, H = q.shape[:2]
    each = reduction is Reduction.EACH
    splits = H if each else head_splits(tiles * B, H, target(q.device))
    maps = q.new_empty((B * splits, rows, keys), dtype=torch.float32)
    run(launch(maps, splits), q)
    if each:
        return maps.view(B, H, rows, keys)
    if splits == 1:
        return maps
    amap = q.new_empty((B, rows, keys), dtype=torch.float32)
    run(fuse_launch(maps, amap, H, splits, int(reduction)), q)
    return amap


def run(launch: Launch, q: Tensor) -> None:
    """Run the launch on q's device, which need not be the current one."""
    if q.device.type == "cuda" and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            compiled = launch.run()
    else:
        compiled = launch.run()
    note(launch, compiled)


@cache
def target(device: torch.device) -> Target:
    """The target that kernels are compiled for on a device; the interpreter takes Hopper's block sizes."""
    if device.type != "cuda":
        return Target("cuda", 90)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", 10 * major + minor, properties.multi_processor_count)
