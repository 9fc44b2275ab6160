"""Put the next draft into the step."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.errors import DrafterError, EmssdError
from emssd_compile.passes.graph import fresh_index, output, placeholder
from emssd_compile.passes.splice import Tensors, add_input, inline_function
from emssd_compile.step.commit import make_report, write
from emssd_compile.step.drafting import DraftContext, Drafter
from emssd_compile.step.state import StepState

_STATE = tuple(f.name for f in fields(StepState))
_INTERNAL = ("hidden", "ready", "tokens", "counts")


class FuseDraft:
    """Trace the drafter behind the commit: the step ends with the drafts that the next one verifies.

    The drafts go to the history, right behind the known tokens, where `pack` finds them.

        before:  ... -> {history, known, ..., hidden[B,H]}
        after:   %draft = drafter(history, known, hidden, ...); ... -> {history with drafts, draft_lengths, ...}
    """

    name = "fuse_draft"

    def __init__(self, drafter: Drafter, fake_mode: FakeTensorMode) -> None:
        self.drafter = drafter
        self.fake_mode = fake_mode

    def run(self, graph_module: fx.GraphModule) -> int:
        """See the class. Raises DrafterError if the drafter fails while it is traced."""
        graph = graph_module.graph
        result = output(graph)
        done: dict[str, fx.Node] = dict(result.args[0])  # type: ignore[arg-type]
        device = placeholder(graph, "history").meta["val"].device
        given = {name: done[name] for name in (*_STATE, *_INTERNAL)}
        given["draft_slots"] = add_input(graph, "draft_slots", fresh_index(self.fake_mode, device))
        for name, spec in {**self.drafter.state_spec(), **self.drafter.cache_spec()}.items():
            with self.fake_mode:
                value = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
            given[name] = add_input(graph, name, value)
        with graph.inserting_before(result):
            drafted = self._traced(graph_module, given)
        kept = {name: node for name, node in done.items() if name not in _INTERNAL}
        result.args = ({**kept, **drafted},)
        return 1

    def _traced(self, graph_module: fx.GraphModule, given: dict[str, fx.Node]) -> dict[str, fx.Node]:
        try:
            return inline_function(graph_module, self._draft, given, self.fake_mode)
        except EmssdError:
            raise
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise DrafterError(
                f"{type(self.drafter).__name__} failed while it was traced: {type(error).__name__}: {reason}. "
                "A drafter's forward may hold tensor operations only"
            ) from error

    def _draft(self, given: Tensors) -> Tensors:
        limit = self.drafter.num_draft_tokens
        known = given["known"]
        can_draft = given["active"] & given["ready"]
        max_drafts = torch.where(can_draft, (given["limits"] - known - 1).clamp(0, limit), 0)
        own = [*self.drafter.state_spec(), *self.drafter.cache_spec()]
        draft = self.drafter(
            DraftContext(
                history=given["history"],
                known=known,
                hidden=given["hidden"],
                active=given["active"],
                can_draft=can_draft,
                max_drafts=max_drafts,
                slots=given["draft_slots"],
                state={name: given[name] for name in own},
            )
        )
        self._check(draft.tokens.shape, known.shape[0], set(draft.state))
        valid = (draft.tokens >= 0) & (draft.tokens < given["is_eos"].shape[0])
        lengths = torch.minimum(draft.lengths, valid.to(known.dtype).cumprod(1).sum(1))
        lengths = torch.minimum(lengths, max_drafts).clamp(min=0)
        history = write(given["history"], known, draft.tokens, lengths) if limit else given["history"]
        report = make_report(given["tokens"], given["counts"], given["active"], known - given["lengths"], lengths)
        return {"history": history, "draft_lengths": lengths, "report": report, **draft.state}

    def _check(self, size: torch.Size, rows: int, returned: set[str]) -> None:
        expected = (rows, self.drafter.num_draft_tokens)
        name = type(self.drafter).__name__
        if tuple(size) != expected:
            raise DrafterError(f"{name} returned tokens of shape {tuple(size)}; expected [B, K] = {list(expected)}")
        if returned != set(self.drafter.state_spec()):
            raise DrafterError(
                f"{name} returned state {sorted(returned)}; state_spec declares {sorted(self.drafter.state_spec())}"
            )
