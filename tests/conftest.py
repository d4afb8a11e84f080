"""Where the tests run: on the GPU if there is one, else on CPU tensors with Triton's interpreter."""

import os
import signal

import pytest
import torch

# A shell's background job is born with SIGINT ignored; tests send it to see what an interrupt does.
signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Triton reads it when it is imported, which no test module does before this file.
    os.environ["TRITON_INTERPRET"] = "1"
    # Beside other workers a second thread waits more than it works.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


INTERPRETED = ("triton", "addresses_beyond", "kernels_that_run")  # in the names of tests that run kernels


def interpreter_works():
    """Triton 3.6's interpreter can't loop to a run-time bound with numpy 2.5; compiled kernels are not concerned."""
    import attnx

    q = torch.ones(1, 1, 1, 16)
    try:
        attnx.attention_map(q, q.expand(1, 1, 300, 16), backend="triton")
    except Exception as error:
        return "only 0-dimensional arrays" not in str(error)
    return True


@pytest.fixture
def device(request):
    """The GPU if there is one, but for tests of the backend that is for CPUs."""
    native = hasattr(request.node, "callspec") and request.node.callspec.params.get("backend") == "native"
    return torch.device("cuda" if HAS_CUDA and not native else "cpu")


@pytest.fixture
def poisoned():
    """Memory that torch.empty gives out is NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Without CUDA `gpu` tests are skipped; with it `-m gpu` also takes every test that runs on `device`."""
    interpreted = [item for item in items if any(word in item.name for word in INTERPRETED)]
    broken = not HAS_CUDA and interpreted and not interpreter_works()
    for item in items:
        if broken and item in interpreted:
            item.add_marker(pytest.mark.skip(reason="this Triton's interpreter does not run with this numpy"))
        if HAS_CUDA and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        elif not HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
