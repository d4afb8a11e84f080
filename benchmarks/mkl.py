"""Run MKL on other makers' processors as on Intel's.

torch's SDPA and linear layers use MKL on x86. On other makers' processors MKL takes a code path that reaches half of
their speed, so anything that does not use MKL looks fast in comparison. With this option the comparison is harder and
carries over to other machines.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "ATTNX_BENCH_MKL"
AS_ON_INTEL = "MKL as on Intel"
_NAMES = ("mkl_serv_intel_cpu_true", "mkl_serv_intel_cpu")  # functions by which MKL detects Intel processors


@contextmanager
def as_on_intel() -> Iterator[None]:
    """Processes started inside the `with` block use MKL's code path for Intel (Linux, by LD_PRELOAD).

    Raises:
        OSError, subprocess.CalledProcessError: the C compiler `cc` is missing or failed.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "mkl.c", Path(folder) / "mkl.so"
        source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in _NAMES))
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        os.environ["LD_PRELOAD"] = " ".join(filter(None, (str(library), before.get("LD_PRELOAD"))))
        os.environ[VARIABLE] = AS_ON_INTEL
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
