"""What holds for every test: no network, no stale compiled graph, the same random numbers in any order."""

import os

# Read by their libraries when they are imported, so they are set before torch and transformers are.
os.environ["HF_HUB_OFFLINE"] = "1"
# Inductor's graph caches do not see the Python source of a custom op and would serve a graph of yesterday's op. Its
# cache of compiled C++ is keyed by the C++ itself and stays on.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:  # one core per worker, or they fight for the same ones
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import gc
import logging
from collections.abc import Iterator

import hypothesis
import pytest
import torch

logging.getLogger("torch.__trace").propagate = False  # pytest would keep every record of every compile

# Tracing makes objects by the million, and most of them stay: looking through them took a tenth of all tests' time.
gc.set_threshold(100_000, 20, 100)

# No deadline: the first call of an example may compile. Derandomised: a red run means that the code changed.
hypothesis.settings.register_profile("emssd", deadline=None, derandomize=True)
hypothesis.settings.load_profile("emssd")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--long`."""
    parser.addoption("--long", action="store_true", help="more rows and more cases of the tests that draw")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked as long is left out unless it is asked for."""
    if config.getoption("--long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def little_garbage() -> Iterator[None]:
    """Collecting looks at what this test makes: to look at all that many tests have made takes seconds each time."""
    gc.freeze()
    yield
    gc.unfreeze()
