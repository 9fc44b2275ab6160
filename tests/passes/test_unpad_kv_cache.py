"""`unpad_kv_cache`: append, then attend, with each row's own offset and length."""

import pytest
import torch

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.ops import append_kv, attention, ragged_attention
from emssd_compile.passes.graph import inputs
from emssd_compile.passes.unpad_kv_cache import UnpadKVCache
from emssd_compile.passes.unpad_tokens import UnpadTokens
from tests.passes.graphs import (
    BATCH,
    COMMITTED,
    ROWS,
    TinyModel,
    alone,
    canonical,
    model_with_attention,
    run_packed,
    unpadded,
)


def test_gives_every_attention_its_caches():
    graph_module, manager = canonical(model_with_attention())
    for step in (UnpadTokens(BATCH, manager.fake_mode), UnpadKVCache(BATCH, manager.fake_mode)):
        manager._run(step, "L2", graph_module)
    assert manager.records[-1].changed == 1
    nodes = [n.target for n in graph_module.graph.nodes]
    assert nodes.count(attention) == 0
    assert nodes.index(append_kv) < nodes.index(ragged_attention)
    shapes = {n.target: tuple(n.meta["val"].shape) for n in inputs(graph_module.graph)[-2:]}
    assert shapes == {"k_cache_0": (3, 64, 2, 4), "v_cache_0": (3, 64, 2, 4)}


def test_refuses_a_model_without_attention():
    graph_module, manager = canonical(TinyModel())
    manager._run(UnpadTokens(BATCH, manager.fake_mode), "L2", graph_module)
    with pytest.raises(UnsupportedModelError, match="no attention"):
        manager._run(UnpadKVCache(BATCH, manager.fake_mode), "L2", graph_module)


def test_packed_rows_give_what_each_row_givesalone():
    model = model_with_attention()
    graph_module, _ = unpadded(model)
    hidden, logits = run_packed(graph_module, ROWS, COMMITTED)
    torch.testing.assert_close(logits, alone(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, logits, rtol=1e-5, atol=1e-5)
