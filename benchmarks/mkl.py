"""MKL, whose matrix products torch's SDPA and linear layers are made of on x86, as it runs on Intel's processors.

On other makers' processors it takes a path that reaches half of what they can do, so that whoever multiplies without it
looks fast beside it. There this is the harder comparison, and the one that carries over to other machines.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "ATTNX_BENCH_MKL"
AS_ON_INTEL = "MKL as on Intel"
_NAMES = ("mkl_serv_intel_cpu_true", "mkl_serv_intel_cpu")  # what MKL asks whether the processor is Intel's


@contextmanager
def as_on_intel() -> Iterator[None]:
    """Processes that are started inside the `with` have MKL believe so (Linux, glibc's LD_PRELOAD).

    Raises:
        OSError, subprocess.CalledProcessError: there is no C compiler `cc`, or it failed.
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
