"""What the compiler says of every kernel on targets that are not at hand: spills, matrix units, shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed, so nothing can be compiled")
ROOT = Path(__file__).resolve().parents[1]
BIASES = ("", "_bias", "_mask")
KERNELS = {kernel + bias for kernel in ("one_pass", "forward", "map", "map_row") for bias in BIASES}
TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")


def compile_all(archs, head_dims):
    """{(kernel, target, head dim): its resources}, in a process of its own: the interpreter compiles nothing."""
    flags = [*(f"--arch={arch}" for arch in archs), *(f"--head-dim={dim}" for dim in head_dims)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "attnx.kernels.offline", "--json", *flags],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {(row["kernel"], row["target"], row["head_dim"]): row for row in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def hopper():
    return compile_all([90], [32, 64, 80, 128])


@pytest.fixture(scope="module")
def everywhere(hopper):
    rows = {**compile_all([80, 86, 100, "gfx942"], [64]), **hopper}
    return {(kernel, target): row for (kernel, target, dim), row in rows.items() if dim == 64}


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kernel", ["map", "map_row"])
def test_map_spills_nothing_on_hopper(kernel, bias, head_dim, hopper):
    assert hopper[kernel + bias, "sm_90", head_dim]["spills"] == 0


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["map", "forward"])
def test_hopper_uses_its_matrix_units(kernel, head_dim, hopper):
    row = hopper[kernel, "sm_90", head_dim]
    assert row["matrix"] == "HGMMA"
    assert row["matrix_count"] > 0


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_and_fits(target, everywhere, record_property):
    from attnx.kernels.offline import SHARED_LIMIT

    assert {kernel for kernel, on in everywhere if on == target} == KERNELS
    limit = SHARED_LIMIT[int(target[3:]) if target.startswith("sm_") else target]
    for kernel in sorted(KERNELS):
        row = everywhere[kernel, target]
        record_property(kernel, json.dumps(row))
        print(*row.values())
        assert row["shared"] <= limit, kernel
        assert row["matrix_count"] > 0, kernel
        assert row["exp_count"] > 0, kernel
