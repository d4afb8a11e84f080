"""Compiles launches for targets that are not at hand and reads what the compiler says of them. No GPU is needed.

python -m attnx.kernels.offline --json        every kernel, default configurations, five targets
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnx.kernels.configs import Launch, Target, one_pass_config
from attnx.kernels.forward import forward_launch, one_pass_launch, shared_args, value_args
from attnx.kernels.map import map_launch

TARGETS = (Target("cuda", 80), Target("cuda", 86), Target("cuda", 90), Target("cuda", 100), Target("hip", "gfx942"))
SHARED_LIMIT = {
    80: 163 << 10,
    86: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    "gfx942": 64 << 10,
}  # bytes a program may use
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.uint8: "u8"}


class Resources(NamedTuple):
    """registers and spilled bytes a thread, shared memory a program in bytes, and instruction counts."""

    kernel: str
    target: str
    dtype: str
    head_dim: int
    config: tuple[int, int, int, int]
    registers: int
    spills: int
    shared: int
    matrix: str
    matrix_count: int
    exp_count: int


def launches(head_dim: int, dtype: torch.dtype, target: Target) -> Iterator[tuple[str, Launch]]:
    """Every kernel as the backend would launch it for a packed ViT qkv, with shape-only tensors.

    Their names: "map" has no bias, "map_bias" an additive and "map_mask" a boolean one.
    """
    for kind, bias_dtype in (("", None), ("_bias", dtype), ("_mask", torch.bool)):
        for name, launch in _launches(head_dim, dtype, target, bias_dtype):
            yield name + kind, launch


def _launches(
    head_dim: int, dtype: torch.dtype, target: Target, bias_dtype: torch.dtype | None
) -> Iterator[tuple[str, Launch]]:
    for name, n in (("one_pass", 197), ("forward", 1370), ("map", 1370), ("map_row", 1370)):
        qkv = torch.empty(2, n, 3, 12, head_dim, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        rows = torch.empty(1, dtype=torch.int64, device="meta") if name == "map_row" else None
        out = torch.empty(2, n, 12, head_dim, dtype=dtype, device="meta").transpose(1, 2)
        bias = None
        if bias_dtype is not None:
            bias = torch.empty(1, 12, n, n, dtype=bias_dtype, device="meta").expand(2, -1, -1, -1)
        shared = shared_args(q, k, bias, rows, head_dim**-0.5, False)
        lse = torch.empty(2, 12, shared["M"], device="meta")
        amap = torch.empty(2, shared["M"], n, device="meta")
        if name == "forward":
            yield name, forward_launch(shared, value_args(q, v, out), lse, target)
        elif name == "one_pass":
            config = one_pass_config(head_dim, q.element_size(), n, target, bias is not None)
            if config is not None:
                yield name, one_pass_launch(shared, value_args(q, v, out), lse, amap, 0, config)
        else:
            yield name, map_launch(shared, lse, amap, 0, target)


def compile_for(launch: Launch, target: Target) -> Any:
    """The compiled kernel of a launch, with the specialisations (divisible by 16, equal to 1) a real call would get."""
    values = {**launch.args, "BLOCK_M": launch.config.block_m, "BLOCK_N": launch.config.block_n}
    signature, constants, attrs = {}, {}, {}
    for i, param in enumerate(launch.kernel.params):
        value = values[param.name]
        if param.is_constexpr or (isinstance(value, int) and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[param.name] = "*" + _TYPES[value.dtype]
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attrs)
    on = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=on, options=options)


def resources(name: str, launch: Launch, target: Target) -> Resources:
    """What the launch takes on the target, read from the machine code."""
    compiled = compile_for(launch, target)
    q = launch.args["q_ptr"]
    described = (name, f"{'sm_' if target.backend == 'cuda' else ''}{target.arch}", _TYPES[q.dtype], q.shape[-1])
    shared = compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
            for key in ("vgpr_count", "vgpr_spill_count")
        )
        count = (text.count("v_mfma_"), text.count("v_exp_f32"))
        return Resources(*described, tuple(launch.config), registers, 4 * spills, shared, "MFMA", *count)
    usage, sass = (_cuobjdump(compiled.asm["cubin"], flag) for flag in ("-res-usage", "-sass"))
    registers = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]
    spills = 4 * len(re.findall(r"\bSTL(?:\.\S+)?\s", sass))
    units = {unit: len(re.findall(rf"\b{unit}", sass)) for unit in ("HGMMA", "HMMA", "UTCHMMA", "FFMA")}
    unit = next((unit for unit in ("HGMMA", "HMMA", "UTCHMMA") if units[unit]), "FFMA")
    count = (units[unit], len(re.findall(r"MUFU\.EX2", sass)))
    return Resources(*described, tuple(launch.config), registers, spills, shared, unit, *count)


def _cuobjdump(cubin: bytes, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def main(argv: list[str] | None = None) -> int:
    """Prints a line (or with --json a list) of Resources for every kernel, target and head dim."""
    parser = argparse.ArgumentParser(prog="attnx.kernels.offline", description=main.__doc__)
    parser.add_argument("--arch", action="append", help="80, 86, 90, 100 or gfx942; repeatable; all unless given")
    parser.add_argument("--head-dim", type=int, action="append", help="repeatable; 64 unless given")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    targets = [t for t in TARGETS if not options.arch or str(t.arch) in options.arch]
    rows = [
        resources(name, launch, target)
        for target in targets
        for head_dim in options.head_dim or [64]
        for name, launch in launches(head_dim, getattr(torch, options.dtype), target)
    ]
    if options.json:
        json.dump([row._asdict() for row in rows], sys.stdout)
    else:
        for row in rows:
            print(*row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
