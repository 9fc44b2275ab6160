"""The device-resident state that one step hands to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emssd_compile.step.fields import holds_tensors, named
from emssd_compile.step.nodes import Nodes
from emssd_compile.step.parts import PartSizes

COUNTERS = (
    "num_steps",
    "num_row_steps",
    "num_spec_steps",
    "num_draft_tokens",
    "num_accepted_draft_tokens",
    "num_emitted_tokens",
    "num_fed_tokens",
    "num_padding_tokens",
)
"""Meaning of each element of `StepState.counters`, in order.

`num_row_steps` counts (row, step) pairs in which a row with nothing left to read emitted tokens; `num_spec_steps`
those of them that verified at least one draft; `num_padding_tokens` the inert tail tokens of all steps.
"""


@holds_tensors
@dataclass
class StepState:
    """Everything a row carries from step to step. All tensors live on the model's device.

    Token `t` of row `b` is `history[b, t]`, for `t < known[b]`. Keys and values are committed for `t < lengths[b]`; in
    steady state `lengths == known - 1`: the newest token's are written by the step that feeds it.

    In the step's signature, and here as `tensors`, a field of `draft` is called `draft_<name>`.

    Attributes:
        history: int64 `[B, C]`, prompt and generated tokens.
        known: int64 `[B]`, number of tokens that are decided.
        lengths: int64 `[B]`, number of tokens whose KV is committed.
        draft: what to verify in the next step.
        active: bool `[B]`, whether the row is being decoded.
        limits: int64 `[B]`, the row ends when `known` reaches this.
        prompt_lengths: int64 `[B]`, how many of the tokens are the prompt.
        groups: int64 `[B]`, rows of one prompt have the same number.
        seeds: int64 `[B]`, seed of each row's random numbers (`randomness.uniforms`).
        is_eos: bool `[V]`, which token ids end a row.
        counters: int64 `[len(COUNTERS)]`, sums since they were last reset.
        histogram: int64 `[D + 1]`, how often a verification accepted 0, 1, ..., D drafts.
        draft_budget: int64 `[]`, most drafts of all rows together that the next step has room for.
        step_seconds: float32 `[B * (K + 1) + 1]`, element n is what a step of n packed tokens takes.
    """

    history: Tensor
    known: Tensor
    lengths: Tensor
    draft: Nodes
    active: Tensor
    limits: Tensor
    prompt_lengths: Tensor
    groups: Tensor
    seeds: Tensor
    is_eos: Tensor
    counters: Tensor
    histogram: Tensor
    draft_budget: Tensor
    step_seconds: Tensor

    def without_drafts(self) -> StepState:
        """The state as a step has it that verifies no drafts: K is 0, and those that there are, are dropped."""
        draft, rows = self.draft, self.known.shape[0]
        none = Nodes(draft.tokens[:, :0], torch.zeros_like(draft.lengths), draft.grades[:, :0], None, max_depth=0)
        return replace(self, draft=none, histogram=self.histogram[:1], step_seconds=self.step_seconds[: rows + 1])

    def with_room(self, given: StepState) -> StepState:
        """The way back: this state in the shapes of `given`, which has room for drafts and is left with none."""
        return replace(
            self,
            draft=replace(given.draft, lengths=torch.zeros_like(given.draft.lengths)),
            histogram=torch.cat([self.histogram, given.histogram[1:]]),
            step_seconds=given.step_seconds,
        )

    @staticmethod
    def empty(sizes: PartSizes, device: torch.device) -> StepState:
        """A state in which no row is active."""
        rows, most = sizes.rows, sizes.num_draft_tokens

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        parents = None if sizes.max_depth is None else zeros(rows, most)
        proposal = zeros(rows, most + 1, sizes.vocabulary, dtype=torch.float32) if sizes.has_proposal else None
        return StepState(
            history=zeros(rows, sizes.capacity),
            known=zeros(rows),
            lengths=zeros(rows),
            draft=Nodes(zeros(rows, most), zeros(rows), zeros(rows, most), parents, sizes.depth, proposal),
            active=zeros(rows, dtype=torch.bool),
            limits=zeros(rows),
            prompt_lengths=zeros(rows),
            groups=zeros(rows),
            seeds=zeros(rows),
            is_eos=zeros(sizes.vocabulary, dtype=torch.bool),
            counters=zeros(len(COUNTERS)),
            histogram=zeros(sizes.depth + 1),
            draft_budget=torch.tensor(rows * most, device=device),
            step_seconds=torch.ones(rows * (most + 1) + 1, dtype=torch.float32, device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return named(self)


CONSTANT_FIELDS = frozenset({"limits", "prompt_lengths", "groups", "seeds", "is_eos", "draft_budget", "step_seconds"})
"""Fields that a step reads but does not return; only the host sets them."""
