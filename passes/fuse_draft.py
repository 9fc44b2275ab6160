"""Put the next draft into the step."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.errors import DrafterError, EmssdError
from emssd_compile.passes.graph import fresh_index, output, placeholder
from emssd_compile.passes.splice import Tensors, add_input, inline_function
from emssd_compile.step.commit import make_report, write
from emssd_compile.step.drafting import Draft, DraftContext, Drafter
from emssd_compile.step.policy import LengthPolicy, PolicyContext, fit
from emssd_compile.step.state import CONSTANT_FIELDS, StepState

_STATE = tuple(f.name for f in fields(StepState))
_INTERNAL = ("hidden", "ready", "tokens", "counts", "drafted", "accepted")


class FuseDraft:
    """Trace the drafter and the length policy behind the commit: the step ends with what the next one verifies.

    The drafts go to the history, right behind the known tokens, where `pack` finds them.

        before:  ... -> {history, known, ..., hidden[B,H]}
        after:   %draft = drafter(history, known, hidden, ...); %lengths = policy(%draft, ...)
                 ... -> {history with drafts, draft_lengths, ...}
    """

    name = "fuse_draft"

    def __init__(self, drafter: Drafter, policy: LengthPolicy, fake_mode: FakeTensorMode) -> None:
        self.drafter = drafter
        self.policy = policy
        self.fake_mode = fake_mode

    def run(self, graph_module: fx.GraphModule) -> int:
        """See the class. Raises DrafterError if the drafter fails while it is traced."""
        graph = graph_module.graph
        result = output(graph)
        done: dict[str, fx.Node] = dict(result.args[0])  # type: ignore[arg-type]
        device = placeholder(graph, "history").meta["val"].device
        given = {name: done[name] for name in (*_STATE, *_INTERNAL)}
        given["row_range"] = placeholder(graph, "row_range")
        given["draft_range"] = add_input(graph, "draft_range", fresh_index(self.fake_mode, device))
        rows, limit = len(placeholder(graph, "known").meta["val"]), self.drafter.num_draft_tokens
        own = {**self.drafter.state_spec(), **self.drafter.cache_spec()}
        own |= {**self.policy.row_spec(rows, limit), **self.policy.memory_spec(limit, self.drafter.num_grades)}
        for name, spec in own.items():
            with self.fake_mode:
                value = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
            given[name] = add_input(graph, name, value)
        with graph.inserting_before(result):
            drafted = self._traced(graph_module, given)
        kept = {name: node for name, node in done.items() if name not in (*_INTERNAL, *CONSTANT_FIELDS)}
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
                draft_range=given["draft_range"],
                row_range=given["row_range"],
                state={name: given[name] for name in own},
            )
        )
        self._check(draft, known.shape[0])
        valid = (draft.tokens >= 0) & (draft.tokens < given["is_eos"].shape[0])
        proposed = torch.minimum(draft.lengths, valid.to(known.dtype).cumprod(1).sum(1))
        proposed = torch.minimum(proposed, max_drafts).clamp(min=0)
        lengths, wanted, policy_state = self._choose_lengths(draft, proposed, given)
        history = write(given["history"], known, draft.tokens, lengths) if limit else given["history"]
        columns = {
            "counts": given["counts"],
            "active": given["active"].to(known.dtype),
            "pending": known - given["lengths"],
            "draft_lengths": lengths,
            "wanted": wanted.expand(known.shape),
        }
        report = make_report(given["tokens"], columns)
        return {"history": history, "draft_lengths": lengths, "report": report, **draft.state, **policy_state}

    def _choose_lengths(self, draft: Draft, proposed: Tensor, given: Tensors) -> tuple[Tensor, Tensor, Tensors]:
        """Lengths of the drafts `[B]`, what the policy wanted in all `[]`, and its new state."""
        rows, limit = draft.tokens.shape
        grades = torch.zeros_like(draft.tokens) if draft.grades is None else draft.grades
        pending = torch.where(given["active"], given["known"] - given["lengths"], 0)
        own = [*self.policy.row_spec(rows, limit), *self.policy.memory_spec(limit, self.drafter.num_grades)]
        ranking = self.policy(
            PolicyContext(
                proposed=proposed,
                grades=grades.clamp(0, self.drafter.num_grades - 1),
                drafted=given["drafted"],
                accepted=given["accepted"],
                num_tokens=pending.sum(),
                num_emitting=given["active"].sum(),
                seconds=given["step_seconds"],
                state={name: given[name] for name in own},
            )
        )
        room = torch.minimum(ranking.wanted, given["draft_budget"])
        return fit(ranking, proposed, room), ranking.wanted, ranking.state

    def _check(self, draft: Draft, rows: int) -> None:
        expected = (rows, self.drafter.num_draft_tokens)
        name = type(self.drafter).__name__
        for what, value in (("tokens", draft.tokens), ("grades", draft.grades)):
            if value is not None and tuple(value.shape) != expected:
                shape = tuple(value.shape)
                raise DrafterError(f"{name} returned {what} of shape {shape}; expected [B, K] = {list(expected)}")
        if set(draft.state) != set(self.drafter.state_spec()):
            raise DrafterError(
                f"{name} returned state {sorted(draft.state)}; state_spec declares {sorted(self.drafter.state_spec())}"
            )
