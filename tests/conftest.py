"""Where the tests run: on the GPU if there is one, else on CPU tensors with Triton's interpreter."""

import os

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Triton reads it when it is imported, which no test module does before this file.
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Without CUDA `gpu` tests are skipped; with it `-m gpu` also takes every test that runs on `device`."""
    for item in items:
        if HAS_CUDA and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        elif not HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
