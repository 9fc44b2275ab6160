"""Put packing, the model and acceptance into one graph."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.errors import RuleError
from emssd_compile.passes.graph import caches, fresh_index, results
from emssd_compile.passes.splice import Tensors, add_input, inline, inline_function
from emssd_compile.passes.traced_part import TracedPart, sizes_of
from emssd_compile.step.acceptance import Rule, Verdict, Verification
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.commit import bar_eos, commit, draft_tokens
from emssd_compile.step.drafting import Drafter
from emssd_compile.step.pack import LogitRows, Packed, logit_rows, pack
from emssd_compile.step.signature import role_of_state
from emssd_compile.step.state import StepState

_RANGES = ("token_range", "logit_range", "row_range")
_STATE = tuple(f.name for f in fields(StepState))
_PACKED = tuple(f.name for f in fields(Packed))
_ROWS = tuple(f.name for f in fields(LogitRows))


class FuseVerify:
    """Wrap the unpadded model into a step over the device-resident state: pack, run, accept, commit.

    What is fed, what is accepted and what is kept are tensor operations; traced around the model they make one graph
    that needs nothing from the host but sizes: T, R and the most tokens of a row, given by the lengths of `arange`s.

        before:  forward(input_ids[T], positions[T], row_ids[T], offsets[B+1], lengths[B], logit_index[R], caches)
        after:   forward(history[B,C], known[B], ..., token_range[T], logit_range[R], row_range, caches)
                     -> {history, known, ..., tokens[B,K+1], counts[B], hidden[B,H], rule_<name>}
    """

    name = "fuse_verify"

    def __init__(self, batch: BatchShape, rule: Rule, drafter: Drafter, fake_mode: FakeTensorMode) -> None:
        self.batch = batch
        self.rule = rule
        self.drafter = drafter
        self.num_draft_tokens = drafter.num_draft_tokens
        self.fake_mode = fake_mode
        self.notes: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule) -> int:
        """Replace the model's graph by that of the step. Raises RuleError if the rule breaks its contract."""
        model = fx.GraphModule(graph_module, graph_module.graph)
        logits = results(model.graph)[1].meta["val"]
        device, vocabulary = logits.device, logits.shape[-1]
        graph_module.graph = fx.Graph()
        graph = graph_module.graph
        with self.fake_mode:
            state = StepState.empty(
                self.batch.rows, self.batch.capacity, vocabulary, self.num_draft_tokens, device
            ).tensors()
        inputs = {name: add_input(graph, name, value, role_of_state(name)) for name, value in state.items()}
        for name in _RANGES:
            inputs[name] = add_input(graph, name, fresh_index(self.fake_mode, device), "size")
        for name, value in caches(model.graph).items():
            inputs[name] = add_input(graph, name, value, "cache")
        graph.output(self._step(graph_module, model, inputs))
        loss = f"{type(self.rule).__name__} is lossy: the tokens need not be the model's own"
        self.notes = (*(() if self.rule.lossless else (loss,)), *self.rule.notes())
        return 1

    def _step(self, into: fx.GraphModule, model: fx.GraphModule, inputs: dict[str, fx.Node]) -> dict[str, fx.Node]:
        state = {name: inputs[name] for name in _STATE}
        ranges = {name: inputs[name] for name in _RANGES}
        packed = inline_function(into, self._pack, {**state, **ranges}, self.fake_mode)
        fed = {**{n: inputs[n] for n in inputs if "_cache_" in n}, **packed}
        fed.update(lengths=state["lengths"], logit_index=packed["rows_index"])
        hidden, logits = inline(into, model, fed)
        for node in (hidden, logits):
            assert "val" in node.meta
        with self.fake_mode:  # the model's graph knew its own T and R; the step's are the lengths of the ranges
            tokens, rows = ranges["token_range"].meta["val"].shape[0], ranges["logit_range"].meta["val"].shape[0]
            hidden.meta["val"] = hidden.meta["val"].new_empty((tokens, hidden.meta["val"].shape[-1]))
            logits.meta["val"] = logits.meta["val"].new_empty((rows, logits.meta["val"].shape[-1]))
        rule = TracedPart("rule", self.rule, Verdict, RuleError, sizes_of(into.graph, self.drafter))
        given = {**state, **packed, "hidden_all": hidden}
        seen = inline_function(into, self._verification, {**given, "logits": logits}, self.fake_mode)
        verdict, rule_state = rule.inline(into, Verification, seen, self.fake_mode)
        decided = {f"verdict.{name}": node for name, node in verdict.items()}
        return inline_function(into, self._commit, {**given, **decided}, self.fake_mode) | rule_state

    def _pack(self, given: Tensors) -> Tensors:
        state = {name: given[name] for name in ("history", "known", "lengths", "draft_lengths", "active")}
        packed = pack(
            **state, token_range=given["token_range"], row_range=given["row_range"], share=self.num_draft_tokens + 1
        )
        rows = logit_rows(packed, given["known"], given["logit_range"])
        return {
            **{name: getattr(packed, name) for name in _PACKED},
            **{f"rows_{name}": getattr(rows, name) for name in _ROWS},
        }

    def _verification(self, given: Tensors) -> Tensors:
        """What the rule sees: the fields of `Verification`."""
        rows = LogitRows(**{name: given[f"rows_{name}"] for name in _ROWS})
        return {
            "logits": bar_eos(given["logits"], rows, given["min_known"], given["is_eos"]),
            "offsets": given["rows_offsets"],
            "draft_tokens": draft_tokens(given["history"], given["known"], self.num_draft_tokens),
            "draft_lengths": given["drafted"],
            "seeds": given["seeds"][rows.row_ids],
            "positions": given["rows_positions"],
        }

    def _commit(self, given: Tensors) -> Tensors:
        """Carry the verdict out, as far as it can be meant: only drafts are accepted, and only token ids emitted."""
        state = StepState(**{name: given[name] for name in _STATE})
        packed = Packed(**{name: given[name] for name in _PACKED})
        accept_lengths = torch.minimum(given["verdict.accept_lengths"], packed.drafted).clamp(min=0)  # [B]
        next_tokens = given["verdict.next_tokens"].clamp(0, state.is_eos.shape[0] - 1)  # [B]
        new, emission = commit(state, packed, accept_lengths, next_tokens)
        last = packed.roots + torch.where(packed.ready, accept_lengths, 0)  # [B], index into T
        return {
            **new.tensors(),
            "tokens": emission.tokens,
            "counts": emission.counts,
            "hidden": given["hidden_all"][last],
            "ready": packed.ready,
            "drafted": packed.drafted,
            "accepted": torch.minimum(accept_lengths, emission.counts),
        }
