"""Threads in one artifact take turns, and two objects of one artifact know nothing of one another."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import emssd_compile
from emssd_compile.drafters import PromptLookup
from emssd_compile.export import open_graph
from tests.exactness.models import Reference, build, prompt

pytest.importorskip("onnxruntime")

NEW, CALLS = 12, 4
BATCHES = [(5, 17), (33, 2), (40,), (7, 23)]


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def fast(model):
    return emssd_compile.optimize(model, PromptLookup(4), max_batch=2, max_length=64, backend="eager")


@pytest.fixture(scope="module")
def artifact(fast, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts") / "onnx"
    fast.export_onnx(folder, check=False)
    return folder


@pytest.mark.parametrize("objects", [1, 2])
def test_every_thread_gets_its_own_tokens(objects, artifact, model):
    """Unguarded, one thread frees the memory that another one's step is bound to."""
    loaded = [emssd_compile.load(artifact) for _ in range(objects)]
    reference, begin = Reference(model), threading.Barrier(len(BATCHES))
    expected = [[[*prompt(n), *reference(prompt(n), NEW)] for n in lengths] for lengths in BATCHES]

    def decode(thread: int) -> list[list[list[int]]]:
        begin.wait()
        prompts = [prompt(n) for n in BATCHES[thread]]
        return [loaded[thread % objects].generate(prompts, max_new_tokens=NEW) for _ in range(CALLS)]

    with ThreadPoolExecutor(len(BATCHES)) as pool:
        found = list(pool.map(decode, range(len(BATCHES))))
    assert found == [[rows] * CALLS for rows in expected]


def test_a_graph_of_tensors_may_be_called_by_threads(fast, tmp_path):
    fast.export_onnx(tmp_path / "graph", verify_only=True)
    graph, begin = open_graph(tmp_path / "graph"), threading.Barrier(4)
    caches = [graph.empty("cache") for _ in range(4)]

    def verify(thread: int) -> list[torch.Tensor]:
        tokens = 5 + thread
        ids = torch.arange(10 * thread, 10 * thread + tokens)
        begin.wait()
        logits = []
        for _ in range(100):
            results = graph(
                input_ids=ids,
                positions=torch.arange(tokens),
                row_ids=torch.zeros(tokens, dtype=torch.int64),
                offsets=torch.tensor([0, tokens, tokens]),
                lengths=torch.zeros(2, dtype=torch.int64),
                logit_index=torch.arange(tokens),
                **{name: torch.arange(tokens) for name in sizes},
                **caches[thread],
            )
            logits.append(results["logits"].flatten(0, -2).clone())
        return logits

    names = {binding.name for binding in graph.manifest.signature.inputs}
    given = {"input_ids", "positions", "row_ids", "offsets", "lengths", "logit_index", *caches[0]}
    sizes = names - given
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(verify, range(4)))
    for thread, logits in enumerate(found):
        with torch.no_grad():
            own = fast.model(torch.arange(10 * thread, 10 * thread + 5 + thread)[None]).logits[0]
        assert all(torch.equal(each, logits[0]) for each in logits)
        assert torch.equal(logits[0].argmax(-1), own.argmax(-1))
