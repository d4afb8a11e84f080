"""Resources of every kernel compiled for other targets: spills, matrix units, shared memory."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

triton = pytest.importorskip("triton", reason="triton is not installed, so nothing can be compiled")
ROOT = Path(__file__).resolve().parents[1]
BIASES = ("", "_bias", "_mask")
KERNELS = {kernel + bias for kernel in ("forward", "map", "map_row", "vecmat", "gradient") for bias in BIASES}
HEAD_DIMS = (32, 64, 80, 128)
OFTEN = (64,)  # those of sm_90 that are not `slow`
# sm_86 and sm_89 run sm_80's instructions, and LLVM takes a minute per head dim for gfx942.
CASES = [
    *(("bfloat16", target, dim) for target in ("sm_80", "sm_90", "sm_100") for dim in HEAD_DIMS),
    *(("bfloat16", target, 64) for target in ("sm_86", "sm_89", "gfx942")),
    *((dtype, "sm_90", 512) for dtype in ("bfloat16", "float32")),
    *(("float32", target, 64) for target in ("sm_80", "sm_90", "gfx942")),
]


def case(dtype, target, head_dim):
    """A pytest parameter. sm_90, sm_80 and sm_100 are `long` at head dim 64; LLVM takes minutes for gfx942."""
    slow = target in ("sm_86", "sm_89", "gfx942") or head_dim not in (OFTEN if target == "sm_90" else (64,))
    marks = pytest.mark.slow if slow else pytest.mark.long
    return pytest.param(dtype, target, head_dim, marks=marks)


PARAMETERS = [case(*each) for each in CASES]
# Bytes that one Triton version spills, by kernel; the versions before and after it spill nothing.
KNOWN = {
    "3.8": {("bfloat16", target, 64): {"map_bias": 8, "map_row_bias": 8} for target in ("sm_80", "sm_86", "sm_89")},
}


def python(code, *arguments):
    """Run `code` in a separate process without the interpreter, so that Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )


@functools.cache
def command(*flags):
    return python("from attnx.cli.main import main; main()", "kernels", *flags)


def compiled(dtype, target, head_dim):
    """{kernel: resources} in the default configurations. One command compiles those of sm_90 that are needed OFTEN."""
    dims = OFTEN if (dtype, target) == ("bfloat16", "sm_90") and head_dim in OFTEN else (head_dim,)
    done = command("--json", "--jobs=2", f"--arch={target}", f"--dtype={dtype}", *(f"--head-dim={dim}" for dim in dims))
    assert done.returncode in (0, 1), done.stderr
    return {row["kernel"]: row for row in json.loads(done.stdout) if row["head_dim"] == head_dim}


ONE_KERNEL = """
import json, torch
from attnx.kernels.inspect import offline
from attnx.kernels.configs import Target
target = Target("cuda", 80)
launch = dict(offline.launches(16, torch.bfloat16, target))["map_row"]
print(json.dumps(offline.resources("map_row", launch, target)._asdict()))
"""


def test_one_kernel_compiles_and_is_inspected():
    """A quick test. The others compile all kernels of a target."""
    done = python(ONE_KERNEL)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["error"], row["undefined"], row["spills"]) == ("", "", 0)
    assert row["matrix"] == "HMMA"
    assert row["exp_count"] > 0
    assert 0 < row["shared"] <= row["limit"]


@pytest.mark.parametrize(("dtype", "target", "head_dim"), PARAMETERS)
def test_nothing_spills_and_nothing_is_lost(dtype, target, head_dim):
    rows = compiled(dtype, target, head_dim)
    assert {kernel: row["undefined"] for kernel, row in rows.items() if row["undefined"]} == {}
    known = KNOWN.get(triton.__version__.rpartition(".")[0], {}).get((dtype, target, head_dim), {})
    assert {
        kernel: (row["spills"], row["error"])
        for kernel, row in rows.items()
        if (row["spills"] > known.get(kernel, 0) and not row["loop"]) or row["error"]
    } == {}


@pytest.mark.parametrize(("dtype", "target", "head_dim"), PARAMETERS)
def test_shared_memory_suffices(dtype, target, head_dim):
    rows = compiled(dtype, target, head_dim)
    assert {kernel: row["shared"] for kernel, row in rows.items() if row["shared"] > row["limit"] > 0} == {}
    assert rows
    assert all(row["limit"] for row in rows.values())


@pytest.mark.parametrize(("dtype", "target", "head_dim"), PARAMETERS)
def test_every_kernel_multiplies_and_has_exps(dtype, target, head_dim, record_property):
    rows = compiled(dtype, target, head_dim)
    # The one-pass kernel is not used where its rows do not fit.
    assert rows.keys() >= KERNELS | ({"one_pass"} if dtype == "bfloat16" and head_dim <= 64 else set())
    units = {"sm_90": {"HGMMA", "HMMA"}, "sm_100": {"UTCHMMA", "HMMA"}, "gfx942": {"MFMA"}}.get(target, {"HMMA"})
    units = {"FFMA", "MFMA"} if dtype == "float32" else units
    for kernel, row in rows.items():
        record_property(kernel, json.dumps(row))
        if kernel.startswith("fuse"):
            continue
        assert row["matrix"] in units, kernel
        assert row["matrix_count"] > 0, kernel
        assert row["exp_count"] > 0, kernel


@pytest.mark.parametrize(
    "head_dim", [pytest.param(64, marks=pytest.mark.long), pytest.param(128, marks=pytest.mark.slow)]
)
def test_hopper_uses_its_own_matrix_unit_in_every_dot(head_dim):
    """Tiles of at least 64 rows use HGMMA only, a whole number of dots, and not one by one."""
    rows = compiled("bfloat16", "sm_90", head_dim).values()
    tall = [row for row in rows if row["config"][0] >= 64 and not row["kernel"].startswith(("fuse", "hopper"))]
    assert {row["kernel"] for row in tall} >= {"forward", "map", "gradient"}
    for row in tall:
        dots = 2 if row["kernel"].startswith(("forward", "one_pass", "gradient")) else 1
        assert row["matrix"] == "HGMMA", row
        assert row["dots"] >= dots, row
        assert row["dots"] == int(row["dots"]), row
        assert row["batches"] < row["matrix_count"], row


GLUON_KERNEL = """
import json, torch
from attnx.kernels.inspect import hopper, offline
from attnx.kernels.configs import Target
target = Target("cuda", 90)
launch = dict(hopper.hopper_launches(64, torch.bfloat16, target))["hopper_map_bias"]
print(json.dumps(offline.resources("hopper_map_bias", launch, target).loop._asdict()))
"""


def test_a_hopper_kernel_compiles_and_its_loop_overlaps():
    done = python(GLUON_KERNEL)
    assert done.returncode == 0, done.stderr
    loop = json.loads(done.stdout)
    assert (loop["serialised"], loop["local"]) == (False, 0)
    assert loop["products"] == 8  # 2 chunks of keys, 64 / 16 instructions each
    assert loop["waits"] == 2
    assert loop["exps"] == loop["overlapped"] == 64


@pytest.mark.parametrize(
    "head_dim", [pytest.param(dim, marks=pytest.mark.long if dim in OFTEN else pytest.mark.slow) for dim in HEAD_DIMS]
)
def test_loops_of_the_hopper_kernels(head_dim):
    """Products are asynchronous, exponentials of the map and of vecmat run beside them, and hardly a register spills.

    A short row of two exponentials has products between them; one of one exponential waits for its scores, and the
    other warpgroup has the tensor cores meanwhile.
    """
    rows = {name: row for name, row in compiled("bfloat16", "sm_90", head_dim).items() if name.startswith("hopper")}
    maps = {"hopper_map", "hopper_map_bias", "hopper_map_mask", "hopper_map_causal", "hopper_vecmat"}
    assert rows.keys() >= maps | {"hopper_50"} | ({"hopper_197", "hopper_257"} if head_dim <= 64 else set())
    for name, row in rows.items():
        loop = row["loop"]
        assert not loop["serialised"], name
        assert loop["local"] <= 0.06 * loop["instructions"], name
        if name in maps:
            assert loop["overlapped"] == loop["exps"] >= 64, name
            assert loop["waits"] == row["config"][4], name


@pytest.mark.long
def test_command_prints_a_table():
    done = command("--jobs=2", "--arch=90", "--head-dim=64")
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["kernel", "target", "D", "dtype"]
    assert {line.split()[0] for line in lines[1:]} >= KERNELS
    assert all("sm_90" in line for line in lines[1:])


def test_failures_name_spills_shared_memory_and_errors():
    from attnx.kernels.inspect.loops import Loop
    from attnx.kernels.inspect.offline import Resources
    from attnx.kernels.inspect.table import failures

    good = Resources("map", "sm_90", "bf16", 64, (128, 128, 8, 3), shared=100, limit=200)
    bad = [good._replace(spills=8), good._replace(shared=300), good._replace(error="PassManager failed")]
    bad += [good._replace(undefined="0bb0: nothing wrote UR34")]
    loop = Loop(500, 16, 4, 128, 128, local=30, serialised=False)
    assert list(failures([good._replace(spills=8, loop=loop)])) == []
    bad += [good._replace(loop=loop._replace(local=31)), good._replace(loop=loop._replace(serialised=True))]
    assert list(failures([good])) == []
    assert [line.partition(": ")[2] for line in failures(bad)] == [
        "8 bytes a thread are spilled",
        "asks for 300 bytes of shared memory, 200 are allowed",
        "PassManager failed",
        "0bb0: nothing wrote UR34",
        "31 of the loop's 500 instructions use local memory",
        "ptxas waits for every product",
    ]


# ptxas 12.8's code for a product with values narrower than the keys: the second descriptor is read from UR34.
LOST = """
        /*0000*/                   ULDC UR6, c[0x0][0x28c] ;
        /*0010*/                   UIADD3 UR7, UR6, 0x2000, URZ ;
        /*0020*/                   UIADD3 UR34, UP0, {base}, 0x20, URZ ;
        /*0030*/                   UIADD3.X UR35, UR7, -0x3ffffff0, URZ, UP0, !UPT ;
        /*0040*/                   UIMAD.WIDE UR14, UR6, UR7, URZ ;
        /*0050*/                   HGMMA.64x16x16.F32 R56, R24, gdesc[UR12].tnspB, R56 ;
        /*0060*/                   HGMMA.64x16x16.F32 R56, R28, gdesc[UR32].tnspB, R56, gsb0 ;
"""


def test_unwritten_registers_are_found():
    from attnx.kernels.inspect.undefined import undefined

    assert undefined(LOST.format(base="UR7")) == []
    assert undefined(LOST.format(base="UR34")) == ["0020: UIADD3 UR34, UP0, UR34, 0x20, URZ: nothing wrote UR34"]
    from_shared = LOST.format(base="UR7").replace("R24, gdesc[UR12]", "gdesc[UR12]")
    assert undefined(from_shared)[0].endswith("nothing wrote UR12, UR13")
    blackwell = "  /*0010*/  UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR10], tmem[UR30], idesc[UR31], !UPT ;"
    assert undefined(blackwell)[0].endswith("nothing wrote UR6, UR7, UR8, UR9, UR10, UR30, UR31")


WIDTHS = """
import json, torch
from attnx.kernels.inspect import offline
from attnx.kernels.inspect.table import failures
from attnx.kernels.arguments import shared_args, value_args
from attnx.kernels.configs import Target, gradient_config
from attnx.kernels.forward import forward_launch
from attnx.kernels.gradient import gradient_launch
hopper, found = Target("cuda", 90), []
for head_dim, value_dim in (32, 16), (64, 16), (64, 32), (48, 48), (16, 64):
    for rows in 20, 300:
        q, k, v = (torch.empty(2, 12, *size, dtype=torch.float16, device="meta")
                   for size in ((rows, head_dim), (300, head_dim), (300, value_dim)))
        out = torch.empty(2, rows, 12, value_dim, dtype=torch.float16, device="meta").transpose(1, 2)
        lse, maps = torch.empty(2, 12, rows, device="meta"), torch.empty(2, rows, 300, device="meta")
        shared = shared_args(q, k, None, None, 1.0, False)
        config = gradient_config(max(head_dim, value_dim), 2, rows, hopper)
        for name, launch in (("forward", forward_launch(shared, value_args(q, v, out), lse, hopper)),
                             ("gradient", gradient_launch(shared, out, v, lse, maps, 0, True, 1, config))):
            found += list(failures([offline.resources(name, launch, hopper)]))
print(json.dumps(found))
"""


INT64_OFFSETS = """
import json, torch
from attnx.kernels.inspect import offline
from attnx.kernels.configs import Target
target = Target("cuda", 80)
# 64-bit offsets may spill; this checks only that the kernels compile.
found = {name: offline.resources(name, launch._replace(args={**launch.args, "INT64_OFFSETS": True}), target)
         for name, launch in offline.launches(64, torch.bfloat16, target)
         if "_bias" not in name and "_mask" not in name}
print(json.dumps({name: row.registers for name, row in found.items()}))
"""


@pytest.mark.long
def test_values_of_another_width_than_the_keys_on_hopper():
    done = python(WIDTHS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


@pytest.mark.long
def test_offsets_of_64_bits_compile():
    done = python(INT64_OFFSETS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() >= {"one_pass", "forward", "map", "map_row", "vecmat", "gradient"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "75"], "arch: expected one of sm_80, sm_86, sm_89, sm_90, sm_100, gfx942; got 'sm_75'"),
        (["--dtype", "int8"], "dtype: expected bfloat16, float16 or float32; got 'int8'"),
        (["--head-dim", "0"], "head-dim: expected 1 to 1024; got 0"),
    ],
)
def test_command_rejects_bad_options(flags, message, monkeypatch):
    from attnx.cli.main import app

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = CliRunner().invoke(app, ["kernels", *flags])
    assert (done.exit_code, done.stderr.strip()) == (2, f"attnx: --{message}")


def test_command_needs_the_compiler(monkeypatch):
    from attnx.cli.main import app

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = CliRunner().invoke(app, ["kernels"])
    assert done.exit_code == 2
    assert "TRITON_INTERPRET is 1" in done.stderr
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setitem(sys.modules, "triton", None)
    done = CliRunner().invoke(app, ["kernels"])
    assert done.exit_code == 2
    assert "triton is not installed" in done.stderr


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x1 */
                                                                          /* 0x2 */
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3 ;
        /*0020*/              @!P1 BRA 0x10 ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, R120, gdesc[UR8], R24 ;
        /*0060*/                   MUFU.EX2 R4, R5 ;
        /*0070*/               @P2 BRA 0xa0 ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0090*/                   FMUL R4, R4, R5 ;
        /*00a0*/              @!P3 BRA 0x60 ;
        /*00b0*/                   STL.64 [R1], R4 ;
        /*00c0*/               @P0 BRA 0x30 ;
        /*00d0*/                   LDSM.16.M88.4 R4, [R7] ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0;
"""

AMDGCN = """
	.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
kernel:                                 ; @kernel
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	s_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
	v_mfma_f32_32x32x8_bf16 v[2:17], v[34:35], v[64:65], v[2:17]
	s_cbranch_scc1 .LBB0_4
.LBB0_2:                                ; =>This Loop Header: Depth=1
	global_load_dwordx4 v[2:5], v0, s[4:5]
.LBB0_3:                                ;   Parent Loop BB0_2 Depth=1
	v_exp_f32_e32 v1, v1
	v_cmp_lt_f32_e32 vcc, v1, v2
	v_pk_mul_f32 v[2:3], v[2:3], v[4:5]
	ds_read2_b64 v[2:5], v0
	s_cbranch_vccnz .LBB0_3
	s_branch .LBB0_1
.LBB0_4:
	scratch_store_dwordx2 off, v[2:3], off
	s_endpgm
.Lfunc_end0:
	s_nop 0
"""


def test_sass_is_read_by_kind():
    from attnx.kernels.inspect.machine_code import Kind, parse

    code = parse(SASS)
    fmas = {i.opcode: i.fmas for i in code.instructions}
    assert fmas["HGMMA.64x128x16.F32.BF16"] == 64 * 128 * 16 // 4
    assert fmas["HGMMA.64x64x16.F32.BF16"] == 64 * 64 * 16 // 4
    assert fmas["HMMA.16816.F32.BF16"] == 16 * 8 * 16
    assert code.fmas() == sum(fmas.values())
    assert code.matrix() == {"HGMMA": 2, "HMMA": 1}
    assert (code.count(Kind.EXP), code.count(Kind.SPILL), code.count(Kind.UNKNOWN)) == (1, 1, 0)


def test_amdgcn_is_read_by_kind():
    from attnx.kernels.inspect.machine_code import Kind, parse

    found = {i.opcode: (i.kind, i.fmas) for i in parse(AMDGCN).instructions}
    assert found["v_mfma_f32_32x32x8_bf16"] == (Kind.MATRIX, 32 * 32 * 8)
    assert found["global_load_dwordx4"] == (Kind.LOAD, 0)
    assert found["v_exp_f32_e32"] == (Kind.EXP, 0)
    assert found["v_cmp_lt_f32_e32"] == (Kind.SELECT, 0)
    assert found["v_pk_mul_f32"] == (Kind.PACKED, 0)
    assert found["ds_read2_b64"] == (Kind.SHARED, 0)
    assert found["scratch_store_dwordx2"] == (Kind.SPILL, 0)
    assert found["s_endpgm"] == (Kind.CONTROL, 0)
    assert "s_nop" not in found


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("MUFU.RCP", "special function"),
        ("FFMA2", "packed fp32"),
        ("FMNMX3", "fp32 min, max, select, compare"),
        ("FSETP.GT.AND", "fp32 min, max, select, compare"),
        ("IMAD.WIDE.U32", "integer multiply"),
        ("F2FP.BF16.F32.PACK_AB", "conversion"),
        ("F2F.F64.F32", "slow conversion"),
        ("LDGSTS.E.BYPASS.128", "global load"),
        ("UTMALDG.2D", "global load"),
        ("LDGDEPBAR", "barrier or wait"),
        ("STSM.16.M88.4", "shared memory"),
        ("LDL.LU", "local memory"),
        ("UIADD3", "scalar or uniform"),
        ("UTCHMMA", "matrix"),
        ("BRA.U", "control"),
    ],
)
def test_sass_opcodes_have_their_kind(opcode, kind):
    from attnx.kernels.inspect.machine_code import sass_instruction

    assert sass_instruction(opcode).kind.value == kind


UNKNOWN = """
import json, torch
from attnx.kernels.inspect import offline
from attnx.kernels.inspect.machine_code import Kind, parse

for target in offline.TARGETS:
    for name, launch in offline.launches(64, torch.bfloat16, target):
        if not name.endswith(("_bias", "_mask")):
            compiled = offline.compile_for(launch, target)
            hip = target.backend == "hip"
            text = compiled.asm["amdgcn"] if hip else offline.cuobjdump(compiled.asm["cubin"], "-sass")
            code = parse(text)
            unknown = sorted({i.opcode for i in code.instructions if i.kind is Kind.UNKNOWN})
            print(json.dumps([name, offline.target_name(target), unknown]))
"""


@pytest.mark.slow
def test_every_opcode_of_compiled_kernels_has_a_kind():
    done = python(UNKNOWN)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    for line in done.stdout.splitlines():
        assert json.loads(line)[2] == [], line
