"""`ambient`: what the caller is in changes nothing, and nothing is left changed."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings

import pytest
import torch

import emssd_compile
from emssd_compile.errors import InvalidInputError
from tests.exactness.models import Reference, build, prompt
from tests.exactness.test_changes import AMBIENT

PROMPT, NEW = prompt(17), 6


def _optimize(model: torch.nn.Module) -> emssd_compile.OptimizedModel:
    return emssd_compile.optimize(model, "none", max_batch=2, max_length=64, backend="eager", layout="auto")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build("llama")


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    return [[*PROMPT, *Reference(model)(PROMPT, NEW)]]


@pytest.fixture(scope="module")
def fast(model) -> emssd_compile.OptimizedModel:
    return _optimize(model)


@pytest.mark.parametrize("name", AMBIENT)
def test_generate_gives_the_same_in_any_state(fast, expected, name):
    for inside in (AMBIENT[name], contextlib.nullcontext):
        with inside():
            assert fast.generate([PROMPT], max_new_tokens=NEW) == expected


@pytest.mark.parametrize("name", AMBIENT)
def test_optimize_works_in_any_state(name):
    model = build("llama")
    expected = [[*PROMPT, *Reference(model)(PROMPT, NEW)]]
    with AMBIENT[name]():
        fast = _optimize(model)
    assert fast.generate([PROMPT], max_new_tokens=NEW) == expected


def test_a_model_that_was_optimized_in_inference_mode_can_be_trained():
    model = build("llama")
    with torch.inference_mode():
        fast = _optimize(model)
        fast.generate([PROMPT], max_new_tokens=1)
    assert not any(p.is_inference() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    optimizer.step()
    assert fast.generate([PROMPT], max_new_tokens=NEW) == [[*PROMPT, *Reference(model)(PROMPT, NEW)]]


def test_weights_made_in_inference_mode_are_refused_with_what_to_do():
    with torch.inference_mode():
        model = build("llama")
    with pytest.raises(InvalidInputError, match="make or load the model outside of inference_mode"):
        _optimize(model)


def test_threads_that_optimize_at_once_all_succeed_and_leave_the_process_as_it_was():
    models = [build(name) for name in ("llama", "gpt2", "own-positions")]
    filters, disabled = [*warnings.filters], logging.root.manager.disable
    found: dict[int, object] = {}

    def work(index: int) -> None:
        found[index] = _optimize(models[index]).generate([PROMPT], max_new_tokens=NEW)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [[*PROMPT, *Reference(m)(PROMPT, NEW)]] for i, m in enumerate(models)}
    assert [*warnings.filters] == filters
    assert logging.root.manager.disable == disabled


def test_the_library_is_quiet_where_nobody_set_logging_up(monkeypatch):
    heard = list[logging.LogRecord]()
    monkeypatch.setattr(logging.root, "handlers", [])
    last = logging.Handler()
    monkeypatch.setattr(last, "emit", heard.append)
    monkeypatch.setattr(logging, "lastResort", last)
    logging.getLogger(f"{emssd_compile.__name__}.stream").warning("ours")
    logging.getLogger("another").warning("another's")
    assert [record.getMessage() for record in heard] == ["another's"]
