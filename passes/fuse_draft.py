"""Put the next draft into the step."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.errors import DrafterError, PolicyError
from emssd_compile.passes.graph import fresh_index, output, placeholder
from emssd_compile.passes.splice import Tensors, add_input, inline_function
from emssd_compile.passes.traced_part import TracedPart, sizes_of
from emssd_compile.step.commit import make_report, write
from emssd_compile.step.drafting import Draft, DraftContext, Drafter
from emssd_compile.step.policy import LengthPolicy, PolicyContext, Ranking, fit
from emssd_compile.step.state import CONSTANT_FIELDS, StepState

_STATE = tuple(f.name for f in fields(StepState))
_INTERNAL = ("hidden", "ready", "tokens", "counts", "drafted", "accepted")


class FuseDraft:
    """Trace the drafter and the length policy behind the commit: the step ends with what the next one verifies.

    The drafts go to the history, right behind the known tokens, where `pack` finds them.

        before:  ... -> {history, known, ..., hidden[B,H]}
        after:   %draft = drafter(history, known, hidden, ...); %lengths = policy(%draft, ...)
                 ... -> {history with drafts, draft_lengths, ..., drafter_<name>, policy_<name>}
    """

    name = "fuse_draft"

    def __init__(self, drafter: Drafter, policy: LengthPolicy, fake_mode: FakeTensorMode) -> None:
        self.drafter = drafter
        self.policy = policy
        self.fake_mode = fake_mode
        self.notes: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule) -> int:
        """Add both to the end of the step.

        Raises:
            DrafterError: the drafter fails while it is traced, or breaks its contract.
            PolicyError: the same of the policy.
        """
        graph = graph_module.graph
        sizes = sizes_of(graph, self.drafter)
        drafter = TracedPart("drafter", self.drafter, Draft, DrafterError, sizes)
        policy = TracedPart("policy", self.policy, Ranking, PolicyError, sizes)
        result = output(graph)
        done: dict[str, fx.Node] = dict(result.args[0])  # type: ignore[arg-type]
        given = {name: done[name] for name in (*_STATE, *_INTERNAL)}
        device = given["history"].meta["val"].device
        given |= {"row_range": placeholder(graph, "row_range"), "seconds": given["step_seconds"]}
        given["draft_range"] = add_input(graph, "draft_range", fresh_index(self.fake_mode, device), "size")
        with graph.inserting_before(result):
            given |= inline_function(graph_module, self._may_draft, given, self.fake_mode)
            draft, drafter_state = self._inline(graph_module, drafter, DraftContext, given)
            given |= {f"draft.{name}": node for name, node in draft.items()}
            given |= inline_function(graph_module, self._propose, given, self.fake_mode)
            ranking, policy_state = self._inline(graph_module, policy, PolicyContext, given)
            given |= {f"ranking.{name}": node for name, node in ranking.items()}
            drafted = inline_function(graph_module, self._choose_lengths, given, self.fake_mode)
        kept = {name: node for name, node in done.items() if name not in (*_INTERNAL, *CONSTANT_FIELDS)}
        result.args = ({**kept, **drafted, **drafter_state, **policy_state},)
        self.notes = (*self.drafter.notes(), *self.policy.notes())
        return 1

    def _inline(
        self, into: fx.GraphModule, part: TracedPart, context: type, given: dict[str, fx.Node]
    ) -> tuple[dict[str, fx.Node], dict[str, fx.Node]]:
        """Trace a part whose context has these fields."""
        seen = {f.name: given[f.name] for f in fields(context) if f.name != "state"}
        return part.inline(into, context, seen, self.fake_mode)

    def _may_draft(self, given: Tensors) -> Tensors:
        """Which rows may draft, and how much."""
        limit = self.drafter.num_draft_tokens
        can_draft = given["active"] & given["ready"]  # [B]
        left = (given["limits"] - given["known"] - 1).clamp(0, limit)  # [B], one place is for the bonus token
        return {"can_draft": can_draft, "max_drafts": torch.where(can_draft, left, 0)}

    def _propose(self, given: Tensors) -> Tensors:
        """The drafts that may be verified, and what else the policy sees."""
        known, tokens, grades = given["known"], given["draft.tokens"], given.get("draft.grades")
        valid = (tokens >= 0) & (tokens < given["is_eos"].shape[0])  # [B, K]
        proposed = torch.minimum(given["draft.lengths"], valid.to(known.dtype).cumprod(1).sum(1))  # [B]
        pending = torch.where(given["active"], known - given["lengths"], 0)  # [B]
        return {
            "proposed": torch.minimum(proposed, given["max_drafts"]).clamp(min=0),
            "grades": (torch.zeros_like(tokens) if grades is None else grades).clamp(0, self.drafter.num_grades - 1),
            "num_tokens": pending.sum(),
            "num_emitting": given["active"].sum(),
        }

    def _choose_lengths(self, given: Tensors) -> Tensors:
        """Put the drafts that are to be verified behind the known tokens, and tell the host."""
        known, history, tokens = given["known"], given["history"], given["draft.tokens"]
        ranking = Ranking(given["ranking.ranks"], given["ranking.wanted"].clamp(0, tokens.numel()))
        room = torch.minimum(ranking.wanted, given["draft_budget"])  # []
        lengths = fit(ranking, given["proposed"], room)  # [B]
        columns = {
            "counts": given["counts"],
            "active": given["active"].to(known.dtype),
            "pending": known - given["lengths"],
            "draft_lengths": lengths,
            "wanted": ranking.wanted.expand(known.shape),
        }
        return {
            "history": write(history, known, tokens, lengths) if tokens.shape[1] else history,
            "draft_lengths": lengths,
            "report": make_report(given["tokens"], columns),
        }
