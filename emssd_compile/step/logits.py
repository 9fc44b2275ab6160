"""The contract of a logits processor: what is done to the target's logits before anything is decided by them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from emssd_compile.step.fields import holds_tensors, mapped
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
        limits: int64 `[B]`, a row ends when it knows so many tokens.
        draft: the drafts that are verified.
        is_eos: bool `[V]`, which token ids end a row.
        options: the options that the processor declares, `[B]` each, or `[B, *shape]`, by name.
        state: the processor's own tensors, as declared by `LogitsProcessor.tensors`.
    """

    logits: Tensor
    row_ids: Tensor
    nodes: Tensor
    positions: Tensor
    history: Tensor
    known: Tensor
    prompt_lengths: Tensor
    limits: Tensor
    draft: Nodes
    is_eos: Tensor
    options: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def form(cls, sizes: PartSizes) -> LogitContext:
        """One with the fields that there are in a step of these sizes, and nothing in them."""
        none = torch.empty(0, device="meta")
        draft = Nodes(none, none, none, None if sizes.max_depth is None else none, sizes.depth)
        return cls(none, none, none, none, none, none, none, none, draft, none)

    def of_row(self, row: int, places: Tensor) -> LogitContext:
        """What one row alone would see: its logits are those at `places`, `[n]` of R, and it is row 0."""
        first, after = row, row + 1
        return replace(
            self,
            logits=self.logits[places],
            row_ids=torch.zeros_like(places),
            nodes=self.nodes[places],
            positions=self.positions[places],
            history=self.history[first:after],
            known=self.known[first:after],
            prompt_lengths=self.prompt_lengths[first:after],
            limits=self.limits[first:after],
            draft=mapped(lambda tensor: tensor[first:after], self.draft),
            options={name: value[first:after] for name, value in self.options.items()},
            state={},
        )

    def option(self, name: str) -> Tensor:
        """`[R]`, or `[R, *shape]`: what the row of each logit sets."""
        return self.options[name][self.row_ids]

    def newest(self, count: int) -> Tensor:
        """int64 `[R, count]`: the last tokens of the text that each logit goes on from, oldest first.

        The drafts on the way to its node are among them. -1 where the text begins later.
        """
        back = torch.arange(count, 0, -1, device=self.positions.device)  # [count]
        return self._tokens_at(self.positions[:, None] - back)

    def texts(self) -> Tensor:
        """int64 `[R, C + D]`: the text that each logit goes on from, drafts on the way to its node included, and -1."""
        most = self.history.shape[1] + self.draft.max_depth
        place = torch.arange(most, device=self.positions.device)
        return self._tokens_at(place.expand(self.positions.shape[0], most))

    def _tokens_at(self, place: Tensor) -> Tensor:
        """The tokens at these positions of each logit's text, `[R, n]`; -1 where there is none."""
        rows = self.row_ids[:, None]
        tokens = self.history[rows, place.clamp(0, self.history.shape[1] - 1)]
        if self.draft.tokens.shape[1] > 0:
            depth = place - self.known[rows]  # [R, n], 0 for what follows the root; negative in the known text
            drafts = self._path().gather(1, depth.clamp(0, self.draft.max_depth - 1))
            tokens = torch.where(depth < 0, tokens, drafts)
        return torch.where((place >= 0) & (place < self.positions[:, None]), tokens, -1)

    def _path(self) -> Tensor:
        """`[R, D]`: the draft at each depth on the way to each node, rubbish beyond the node."""
        if self.draft.parents is None:
            return self.draft.tokens[self.row_ids]
        lineage = Lineage.of(self.draft.parents, self.draft.max_depth)
        above = lineage.descends[self.row_ids, self.nodes][:, None, 1:]  # [R, 1, K]
        depths = lineage.depths[self.row_ids][:, None, 1:]  # [R, 1, K]
        depth = torch.arange(1, self.draft.max_depth + 1, device=depths.device)
        is_there = above & (depths == depth[:, None])  # [R, D, K]
        return self.draft.tokens[self.row_ids[:, None], is_there.to(torch.int64).argmax(2)]


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
        looks_at_ends: whether it looks at the tokens that end a row; of those of a user's own it is always supposed.
    """

    is_filter: bool = False
    looks_at_ends: bool = False

    def forward(self, context: LogitContext) -> Processed:
        """Process the logits of all rows at once."""
        raise NotImplementedError
