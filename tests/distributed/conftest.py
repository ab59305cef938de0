"""One pool of processes for the whole session."""

import importlib.util
from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def engine_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Ranks that have DeepSpeed from the start, which takes as long to import as torch."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs the extra deepspeed")
    folder = tmp_path_factory.mktemp("pool")
    environment = {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_RANK": "0",  # a launcher would say so
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),  # nothing is built; if it were, for nobody else
    }
    pool = Pool(folder, environment, imports="deepspeed")
    yield pool
    pool.close()
