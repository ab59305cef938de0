"""Eight virtual devices as one mesh, for all tests of this folder (`make test-xla`)."""

import importlib.util
from pathlib import Path

import pytest

from openmoe.parallel.xla import start

DEVICES = 8


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("torch_xla") is None:
        here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]  # of all collected
        for item in here:
            item.add_marker(pytest.mark.skip(reason="torch_xla is missing here; run `make test-xla`"))


@pytest.fixture(scope="session", autouse=True)
def devices() -> int:
    """Before any backward pass on the CPU: torch_xla dies later when its client is not there first."""
    found = start()
    if found != DEVICES:
        pytest.fail(f"{found} devices, CPU_NUM_DEVICES={DEVICES} was to give {DEVICES}; run `make test-xla`")
    return found
