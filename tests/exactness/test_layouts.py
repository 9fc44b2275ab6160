"""Layouts change how long it takes, never a token; and `auto` drafts where drafts pay."""

import pytest
import torch

from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.requests import Request
from tests.exactness.compiled import NEW_TOKENS, rechunked, target
from tests.exactness.models import prompt
from tests.runtime.engines import graph_engine
from tests.runtime.tape import TapeDevice

ROWS = 3
LENGTHS = (5, 33, 1, 70, 17, 2, 40)
LAYOUTS = ("packed", "padded", "auto")
DRAFTERS = ("none", "prompt-lookup", "draft-model", "draft-model-tree", "rubbish", "sometimes-wrong")
OFTEN = {
    "packed": ("draft-model-tree", "sometimes-wrong"),  # `test_architectures.py` decodes so with all of them
    "padded": ("none", "draft-model-tree", "sometimes-wrong"),
    "auto": tuple(drafter for drafter in DRAFTERS if drafter != "draft-model"),
}
"""Tried each time; the others if --long."""


def _compiled(drafter: str, layout: str) -> OptimizedModel:
    compiled = target("llama", ROWS)
    return compiled.optimize(compiled.drafter(drafter), layout=layout)


def _decode(engine: Engine) -> dict[str, int]:
    """Decode the prompts, assert their tokens, and return the counters."""
    engine.counters()
    requests = [Request(index, torch.tensor(prompt(n)), NEW_TOKENS) for index, n in enumerate(LENGTHS)]
    list(engine.run(requests))
    assert [r.output for r in requests] == [target("llama", ROWS).reference(prompt(n), NEW_TOKENS) for n in LENGTHS]
    return engine.counters()[0]


@pytest.mark.parametrize(
    ("layout", "drafter"),
    [
        pytest.param(layout, drafter, marks=() if drafter in OFTEN[layout] else pytest.mark.long)
        for layout in LAYOUTS
        for drafter in DRAFTERS
    ],
)
def test_layouts_give_the_tokens_of_the_reference(layout, drafter):
    fast = _compiled(drafter, layout)
    fast.warmup()
    _decode(fast._engine)
    _decode(rechunked(fast, 24)._engine)
    engine = graph_engine(fast, 24, TapeDevice())
    engine.calibrate()
    _decode(engine)


@pytest.mark.parametrize(
    ("drafter", "price", "least", "most"),
    [
        ("always-wrong", 1.0, 0.0, 0.1),
        ("always-right", 10.0, 0.0, 0.0),
        ("always-right", 0.001, 3.0, 4.0),
    ],
)
@pytest.mark.parametrize("kind", ["in step", "graphs"])
def test_auto_drafts_where_drafts_pay(kind, drafter, price, least, most):
    """`price`: what a packed token costs, by what a step costs without any; then drafts a row and step, from, to."""
    fast = _compiled(drafter, "auto")
    engine = graph_engine(fast, 512, TapeDevice()) if kind == "graphs" else rechunked(fast, 512)._engine
    engine.times.calibrate({n: 0.01 * (1 + price * n) for n in range(1, engine.times.most + 1)})
    engine.times.observe = lambda tokens, seconds: seconds  # type: ignore[method-assign]
    engine._publish_times()
    counts = _decode(engine)
    if not most:
        assert counts["num_padding_tokens"] <= counts["num_steps"], "no room is kept for drafts that do not come"
    assert least <= counts["num_draft_tokens"] / counts["num_row_steps"] <= most
