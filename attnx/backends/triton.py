"""The op on GPUs by the Triton kernels; on CPU tensors they run in Triton's interpreter."""

import os
from functools import cache

import torch
from torch import Tensor

from attnx.kernels.configs import Launch, Target, one_pass_config
from attnx.kernels.forward import forward_launch, one_pass_launch, shared_args, value_args
from attnx.kernels.map import map_launch
from attnx.reducers import Heads

MAX_HEAD_DIM = 256


def limits(q: Tensor, v: Tensor | None) -> list[str]:
    """Why this backend can't take these inputs; empty if it can."""
    widest = max(q.shape[-1], 0 if v is None else v.shape[-1])
    reasons = []
    if widest > MAX_HEAD_DIM:
        reasons.append(f"head dim {widest} is above {MAX_HEAD_DIM}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype {q.dtype} is not float16, bfloat16 or float32")
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append(f"tensors are on {q.device.type}; set TRITON_INTERPRET=1 before triton is imported to interpret")
    return reasons


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float, heads: Heads
) -> tuple[Tensor, Tensor]:
    """Output [B,H,M,Dv] in q's dtype (rows before heads in memory, as blocks want it) and map, see `ops.attention`."""
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, _run(q, k, v, out, bias, is_causal, scale, heads, None, None)


def attention_map(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: Heads,
    rows: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """The map alone, see `ops.attention_map`. Only the chosen rows are loaded."""
    if lse is not None:
        lse = (lse if rows is None else lse.index_select(2, rows)).contiguous()
    return _run(q, k, None, None, bias, is_causal, scale, heads, rows, lse)


def attention_output(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Output [B,H,M,Dv] alone."""
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    shared = shared_args(q, k, _expand(bias, q, k), None, scale, is_causal)
    _launch(forward_launch(shared, value_args(q, v, out), _lse(shared), target(q.device)), q)
    return out


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    out: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: Heads,
    rows: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """One launch for short rows; for others the output and lse first, then the map from lse."""
    shared = shared_args(q, k, _expand(bias, q, k), rows, scale, is_causal)
    values = value_args(q, v, out)
    B, H, M, N = q.shape[0], q.shape[1], shared["M"], shared["N"]
    amap = q.new_empty((B, H, M, N) if heads is Heads.EACH else (B, M, N), dtype=torch.float32)
    on = target(q.device)
    widest = max(shared["D"], values["DV"]) if v is not None else shared["D"]
    short = one_pass_config(widest, q.element_size(), N, on, bias is not None) if lse is None else None
    if short is not None:
        _launch(one_pass_launch(shared, values, _lse(shared), amap, int(heads), short), q)
        return amap
    if lse is None:
        lse = _lse(shared)
        _launch(forward_launch(shared, values, lse, on), q)
    _launch(map_launch(shared, lse, amap, int(heads), on), q)
    return amap


def _launch(launch: Launch, q: Tensor) -> None:
    """Runs it on q's device, which need not be the current one."""
    if q.device.type == "cuda":
        with torch.cuda.device(q.device):
            launch.run()
    else:
        launch.run()


def _lse(shared: dict) -> Tensor:
    q = shared["q_ptr"]
    return q.new_empty((q.shape[0], q.shape[1], shared["M"]), dtype=torch.float32)


def _expand(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


@cache
def target(device: torch.device) -> Target:
    """What the kernels are compiled for; the interpreter takes Hopper's block sizes."""
    if device.type != "cuda":
        return Target("cuda", 90)
    if torch.version.hip:
        return Target("hip", torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", 10 * major + minor)
