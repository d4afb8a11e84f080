"""Fixtures and markers. Tests run on the GPU if there is one, else on CPU tensors with Triton's interpreter."""

import os
import signal
import sys

import pytest
import torch
from browser import browser  # noqa: F401  # a fixture

# A shell starts background jobs with SIGINT ignored; some tests send SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Triton reads this when it is imported; no test module is imported before this file.
    os.environ["TRITON_INTERPRET"] = "1"
    # With other test workers on the machine, a second thread is mostly idle.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


# Files that take a minute or more with their `long` tests.
MINUTES = {
    "test_kernels_offline", "test_engines", "test_native", "test_benchmarks", "test_ops", "test_vecmat",
    "test_supervision", "test_remote_sources", "test_gradient_kernel", "test_ops_contract", "test_family_layouts",
    "test_family_maps", "test_docs", "test_stats", "test_probes",
}  # fmt: skip


def pytest_configure(config):
    """Let xdist take the files in the order of `MINUTES`; by default those with the fewest tests come last."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def interpreter_works():
    """True unless Triton's interpreter fails with this numpy.

    Triton 3.6's interpreter can't loop to a run-time bound with numpy 2.5. Compiled kernels are not affected.
    """
    import attnx

    q = torch.ones(1, 1, 1, 16)
    try:
        attnx.attention_map(q, q.expand(1, 1, 300, 16), backend="triton")
    except Exception as error:
        return "only 0-dimensional arrays" not in str(error)
    return True


@pytest.fixture
def device(request):
    """The GPU if there is one. Tests of the native backend run on the CPU."""
    native = hasattr(request.node, "callspec") and request.node.callspec.params.get("backend") == "native"
    return torch.device("cuda" if HAS_CUDA and not native else "cpu")


@pytest.fixture(autouse=True)
def nothing_prepared():
    """No call and no launch was prepared in another test, in which a backend may have been replaced."""
    from attnx.ops import known_calls

    known_calls._KNOWN.clear()
    plans = sys.modules.get("attnx.ops.backends.plans")
    if plans is not None:
        plans._KEPT.clear()


@pytest.fixture
def poisoned():
    """torch.empty fills memory with NaN, so that an element that is not written is detected."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Without CUDA, skip `gpu` tests; with CUDA, mark every test that uses `device` as `gpu`.

    `triton_kernels` tests are skipped where the interpreter does not work. There, tests with many keys are `long`: the
    table of cases still runs both lengths.
    """
    items.sort(key=lambda item: item.path.stem not in MINUTES)  # so that workers end at about the same time
    # Not at the top: it imports attnx, and Triton must find the variable that is set above.
    from on_backends import LONG

    interpreted = [item for item in items if item.get_closest_marker("triton_kernels")]
    broken = not HAS_CUDA and interpreted and not interpreter_works()
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if not HAS_CUDA and params.get("backend") == "triton" and params.get("N") == LONG:
            item.add_marker(pytest.mark.long)
        if broken and item in interpreted:
            item.add_marker(pytest.mark.skip(reason="this Triton's interpreter does not run with this numpy"))
        if HAS_CUDA and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        elif not HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
