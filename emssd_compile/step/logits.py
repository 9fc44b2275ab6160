"""The contract of a logits processor: what is done to the target's logits before anything is decided by them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from emssd_compile.step.fields import holds_tensors
from emssd_compile.step.nodes import Lineage, Nodes
from emssd_compile.step.parts import Part, PartSizes


@holds_tensors
@dataclass
class LogitContext:
    """What a processor sees: logits, and for each of them the text that it goes on from.

    Attributes:
        logits: float `[R, V]`; each predicts what follows a node of a row. Those behind the last row's are rubbish.
        row_ids: int64 `[R]`, the row of each.
        nodes: int64 `[R]`, its node: 0 for the row's root token, i for its i-th draft.
        positions: int64 `[R]`, position of the token that it predicts.
        history: int64 `[B, C]`, prompt and generated tokens; only the first `known[b]` mean something.
        known: int64 `[B]`.
        prompt_lengths: int64 `[B]`, how many of these tokens are the prompt.
        draft: the drafts that are verified.
        is_eos: bool `[V]`, which token ids end a row.
        options: the options that the processor declares, `[B]` each, by name.
        state: the processor's own tensors, as declared by `LogitsProcessor.tensors`.
    """

    logits: Tensor
    row_ids: Tensor
    nodes: Tensor
    positions: Tensor
    history: Tensor
    known: Tensor
    prompt_lengths: Tensor
    draft: Nodes
    is_eos: Tensor
    options: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def form(cls, sizes: PartSizes) -> LogitContext:
        """One with the fields that there are in a step of these sizes, and nothing in them."""
        none = torch.empty(0, device="meta")
        draft = Nodes(none, none, none, None if sizes.max_depth is None else none, sizes.depth)
        return cls(none, none, none, none, none, none, none, draft, none)

    def newest(self, count: int) -> Tensor:
        """int64 `[R, count]`: the last tokens of the text that each logit goes on from, oldest first.

        The drafts on the way to its node are among them. -1 where the text begins later.
        """
        back = torch.arange(count - 1, -1, -1, device=self.positions.device)  # [count]
        place = self.positions[:, None] - 1 - back  # [R, count]
        rows = self.row_ids[:, None]
        tokens = self.history[rows, place.clamp(0, self.history.shape[1] - 1)]
        if self.draft.tokens.shape[1] > 0:
            depth = place - self.known[rows]  # [R, count], of the draft at that place; negative in the known text
            draft = self._on_path(depth)
            tokens = torch.where(depth < 0, tokens, self.draft.tokens[rows, draft])
        return torch.where(place < 0, -1, tokens)

    def _on_path(self, depth: Tensor) -> Tensor:
        """Which draft lies at a depth (0 for those that follow the root) on the way to each node, `[R, count]`."""
        most = self.draft.tokens.shape[1] - 1
        if self.draft.parents is None:
            return depth.clamp(0, most)
        lineage = Lineage.of(self.draft.parents, self.draft.max_depth)
        above = lineage.descends[self.row_ids, self.nodes][:, None, 1:]  # [R, 1, K]
        depths = lineage.depths[self.row_ids][:, None, 1:]  # [R, 1, K]
        is_there = above & (depths == depth[:, :, None] + 1)  # [R, count, K]
        return is_there.to(torch.int64).argmax(2)


@holds_tensors
@dataclass
class Processed:
    """What a processor answers.

    Attributes:
        logits: as they came, `[R, V]`, with the processor's effect.
        state: new values of the tensors in `LogitsProcessor.tensors`, but for those written in place.
    """

    logits: Tensor = field(metadata={"like": "logits"})
    state: dict[str, Tensor] = field(default_factory=dict)


class LogitsProcessor(Part):
    """Changes the target's logits, of each token by the text before it, drafts among it.

    It is compiled into a step only where a request sets one of its options to something other than its default, or
    where it declares none.

    Attributes:
        is_filter: whether it shapes a distribution that is complete, as temperature and top-p do: such processors come
            behind all others, and behind Python of the user's own.
    """

    is_filter: bool = False

    def forward(self, context: LogitContext) -> Processed:
        """Process the logits of all rows at once."""
        raise NotImplementedError


def in_use(processors: Iterable[LogitsProcessor], used: Collection[str]) -> dict[int, LogitsProcessor]:
    """Those of the processors that do something where requests set these options, in order, by their places among all.

    The places name their tensors, which the forms of a step share.
    """
    options = [(place, p, p.options().keys()) for place, p in enumerate(processors)]
    return {place: p.suited(used) for place, p, own in options if not own or not own.isdisjoint(used)}
