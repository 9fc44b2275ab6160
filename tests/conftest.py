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

import logging

import hypothesis
import pytest
import torch

logging.getLogger("torch.__trace").propagate = False  # pytest would keep every record of every compile

# No deadline: the first call of an example may compile. Derandomised: a red run means that the code changed.
hypothesis.settings.register_profile("emssd", deadline=None, derandomize=True)
hypothesis.settings.load_profile("emssd")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
