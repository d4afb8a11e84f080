import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.record import Record


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny shapes, two rounds")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu")
    parser.addoption("--record", type=Path, help="file for the findings, see benchmarks/record.py")


def pytest_collection_finish(session: pytest.Session) -> None:
    Record(session.config.getoption("--record")).add(planned=[item.name for item in session.items])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if report.failed:
        reason = call.excinfo.exconly().splitlines()[0] if call.excinfo else report.longreprtext
        Record(item.config.getoption("--record")).add(failed=item.name, reason=reason[:500])
    return report


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return pytestconfig.getoption("--device")


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("--quick")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    return Record(request.config.getoption("--record"), request.node.name)


@pytest.fixture(autouse=True)
def _free_device_memory(device: str) -> Iterator[None]:
    yield
    if device == "cuda":
        for name in ("last_exc", "last_value", "last_traceback"):  # a failure's frames keep tensors alive
            sys.__dict__.pop(name, None)
        gc.collect()
        torch.cuda.empty_cache()
