"""Compile kernels for any target and read their resource usage from the compiler's output. No GPU is needed.

`attnx kernels` prints the resource usage of every kernel in its default configurations.
"""

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnx.kernels.configs import Launch, Target
from attnx.kernels.inspect.launches import launches
from attnx.kernels.inspect.loops import Loop, main_loop
from attnx.kernels.inspect.machine_code import Kind, parse
from attnx.kernels.inspect.undefined import undefined

TARGETS = (*(Target("cuda", arch) for arch in (80, 86, 89, 90, 100)), Target("hip", "gfx942"))
# Maximum shared memory per program, in bytes.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, "gfx942": 64 << 10}
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.uint8: "u8"}


class Resources(NamedTuple):
    """Resource usage of a kernel on a target, and instruction counts of its machine code.

    registers: registers per thread. On AMD, vector registers including accumulation registers.
    spills: spilled bytes per thread.
    shared: bytes of shared memory that a program uses.
    limit: bytes of shared memory that a program may use.
    matrix: names of the matrix instructions, such as "HGMMA+HMMA", or of the fp32 instruction if there are none.
    dots: multiply-adds of the matrix instructions, divided by those of one tile's product of queries and keys. None
        if the shape of an instruction is unknown. If it is larger than in the source, warps duplicate work.
    batches: number of groups in which Hopper's matrix instructions are issued. If it equals `matrix_count`, ptxas
        issues them one by one.
    exp_count: number of exponential instructions.
    sgpr_spills: AMD scalar registers that are spilled to lanes of vector registers.
    agprs: AMD accumulation registers.
    undefined: the first instruction that reads an unwritten register, else "". See `kernels/inspect/undefined.py`.
    loop: the main loop of a kernel for Hopper, see `kernels/inspect/loops.py`; None for the other kernels.
    error: message of the compiler error, else "".
    """

    kernel: str
    target: str
    dtype: str
    head_dim: int
    config: tuple[int, int, int, int, int]
    registers: int = 0
    spills: int = 0
    shared: int = 0
    limit: int = 0
    matrix: str = ""
    matrix_count: int = 0
    dots: float | None = None
    batches: int = 0
    exp_count: int = 0
    sgpr_spills: int = 0
    agprs: int = 0
    undefined: str = ""
    loop: Loop | None = None
    error: str = ""


def compile_for(launch: Launch, target: Target) -> Any:
    """Compile the kernel of a launch for the target.

    Arguments are specialised (divisible by 16, equal to 1) as in a real call.
    """
    values = {**launch.args, "BLOCK_M": launch.config.block_m, "BLOCK_N": launch.config.block_n}
    signature, constants, attrs = {}, {}, {}
    for i, param in enumerate(launch.kernel.params):
        value = values[param.name]
        if param.is_constexpr or (isinstance(value, int) and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        if not isinstance(value, torch.Tensor | int | float):  # a Box of the kernels for Hopper
            signature[param.name] = value.type_name(_TYPES[value.tensor.dtype])
            continue
        if isinstance(value, torch.Tensor):
            signature[param.name] = "*" + _TYPES[value.dtype]
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = source_class(launch)(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attrs)
    on = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=on, options=options)


def source_class(launch: Launch) -> Any:
    """Triton's class for the source of the kernel, which is written in Triton or in Gluon."""
    if not _is_gluon(launch):
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _is_gluon(launch: Launch) -> bool:
    return bool(getattr(launch.kernel, "is_gluon", bool)())


def target_name(target: Target) -> str:
    """Name of the target, such as "sm_90" or "gfx942"."""
    return f"{'sm_' if target.backend == 'cuda' else ''}{target.arch}"


def resources(name: str, launch: Launch, target: Target) -> Resources:
    """Compile the launch for the target and read its resource usage from the machine code."""
    compiled = compile_for(launch, target)
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        code, found = parse(text), _amd_usage(text)
    else:
        text = cuobjdump(compiled.asm["cubin"], "-sass")
        code = parse(text)
        usage = cuobjdump(compiled.asm["cubin"], "-res-usage")
        registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
        # The stack size is used because stack slots are reused: counting the stores would give too many bytes.
        found = dict[str, Any](registers=registers, spills=stack if code.count(Kind.SPILL) else 0)
        found["undefined"] = next(iter(undefined(text)), "")
        if _is_gluon(launch):
            found["loop"] = main_loop(text, compiled.asm["ptx"], int(target.arch))
    units = code.matrix()
    fp32 = sum(i.opcode.startswith(("FFMA", "v_fma", "v_pk_fma")) for i in code.instructions)
    product_fmas = _multiply_adds(launch)
    return _described(name, launch, target)._replace(
        **found,
        shared=compiled.metadata.shared,
        matrix="+".join(unit.removeprefix("v_").upper() for unit in sorted(units)) or ("FFMA" if fp32 else ""),
        matrix_count=sum(units.values()) or fp32,
        dots=code.fmas() * launch.config.num_warps / product_fmas if code.fmas() and product_fmas else None,
        batches=sum(i.opcode == "WARPGROUP.ARRIVE" for i in code.instructions),
        exp_count=code.count(Kind.EXP),
    )


def _multiply_adds(launch: Launch) -> int:
    """Multiply-adds of the product of one tile of queries with its keys, including padding."""
    args = launch.args
    keys = launch.config.block_n * args.get("PARTS", 1) + args.get("TAIL", 0)
    return launch.config.block_m * keys * (args.get("BLOCK_D", 0) + args.get("REST_D", 0))


def _described(name: str, launch: Launch, target: Target) -> Resources:
    """A row with name, target, dtype and configuration only.

    The dtype is that of q, or of the first tensor if the launch has no q.
    """
    if "q_desc" in launch.args:
        q = launch.args["q_desc"].tensor
    else:
        q = launch.args.get("q_ptr", next(v for v in launch.args.values() if isinstance(v, torch.Tensor)))
    described = (name, target_name(target), _TYPES[q.dtype], launch.args.get("D", q.shape[-1]), tuple(launch.config))
    return Resources(*described, limit=SHARED_LIMIT.get(target.arch, 0))


def _amd_usage(text: str) -> dict[str, Any]:
    """Registers and spills from the metadata of an AMDGCN assembly."""
    keys = ("vgpr_count", "agpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    vgprs, agprs, spilled, scalars, stack = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in keys)  # type: ignore[index]
    return dict(registers=vgprs, agprs=agprs, spills=max(4 * spilled, stack), sgpr_spills=scalars)


def cuobjdump(cubin: bytes, flag: str) -> str:
    """Run `cuobjdump FLAG` from Triton's wheel on a compiled kernel and return its output."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def compile_defaults(
    targets: list[Target], head_dims: list[int], dtypes: list[torch.dtype], jobs: int
) -> list[Resources]:
    """Compile every kernel in its default configurations in `jobs` processes and return its resource usage."""
    tasks = list(product(targets, head_dims, dtypes))
    rows: list[Resources] = []
    for (target, head_dim, dtype), found in zip(tasks, in_processes(_compile_some, tasks, jobs), strict=True):
        if isinstance(found, BrokenProcessPool):
            raise RuntimeError(
                f"the compiler crashed on {target_name(target)}, head dim {head_dim}, {dtype}"
            ) from found
        if isinstance(found, BaseException):
            raise found
        rows += found
    return rows


def in_processes(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], jobs: int) -> list[Any]:
    """Results of function(*task) for each task, computed in `jobs` processes.

    The result of a task that fails is its exception. A compiler crash ends its process and breaks the pool. The tasks
    without a result are then run again, each in a pool of its own.
    """
    # torch starts threads, and forking a process with threads can deadlock.
    with ProcessPoolExecutor(max(1, min(jobs, len(tasks))), multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, *task) for task in tasks]
    results = []
    for task, future in zip(tasks, futures, strict=True):
        error = future.exception()
        if isinstance(error, BrokenProcessPool) and len(tasks) > 1:
            results += in_processes(function, [task], 1)
        else:
            results.append(future.result() if error is None else error)
    return results


def _compile_some(target: Target, head_dim: int, dtype: torch.dtype) -> list[Resources]:
    """Resource usage of every kernel for one target, head dim and dtype. A compiler error becomes a row's `error`."""
    rows = []
    for name, launch in launches(head_dim, dtype, target):
        try:
            rows.append(resources(name, launch, target))
        except FileNotFoundError:
            # cuobjdump is missing, so every kernel would fail.
            raise
        # The compiler's errors have no common base class.
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            rows.append(_described(name, launch, target)._replace(error=f"{type(error).__name__}: {first}"[:200]))
    return rows
