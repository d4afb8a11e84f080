import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny shapes, two rounds: does it run?")
    parser.addoption("--device", choices=["cpu", "cuda"], help="CUDA where there is a device, unless given")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, where it is installed")
    if config.getoption("--device") is None:
        config.option.device = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return pytestconfig.getoption("--device")


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("--quick")


@pytest.fixture(autouse=True)
def _free_device_memory(device: str):  # type: ignore[no-untyped-def]
    yield
    if device == "cuda":
        torch.cuda.empty_cache()
