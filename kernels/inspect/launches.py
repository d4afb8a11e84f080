"""Launches of every kernel for the compiler, in the default configurations. Tensors are on the meta device."""

from collections.abc import Iterator
from importlib.util import find_spec

import torch

from attnx.kernels.arguments import shared_args, value_args
from attnx.kernels.configs import WHOLE_HEAD, Launch, Target, gradient_config, map_config, one_pass_config
from attnx.kernels.forward import forward_launch
from attnx.kernels.gradient import gradient_launch
from attnx.kernels.importance import importance_launch
from attnx.kernels.map import map_launch
from attnx.kernels.one_pass import one_pass_launch
from attnx.kernels.statistics import STATISTICS, statistics_launch
from attnx.kernels.vecmat import vecmat_launch

_KERNELS = {
    "one_pass": 197, "one_pass_50": 50, "one_pass_224": 224, "one_pass_257": 257,
    "forward": 1370, "map": 1370, "map_row": 1370, "vecmat": 1370, "gradient": 1370,
    "statistics": 1370, "importance": 1370,
}  # fmt: skip


def launches(head_dim: int, dtype: torch.dtype, target: Target) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of every kernel, as the backend launches it for a packed ViT qkv. Tensors are on the meta device.

    "map" has no bias, "map_bias" has an additive bias, and "map_mask" has a boolean mask. "map_row" computes selected
    rows. "one_pass" is the one-pass kernel with 197 keys, "one_pass_50" with 50 keys, and so on. Names of the kernels
    for Hopper start with "hopper_".
    """
    for kind, bias_dtype in (("", None), ("_bias", dtype), ("_mask", torch.bool)):
        for name, launch in _launches(head_dim, dtype, target, bias_dtype):
            yield name + kind, launch
    if find_spec("triton.experimental.gluon.nvidia.hopper") is not None:
        from attnx.kernels.inspect.hopper import hopper_launches

        yield from hopper_launches(head_dim, dtype, target)


def _launches(
    head_dim: int, dtype: torch.dtype, target: Target, bias_dtype: torch.dtype | None
) -> Iterator[tuple[str, Launch]]:
    for name, n in _KERNELS.items():
        if bias_dtype is not None and n in (224, 257):
            # With a bias, all lengths use one layout.
            continue
        qkv = torch.empty(2, n, 3, 12, head_dim, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        rows = torch.empty(1, dtype=torch.int64, device="meta") if name == "map_row" else None
        out = torch.empty(2, n, 12, head_dim, dtype=dtype, device="meta").transpose(1, 2)
        bias = None
        if bias_dtype is not None:
            bias = torch.empty(1, 12, n, n, dtype=bias_dtype, device="meta").expand(2, -1, -1, -1)
        shared = shared_args(q, k, bias, rows, head_dim**-0.5, False)
        lse = torch.empty(2, 12, shared["M"], device="meta")
        sizes = (
            head_dim,
            q.element_size(),
            n if name.startswith("one_pass") else shared["M"],
            target,
            bias is not None,
        )
        maps = torch.empty(2, shared["M"], n, device="meta")
        if name == "forward":
            columns = (x[..., :WHOLE_HEAD] for x in (v, out))
            yield name, forward_launch(shared, value_args(q, *columns), lse, target)
        elif name.startswith("one_pass"):
            short = one_pass_config(*sizes)
            if short is not None:
                yield name, one_pass_launch(shared, value_args(q, v, out), maps, 0, 1, short)
        elif name == "vecmat":
            r, sums = torch.empty(2, n, device="meta"), torch.empty(2, 12, n, device="meta")
            yield name, vecmat_launch(shared, r, lse, sums, target)
        elif name == "statistics":
            at, stats = torch.empty(1, n, 2, device="meta"), torch.empty(4, 2, 12, n, device="meta")
            yield name, statistics_launch(shared, lse, at, at, sum(STATISTICS.values()), 1, stats, target)
        elif name == "importance":
            yield name, importance_launch(shared, out, v, lse, lse, target)
        elif name == "gradient":
            config = gradient_config(*sizes)
            yield name, gradient_launch(shared, out, v, lse, maps, 0, True, 1, config)
        else:
            yield name, map_launch(shared, lse, maps, 0, 1, map_config(*sizes))
