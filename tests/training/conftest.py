import pytest

from emssd_compile.training.features import FrozenTarget
from tests.training.toys import BATCH, WINDOW, toy_target


@pytest.fixture(scope="session")
def model():
    return toy_target()


@pytest.fixture(scope="session")
def target(model) -> FrozenTarget:
    return FrozenTarget(model, BATCH, WINDOW)
