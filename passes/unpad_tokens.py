"""Let T hold the tokens of all rows."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.passes.graph import aten, fresh_index, placeholder
from emssd_compile.step.batch import BatchShape


class UnpadTokens:
    """Add the inputs that describe a packed (jagged) batch.

    Because every op but attention acts on each token by itself (proved just before), the tokens of all rows may lie
    side by side in T: no op changes. Only attention must learn which token belongs to which row, from these inputs.

        before:  forward(input_ids[1,T], positions[1,T])
        after:   forward(input_ids[T], positions[T], row_ids[T], offsets[B+1], lengths[B], logit_index[R])

    For trees of drafts there are also `slots[T]`, where a token's keys and values lie, and `ancestors[T, W]`, whom it
    sees.
    """

    name = "unpad_tokens"

    def __init__(self, batch: BatchShape, fake_mode: FakeTensorMode) -> None:
        self.batch = batch
        self.fake_mode = fake_mode

    def run(self, graph_module: fx.GraphModule) -> int:
        """Add the inputs of a packed batch; returns 1."""
        graph = graph_module.graph
        ids, positions = placeholder(graph, "input_ids"), placeholder(graph, "positions")
        tokens = ids.meta["val"].shape[1]
        logit_index = fresh_index(self.fake_mode, ids.meta["val"].device)
        with self.fake_mode:
            index = ids.meta["val"].new_empty((tokens,), dtype=torch.int64)
            rows = index.new_empty((self.batch.rows,))
            fresh = {
                "row_ids": index,
                "offsets": rows.new_empty((self.batch.rows + 1,)),
                "lengths": rows,
                "logit_index": logit_index,
            }
            if self.batch.tree_nodes:
                words = index.new_empty((tokens, self.batch.ancestor_words), dtype=torch.int32)
                fresh |= {"slots": index, "ancestors": words}
        after = positions
        for name, value in fresh.items():
            with graph.inserting_after(after):
                after = graph.placeholder(name)
            after.meta["val"] = value
        for node in (ids, positions):
            with graph.inserting_after(after):
                node_2d = graph.call_function(aten.unsqueeze.default, (node, 0))
            node.replace_all_uses_with(node_2d)
            node_2d.args = (node, 0)
            with self.fake_mode:
                node.meta["val"] = index.new_empty((tokens,), dtype=node.meta["val"].dtype)
                node_2d.meta["val"] = node.meta["val"][None]
        return 1
